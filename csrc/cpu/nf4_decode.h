// Decoding of NF4/FP4 blocks for the tier being compiled. The 16 values of a block are multiplied
// with its absmax and rounded to the output type once; elements are then table look-ups. The result
// is exactly round(table[code] * absmax), on every tier.
//
// Each tier has scaled_table, which makes the table of a block, and decode32: 16 bytes -> 32
// elements.
#pragma once

#include <cstdint>

#include "lora_kernels/nf4.h"
#include "target.h"

namespace lora_kernels {
namespace {

#if LK_AVX512

// 32 16-bit words: the 16 of the table twice, as vpermw takes five bits of an index.
struct WordTable {
  __m512i words;
};

LK_INLINE __m256i round_words(__m512 v, BFloat16) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i nan = _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi32(int(0x80000000u))),
                                      _mm512_set1_epi32(0x7fc00000));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), nan);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

LK_INLINE __m256i round_words(__m512 v, Half) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

template <class Out>
LK_INLINE WordTable scaled_table(const float* table, float scale, const Out*) {
  const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
  return {_mm512_broadcast_i64x4(round_words(v, Out{}))};
}

LK_INLINE __m512 scaled_table(const float* table, float scale, const float*) {
  return _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
}

// The 16 bytes as 32 words, each byte twice, its high nibble first. The look-up takes the lowest
// bits; those above are arbitrary.
LK_INLINE __m512i spread_words(const uint8_t* packed) {
  const __m512i pairs = _mm512_set_epi64(INT64_C(0x800f800f800e800e), INT64_C(0x800d800d800c800c),
                                         INT64_C(0x800b800b800a800a), INT64_C(0x8009800980088008),
                                         INT64_C(0x8007800780068006), INT64_C(0x8005800580048004),
                                         INT64_C(0x8003800380028002), INT64_C(0x8001800180008000));
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, pairs), _mm512_set1_epi32(4));
}

// The same with 8 bytes as 16 32-bit lanes.
LK_INLINE __m512i spread_lanes(const uint8_t* packed) {
  const __m512i pairs =
      _mm512_set_epi32(int(0x80808007), int(0x80808007), int(0x80808006), int(0x80808006),
                       int(0x80808005), int(0x80808005), int(0x80808004), int(0x80808004),
                       int(0x80808003), int(0x80808003), int(0x80808002), int(0x80808002),
                       int(0x80808001), int(0x80808001), int(0x80808000), int(0x80808000));
  int64_t eight;
  __builtin_memcpy(&eight, packed, 8);
  return _mm512_srlv_epi32(_mm512_shuffle_epi8(_mm512_set1_epi64(eight), pairs),
                           _mm512_set1_epi64(4));
}

template <class Out>
LK_INLINE void decode32(const uint8_t* packed, WordTable table, Out* out) {
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(spread_words(packed), table.words));
}

LK_INLINE void decode32(const uint8_t* packed, __m512 table, float* out) {
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(spread_lanes(packed), table));
  _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(spread_lanes(packed + 8), table));
}

#elif LK_AVX2

// The low and the high bytes of 16 words, in both 128-bit lanes: pshufb looks up bytes.
struct WordTable {
  __m256i low, high;
};
struct FloatTable {
  __m256 first, second;
};

// Rounds to 8 words, in the low halves of 32-bit lanes.
LK_INLINE __m256i round_words(__m256 v, BFloat16) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(int(0x80000000u))),
                                      _mm256_set1_epi32(0x7fc00000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
}

LK_INLINE __m256i round_words(__m256 v, Half) {
  return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

LK_INLINE FloatTable scaled_table(const float* table, float scale, const float*) {
  const __m256 s = _mm256_set1_ps(scale);
  return {_mm256_mul_ps(_mm256_loadu_ps(table), s), _mm256_mul_ps(_mm256_loadu_ps(table + 8), s)};
}

template <class Out>
LK_INLINE WordTable scaled_table(const float* table, float scale, const Out*) {
  const FloatTable v = scaled_table(table, scale, static_cast<const float*>(nullptr));
  const __m256i first = round_words(v.first, Out{}), second = round_words(v.second, Out{});
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), _MM_SHUFFLE(3, 1, 2, 0));
  const auto both = [](__m256i w) {  // 16 words below 256 -> 16 bytes in both lanes
    const __m256i bytes = _mm256_packus_epi16(w, w);
    return _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(2, 0, 2, 0));
  };
  return {both(_mm256_and_si256(words, _mm256_set1_epi16(0xff))),
          both(_mm256_srli_epi16(words, 8))};
}

