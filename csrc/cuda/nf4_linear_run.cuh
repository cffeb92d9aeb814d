// NF4/FP4 linear for few tokens: which kernel, which grid. Included once for each type of x.
#pragma once

#include <climits>

#include "nf4_linear_kernel.cuh"
#include "nf4_linear_plan.cuh"

namespace lora_kernels {
namespace nf4_linear {

template <class S, bool kNested, bool kAligned>
cudaError_t launch_linear(const Call& call, const Plan& p, cudaStream_t stream) {
  auto* const kernel = linear_kernel<S, kNested, kAligned>;
  const bool map = call.c.q.absmax == nullptr;
  const size_t shared = kSharedBytes + (map ? kMapBytes : 0);
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes + kMapBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned(p.groups), unsigned(p.splits), unsigned(ceil_div(call.c.m, S::kTokens)));
  const bool follows = call.c.rank > 0 && call.c.a != nullptr && may_follow();
  return launch(kernel, grid, S::kThreads, shared, stream, follows, call);
}

// Whether the kernel can load 16 bytes of codes and of x at a time, and find scales by shifts.
template <class S>
bool aligned(const Call& call) {
  const Nf4Linear& c = call.c;
  const int64_t nested = c.q.nested_block;
  return c.k > 0 && c.k % c.q.block_size == 0 && multiple(c.q.packed, S::kRun / 2) &&
         multiple(c.x, 16) && (c.m == 1 || c.ldx * sizeof(typename S::T) % 16 == 0) &&
         c.q.n / c.q.block_size <= INT_MAX &&
         (c.q.absmax != nullptr || (nested & (nested - 1)) == 0);
}

// Calls that are not aligned use the tile `Ragged`, so that there are fewer kernels to compile.
template <class S, class Ragged>
cudaError_t run(Call& call, float* workspace, cudaStream_t stream) {
  const bool fast = aligned<S>(call);
  const Plan p =
      fast ? plan<S>(call.c.m, call.c.n, call.c.k) : plan<Ragged>(call.c.m, call.c.n, call.c.k);
  if (p.groups > INT_MAX || p.splits > 65535) return cudaErrorInvalidValue;
  call.steps = int(p.steps);
  call.steps_per_split = int(p.steps_per_split);
  call.parts = p.splits > 1 ? workspace : nullptr;
  call.part_ld = ceil_div(call.c.n, 4) * 4;
  const bool nested = call.c.q.absmax == nullptr;
  const cudaError_t error = !fast    ? launch_linear<Ragged, false, false>(call, p, stream)
                            : nested ? launch_linear<S, true, true>(call, p, stream)
                                     : launch_linear<S, false, true>(call, p, stream);
  if (error != cudaSuccess || p.splits == 1) return error;
  const int64_t grid = ceil_div(call.c.m * (call.part_ld / 4), 128);
  return launch(sum_kernel<typename S::T>, dim3(unsigned(grid)), 128, 0, stream, may_follow(), call,
                int(p.splits));
}

template <class T>
cudaError_t run_tokens(Call& call, float* workspace, cudaStream_t stream) {
  using Narrow = Tile<T, 1>;
  if constexpr (Narrow::kTensor) {
    using Wide = Tile<T, 8>;
    const int64_t m = call.c.m;
    if (m > 32) return run<Wide, Wide>(call, workspace, stream);
    if (m > 16) return run<Tile<T, 4>, Wide>(call, workspace, stream);
    if (m > 8) return run<Tile<T, 2>, Wide>(call, workspace, stream);
  }
  return run<Narrow, Narrow>(call, workspace, stream);
}

}  // namespace nf4_linear
}  // namespace lora_kernels
