// The parts of the NF4/FP4 linear kernel: its tile, the decode table, the sums, the LoRA branch.
// nf4_linear_load.cuh loads codes and x; nf4_linear_kernel.cuh is the kernel itself. It serves
// nf4_linear and, with a branch, lora_linear.
//
// Weights are the A operand of mma.m16n8k16 (16 outputs x 16 of K), and tokens are the 8 columns of
// B. One decode therefore serves all tokens, and the multiply-adds take very few instructions. The
// sum over K may run in any order, so lane (g, t) = (lane / 4, lane % 4) takes a run of `kRun`
// consecutive codes of rows g and g + 8, one wide load each; x is laid out in shared memory in the
// same order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "lora_kernels/nf4_linear_cuda.h"
#include "nf4_codes.cuh"

namespace lora_kernels {
namespace nf4_linear {

constexpr int kRowTiles = 2;  // 16-row tiles of a warp, which share the loads of x
constexpr int kRowWarps = 2;
constexpr int kRows = 16 * kRowTiles * kRowWarps;  // outputs of a block
constexpr int kRunRows = 2 * kRowTiles;            // rows of a lane: g + 8 i
constexpr int kLine = 256;                         // bytes, see fill_table
constexpr int kSharedBytes = 256 * kLine;
constexpr int kMapBytes = 256 * 4;  // of nested scales, behind the lines

// The tile of a block: 64 rows x 8 kTiles tokens; kStep of K at a time, split over kDepthWarps.
template <class T_, int kTiles_>
struct Tile {
  using T = T_;
  static constexpr bool kTensor = sizeof(T) == 2;  // fp32 has no tensor core of its precision
  static constexpr int kTiles = kTiles_;
  static constexpr int kTokens = 8 * kTiles;
  static constexpr bool kNarrow = kTiles <= 2;
  static constexpr int kDepthWarps = kNarrow ? 4 : 2;
  static constexpr int kRun = kNarrow && kTensor ? 32 : 16;  // codes of one load
  static constexpr int kWarps = kRowWarps * kDepthWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kChunk = 4 * kRun;  // of K, of a warp
  static constexpr int kStep = kDepthWarps * kChunk;
  static constexpr int kUnit = 16 / sizeof(T);  // elements of 16 bytes of x
  static constexpr int kRunUnits = kRun / kUnit;
  static constexpr int kStageBytes = kTokens * kStep * sizeof(T);
  static constexpr int kStages = kSharedBytes / 2 / kStageBytes;
  static_assert(kStages >= 2 && (kStages & (kStages - 1)) == 0, "a ring of stages in the lines");
};

// The decode table in shared memory: line b holds the two fp32 values of the byte b of codes, 16
// times. An 8-byte access serves half a warp at a time, and each of its 16 lanes reads a copy of
// its own, so there are no bank conflicts. The second half of each 256-byte line holds x. With
// lines of 256 bytes one PRMT makes the address of a look-up from a byte of codes.
template <int kWarps>
__device__ void fill_table(uint8_t* smem, int quant_type) {
  const int lane = threadIdx.x & 31;
  const float value = device_codes[quant_type][lane & 15];
#pragma unroll
  for (int i = 0; i < 64 / kWarps; ++i) {
    const int line = 4 * (i * kWarps + (threadIdx.x >> 5)) + (lane >> 3);
    const float high = __shfl_sync(kAll, value, line >> 4);
    const float low = __shfl_sync(kAll, value, line & 15);
    *reinterpret_cast<float4*>(smem + line * kLine + (lane & 7) * 16) =
        make_float4(high, low, high, low);
  }
}

// The two values of byte i of a word of codes, not yet scaled. Two weights then take a PRMT, a
// load, two products and one rounding to a pair: 2.5 instructions a weight. Tables of the 16
// rounded products of a block, read by PRMT, need 2.6 and 0.5 or more to build; products in 16-bit
// arithmetic would round twice.
__device__ inline float2 look_up(const uint8_t* smem, uint32_t word, int i, uint32_t slot) {
  return *reinterpret_cast<const float2*>(smem + __byte_perm(word, slot, 0x5504 | i << 4));
}

// code * scale in fp32, each rounded.
__device__ inline float2 scaled(float2 code, float scale) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return __fmul2_rn(code, make_float2(scale, scale));
#else
  return make_float2(__fmul_rn(code.x, scale), __fmul_rn(code.y, scale));
#endif
}

__device__ inline float2 scaled(float2 code, float2 scale) {
  return make_float2(__fmul_rn(code.x, scale.x), __fmul_rn(code.y, scale.y));
}

template <class Pair>
__device__ uint32_t bits(const Pair& pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The types of x: rounding to them, and their tensor-core instruction D += A B; Rank is the type of
// s, and round_rank rounds to it.
template <class T>
struct Math;

template <>
struct Math<__nv_bfloat16> {
  using Rank = __nv_bfloat16;
  __device__ static Rank round_rank(float v) { return round(v); }
  __device__ static uint32_t pack(float2 v) { return bits(__floats2bfloat162_rn(v.x, v.y)); }
  __device__ static __nv_bfloat16 round(float v) { return __float2bfloat16_rn(v); }
  __device__ static float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Math<__half> {
  // s is fp32 rounded to the 11 significant bits of fp16, which is what a tf32 product takes.
  using Rank = float;
  __device__ static float round_rank(float v) {
    const uint32_t bits = __float_as_uint(v);
    const uint32_t rounded = (bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu;
    return isfinite(v) ? __uint_as_float(rounded) : v;
  }
  __device__ static void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
  }
  __device__ static uint32_t pack(float2 v) { return bits(__floats2half2_rn(v.x, v.y)); }
  __device__ static __half round(float v) { return __float2half_rn(v); }
  __device__ static float widen(__half v) { return __half2float(v); }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

template <>
struct Math<float> {
  using Rank = float;
  __device__ static float round_rank(float v) { return v; }
  __device__ static float round(float v) { return v; }
  __device__ static float widen(float v) { return v; }
};

// The sums that a lane holds. On tensor cores: D of mma, by row tile and token tile. In fp32: those
// of four rows and eight tokens, over the lane's own part of K.
template <class S, bool kTensor = S::kTensor>
struct Sums {
  float d[kRowTiles][S::kTiles][4];
};
template <class S>
struct Sums<S, false> {
  float d[kRunRows][8];
};

// Four elements of a row, zeros past its end.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};

template <class T>
__device__ Quad<T> load_quad(const T* from, int64_t left, bool vector) {
  Quad<T> quad;
  if (vector && left >= 4) {
    quad = *reinterpret_cast<const Quad<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.v[i] = i < left ? from[i] : Math<T>::round(0.0f);
  }
  return quad;
}

template <class T>
__host__ __device__ inline bool quads_aligned(const void* p, int64_t ld) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Quad<T>) == 0 && ld % 4 == 0;
}

// The offset of a unit of x in its stage and chunk: units are 16 bytes, 8 to a line.
__device__ inline int unit_offset(int unit) { return (unit >> 3) * kLine + (unit & 7) * 16; }

// sums += W x over one chunk of a warp. Unit u of a run of token m, lane t, is unit
// (u kTiles + m / 8) 32 + (m % 8) 4 + t of the chunk: a warp reads whole lines. `scale_of(i, byte)`
// is the scale of a byte of row i, or the two of its nibbles.
template <class S, class ScaleOf>
__device__ void accumulate(Sums<S>& sums, const uint32_t (&code)[kRunRows][S::kRun / 8],
                           const ScaleOf& scale_of, const uint8_t* smem, const uint8_t* x,
                           const int (&x_offset)[S::kTiles], uint32_t slot, int tokens) {
  using M = Math<typename S::T>;
  const auto decode = [&](int i, int byte) {
    return scaled(look_up(smem, code[i][byte >> 2], byte & 3, slot), scale_of(i, byte));
  };
#pragma unroll
  for (int u = 0; u < S::kRunUnits; ++u) {
    if constexpr (S::kTensor) {
      uint4 v[S::kTiles];
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile)
        v[tile] = *reinterpret_cast<const uint4*>(x + u * S::kTiles * 4 * kLine + x_offset[tile]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int byte = 4 * u + 2 * half;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const uint32_t a[4] = {M::pack(decode(2 * r, byte)), M::pack(decode(2 * r + 1, byte)),
                                 M::pack(decode(2 * r, byte + 1)),
                                 M::pack(decode(2 * r + 1, byte + 1))};
#pragma unroll
          for (int tile = 0; tile < S::kTiles; ++tile)
            M::mma(sums.d[r][tile], a, half == 0 ? v[tile].x : v[tile].z,
                   half == 0 ? v[tile].y : v[tile].w);
        }
      }
    } else {
      float2 w[kRunRows][2];
#pragma unroll
      for (int i = 0; i < kRunRows; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) w[i][half] = decode(i, 2 * u + half);
#pragma unroll
      for (int token = 0; token < 8; ++token) {
        if (token >= tokens) break;
        const float4 v = *reinterpret_cast<const float4*>(x + u * 4 * kLine + x_offset[0] +
                                                          unit_offset(4 * token));
#pragma unroll
        for (int i = 0; i < kRunRows; ++i) {
          float& d = sums.d[i][token];
          d = __fmaf_rn(w[i][0].x, v.x, d);
          d = __fmaf_rn(w[i][0].y, v.y, d);
          d = __fmaf_rn(w[i][1].x, v.z, d);
          d = __fmaf_rn(w[i][1].y, v.w, d);
        }
      }
    }
  }
}

