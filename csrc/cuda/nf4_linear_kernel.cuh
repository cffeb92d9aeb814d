// The NF4/FP4 linear kernel for few tokens, and the sum of its split-K parts.
#pragma once

#include "nf4_linear_load.cuh"

namespace lora_kernels {
namespace nf4_linear {

__device__ inline float4 add(float4 a, float4 b) {
  return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
                     __fadd_rn(a.w, b.w));
}

// Four outputs of a token, rounded.
template <class T>
__device__ void store_outputs(const Nf4Linear& c, int64_t m, int64_t n, float4 sum) {
  const int64_t left = c.n - n;
  Quad<T> bias;
#pragma unroll
  for (T& v : bias.v) v = Math<T>::round(0.0f);
  if (c.bias != nullptr)
    bias = load_quad(static_cast<const T*>(c.bias) + n, left, quads_aligned<T>(c.bias, 0));
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  Quad<T> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float value = c.bias != nullptr ? __fadd_rn(sums[i], Math<T>::widen(bias.v[i])) : sums[i];
    out.v[i] = Math<T>::round(value);
  }
  T* y = static_cast<T*>(c.y) + m * c.ldy + n;
  if (left >= 4 && quads_aligned<T>(c.y, c.ldy)) {
    *reinterpret_cast<Quad<T>*>(y) = out;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) y[i] = out.v[i];
  }
}

constexpr int kPitch = kRows + 4;  // of the sums of a token in shared memory

// Writes a lane's sums, with token 2 t of row g at `to`. With `more` it adds them to the sums that
// it wrote before.
template <class S>
__device__ void put_sums(float* to, const Sums<S>& sums, int t, bool more) {
  const auto put = [&](int at, float d) { to[at] = more ? __fadd_rn(to[at], d) : d; };
  if constexpr (S::kTensor) {
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4 * kRowTiles; ++i)
        put((8 * tile + (i & 1)) * kPitch + (i >> 1) * 8, sums.d[i >> 2][tile][i & 3]);
  } else {  // each t has the sums over its own part of K
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int i = 0; i < kRunRows; ++i) {
        float d = sums.d[i][m];
        d = __fadd_rn(d, __shfl_xor_sync(kAll, d, 1));
        d = __fadd_rn(d, __shfl_xor_sync(kAll, d, 2));
        if (m >> 1 == t) put((m & 1) * kPitch + 8 * i, d);
      }
  }
}

extern __shared__ __align__(256) uint8_t shared_memory[];

