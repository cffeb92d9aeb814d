// NF4/FP4 dequantise. Compiled without torch; the arguments are plain pointers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>

#include "launch.cuh"
#include "lora_kernels/nf4_cuda.h"
#include "nf4_codes.cuh"

namespace lora_kernels {
namespace {

constexpr int kWarps = 8;                   // of a block
constexpr int kLoads = 8;                   // 4-byte loads of a thread
constexpr int kWarpTile = 32 * 8 * kLoads;  // weights of a warp: 32 blocks of 64

// How two products are rounded, to nearest even, and packed into one 32-bit register (16-bit types)
// or two (fp32).
struct PairF32 {
  using Element = float;
  static constexpr int kPerStore = 4;  // weights in 16 bytes
  __device__ static void put(uint32_t* word, int i, float a, float b) {
    word[2 * i] = __float_as_uint(a);
    word[2 * i + 1] = __float_as_uint(b);
  }
  __device__ static float convert(float a) { return a; }
};
template <class T, class Two, T (*kRoundOne)(float), Two (*kRoundTwo)(float, float)>
struct Pair16 {
  using Element = T;
  static constexpr int kPerStore = 8;
  __device__ static void put(uint32_t* word, int i, float a, float b) {
    const Two pair = kRoundTwo(a, b);
    word[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  __device__ static T convert(float a) { return kRoundOne(a); }
};
struct PairF16 : Pair16<__half, __half2, __float2half_rn, __floats2half2_rn> {};
struct PairBF16
    : Pair16<__nv_bfloat16, __nv_bfloat162, __float2bfloat16_rn, __floats2bfloat162_rn> {};

// The scale of a block, read by a single thread. The product and the sum are rounded separately.
template <bool kNested>
__device__ float block_scale(const DeviceQuantView& q, const float* map, int64_t block) {
  if (!kNested) return __ldg(q.absmax + block);
  const float product =
      __fmul_rn(map[__ldg(q.absmax8 + block)], __ldg(q.nested_absmax + block / q.nested_block));
  return __fadd_rn(product, __ldg(q.nested_offset));
}

// The scales of blocks first .. first + 31, one per lane; only the first `count` are read. All
// lanes of a warp call this together. nested_absmax, shared by most lanes, is read by the first
// lane that needs it.
template <bool kNested>
__device__ float warp_scales(const DeviceQuantView& q, const float* map, int64_t first, int count,
                             int lane) {
  const bool wanted = lane < count;
  if (!kNested) return wanted ? __ldg(q.absmax + first + lane) : 0.0f;
  const int64_t block = first + (wanted ? lane : 0);
  const int64_t group = block / q.nested_block;
  const int64_t within = block - group * q.nested_block;
  const bool leads = wanted && (lane == 0 || within == 0);
  const float own = leads ? __ldg(q.nested_absmax + group) : 0.0f;
  const float nested_absmax = __shfl_sync(kAll, own, within < lane ? lane - int(within) : 0);
  const float offset = __shfl_sync(kAll, lane == 0 ? __ldg(q.nested_offset) : 0.0f, 0);
  const float value = wanted ? map[__ldg(q.absmax8 + block)] : 0.0f;
  return __fadd_rn(__fmul_rn(value, nested_absmax), offset);
}

// out[i] = round(table[code[i]] * scale[i / block_size])
//
// packed [(n + 1) / 2] bytes, high nibble first; scales fp32 [blocks], or nested; out [n].
// Grid: one warp per 2048 weights, kWarps a block. Products in fp32.
//
// Lane l holds table entry l % 16 and a look-up is a shuffle, free of bank conflicts; the map of
// nested scales (one look-up per block) is in shared memory.
// Load j of a warp takes 128 consecutive bytes; its stores are 512 consecutive bytes each.
template <class Pair, bool kNested>
__global__ void __launch_bounds__(32 * kWarps)
    dequantize_kernel(const DeviceQuantView q, typename Pair::Element* __restrict__ out,
                      int block_shift, bool aligned) {
  __shared__ float map[kNested ? 256 : 1];
  if (kNested) {
    static_assert(32 * kWarps == 256, "a thread copies one entry of the map");
    map[threadIdx.x] = __ldg(q.nested_map + threadIdx.x);
    __syncthreads();
  }
  const int lane = threadIdx.x & 31;
  const int64_t tile = (int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5)) * kWarpTile;
  if (tile >= q.n) return;
  const float code_value = device_codes[q.quant_type][lane & 15];

  if (tile + kWarpTile > q.n || !aligned) {  // two weights, a byte, at a time
    const int64_t end = tile + kWarpTile < q.n ? tile + kWarpTile : q.n;
    for (int64_t i = tile + 2 * lane; i < end; i += 64) {
      const uint8_t byte = q.packed[i >> 1];
      const float scale = block_scale<kNested>(q, map, i >> block_shift);
      out[i] = Pair::convert(__fmul_rn(device_codes[q.quant_type][byte >> 4], scale));
      if (i + 1 < end) {
        out[i + 1] = Pair::convert(__fmul_rn(device_codes[q.quant_type][byte & 15], scale));
      }
    }
    return;
  }

  const uint32_t* packed = reinterpret_cast<const uint32_t*>(q.packed + tile / 2) + lane;
  uint32_t codes[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) codes[j] = __ldg(packed + 32 * j);

  // 32 scales cover the tile down to blocks of 64; blocks of 32 need a second set.
  const int64_t first = tile >> block_shift;
  const int scales = kWarpTile >> block_shift;
  const float scale_low = warp_scales<kNested>(q, map, first, scales > 0 ? scales : 1, lane);
  const float scale_high = scales > 32 ? warp_scales<kNested>(q, map, first + 32, 32, lane) : 0.0f;

  constexpr int kPerStore = Pair::kPerStore;
  uint4* to = reinterpret_cast<uint4*>(out + tile) + lane;
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
#pragma unroll
    for (int part = 0; part < 8 / kPerStore; ++part) {
      const int at =
          256 * j + 32 * kPerStore * part + kPerStore * lane;  // first weight, in the tile
      uint32_t code = codes[j];
      if (kPerStore == 4)  // two lanes share the 8 codes of one load
        code = __shfl_sync(kAll, code, 16 * part + (lane >> 1)) >> (16 * (lane & 1));
      const int which = at >> block_shift;
      const float scale =
          __shfl_sync(kAll, block_shift == 5 && j >= kLoads / 2 ? scale_high : scale_low, which);
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < kPerStore / 2; ++i) {
        const float a = __shfl_sync(kAll, code_value, code >> (8 * i + 4), 16);
        const float b = __shfl_sync(kAll, code_value, code >> (8 * i), 16);
        Pair::put(word, i, __fmul_rn(a, scale), __fmul_rn(b, scale));
      }
      to[(256 * j + 32 * kPerStore * part) / kPerStore] =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

template <class Pair>
cudaError_t dequantize(const DeviceQuantView& q, void* out, cudaStream_t stream) {
  const int64_t grid = ceil_div(q.n, kWarps * kWarpTile);
  if (grid == 0) return cudaSuccess;
  if (grid > INT_MAX) return cudaErrorInvalidValue;
  const bool aligned = multiple(q.packed, 4) && multiple(out, 16);
  auto* const kernel =
      q.absmax != nullptr ? dequantize_kernel<Pair, false> : dequantize_kernel<Pair, true>;
  return launch(kernel, dim3(unsigned(grid)), 32 * kWarps, 0, stream, false, q,
                static_cast<typename Pair::Element*>(out), log2_floor(q.block_size), aligned);
}

}  // namespace

cudaError_t nf4_dequantize_cuda(const DeviceQuantView& q, Dtype out_dtype, void* out,
                                cudaStream_t stream) {
  switch (out_dtype) {
    case Dtype::f32:
      return dequantize<PairF32>(q, out, stream);
    case Dtype::f16:
      return dequantize<PairF16>(q, out, stream);
    case Dtype::bf16:
      return dequantize<PairBF16>(q, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lora_kernels