// Four elements of B, rounded to x's type.
template <class T>
__device__ Quad<T> load_b(const Nf4Linear& c, int64_t at, int64_t left, bool vector) {
  if (sizeof(T) == 4 || c.adapters != Dtype::f32)
    return load_quad(static_cast<const T*>(c.b) + at, left, vector);
  const Quad<float> wide = load_quad(static_cast<const float*>(c.b) + at, left, vector);
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.v[i] = Math<T>::round(wide.v[i]);
  return quad;
}

// d += B sᵀ of four ranks a lane: rows g and g + 8 of B, and s of token g.
template <class T, class Rank>
__device__ void mma_ranks(float (&d)[4], const Quad<T>& low, const Quad<T>& high,
                          const Quad<Rank>& s) {
  if constexpr (sizeof(Rank) == sizeof(T)) {
    const uint2 l = *reinterpret_cast<const uint2*>(&low);
    const uint2 h = *reinterpret_cast<const uint2*>(&high);
    const uint2 b = *reinterpret_cast<const uint2*>(&s);
    const uint32_t a[4] = {l.x, h.x, l.y, h.y};
    Math<T>::mma(d, a, b.x, b.y);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float a[4] = {Math<T>::widen(low.v[i]), Math<T>::widen(high.v[i]),
                          Math<T>::widen(low.v[i + 1]), Math<T>::widen(high.v[i + 1])};
      Math<T>::mma_tf32(d, a, s.v[i], s.v[i + 1]);
    }
  }
}

