// Decoding of many consecutive NF4/FP4 blocks. AVX-512 looks up 16-bit words in a table of 32, so
// it decodes two blocks at a time: their tables share a register and are rounded together.
#pragma once

#include <cstdint>

#include "lora_kernels/nf4.h"
#include "nf4_decode.h"
#include "target.h"

namespace lora_kernels {
namespace {

// Bytes by which the packed codes are prefetched ahead.
constexpr int64_t kDecodeAhead = 2048;

#if LK_AVX512

// Whether round_pair is exact for the 16 products of every scale: no product may be subnormal,
// infinite or NaN. (The smallest nonzero value of a code is above 2^-8.)
LK_INLINE bool ordinary(const float* scales, int64_t count, BFloat16) {
  const __m512i least = _mm512_set1_epi32((127 - 110) << 23);
  const __m512i infinity = _mm512_set1_epi32(0x7f800000);
  __mmask16 bad = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = __mmask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
    const __m512i magnitude = _mm512_and_si512(_mm512_maskz_loadu_epi32(lanes, scales + i),
                                               _mm512_set1_epi32(0x7fffffff));
    const __mmask16 nonzero = _mm512_test_epi32_mask(magnitude, magnitude);
    bad |= _mm512_mask_cmplt_epu32_mask(nonzero, magnitude, least);
    bad |= _mm512_cmpge_epu32_mask(magnitude, infinity);
  }
  return bad == 0;
}
LK_INLINE bool ordinary(const float*, int64_t, Half) { return true; }

// 16 words of `first`, then 16 of `second`.
LK_INLINE __m512i round_pair(__m512 first, __m512 second, BFloat16) {
#if LK_BF16
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
#else
  const auto rounded = [](__m512 v) {  // in the high words
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  };
  alignas(64) static constexpr uint16_t kHigh[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                     23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                     45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(rounded(first), _mm512_load_si512(kHigh), rounded(second));
#endif
}
LK_INLINE __m512i round_pair(__m512 first, __m512 second, Half) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(round_words(first, Half{})),
                            round_words(second, Half{}), 1);
}

// Stores past the caches (kPast; `p` is then 64-byte aligned) or through them.
template <bool kPast, class Out>
LK_INLINE void put64(Out* p, __m512i v) {
  if (kPast)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v);
  else
    _mm512_storeu_si512(p, v);
}

// kSteps: block_size / 32 where it is known when compiling; 0: any.
template <bool kPast, int kSteps, class Out>
LK_INLINE void decode_pairs(const uint8_t* packed, const float* scales, int64_t count,
                            int64_t block_size, const float* table, Out* out) {
  const int64_t steps = kSteps > 0 ? kSteps : block_size / 32;
  const __m512 codes = _mm512_loadu_ps(table);
  const __m512i nibble = _mm512_set1_epi16(15);
  constexpr int kAndOr = 0xea;
  for (int64_t b = 0; b < count; b += 2) {
    const __m512i words = round_pair(_mm512_mul_ps(codes, _mm512_set1_ps(scales[b])),
                                     _mm512_mul_ps(codes, _mm512_set1_ps(scales[b + 1])), Out{});
    for (int half = 0; half < 2; ++half) {
      const __m512i base = _mm512_set1_epi16(short(16 * half));
      for (int64_t i = 0; i < steps; ++i, packed += 16, out += 32) {
        if (i % 4 == 0 && (steps > 2 || half == 0)) __builtin_prefetch(packed + kDecodeAhead, 0, 3);
        const __m512i index = _mm512_ternarylogic_epi32(spread_words(packed), nibble, base, kAndOr);
        put64<kPast>(out, _mm512_permutexvar_epi16(index, words));
      }
    }
  }
}

// Decodes as many of the first of `count` blocks as this tier can; returns how many.
template <bool kPast, class Out>
LK_INLINE int64_t decode_most(const uint8_t* packed, const float* scales, int64_t count,
                              int64_t block_size, const float* table, Out* out) {
  if (!ordinary(scales, count, Out{})) return 0;
  count &= ~INT64_C(1);
  if (block_size == 64)
    decode_pairs<kPast, 2>(packed, scales, count, block_size, table, out);
  else
    decode_pairs<kPast, 0>(packed, scales, count, block_size, table, out);
  return count;
}
template <bool kPast>
LK_INLINE int64_t decode_most(const uint8_t* packed, const float* scales, int64_t count,
                              int64_t block_size, const float* table, float* out) {
  for (int64_t b = 0; b < count; ++b) {
    const __m512 scaled = scaled_table(table, scales[b], out);
    for (int64_t i = 0; i < block_size; i += 16, packed += 8, out += 16) {
      if (i % 128 == 0) __builtin_prefetch(packed + kDecodeAhead, 0, 3);
      put64<kPast>(out, _mm512_castps_si512(_mm512_permutexvar_ps(spread_lanes(packed), scaled)));
    }
  }
  return count;
}

#else

template <bool kPast, class Out>
LK_INLINE int64_t decode_most(const uint8_t*, const float*, int64_t, int64_t, const float*, Out*) {
  return 0;
}

#endif

// Decodes `count` whole blocks; past the caches if kPast, where the tier can.
template <bool kPast, class Out>
LK_INLINE void decode_blocks(const uint8_t* packed, const float* scales, int64_t count,
                             int64_t block_size, const float* table, Out* out) {
  int64_t b = decode_most<kPast>(packed, scales, count, block_size, table, out);
  for (; b < count; ++b) {
    const auto scaled = scaled_table(table, scales[b], out);
    const uint8_t* from = packed + b * block_size / 2;
    Out* to = out + b * block_size;
    for (int64_t i = 0; i < block_size; i += 32) {
      if (i % 128 == 0) __builtin_prefetch(from + i / 2 + kDecodeAhead, 0, 3);
      decode32(from + i / 2, scaled, to + i);
    }
  }
}

}  // namespace
}  // namespace lora_kernels