// 32 codes in order, one a byte.
LK_INLINE __m256i codes32(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i odd = _mm_and_si128(bytes, mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

template <class Out>
LK_INLINE void decode32(const uint8_t* packed, const WordTable& table, Out* out) {
  const __m256i codes = codes32(packed);
  const __m256i low = _mm256_shuffle_epi8(table.low, codes);
  const __m256i high = _mm256_shuffle_epi8(table.high, codes);
  const __m256i a = _mm256_unpacklo_epi8(low, high);  // elements 0-7, 16-23
  const __m256i b = _mm256_unpackhi_epi8(low, high);  // elements 8-15, 24-31
  __m256i* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
}

LK_INLINE void decode32(const uint8_t* packed, const FloatTable& table, float* out) {
  const __m256i codes = codes32(packed);
  const __m128i halves[2] = {_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1)};
  for (int i = 0; i < 4; ++i) {
    const __m128i half = halves[i >> 1];
    const __m256i c = _mm256_cvtepu8_epi32((i & 1) ? _mm_srli_si128(half, 8) : half);
    // Bit 3 of the code, moved to the sign, picks the half of the table.
    const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(c, 28));
    _mm256_storeu_ps(out + 8 * i,
                     _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.first, c),
                                      _mm256_permutevar8x32_ps(table.second, c), pick));
  }
}

#elif LK_NEON

// The bytes of 16 elements, lowest first: tbl looks up bytes.
struct WordTable {
  uint8x16_t byte[2];
};
struct FloatTable {
  uint8x16_t byte[4];
};

template <class Out>
LK_INLINE WordTable scaled_table(const float* table, float scale, const Out*) {
  Out scaled[16];
  for (int c = 0; c < 16; ++c) store(&scaled[c], table[c] * scale);
  const uint8x16x2_t split = vld2q_u8(reinterpret_cast<const uint8_t*>(scaled));
  return {{split.val[0], split.val[1]}};
}

LK_INLINE FloatTable scaled_table(const float* table, float scale, const float*) {
  float scaled[16];
  for (int c = 0; c < 16; ++c) scaled[c] = table[c] * scale;
  const uint8x16x4_t split = vld4q_u8(reinterpret_cast<const uint8_t*>(scaled));
  return {{split.val[0], split.val[1], split.val[2], split.val[3]}};
}

// 32 codes in order, one a byte.
LK_INLINE uint8x16x2_t codes32(const uint8_t* packed) {
  const uint8x16_t bytes = vld1q_u8(packed);
  return vzipq_u8(vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15)));
}

template <class Out>
LK_INLINE void decode32(const uint8_t* packed, const WordTable& table, Out* out) {
  const uint8x16x2_t codes = codes32(packed);
  for (int i = 0; i < 2; ++i) {
    const uint8x16x2_t words = {
        {vqtbl1q_u8(table.byte[0], codes.val[i]), vqtbl1q_u8(table.byte[1], codes.val[i])}};
    vst2q_u8(reinterpret_cast<uint8_t*>(out + 16 * i), words);
  }
}

LK_INLINE void decode32(const uint8_t* packed, const FloatTable& table, float* out) {
  const uint8x16x2_t codes = codes32(packed);
  for (int i = 0; i < 2; ++i) {
    const uint8x16x4_t words = {
        {vqtbl1q_u8(table.byte[0], codes.val[i]), vqtbl1q_u8(table.byte[1], codes.val[i]),
         vqtbl1q_u8(table.byte[2], codes.val[i]), vqtbl1q_u8(table.byte[3], codes.val[i])}};
    vst4q_u8(reinterpret_cast<uint8_t*>(out + 16 * i), words);
  }
}

#else

template <class Out>
struct CodeTable {
  Out value[16];
};

template <class Out>
LK_INLINE CodeTable<Out> scaled_table(const float* table, float scale, const Out*) {
  CodeTable<Out> scaled;
  for (int c = 0; c < 16; ++c) store(&scaled.value[c], table[c] * scale);
  return scaled;
}

template <class Out>
LK_INLINE void decode32(const uint8_t* packed, const CodeTable<Out>& table, Out* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = table.value[packed[i] >> 4];
    out[2 * i + 1] = table.value[packed[i] & 15];
  }
}

#endif

// Decodes `count` elements of one block from an even position on, with the table of the block.
template <class Table, class Out>
LK_INLINE void decode(const uint8_t* packed, int64_t count, const Table& scaled, Out* out) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) decode32(packed + i / 2, scaled, out + i);
  if (i < count) {
    uint8_t bytes[16] = {};
    Out tail[32];
    const int64_t rest = count - i;
    for (int64_t j = 0; j < (rest + 1) / 2; ++j) bytes[j] = packed[i / 2 + j];
    decode32(bytes, scaled, tail);
    for (int64_t j = 0; j < rest; ++j) out[i + j] = tail[j];
  }
}

template <class Out>
LK_INLINE void decode(const uint8_t* packed, int64_t count, const float* table, float scale,
                      Out* out) {
  decode(packed, count, scaled_table(table, scale, out), out);
}

}  // namespace
}  // namespace lora_kernels
