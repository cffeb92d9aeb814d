// NF4/FP4 quantise, and quantise the scales. Compiled without torch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>

#include "launch.cuh"
#include "lora_kernels/nf4_codes.h"
#include "lora_kernels/nf4_cuda.h"

namespace lora_kernels {
namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kLoads = 8;  // 16-byte loads of a thread
constexpr unsigned kAll = 0xffffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;  // as fp32; the bits of NaN are above

template <int kType, int i>
constexpr float kThreshold =
    (kCodeTable[kType][kCodeOrder[kType][i]] + kCodeTable[kType][kCodeOrder[kType][i + 1]]) / 2.0f;

constexpr uint32_t codes_of(const uint8_t* order) {
  uint32_t codes = 0;
  for (int i = 0; i < 8; ++i) codes |= uint32_t(order[i]) << (4 * i);
  return codes;
}
// The codes of ranks first .. first + 7, a nibble each.
template <int kType, int first>
constexpr uint32_t kCodes = codes_of(kCodeOrder[kType] + first);

#define LK_EVEN_THRESHOLDS(t)                                                \
  {kThreshold<t, 0>, kThreshold<t, 2>,  kThreshold<t, 4>,  kThreshold<t, 6>, \
   kThreshold<t, 8>, kThreshold<t, 10>, kThreshold<t, 12>, kThreshold<t, 14>}
__constant__ float even_thresholds[2][8] = {LK_EVEN_THRESHOLDS(kNf4), LK_EVEN_THRESHOLDS(kFp4)};

// How 16 bytes of a weight, as four words, are read for each of its types.
template <class T>
struct Read;

template <>
struct Read<float> {
  __device__ static uint32_t magnitude(const uint32_t (&v)[4]) {
    constexpr uint32_t kMagnitude = 0x7fffffffu;
    return max(max(v[0] & kMagnitude, v[1] & kMagnitude),
               max(v[2] & kMagnitude, v[3] & kMagnitude));
  }
  __device__ static float get(const uint32_t (&v)[4], int i) { return __uint_as_float(v[i]); }
};

// The bits of the largest magnitude of eight, as fp32.
template <class Pair>
__device__ uint32_t magnitude_of_pairs(const uint32_t (&v)[4]) {
  const Pair* pair = reinterpret_cast<const Pair*>(v);
  const Pair low = __hmax2_nan(__habs2(pair[0]), __habs2(pair[1]));
  const Pair high = __hmax2_nan(__habs2(pair[2]), __habs2(pair[3]));
  const Pair both = __hmax2_nan(low, high);
  constexpr uint32_t kMagnitude = 0x7fffffffu;
  return max(__float_as_uint(__low2float(both)) & kMagnitude,
             __float_as_uint(__high2float(both)) & kMagnitude);
}

template <>
struct Read<__half> {
  __device__ static uint32_t magnitude(const uint32_t (&v)[4]) {
    return magnitude_of_pairs<__half2>(v);
  }
  __device__ static float get(const uint32_t (&v)[4], int i) {
    const __half2 pair = *reinterpret_cast<const __half2*>(&v[i / 2]);
    return i % 2 == 0 ? __low2float(pair) : __high2float(pair);
  }
};

template <>
struct Read<__nv_bfloat16> {
  __device__ static uint32_t magnitude(const uint32_t (&v)[4]) {
    return magnitude_of_pairs<__nv_bfloat162>(v);
  }
  __device__ static float get(const uint32_t (&v)[4], int i) {
    return __uint_as_float(i % 2 == 0 ? v[i / 2] << 16 : v[i / 2] & 0xffff0000u);
  }
};

// The number of thresholds below v, found by four comparisons. `even` of lane l is threshold 2 (l %
// 8).
template <int kType>
__device__ int rank(float v, float even) {
  const bool upper = v > kThreshold<kType, 7>;
  const bool second = v > (upper ? kThreshold<kType, 11> : kThreshold<kType, 3>);
  const float t = upper ? (second ? kThreshold<kType, 13> : kThreshold<kType, 9>)
                        : (second ? kThreshold<kType, 5> : kThreshold<kType, 1>);
  int p = (upper ? 4 : 0) + (second ? 2 : 0) + (v > t ? 1 : 0);
  return 2 * p + (v > __shfl_sync(kAll, even, p, 8) ? 1 : 0);
}

template <int kType>
__device__ uint32_t code(float v, float even) {
  const int r = rank<kType>(v, even);
  if (kType == kNf4) return r;  // the table is sorted
  return (r < 8 ? kCodes<kType, 0> : kCodes<kType, 8>) >> (4 * (r & 7)) & 15;
}

// absmax[b] = max |x| of block b; code of x[i] = rank of x[i] * (1 / absmax) among the thresholds.
//
// x [n] -> packed [(n + 1) / 2], high nibble first, an odd n padded with the code of 0; absmax
// [ceil(n / block)]. *bad becomes the index of the first element that is not finite, if any is.
// Grid: a thread block takes 4 warps x 8 loads x 32 lanes x 16 bytes: whole quantisation blocks.
// Load j of a warp is 512 consecutive bytes; a lane's codes of it are stored at once.
template <class T, int kType>
__global__ void __launch_bounds__(32 * kWarps)
    quantize_kernel(const T* __restrict__ x, int64_t n, int block_shift,
                    uint8_t* __restrict__ packed, float* __restrict__ absmax,
                    unsigned long long* bad, bool aligned) {
  constexpr int kUnit = 16 / sizeof(T);  // elements of a load
  constexpr int kLaneShift = kUnit == 8 ? 3 : 2;
  constexpr int kLoad = 32 * kUnit;  // of a warp
  constexpr int kTile = kLoads * kLoad;
  static_assert(kWarps * kTile % kMaxBlock == 0, "no quantisation block is shared");
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t tile = (int64_t(blockIdx.x) * kWarps + warp) * kTile;
  const bool whole = aligned && tile + kTile <= n;
  const float even = even_thresholds[kType][lane & 7];

  uint32_t v[kLoads][4];
  if (whole) {
    const uint4* from = reinterpret_cast<const uint4*>(x + tile) + lane;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const uint4 unit = __ldg(from + 32 * j);
      v[j][0] = unit.x, v[j][1] = unit.y, v[j][2] = unit.z, v[j][3] = unit.w;
    }
  } else {  // zeros past the end
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t at = tile + j * kLoad + lane * kUnit;
      alignas(16) T unit[kUnit];
#pragma unroll
      for (int e = 0; e < kUnit; ++e) unit[e] = at + e < n ? x[at + e] : T(0.0f);
      __builtin_memcpy(v[j], unit, 16);
    }
  }

  uint32_t most[kLoads];  // bits of the largest magnitude: of the lane, then of its block
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    most[j] = Read<T>::magnitude(v[j]);
    if (most[j] >= kInfinity) {
#pragma unroll
      for (int e = 0; e < kUnit; ++e)
        if ((__float_as_uint(Read<T>::get(v[j], e)) & 0x7fffffffu) >= kInfinity)
          atomicMin(bad, static_cast<unsigned long long>(tile + j * kLoad + lane * kUnit + e));
    }
  }