// sums = scale s Bᵀ over every `step`-th 16 ranks from r0 on; the part of lane (g, t): rank
// r0 + 4 t .. + 3.
template <class S>
__device__ void lora_sums(Sums<S>& sums, const Nf4Linear& c, int64_t row, int64_t token, int tokens,
                          int64_t r0, int step) {
  using T = typename S::T;
  using Rank = typename Math<T>::Rank;
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const Rank* s = static_cast<const Rank*>(c.s) + token * c.lds;
  const bool vector_b =
      c.adapters == Dtype::f32 ? quads_aligned<float>(c.b, c.ldb) : quads_aligned<T>(c.b, c.ldb);
  const bool vector_s = quads_aligned<Rank>(c.s, c.lds);
  for (; r0 < c.rank; r0 += step) {
    const int64_t at = r0 + 4 * t, left = c.rank - at;
    Quad<T> w[kRunRows];
#pragma unroll
    for (int i = 0; i < kRunRows; ++i)
      w[i] = load_b<T>(c, (row + 8 * i) * c.ldb + at, row + 8 * i < c.n ? left : 0, vector_b);
    if constexpr (S::kTensor) {
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
        const int m = 8 * tile + g;
        const Quad<Rank> v = load_quad(s + m * c.lds + at, m < tokens ? left : 0, vector_s);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
          mma_ranks<T>(sums.d[r][tile], w[2 * r], w[2 * r + 1], v);
      }
    } else {
#pragma unroll
      for (int m = 0; m < 8; ++m) {
        const Quad<T> v = load_quad(s + m * c.lds + at, m < tokens ? left : 0, vector_s);
#pragma unroll
        for (int i = 0; i < kRunRows; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums.d[i][m] = __fmaf_rn(w[i].v[e], v.v[e], sums.d[i][m]);
      }
    }
  }
  constexpr int kInner = sizeof(sums.d[0]) / sizeof(float);
#pragma unroll
  for (auto& d : sums.d)
#pragma unroll
    for (int i = 0; i < kInner; ++i) reinterpret_cast<float*>(&d)[i] *= c.scale;
}

// Prefetches into L2 what lora_sums will read of B.
__device__ inline void prefetch_b(const Nf4Linear& c, int64_t row, int64_t r0, int step, int size) {
  for (int64_t at = r0 + 4 * (threadIdx.x & 3); at < c.rank; at += step)
#pragma unroll
    for (int i = 0; i < kRunRows; ++i)
      if (row + 8 * i < c.n)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint8_t*>(c.b) +
                                                      ((row + 8 * i) * c.ldb + at) * size));
}

}  // namespace nf4_linear
}  // namespace lora_kernels
