// The table of CPU kernels of the cross-entropy over a vocabulary.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/parallel.h"

namespace lora_kernels {

struct CrossEntropy {
  const void* logits;     // [M, V], rows `stride` elements apart
  Dtype dtype;            // of logits and dlogits
  int64_t rows, columns;  // M, V >= 1
  int64_t stride;
  const int64_t* labels;  // [M], each below V or `ignored`
  int64_t ignored;
  float* losses;  // [M]
  void* dlogits;  // [M, V] contiguous, or null
};

struct CrossEntropyKernels {
  // losses = log Σ exp(logits) - logits[label], dlogits = softmax(logits) - one-hot(label), of
  // ignored rows 0; NaN for a row that holds a NaN or +inf.
  void (*rows)(const CrossEntropy&, const Parallel&);
};

LK_DECLARE_FAMILY(CrossEntropyKernels, cross_entropy)

}  // namespace lora_kernels
