// Encoding of NF4/FP4 blocks for the tier being compiled. Four comparisons count how many of the 15
// thresholds are below x * (1 / absmax). That count is the rank of x among the 16 values, and a
// table gives the code of each rank.
//
// Each tier has Encoder (the thresholds of a quant type), encode32: 32 elements -> 16 bytes, and
// max_magnitude32: the bits of max |x| as an unsigned integer. Infinity and NaN are larger than
// every finite number in that order, so the check for them costs nothing.
#pragma once

#include <cstdint>

#include "lora_kernels/nf4.h"
#include "target.h"

namespace lora_kernels {
namespace {

LK_INLINE uint32_t magnitude_bits(float v) { return float_bits(v) & 0x7fffffffu; }
LK_INLINE uint32_t magnitude_bits(Half v) { return v.bits & 0x7fffu; }
LK_INLINE uint32_t magnitude_bits(BFloat16 v) { return v.bits & 0x7fffu; }

// The magnitude bits of infinity; those of NaN are larger.
LK_INLINE uint32_t infinity_bits(const float*) { return 0x7f800000u; }
LK_INLINE uint32_t infinity_bits(const Half*) { return 0x7c00u; }
LK_INLINE uint32_t infinity_bits(const BFloat16*) { return 0x7f80u; }

LK_INLINE float magnitude_float(uint32_t bits, const float*) { return bits_float(bits); }
LK_INLINE float magnitude_float(uint32_t bits, const Half*) {
  return to_float(Half{static_cast<uint16_t>(bits)});
}
LK_INLINE float magnitude_float(uint32_t bits, const BFloat16*) { return bits_float(bits << 16); }

#if LK_AVX2
// The largest of 16 unsigned words.
LK_INLINE uint32_t max_word(__m256i v) {
  const __m128i m = _mm_max_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  // minpos of the complement
  return 0xffffu ^
         uint32_t(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi32(-1)))) &
                  0xffff);
}

// 32 ranks, one a byte -> 16 bytes of codes, the even element in the high nibble.
LK_INLINE void store_codes(__m256i ranks, __m128i order, uint8_t* packed) {
  const __m256i codes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(order), ranks);
  const __m256i words = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
  const __m256i bytes =
      _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), _MM_SHUFFLE(3, 1, 2, 0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(bytes));
}
#endif

#if LK_AVX512

LK_INLINE __m512 load16(const float* x) { return _mm512_loadu_ps(x); }
LK_INLINE __m512 load16(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
LK_INLINE __m512 load16(const BFloat16* x) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

struct Encoder {
  // step[s][p]: the threshold to compare with when the rank is known to be p .. p + 2 s - 1
  __m512 step8, step4, step2, step1;
  __m128i order;

  LK_INLINE explicit Encoder(int quant_type) {
    float t[32];
    for (int i = 0; i < 32; ++i) t[i] = i < 15 ? code_threshold(quant_type, i) : 0.0f;
    step8 = _mm512_set1_ps(t[7]);
    step4 = _mm512_loadu_ps(t + 3);
    step2 = _mm512_loadu_ps(t + 1);
    step1 = _mm512_loadu_ps(t);
    order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodeOrder[quant_type]));
  }

  LK_INLINE __m128i ranks16(__m512 v) const {
    const __mmask16 m8 = _mm512_cmp_ps_mask(v, step8, _CMP_GT_OQ);
    __m512i p = _mm512_maskz_set1_epi32(m8, 8);
    const __mmask16 m4 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(p, step4), _CMP_GT_OQ);
    p = _mm512_mask_or_epi32(p, m4, p, _mm512_set1_epi32(4));
    const __mmask16 m2 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(p, step2), _CMP_GT_OQ);
    p = _mm512_mask_or_epi32(p, m2, p, _mm512_set1_epi32(2));
    const __mmask16 m1 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(p, step1), _CMP_GT_OQ);
    p = _mm512_mask_or_epi32(p, m1, p, _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi8(p);
  }

  template <class In>
  LK_INLINE void encode32(const In* x, float inverse, uint8_t* packed) const {
    const __m512 s = _mm512_set1_ps(inverse);
    const __m128i a = ranks16(_mm512_mul_ps(load16(x), s));
    const __m128i b = ranks16(_mm512_mul_ps(load16(x + 16), s));
    store_codes(_mm256_set_m128i(b, a), order, packed);
  }
};

