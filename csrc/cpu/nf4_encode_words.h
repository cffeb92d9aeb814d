// Encoding of many consecutive NF4/FP4 blocks with AVX-512, 16 blocks at a time so that no block
// waits for the one before.
//
// A 16-bit x is compared with the thresholds without converting it to fp32. As x * inverse,
// rounded, never decreases with x, each threshold has a cut: the largest 16-bit number that is not
// above it. An x is above the threshold exactly where it is above the cut. With the 15 cuts of a
// block, 32 words are searched at once.
#pragma once

#include "nf4_encode.h"

namespace lora_kernels {
namespace {

#if LK_AVX512

constexpr int kXorAnd = 0x78;
constexpr int kEncodeBlocks = 16;

// Keeps a constant in a register or on the stack. GCC would broadcast it again for every block,
// which takes the execution port that comparisons and look-ups need.
LK_INLINE __m512i kept(__m512i v) {
  __asm__("" : "+v"(v));
  return v;
}
LK_INLINE __m512i kept_lanes(int v) { return kept(_mm512_set1_epi32(v)); }
LK_INLINE __m512i kept_words(short v) { return kept(_mm512_set1_epi16(v)); }

// Word i is 2 * (first + stride * i): the index of the low word of a 32-bit lane.
LK_INLINE __m512i lane_index(int first, int stride) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = uint16_t(2 * (first + stride * i));
  return kept(_mm512_load_si512(index));
}

// The 15 thresholds in order, and the constants for making cuts and for searching.
struct Thresholds {
  __m512 exact;  // one a lane, the last is not used
  __m512 above;  // by more than all roundings of a cut, by less than a 16-bit number
  __m512 step8, step4_low, step4_high, step2, step1;
  __m512i order;  // words: the code of each rank
  bool sorted;    // the code is the rank

  const __m512i at8 = lane_index(7, 0), at4_low = lane_index(3, 0), at4_high = lane_index(11, 0);
  const __m512i at2 = lane_index(1, 1), at1 = lane_index(0, 1);
  const __m512i lane8 = kept_lanes(8), lane4 = kept_lanes(4), lane2 = kept_lanes(2);
  const __m512i lane1 = kept_lanes(1), lane_low = kept_lanes(0xffff);
  const __m512i lane_word = kept_lanes(0x7fff), lane_magnitude = kept_lanes(0x7fffffff);
  const __m512i word8 = kept_words(8), word4 = kept_words(4), word2 = kept_words(2);
  const __m512i word1 = kept_words(1), word_magnitude = kept_words(0x7fff);
  const __m512i pair = kept_lanes(0x00010010);  // high nibble first

  LK_INLINE explicit Thresholds(int quant_type) : sorted(quant_type == kNf4) {
    float t[32] = {}, more[16] = {};
    for (int i = 0; i < 15; ++i) {
      t[i] = code_threshold(quant_type, i);
      more[i] = t[i] + (t[i] < 0 ? -t[i] : t[i]) * 0x1p-20f;
    }
    exact = step1 = _mm512_loadu_ps(t);
    above = _mm512_loadu_ps(more);
    step8 = _mm512_set1_ps(t[7]);
    step4_low = _mm512_set1_ps(t[3]);
    step4_high = _mm512_set1_ps(t[11]);
    step2 = _mm512_loadu_ps(t + 1);
    order = _mm512_broadcast_i64x4(_mm256_cvtepu8_epi16(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodeOrder[quant_type]))));
  }

  // The largest number of the 16-bit type that is not above v, in each lane: as a float, and in
  // *ordered as an integer that is ordered as the numbers are. v is neither subnormal nor huge.
  LK_INLINE __m512 floor16(__m512 v, __m512i* ordered, BFloat16) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i negative = _mm512_srai_epi32(bits, 31);
    const __m512i all = _mm512_ternarylogic_epi32(bits, negative, lane_magnitude, kXorAnd);
    *ordered = _mm512_srai_epi32(_mm512_sub_epi32(all, _mm512_and_si512(negative, lane_low)), 16);
    const __m512i word = _mm512_ternarylogic_epi32(*ordered, negative, lane_word, kXorAnd);
    return _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
  }
  LK_INLINE __m512 floor16(__m512 v, __m512i* ordered, Half) const {
    const __m256i words = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512i lanes = _mm512_cvtepi16_epi32(words);
    *ordered = _mm512_ternarylogic_epi32(lanes, _mm512_srai_epi32(lanes, 31), lane_word, kXorAnd);
    return _mm512_cvtph_ps(words);
  }
};

