// The table of CPU kernels of the dropout mask.
#pragma once

#include <cstdint>

#include "lora_kernels/isa.h"
#include "lora_kernels/parallel.h"
#include "lora_kernels/philox.h"

namespace lora_kernels {

struct DropoutKernels {
  // keep[rows, cols], one byte for each element: 1 if kept, 0 if dropped.
  void (*mask)(const Dropout& dropout, int64_t rows, int64_t cols, uint8_t* keep,
               const Parallel& parallel);
};

LK_DECLARE_FAMILY(DropoutKernels, dropout)

}  // namespace lora_kernels