LK_INLINE uint32_t max_magnitude32(const float* x, int64_t count) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  __m512i a = _mm512_setzero_si512(), b = a;
  for (int64_t i = 0; i < count; i += 32) {
    a = _mm512_max_epu32(a, _mm512_and_si512(_mm512_loadu_si512(x + i), mask));
    b = _mm512_max_epu32(b, _mm512_and_si512(_mm512_loadu_si512(x + i + 16), mask));
  }
  return _mm512_reduce_max_epu32(_mm512_max_epu32(a, b));
}

template <class In>  // 16-bit
LK_INLINE uint32_t max_magnitude32(const In* x, int64_t count) {
  const __m512i mask = _mm512_set1_epi16(0x7fff);
  __m512i a = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32)
    a = _mm512_max_epu16(a, _mm512_and_si512(_mm512_loadu_si512(x + i), mask));
  return max_word(_mm256_max_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)));
}

#elif LK_AVX2

LK_INLINE __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
LK_INLINE __m256 load8(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
LK_INLINE __m256 load8(const BFloat16* x) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

struct Encoder {
  // Thresholds by the leading bits of the rank that are known.
  __m256 bit3, bit2, bit1, bit0;
  __m128i order;

  LK_INLINE explicit Encoder(int quant_type) {
    float t2[8], t1[8], t0[8];
    for (int i = 0; i < 8; ++i) {
      t2[i] = code_threshold(quant_type, 8 * (i & 1) + 3);
      t1[i] = code_threshold(quant_type, 4 * (i & 3) + 1);
      t0[i] = code_threshold(quant_type, 2 * i);
    }
    bit3 = _mm256_set1_ps(code_threshold(quant_type, 7));
    bit2 = _mm256_loadu_ps(t2);
    bit1 = _mm256_loadu_ps(t1);
    bit0 = _mm256_loadu_ps(t0);
    order = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodeOrder[quant_type]));
  }

  LK_INLINE static __m256i above(__m256 v, __m256 threshold) {  // -1 where v > threshold
    return _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ));
  }

  LK_INLINE __m256i ranks8(__m256 v) const {
    __m256i p = _mm256_sub_epi32(_mm256_setzero_si256(), above(v, bit3));
    p = _mm256_sub_epi32(_mm256_add_epi32(p, p), above(v, _mm256_permutevar8x32_ps(bit2, p)));
    p = _mm256_sub_epi32(_mm256_add_epi32(p, p), above(v, _mm256_permutevar8x32_ps(bit1, p)));
    return _mm256_sub_epi32(_mm256_add_epi32(p, p), above(v, _mm256_permutevar8x32_ps(bit0, p)));
  }

  template <class In>
  LK_INLINE void encode32(const In* x, float inverse, uint8_t* packed) const {
    const __m256 s = _mm256_set1_ps(inverse);
    const __m256i a = ranks8(_mm256_mul_ps(load8(x), s));
    const __m256i b = ranks8(_mm256_mul_ps(load8(x + 8), s));
    const __m256i c = ranks8(_mm256_mul_ps(load8(x + 16), s));
    const __m256i d = ranks8(_mm256_mul_ps(load8(x + 24), s));
    const __m256i mixed = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m256i sorted =
        _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    store_codes(sorted, order, packed);
  }
};

LK_INLINE uint32_t max_magnitude32(const float* x, int64_t count) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i m = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    m = _mm256_max_epu32(m, _mm256_and_si256(v, mask));
  }
  __m128i h = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  h = _mm_max_epu32(h, _mm_shuffle_epi32(h, _MM_SHUFFLE(1, 0, 3, 2)));
  h = _mm_max_epu32(h, _mm_shuffle_epi32(h, _MM_SHUFFLE(2, 3, 0, 1)));
  return uint32_t(_mm_cvtsi128_si32(h));
}

template <class In>  // 16-bit
LK_INLINE uint32_t max_magnitude32(const In* x, int64_t count) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  __m256i m = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    m = _mm256_max_epu16(m, _mm256_and_si256(v, mask));
  }
  return max_word(m);
}

#elif LK_NEON

LK_INLINE float32x4_t load4(const float* x) { return vld1q_f32(x); }
LK_INLINE float32x4_t load4(const Half* x) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x))));
}
LK_INLINE float32x4_t load4(const BFloat16* x) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x)), 16));
}