// The cuts of one block, arranged for the four steps of the search.
struct Cuts {
  __m512i step8, step4_low, step4_high, step2, step1;

  template <class In>
  LK_INLINE Cuts(const Thresholds& t, float absmax, float inverse, In type) {
    __m512i cut;
    const __m512 candidate = t.floor16(_mm512_mul_ps(t.above, _mm512_set1_ps(absmax)), &cut, type);
    const __m512 scaled = _mm512_mul_ps(candidate, _mm512_set1_ps(inverse));
    const __mmask16 over = _mm512_cmp_ps_mask(scaled, t.exact, _CMP_GT_OQ);
    cut = _mm512_mask_sub_epi32(cut, over, cut, t.lane1);
    step8 = _mm512_permutexvar_epi16(t.at8, cut);
    step4_low = _mm512_permutexvar_epi16(t.at4_low, cut);
    step4_high = _mm512_permutexvar_epi16(t.at4_high, cut);
    step2 = _mm512_permutexvar_epi16(t.at2, cut);
    step1 = _mm512_permutexvar_epi16(t.at1, cut);
  }

  // The ranks of 32 elements.
  LK_INLINE __m512i ranks(const Thresholds& t, __m512i x) const {
    x = _mm512_ternarylogic_epi32(x, _mm512_srai_epi16(x, 15), t.word_magnitude, kXorAnd);
    const __mmask32 m8 = _mm512_cmpgt_epi16_mask(x, step8);
    const __mmask32 m4 =
        _mm512_cmpgt_epi16_mask(x, _mm512_mask_blend_epi16(m8, step4_low, step4_high));
    __m512i p = _mm512_maskz_mov_epi16(m8, t.word8);
    p = _mm512_mask_add_epi16(p, m4, p, t.word4);
    const __mmask32 m2 = _mm512_cmpgt_epi16_mask(x, _mm512_permutexvar_epi16(p, step2));
    p = _mm512_mask_add_epi16(p, m2, p, t.word2);
    const __mmask32 m1 = _mm512_cmpgt_epi16_mask(x, _mm512_permutexvar_epi16(p, step1));
    return _mm512_mask_add_epi16(p, m1, p, t.word1);
  }
};

// Encodes one block of 16-bit elements; ordinary_absmax(absmax).
template <bool kSorted, class In>
LK_INLINE void encode_words(const Thresholds& t, const In* x, int64_t count, float absmax,
                            float inverse, uint8_t* packed) {
  const Cuts cuts(t, absmax, inverse, In{});
  for (int64_t i = 0; i < count; i += 32) {
    __m512i code = cuts.ranks(t, _mm512_loadu_si512(x + i));
    if (!kSorted) code = _mm512_permutexvar_epi16(code, t.order);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_madd_epi16(code, t.pair));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), bytes);
  }
}

// Whether cuts are exact: threshold * absmax is normal, and x * inverse is 0 for x = 0 only.
LK_INLINE bool ordinary_absmax(float absmax) { return absmax >= 0x1p-60f && absmax <= 0x1p15f; }

LK_INLINE __m512i ranks_floats(const Thresholds& t, __m512 v) {
  const __mmask16 m8 = _mm512_cmp_ps_mask(v, t.step8, _CMP_GT_OQ);
  const __mmask16 m4 =
      _mm512_cmp_ps_mask(v, _mm512_mask_blend_ps(m8, t.step4_low, t.step4_high), _CMP_GT_OQ);
  __m512i p = _mm512_maskz_mov_epi32(m8, t.lane8);
  p = _mm512_mask_add_epi32(p, m4, p, t.lane4);
  const __mmask16 m2 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(p, t.step2), _CMP_GT_OQ);
  p = _mm512_mask_add_epi32(p, m2, p, t.lane2);
  const __mmask16 m1 = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(p, t.step1), _CMP_GT_OQ);
  return _mm512_mask_add_epi32(p, m1, p, t.lane1);
}