// y = x Wᵀ + bias + scale s Bᵀ for up to 64 tokens, W = round(code * absmax) to x's type, sums in
// fp32; Call::parts in place of y where K is split.
//
// 2 M N K FLOP, of M rounded up to 8, 16, 32 or 64. Bytes it cannot avoid: N K (1/2 + 4 / block),
// M (K + N) elements. Grid: 64 rows of W x splits of K (x 8 tokens, fp32); x is read by every block
// of rows, W once. Warps of a block share rows two by two and split each step of K.
template <class S, bool kNested, bool kAligned>
__global__ void __launch_bounds__(S::kThreads, 2) linear_kernel(const __grid_constant__ Call call) {
  using T = typename S::T;
  const Nf4Linear& c = call.c;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;
  const int depth_warp = warp % S::kDepthWarps, row_warp = warp / S::kDepthWarps;
  const int64_t row = int64_t(blockIdx.x) * kRows + row_warp * 16 * kRowTiles + g;
  const int64_t token = int64_t(blockIdx.z) * S::kTokens;
  const int tokens = static_cast<int>(min(c.m - token, int64_t(S::kTokens)));
  const T* x = static_cast<const T*>(c.x) + token * c.ldx;
  const int first = blockIdx.y * call.steps_per_split;
  int last = min(first + call.steps_per_split, call.steps);
  keep(last);
  const int lane_k = depth_warp * S::kChunk + t * S::kRun;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif

  const int k_end = min(static_cast<int>(c.k), last * S::kStep);
  Loader<S, kNested> loader(call, row, first * S::kStep + lane_k, k_end);
  Runs<S, kNested> runs[2] = {};
  if (kAligned) loader.load(runs[0]);
  uint8_t* const smem = shared_memory;
  using X = Stager<S, kAligned>;
  X stager(x, c.ldx, tokens, first * S::kStep, k_end);
  // Stages of x, in the second half of each line; `in` is that of the present step.
  constexpr int kStagePitch = 2 * S::kStageBytes, kAhead = S::kStages / X::kFetch - 1;
  int in = 0;
  const auto fetch_x = [&](int ahead, int step) {
    if (step < last)
      stager.fetch(smem + kLine / 2 + ((in + ahead * kStagePitch) & (kSharedBytes - 1)));
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch_x(i * X::kFetch, first + i * X::kFetch);

  fill_table<S::kWarps>(smem, c.q.quant_type);
  float* const map = reinterpret_cast<float*>(smem + kSharedBytes);
  float offset = 0.0f;
  if (kNested || (!kAligned && c.q.absmax == nullptr)) {
    for (int i = threadIdx.x; i < 256; i += S::kThreads) map[i] = __ldg(c.q.nested_map + i);
    offset = __ldg(c.q.nested_offset);
  }

  Sums<S> sums = {};
  const bool lora = c.rank > 0 && blockIdx.y == 0;
  constexpr int kRankStep = 16 * S::kDepthWarps;
  if (lora)
    prefetch_b(c, row, 16 * depth_warp, kRankStep, c.adapters == Dtype::f32 ? 4 : sizeof(T));

  int slot = (lane & 15) * 8;
  keep(slot);
  int x_offset[S::kTiles];  // past the last token, that of the last one
#pragma unroll
  for (int tile = 0; tile < S::kTiles; ++tile) {
    const int m = S::kTensor ? min(8 * tile + g, tokens - 1) : 0;
    x_offset[tile] = depth_warp * S::kRunUnits * S::kTiles * 4 * kLine + unit_offset(m * 4 + t);
    keep(x_offset[tile]);
  }
  const auto advance = [&](int step, bool second, Runs<S, kNested>& now, Runs<S, kNested>& next) {
    if (X::kFetch == 1 || !second) {
      wait_for_all_but<kAhead - 1>();
      __syncthreads();
      fetch_x(kAhead * X::kFetch, step + kAhead * X::kFetch);
    }
    const uint8_t* const stage = smem + kLine / 2 + in;
    in = (in + kStagePitch) & (kSharedBytes - 1);
    if constexpr (kAligned) {
      float scale[kRunRows];
#pragma unroll
      for (int i = 0; i < kRunRows; ++i) scale[i] = loader.scale(now, i, map, offset);
      loader.load(next);
      accumulate<S>(
          sums, now.code, [&](int i, int) { return scale[i]; }, smem, stage, x_offset, slot,
          tokens);
    } else {
      RaggedRuns<S> ragged;
      load_ragged<S>(ragged, call, map, row, step * S::kStep + lane_k);
      const auto scale_of = [&](int i, int byte) {
        return make_float2(2 * byte < ragged.cut[i] ? ragged.scale[i] : ragged.next_scale[i],
                           2 * byte + 1 < ragged.cut[i] ? ragged.scale[i] : ragged.next_scale[i]);
      };
      accumulate<S>(sums, ragged.code, scale_of, smem, stage, x_offset, slot, tokens);
    }
  };
  for (int step = first; step < last; ++step) {  // two steps: `next` becomes `now` without a copy
    advance(step, false, runs[0], runs[1]);
    if (!kAligned) continue;
    if (++step == last) break;
    advance(step, true, runs[1], runs[0]);
  }

  // The warps' sums, [depth warp, token, row + pad]: added in order.
  float* const red = reinterpret_cast<float*>(smem);
  static_assert(S::kDepthWarps * S::kTokens * kPitch * 4 <= kSharedBytes, "fits over the table");
  __syncthreads();
  float* const to =
      red + (depth_warp * S::kTokens + 2 * t) * kPitch + row_warp * 16 * kRowTiles + g;
  put_sums<S>(to, sums, t, false);
  if (lora) {  // last: s may come from the kernel in front
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    sums = {};
    lora_sums(sums, c, row, token, tokens, 16 * depth_warp, kRankStep);
    put_sums<S>(to, sums, t, true);
  }
  __syncthreads();
  const int64_t block_row = int64_t(blockIdx.x) * kRows;
  for (int i = threadIdx.x; i < tokens * (kRows / 4); i += S::kThreads) {
    const int m = i / (kRows / 4), r = i % (kRows / 4) * 4;
    float4 sum = *reinterpret_cast<const float4*>(red + m * kPitch + r);
#pragma unroll
    for (int w = 1; w < S::kDepthWarps; ++w)
      sum = add(sum, *reinterpret_cast<const float4*>(red + (w * S::kTokens + m) * kPitch + r));
    const int64_t n = block_row + r;
    if (n >= c.n) continue;
    if (call.parts != nullptr) {
      float* part = call.parts + (blockIdx.y * c.m + token + m) * call.part_ld + n;
      __stcg(reinterpret_cast<float4*>(part), sum);
    } else {
      store_outputs<T>(c, token + m, n, sum);
    }
  }
}

// y = the sum of the parts in order + bias. Grid: four outputs a thread.
template <class T>
__global__ void __launch_bounds__(128) sum_kernel(const __grid_constant__ Call call, int splits) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const Nf4Linear& c = call.c;
  const int64_t quads = call.part_ld / 4;
  const int64_t i = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (i >= c.m * quads) return;
  const float4* part = reinterpret_cast<const float4*>(call.parts) + i;
  float4 sum = __ldcg(part);
  for (int split = 1; split < splits; ++split) sum = add(sum, __ldcg(part + split * c.m * quads));
  store_outputs<T>(c, i / quads, i % quads * 4, sum);
}

}  // namespace nf4_linear
}  // namespace lora_kernels