struct Encoder {
  float threshold[15];
  uint8x16_t order;

  LK_INLINE explicit Encoder(int quant_type) : order(vld1q_u8(kCodeOrder[quant_type])) {
    for (int i = 0; i < 15; ++i) threshold[i] = code_threshold(quant_type, i);
  }

  template <class In>
  LK_INLINE uint32x4_t ranks4(const In* x, float inverse) const {
    const float32x4_t v = vmulq_n_f32(load4(x), inverse);
    uint32x4_t rank = vdupq_n_u32(0);
    for (int i = 0; i < 15; ++i) rank = vsubq_u32(rank, vcgtq_f32(v, vdupq_n_f32(threshold[i])));
    return rank;
  }

  template <class In>
  LK_INLINE uint8x16_t codes16(const In* x, float inverse) const {
    const uint16x8_t a = vcombine_u16(vmovn_u32(ranks4(x, inverse)),  //
                                      vmovn_u32(ranks4(x + 4, inverse)));
    const uint16x8_t b =
        vcombine_u16(vmovn_u32(ranks4(x + 8, inverse)), vmovn_u32(ranks4(x + 12, inverse)));
    return vqtbl1q_u8(order, vcombine_u8(vmovn_u16(a), vmovn_u16(b)));
  }

  template <class In>
  LK_INLINE void encode32(const In* x, float inverse, uint8_t* packed) const {
    const uint8x16x2_t codes = vuzpq_u8(codes16(x, inverse), codes16(x + 16, inverse));
    vst1q_u8(packed, vorrq_u8(vshlq_n_u8(codes.val[0], 4), codes.val[1]));
  }
};

#else

struct Encoder {
  float threshold[15];
  const uint8_t* order;

  LK_INLINE explicit Encoder(int quant_type) : order(kCodeOrder[quant_type]) {
    for (int i = 0; i < 15; ++i) threshold[i] = code_threshold(quant_type, i);
  }

  LK_INLINE uint8_t code(float v) const {
    int p = v > threshold[7] ? 8 : 0;
    p += v > threshold[p + 3] ? 4 : 0;
    p += v > threshold[p + 1] ? 2 : 0;
    p += v > threshold[p] ? 1 : 0;
    return order[p];
  }

  template <class In>
  LK_INLINE void encode32(const In* x, float inverse, uint8_t* packed) const {
    for (int i = 0; i < 16; ++i) {
      packed[i] = static_cast<uint8_t>(code(to_float(x[2 * i]) * inverse) << 4 |
                                       code(to_float(x[2 * i + 1]) * inverse));
    }
  }
};

#endif

#if !LK_AVX2
template <class In>
LK_INLINE uint32_t max_magnitude32(const In* x, int64_t count) {
  uint32_t m = 0;
  for (int64_t i = 0; i < count; ++i) m = magnitude_bits(x[i]) > m ? magnitude_bits(x[i]) : m;
  return m;
}

#endif

// Encodes one block of `count` elements. False, with the outputs unspecified, where an element is
// not finite. An odd count is padded with the code of 0.
template <class In>
LK_INLINE bool encode(const Encoder& encoder, const In* x, int64_t count, uint8_t* packed,
                      float* absmax) {
  const int64_t whole = count & ~INT64_C(31);
  const int64_t rest = count - whole;
  In tail[32];
  uint32_t largest = max_magnitude32(x, whole);
  if (__builtin_expect(rest != 0, 0)) {
    for (int64_t i = 0; i < 32; ++i) tail[i] = i < rest ? x[whole + i] : In{};
    const uint32_t m = max_magnitude32(tail, 32);
    largest = m > largest ? m : largest;
  }
  if (__builtin_expect(largest >= infinity_bits(x), 0)) return false;

  *absmax = magnitude_float(largest, x);
  const float inverse = 1.0f / (*absmax > kMinAbsmax ? *absmax : kMinAbsmax);
  for (int64_t i = 0; i < whole; i += 32) encoder.encode32(x + i, inverse, packed + i / 2);
  if (__builtin_expect(rest != 0, 0)) {
    uint8_t bytes[16];
    encoder.encode32(tail, inverse, bytes);
    for (int64_t i = 0; i < (rest + 1) / 2; ++i) packed[whole / 2 + i] = bytes[i];
  }
  return true;
}

}  // namespace
}  // namespace lora_kernels