// Encodes one block by way of fp32: any type, any absmax.
template <bool kSorted, class In>
LK_INLINE void encode_floats(const Thresholds& t, const In* x, int64_t count, float inverse,
                             uint8_t* packed) {
  const __m512 s = _mm512_set1_ps(inverse);
  const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  for (int64_t i = 0; i < count; i += 32) {
    const __m512i a = ranks_floats(t, _mm512_mul_ps(load16(x + i), s));
    const __m512i b = ranks_floats(t, _mm512_mul_ps(load16(x + i + 16), s));
    __m512i both = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));  // as words
    if (!kSorted) both = _mm512_permutexvar_epi16(both, t.order);
    // In 64-bit lanes: a's even, b's even, a's odd, b's odd.
    const __m512i nibbles =
        _mm512_or_si512(_mm512_slli_epi64(both, 4), _mm512_srli_epi64(both, 32));
    const __m512i bytes = _mm512_or_si512(nibbles, _mm512_srli_epi64(nibbles, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2),
                     _mm_shuffle_epi8(_mm512_cvtepi64_epi16(bytes), halves));
  }
}

template <bool kSorted>
LK_INLINE void encode_block(const Thresholds& t, const float* x, int64_t count, float,
                            float inverse, uint8_t* packed) {
  encode_floats<kSorted>(t, x, count, inverse, packed);
}
template <bool kSorted, class In>
LK_INLINE void encode_block(const Thresholds& t, const In* x, int64_t count, float absmax,
                            float inverse, uint8_t* packed) {
  if (__builtin_expect(ordinary_absmax(absmax), 1))
    encode_words<kSorted>(t, x, count, absmax, inverse, packed);
  else
    encode_floats<kSorted>(t, x, count, inverse, packed);
}

// Encodes `count` whole blocks; returns how many come before the first with an element that is not
// finite.
template <class In>
LK_INLINE int64_t encode_blocks(int quant_type, const In* x, int64_t count, int64_t block_size,
                                uint8_t* packed, float* absmax) {
  const Thresholds t(quant_type);
  alignas(64) float scales[kEncodeBlocks], inverse[kEncodeBlocks];
  for (int64_t first = 0; first < count; first += kEncodeBlocks) {
    const int64_t blocks = count - first < kEncodeBlocks ? count - first : kEncodeBlocks;
    for (int64_t b = 0; b < blocks; ++b) {
      const uint32_t largest = max_magnitude32(x + (first + b) * block_size, block_size);
      if (__builtin_expect(largest >= infinity_bits(x), 0)) return first + b;
      scales[b] = absmax[first + b] = magnitude_float(largest, x);
    }
    for (int64_t b = blocks; b < kEncodeBlocks; ++b) scales[b] = 1.0f;
    const __m512 divisor = _mm512_max_ps(_mm512_load_ps(scales), _mm512_set1_ps(kMinAbsmax));
    _mm512_store_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1.0f), divisor));
    for (int64_t b = 0; b < blocks; ++b) {
      const In* from = x + (first + b) * block_size;
      for (int64_t i = 0; i < block_size; i += int64_t(64 / sizeof(In)))
        __builtin_prefetch(reinterpret_cast<const char*>(from + i) + 4096, 0, 3);
      uint8_t* to = packed + (first + b) * block_size / 2;
      if (t.sorted)
        encode_block<true>(t, from, block_size, scales[b], inverse[b], to);
      else
        encode_block<false>(t, from, block_size, scales[b], inverse[b], to);
    }
  }
  return count;
}

#else

template <class In>
LK_INLINE int64_t encode_blocks(int quant_type, const In* x, int64_t count, int64_t block_size,
                                uint8_t* packed, float* absmax) {
  const Encoder encoder(quant_type);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t at = b * block_size;
    if (!encode(encoder, x + at, block_size, packed + at / 2, absmax + b)) return b;
  }
  return count;
}

#endif

}  // namespace
}  // namespace lora_kernels