#pragma unroll
  for (int bit = 0; bit < 5; ++bit)  // over lanes
    if (block_shift > kLaneShift + bit) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        most[j] = max(most[j], __shfl_xor_sync(kAll, most[j], 1 << bit));
    }
#pragma unroll
  for (int bit = 0; bit < 3; ++bit)  // over loads
    if (block_shift > kLaneShift + 5 + bit) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if ((j >> bit & 1) == 0) most[j] = most[j | 1 << bit] = max(most[j], most[j | 1 << bit]);
    }
  constexpr int kTileShift = kLaneShift + 8;
  if (block_shift > kTileShift) {  // over warps
    __shared__ uint32_t of_warp[kWarps];
    if (lane == 0) of_warp[warp] = most[0];
    __syncthreads();
    const int warps = 1 << (block_shift - kTileShift);
    for (int i = 0; i < warps; ++i) most[0] = max(most[0], of_warp[(warp & -warps) + i]);
#pragma unroll
    for (int j = 1; j < kLoads; ++j) most[j] = most[0];
  }

#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int64_t at = tile + j * kLoad + lane * kUnit;
    const float largest = __uint_as_float(most[j]);
    if ((at & ((int64_t(1) << block_shift) - 1)) == 0 && at < n)
      absmax[at >> block_shift] = largest;
    const float inverse = __frcp_rn(fmaxf(largest, kMinAbsmax));
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < kUnit; ++e)
      codes |= code<kType>(__fmul_rn(Read<T>::get(v[j], e), inverse), even) << (4 * (e ^ 1));
    uint8_t* to = packed + at / 2;
    if (whole) {
      if (kUnit == 8)
        *reinterpret_cast<uint32_t*>(to) = codes;
      else
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes);
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; e += 2)
        if (at + e < n) to[e / 2] = static_cast<uint8_t>(codes >> (4 * e));
    }
  }
}

// The code of x: of the nearest of bitsandbytes' grid of 65536 points, the nearest map entry.
__device__ int scale_code(float x, const float* map) {
  const float y = __fadd_rn(__fmul_rn(__fadd_rn(x, 1.0f), 32767.5f), 0.5f);
  const float positive = y > 0.0f ? y : 0.0f;  // of NaN too: 0 * (1 / 0), if all scales are equal
  const float point = floorf(fminf(positive, 65535.0f));
  const float v = __fadd_rn(__fdiv_rn(point, 32767.5f), -1.0f);
  int above = 0;  // the number of entries below v
#pragma unroll
  for (int step = 128; step > 0; step >>= 1)
    if (map[above + step - 1] < v) above += step;
  above = max(above, 1);
  const float up = fabsf(__fadd_rn(map[above], -v)), down = fabsf(__fadd_rn(v, -map[above - 1]));
  return up < down ? above : above - 1;
}

