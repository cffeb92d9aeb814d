// NF4/FP4 linear for few tokens: which kernel, which grid. Compiled without torch.
#include <algorithm>
#include <climits>
#include <cstdint>

#include "launch.cuh"
#include "lora_shrink.cuh"
#include "nf4_linear_kernel.cuh"

namespace lora_kernels {
namespace {

using namespace nf4_linear;

// K is split into `splits` runs of `steps_per_split` steps; all but the last are full.
struct Plan {
  int64_t groups, steps, steps_per_split, splits;
};

// At least two blocks for every core, or one of the larger ones, as long as there are steps: each
// more part costs 8 bytes of workspace traffic per output.
template <class S>
Plan plan(int64_t m, int64_t n, int64_t k) {
  const int64_t cores = std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
  Plan p;
  p.groups = ceil_div(n, kRows);
  p.steps = ceil_div(k, S::kStep);
  const int64_t blocks = std::max<int64_t>(p.groups * ceil_div(m, S::kTokens), 1);
  const int64_t splits = ceil_div(S::kFew ? 2 * cores : cores, blocks);
  p.steps_per_split = std::max<int64_t>(p.steps / splits, 1);
  p.splits = std::max<int64_t>(ceil_div(p.steps, p.steps_per_split), 1);
  return p;
}

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

// Whether the kernel may load 16 bytes of codes and of x at a time, and finds scales by shifts.
template <class S>
bool aligned(const Call& call) {
  const Nf4Linear& c = call.c;
  const int64_t nested = c.q.nested_block;
  return c.k > 0 && c.k % c.q.block_size == 0 && multiple(c.q.packed, S::kRun / 2) &&
         multiple(c.x, 16) && (c.m == 1 || c.ldx * sizeof(typename S::T) % 16 == 0) &&
         c.q.n / c.q.block_size <= INT_MAX &&
         (c.q.absmax != nullptr || (nested & (nested - 1)) == 0);
}

// Ragged calls use the shapes `Ragged`, so that there are fewer kernels to compile.
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
cudaError_t run_tensor(Call& call, float* workspace, cudaStream_t stream) {
  using Few = Tile<T, 1>;
  using Most = Tile<T, 8>;
  const int64_t m = call.c.m;
  if (m <= 8) return run<Few, Few>(call, workspace, stream);
  if (m <= 16) return run<Tile<T, 2>, Most>(call, workspace, stream);
  if (m <= 32) return run<Tile<T, 4>, Most>(call, workspace, stream);
  return run<Most, Most>(call, workspace, stream);
}

}  // namespace

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
      return run<Tile<float, 1>, Tile<float, 1>>(call, workspace, stream);
    case Dtype::f16:
      return run_tensor<__half>(call, workspace, stream);
    case Dtype::bf16:
      return run_tensor<__nv_bfloat16>(call, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lora_kernels
