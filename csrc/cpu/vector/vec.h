// fp32 vectors of the tier being compiled, and what the linear kernels of every tier build on:
// conversion of rows, horizontal sums, transposes.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "nf4_decode.h"
#include "target.h"

namespace lora_kernels {
namespace {
namespace vector {

// A register tile of a product holds kRowTile x kTileVectors accumulators: with one vector of the
// right operand each and a broadcast element of the left one, it fills the register file.
#if LK_AVX512
using Vec = __m512;
constexpr int kRowTile = 12, kTileVectors = 2;
#elif LK_AVX2
using Vec = __m256;
constexpr int kRowTile = 6, kTileVectors = 2;
#elif LK_NEON
using Vec = float32x4_t;
constexpr int kRowTile = 6, kTileVectors = 4;
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int kRowTile = 6, kTileVectors = 2;
#endif
constexpr int kLanes = sizeof(Vec) / sizeof(float);
typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));

LK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

LK_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
LK_INLINE void put(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

#if LK_AVX512

LK_INLINE Vec splat(float f) { return _mm512_set1_ps(f); }
LK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
LK_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }

LK_INLINE __m256i words16(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
LK_INLINE Vec load(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words16(p)), 16));
}
LK_INLINE Vec load(const Half* p) { return _mm512_cvtph_ps(words16(p)); }
template <class T>
LK_INLINE void put(T* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_words(v, T{}));
}
LK_INLINE Vec round_half(Vec v) { return _mm512_cvtph_ps(round_words(v, Half{})); }

// Rows of 16 at `in` become columns at `out`.
LK_INLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m512 r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = load(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + h + 2]);
      r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // r[4 q + c] holds, in 128-bit lane l, column 4 l + c of the rows 4 q .. 4 q + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    put(out + c * out_stride, _mm512_shuffle_f32x4(a, d, 0x88));
    put(out + (4 + c) * out_stride, _mm512_shuffle_f32x4(b, e, 0x88));
    put(out + (8 + c) * out_stride, _mm512_shuffle_f32x4(a, d, 0xdd));
    put(out + (12 + c) * out_stride, _mm512_shuffle_f32x4(b, e, 0xdd));
  }
}

#elif LK_AVX2

LK_INLINE Vec splat(float f) { return _mm256_set1_ps(f); }
LK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LK_INLINE float sum(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

LK_INLINE __m128i words8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
LK_INLINE Vec load(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words8(p)), 16));
}
LK_INLINE Vec load(const Half* p) { return _mm256_cvtph_ps(words8(p)); }
template <class T>
LK_INLINE void put(T* p, Vec v) {
  const __m256i words = round_words(v, T{});
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LK_INLINE Vec round_half(Vec v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

LK_INLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = load(in + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m256d a = _mm256_castps_pd(t[i + h]), b = _mm256_castps_pd(t[i + h + 2]);
      r[i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      r[i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int c = 0; c < 4; ++c) {
    put(out + c * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
    put(out + (4 + c) * out_stride, _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
  }
}

#else

#if LK_NEON
LK_INLINE Vec splat(float f) { return vdupq_n_f32(f); }
LK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
LK_INLINE float sum(Vec v) { return vaddvq_f32(v); }
LK_INLINE Vec load(const BFloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16));
}
LK_INLINE Vec load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
LK_INLINE Vec round_half(Vec v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
LK_INLINE void put(Half* p, Vec v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

LK_INLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  const float32x4x2_t a = vtrnq_f32(load(in), load(in + in_stride));
  const float32x4x2_t b = vtrnq_f32(load(in + 2 * in_stride), load(in + 3 * in_stride));
  for (int i = 0; i < 2; ++i) {
    put(out + i * out_stride, vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i])));
    put(out + (2 + i) * out_stride, vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i])));
  }
}
#else
LK_INLINE Vec splat(float f) { return Vec{f, f, f, f}; }
LK_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
LK_INLINE float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
template <class T>
LK_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
LK_INLINE Vec round_half(Vec v) {
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(to_half(v[i]));
  return v;
}

LK_INLINE void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int c = 0; c < kLanes; ++c)
    for (int i = 0; i < kLanes; ++i) out[c * out_stride + i] = in[i * in_stride + c];
}
#endif

template <class T>
LK_INLINE void put(T* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) store(p + i, v[i]);
}

#endif

// The first `count` lanes; the others are 0.
template <class T>
LK_INLINE Vec load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? to_float(p[i]) : 0.0f;
  return load(lanes);
}

// fp32 rounded to T, as fp32.
LK_INLINE Vec rounded(Vec v, float) { return v; }
LK_INLINE Vec rounded(Vec v, Half) { return round_half(v); }
LK_INLINE Vec rounded(Vec v, BFloat16) {
  const Words bits = (Words)v;
  const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Words quiet = bits | 0x00400000u;
  const Words number = (Words)(v == v);
  return (Vec)(((number & nearest) | (~number & quiet)) & 0xffff0000u);
}

template <class T>
LK_INLINE void widen(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) put(out + i, load(in + i));
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

template <class T>
LK_INLINE void narrow(const float* in, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) put(out + i, load(in + i));
  for (; i < count; ++i) store(out + i, in[i]);
}

// Elements [first, first + count) of an array of any float type, as fp32, and back.
inline void widen(const void* in, Dtype dtype, int64_t first, int64_t count, float* out) {
  switch (dtype) {
    case Dtype::f16:
      return widen(static_cast<const Half*>(in) + first, count, out);
    case Dtype::bf16:
      return widen(static_cast<const BFloat16*>(in) + first, count, out);
    default:
      return widen(static_cast<const float*>(in) + first, count, out);
  }
}

inline void narrow(const float* in, int64_t count, Dtype dtype, void* out, int64_t first) {
  switch (dtype) {
    case Dtype::f16:
      return narrow(in, count, static_cast<Half*>(out) + first);
    case Dtype::bf16:
      return narrow(in, count, static_cast<BFloat16*>(out) + first);
    default:
      return narrow(in, count, static_cast<float*>(out) + first);
  }
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