constexpr int kScaleThreads = 256;

// nested_absmax[g] = max |absmax - offset| of group g; code of a scale = nearest map entry of
// (absmax - offset) * (1 / nested_absmax).
//
// bad[0] becomes the index of the first scale that is not finite, bad[1] that of the first map
// entry below the one before it, if there is one. Grid: one thread block per group.
__global__ void __launch_bounds__(kScaleThreads)
    quantize_scales_kernel(const float* __restrict__ absmax, int64_t blocks, int64_t nested_block,
                           const float* __restrict__ nested_map,
                           const float* __restrict__ nested_offset, uint8_t* __restrict__ codes,
                           float* __restrict__ nested_absmax, unsigned long long* bad) {
  __shared__ float map[256];
  __shared__ uint32_t of_warp[kScaleThreads / 32];
  static_assert(kScaleThreads == 256, "a thread copies one entry of the map");
  const int thread = threadIdx.x;
  const float offset = __ldg(nested_offset);
  map[thread] = __ldg(nested_map + thread);
  const int64_t begin = blockIdx.x * nested_block, end = min(begin + nested_block, blocks);

  uint32_t most = 0;
  for (int64_t i = begin + thread; i < end; i += kScaleThreads) {
    const float scale = __ldg(absmax + i);
    if ((__float_as_uint(scale) & 0x7fffffffu) >= kInfinity)
      atomicMin(bad, static_cast<unsigned long long>(i));
    most = max(most, __float_as_uint(__fadd_rn(scale, -offset)) & 0x7fffffffu);
  }
  most = __reduce_max_sync(kAll, most);
  if ((thread & 31) == 0) of_warp[thread >> 5] = most;
  __syncthreads();
  for (const uint32_t m : of_warp) most = max(most, m);
  if (blockIdx.x == 0 && thread > 0 && !(map[thread - 1] <= map[thread]))
    atomicMin(bad + 1, static_cast<unsigned long long>(thread));
  if (thread == 0) nested_absmax[blockIdx.x] = __uint_as_float(most);
  const float inverse = __frcp_rn(__uint_as_float(most));
  for (int64_t i = begin + thread; i < end; i += kScaleThreads)
    codes[i] = static_cast<uint8_t>(
        scale_code(__fmul_rn(__fadd_rn(__ldg(absmax + i), -offset), inverse), map));
}

template <class T>
cudaError_t quantize(const void* x, int64_t n, int64_t block_size, int quant_type, uint8_t* packed,
                     float* absmax, unsigned long long* bad, cudaStream_t stream) {
  const int64_t grid = ceil_div(n, kWarps * kLoads * 32 * (16 / sizeof(T)));
  if (grid == 0) return cudaSuccess;
  if (grid > INT_MAX) return cudaErrorInvalidValue;
  const bool aligned = multiple(x, 16) && multiple(packed, 4);
  auto* const kernel = quant_type == kNf4 ? quantize_kernel<T, kNf4> : quantize_kernel<T, kFp4>;
  return launch(kernel, dim3(unsigned(grid)), 32 * kWarps, 0, stream, false,
                static_cast<const T*>(x), n, log2_floor(block_size), packed, absmax, bad, aligned);
}

}  // namespace

cudaError_t nf4_quantize_cuda(const void* x, Dtype dtype, int64_t n, int64_t block_size,
                              int quant_type, uint8_t* packed, float* absmax,
                              unsigned long long* bad, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::f32:
      return quantize<float>(x, n, block_size, quant_type, packed, absmax, bad, stream);
    case Dtype::f16:
      return quantize<__half>(x, n, block_size, quant_type, packed, absmax, bad, stream);
    case Dtype::bf16:
      return quantize<__nv_bfloat16>(x, n, block_size, quant_type, packed, absmax, bad, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t nf4_quantize_scales_cuda(const float* absmax, int64_t blocks, int64_t nested_block,
                                     const float* nested_map, const float* nested_offset,
                                     uint8_t* codes, float* nested_absmax, unsigned long long* bad,
                                     cudaStream_t stream) {
  if (nested_block < 1) return cudaErrorInvalidValue;
  const int64_t groups = blocks / nested_block + (blocks % nested_block > 0);
  if (groups == 0) return cudaSuccess;
  if (groups > INT_MAX) return cudaErrorInvalidValue;
  return launch(quantize_scales_kernel, dim3(unsigned(groups)), kScaleThreads, 0, stream, false,
                absmax, blocks, nested_block, nested_map, nested_offset, codes, nested_absmax, bad);
}

}  // namespace lora_kernels
