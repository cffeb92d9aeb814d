// 64 keep bits of a dropout mask at a time, for the tier being compiled (philox.h says which bits).
#pragma once

#include <cstdint>

#include "lora_kernels/philox.h"
#include "target.h"

namespace lora_kernels {
namespace {

#if LK_AVX512

// Eight counters, one in the low half of each 64-bit lane; what the high halves hold does not
// matter until the end. Lanes are ordered so that interleaving the words puts elements in order.
LK_INLINE uint64_t keep_mask64(const Dropout& d, uint32_t m, uint32_t chunk) {
  const __m512i lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i c0 = _mm512_add_epi64(lane, _mm512_set1_epi64(int64_t(chunk) * 8));
  __m512i c1 = _mm512_set1_epi64(m), c2 = _mm512_set1_epi64(d.stream), c3 = _mm512_setzero_si512();
  const __m512i mul0 = _mm512_set1_epi64(kPhiloxMul0), mul1 = _mm512_set1_epi64(kPhiloxMul1);
  uint32_t key0 = uint32_t(d.seed), key1 = uint32_t(d.seed >> 32);
  for (int r = 0; r < kDropoutRounds; ++r, key0 += kPhiloxKey0, key1 += kPhiloxKey1) {
    const __m512i p0 = _mm512_mul_epu32(c0, mul0), p1 = _mm512_mul_epu32(c2, mul1);
    constexpr int kXor3 = 0x96;
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(key0), kXor3);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(key1), kXor3);
    c1 = p1;
    c3 = p0;
  }
  constexpr __mmask16 kOddWords = 0xaaaa;
  const __m512i w01 = _mm512_mask_mov_epi32(c0, kOddWords, _mm512_slli_epi64(c1, 32));
  const __m512i w23 = _mm512_mask_mov_epi32(c2, kOddWords, _mm512_slli_epi64(c3, 32));
  // half > T - 1 is half >= T for T = 1 .. 65536.
  const __m512i t = _mm512_set1_epi16(short(d.threshold - 1));
  const uint64_t low = _mm512_cmpgt_epu16_mask(_mm512_unpacklo_epi64(w01, w23), t);
  const uint64_t high = _mm512_cmpgt_epu16_mask(_mm512_unpackhi_epi64(w01, w23), t);
  return d.threshold == 0 ? ~UINT64_C(0) : (high << 32 | low);
}

#elif LK_AVX2

// Four counters, as above; 32 keep bits.
LK_INLINE uint32_t keep_mask32(const Dropout& d, uint32_t m, uint32_t chunk) {
  __m256i c0 =
      _mm256_add_epi64(_mm256_setr_epi64x(0, 1, 2, 3), _mm256_set1_epi64x(int64_t(chunk) * 4));
  __m256i c1 = _mm256_set1_epi64x(m), c2 = _mm256_set1_epi64x(d.stream);
  __m256i c3 = _mm256_setzero_si256();
  const __m256i mul0 = _mm256_set1_epi64x(kPhiloxMul0), mul1 = _mm256_set1_epi64x(kPhiloxMul1);
  uint32_t key0 = uint32_t(d.seed), key1 = uint32_t(d.seed >> 32);
  for (int r = 0; r < kDropoutRounds; ++r, key0 += kPhiloxKey0, key1 += kPhiloxKey1) {
    const __m256i p0 = _mm256_mul_epu32(c0, mul0), p1 = _mm256_mul_epu32(c2, mul1);
    c0 =
        _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, _mm256_set1_epi64x(key0)));
    c2 =
        _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, _mm256_set1_epi64x(key1)));
    c1 = p1;
    c3 = p0;
  }
  const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
  const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
  // half >= T is max(half, T) == half; packs keeps the sign of the 16-bit results.
  const __m256i t = _mm256_set1_epi16(short(d.threshold));
  const __m256i a = _mm256_unpacklo_epi64(w01, w23);  // counters 0, 2
  const __m256i b = _mm256_unpackhi_epi64(w01, w23);  // counters 1, 3
  const __m256i keep = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(a, t), a),
                                          _mm256_cmpeq_epi16(_mm256_max_epu16(b, t), b));
  return d.threshold > 0xffffu ? 0u : uint32_t(_mm256_movemask_epi8(keep));
}

LK_INLINE uint64_t keep_mask64(const Dropout& d, uint32_t m, uint32_t chunk) {
  return keep_mask32(d, m, 2 * chunk) | uint64_t(keep_mask32(d, m, 2 * chunk + 1)) << 32;
}

#else

LK_INLINE uint64_t keep_mask64(const Dropout& d, uint32_t m, uint32_t chunk) {
  uint64_t keep = 0;
  for (uint32_t i = 0; i < 8; ++i) keep |= uint64_t(keep_bits8(d, m, chunk * 8 + i)) << (8 * i);
  return keep;
}

#endif

// Bit i -> byte i, 0 or 1.
LK_INLINE void store_bits(uint64_t bits, uint8_t* out) {
#if LK_AVX512
  _mm512_storeu_si512(out, _mm512_maskz_set1_epi8(bits, 1));
#elif LK_AVX2
  const __m256i pick = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i byte =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  for (int i = 0; i < 2; ++i) {
    const __m256i spread =
        _mm256_shuffle_epi8(_mm256_set1_epi32(int(uint32_t(bits >> (32 * i)))), byte);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, pick), pick);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i),
                        _mm256_and_si256(set, _mm256_set1_epi8(1)));
  }
#else
  for (int i = 0; i < 64; ++i) out[i] = (bits >> i) & 1u;
#endif
}

}  // namespace
}  // namespace lora_kernels
