// The columns of a GEMV, by the type of W: what lora.cpp calls of the lora_gemv_*.cpp of its tier.
#pragma once

#include "lora_kernels/lora.h"
#include "target.h"

namespace lora_kernels {

struct GemvOperands {
  const float* x;  // [M, K] in the lane order of the weights (gemv_weights.h)
  const float* s;  // [M, R]
};

struct GemvKernels {
  // The columns of y that the rows [4 begin, 4 end) of W give. False: out of memory.
  bool (*columns)(const LoraForward& f, const GemvOperands& operands, int64_t begin, int64_t end);
};

extern const GemvKernels LK_CAT_(lora_gemv_f32_table_, LK_TIER);
extern const GemvKernels LK_CAT_(lora_gemv_f16_table_, LK_TIER);
extern const GemvKernels LK_CAT_(lora_gemv_bf16_table_, LK_TIER);

namespace {
namespace vector {

// Rows of x that are multiplied at once: their sums fit the registers. More rows, up to kGemvRows,
// take several passes over the weight, each of which decodes it again; beyond that decoding into
// panels (gemm.h) is faster. 4096 x 4096, 16 rows: 6.0 against 8.0 ms with AVX-512, 9.4 against
// 11.1 with AVX2; at 24 rows they are level.
constexpr int64_t kPassRows = 8, kGemvRows = 16;

// Slots of thread_scratch.
enum GemvScratch { kGemvInput, kGemvWeights, kGemvScales };

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
