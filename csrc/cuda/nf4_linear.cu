// NF4/FP4 linear for few tokens: its checks, and the choice of a type. Compiled without torch.
#include <algorithm>
#include <climits>
#include <cstdint>

#include "lora_shrink.cuh"
#include "nf4_linear_plan.cuh"

namespace lora_kernels {

using namespace nf4_linear;

int64_t nf4_linear_workspace(int64_t m, int64_t n, int64_t k, Dtype dtype) {
  int64_t splits = 1;
  const auto take = [&](const Plan& p) { splits = std::max(splits, p.splits); };
  if (dtype == Dtype::f32) {
    take(plan<Tile<float, 1>>(m, n, k));
  } else {
    // Aligned or not: two plans.
    if (m <= 8) take(plan<Tile<__half, 1>>(m, n, k));
    if (m > 8 && m <= 16) take(plan<Tile<__half, 2>>(m, n, k));
    if (m > 16 && m <= 32) take(plan<Tile<__half, 4>>(m, n, k));
    if (m > 8) take(plan<Tile<__half, 8>>(m, n, k));
  }
  return splits > 1 ? splits * m * ceil_div(n, 4) * 16 : 0;
}

cudaError_t nf4_linear_cuda(const Nf4Linear& c, Dtype dtype, float* workspace,
                            cudaStream_t stream) {
  if (c.m > kNf4LinearMaxTokens || c.k > INT_MAX / 2) return cudaErrorInvalidValue;
  if (c.m == 0) return cudaSuccess;
  if (c.rank > 0) {
    if (c.adapters != dtype && c.adapters != Dtype::f32) return cudaErrorInvalidValue;
    const cudaError_t error = c.a != nullptr ? lora_shrink(c, dtype, stream) : cudaSuccess;
    if (error != cudaSuccess) return error;
  }
  if (c.n == 0) return cudaSuccess;
  Call call{};
  call.c = c;
  call.block_shift = log2_floor(c.q.block_size);
  call.nested_shift = log2_floor(c.q.nested_block);
  switch (dtype) {
    case Dtype::f32:
      return run_tokens<float>(call, workspace, stream);
    case Dtype::f16:
      return run_tokens<__half>(call, workspace, stream);
    case Dtype::bf16:
      return run_tokens<__nv_bfloat16>(call, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lora_kernels
