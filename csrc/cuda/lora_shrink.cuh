// s = x Aᵀ for few tokens.
#pragma once

#include "lora_kernels/nf4_linear_cuda.h"

namespace lora_kernels {

// Writes c.s. The launch behind it may start before it has ended.
cudaError_t lora_shrink(const Nf4Linear& c, Dtype dtype, cudaStream_t stream);

}  // namespace lora_kernels
