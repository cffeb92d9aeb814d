// s = x Aᵀ for few tokens. Compiled without torch.
#include "lora_shrink.cuh"

#include <climits>
#include <cstdint>

#include "launch.cuh"
#include "nf4_linear.cuh"

namespace lora_kernels {
namespace {

using nf4_linear::Math;

constexpr int kThreads = 512;
constexpr int kRanks = 4, kTokens = 8;  // of a block: together one sum a lane
static_assert(kRanks * kTokens == 32);

// kCount elements of a row as fp32, zeros past its end; `vector`: 16 bytes at a time.
template <class T, int kCount>
__device__ void load_unit(float (&to)[kCount], const T* from, int64_t left, bool vector) {
  constexpr int kWide = 16 / sizeof(T);
  alignas(16) T unit[kCount];
  if (vector && left >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount; i += kWide)
      *reinterpret_cast<uint4*>(unit + i) = __ldg(reinterpret_cast<const uint4*>(from + i));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) unit[i] = i < left ? from[i] : Math<T>::round(0.0f);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = Math<T>::widen(unit[i]);
}

template <class T>
bool rows_aligned(const void* p, int64_t ld, int64_t rows) {
  return multiple(p, 16) && (rows == 1 || ld * sizeof(T) % 16 == 0);
}

// Adds sums over a warp's lanes; lane l ends with sum[0] = sum l of 2 kHalf, kHalf = 16 for all 32.
template <int kHalf>
__device__ void add_across(float (&sum)[32], int lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float given = upper ? sum[i] : sum[i + kHalf], kept = upper ? sum[i + kHalf] : sum[i];
    sum[i] = __fadd_rn(kept, __shfl_xor_sync(kAll, given, kHalf));
  }
  if constexpr (kHalf > 1) add_across<kHalf / 2>(sum, lane);
}

// s[M, R] = x[M, K] A[R, K]ᵀ, A rounded to x's type first, summed in fp32, rounded once to as many
// bits as x has.
//
// Grid: blocks of 4 ranks x 8 tokens. Thread i takes every 512th unit of 16 bytes of x, from the
// i-th on. The 32 sums are then added over the lanes of a warp, so that lane l ends with sum l, and
// over the warps in order.
template <class T, class Adapter>
__global__ void __launch_bounds__(kThreads)
    shrink_kernel(const __grid_constant__ Nf4Linear c, bool vector_x, bool vector_a) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  constexpr int kUnit = 16 / sizeof(T);
  const int64_t rank = int64_t(blockIdx.x) * kRanks, token = int64_t(blockIdx.y) * kTokens;
  const int tokens = static_cast<int>(min(c.m - token, int64_t(kTokens)));
  const T* const x = static_cast<const T*>(c.x) + token * c.ldx;
  const Adapter* const a = static_cast<const Adapter*>(c.a) + rank * c.lda;
  float sum[32] = {};  // [rank, token]
  for (int64_t k = int64_t(threadIdx.x) * kUnit; k < c.k; k += kThreads * kUnit) {
    float w[kRanks][kUnit];
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      load_unit(w[r], a + r * c.lda + k, rank + r < c.rank ? c.k - k : 0, vector_a);
#pragma unroll
      for (float& v : w[r]) v = Math<T>::widen(Math<T>::round(v));
    }
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m >= tokens) break;
      float v[kUnit];
      load_unit(v, x + m * c.ldx + k, c.k - k, vector_x);
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
#pragma unroll
        for (int i = 0; i < kUnit; ++i)
          sum[r * kTokens + m] = __fmaf_rn(w[r][i], v[i], sum[r * kTokens + m]);
    }
  }

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  add_across<16>(sum, lane);
  __shared__ float of_warp[kThreads / 32][32];
  of_warp[warp][lane] = sum[0];
  __syncthreads();
  const int r = lane / kTokens, m = lane % kTokens;
  if (warp > 0 || m >= tokens || rank + r >= c.rank) return;
  float total = of_warp[0][lane];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) total = __fadd_rn(total, of_warp[i][lane]);
  using Rank = typename Math<T>::Rank;
  static_cast<Rank*>(c.s)[(token + m) * c.lds + rank + r] = Math<T>::round_rank(total);
}

template <class T, class Adapter>
cudaError_t run(const Nf4Linear& c, cudaStream_t stream) {
  const int64_t ranks = ceil_div(c.rank, kRanks);
  if (ranks > INT_MAX) return cudaErrorInvalidValue;
  return launch(shrink_kernel<T, Adapter>, dim3(unsigned(ranks), unsigned(ceil_div(c.m, kTokens))),
                kThreads, 0, stream, false, c, rows_aligned<T>(c.x, c.ldx, c.m),
                rows_aligned<Adapter>(c.a, c.lda, c.rank));
}

}  // namespace

cudaError_t lora_shrink(const Nf4Linear& c, Dtype dtype, cudaStream_t stream) {
  const bool wide = c.adapters == Dtype::f32;
  switch (dtype) {
    case Dtype::f32:
      return run<float, float>(c, stream);
    case Dtype::f16:
      return wide ? run<__half, float>(c, stream) : run<__half, __half>(c, stream);
    case Dtype::bf16:
      return wide ? run<__nv_bfloat16, float>(c, stream)
                  : run<__nv_bfloat16, __nv_bfloat16>(c, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lora_kernels
