// A, B and s of the LoRA branch as tiles.
#pragma once

#include "tiles/pack.h"

#if LK_BF16

namespace lora_kernels {
namespace {

// 16 elements of a diagonal; ones where there is none.
LK_INLINE __m512 diagonal16(const MatrixView& v, int64_t i, __mmask16 mask) {
  return v.data == nullptr ? _mm512_set1_ps(1.0f) : load_floats(v.data, v.dtype, i, mask);
}

LK_INLINE float diagonal(const MatrixView& v, int64_t i) {
  return v.data == nullptr ? 1.0f : _mm512_cvtss_f32(load_floats(v.data, v.dtype, i, 1));
}

// scale · g[n] · d[r] · B[n, r] for 16 ranks from r.
LK_INLINE __m512 scaled_b(const LoraView& lora, int64_t n, int64_t r) {
  const __mmask16 mask = lanes16(lora.r() - r);
  const __m512 b = load_floats(lora.b.data, lora.b.dtype, n * lora.b.stride + r, mask);
  const __m512 factor = _mm512_mul_ps(diagonal16(lora.rank_diag, r, mask),
                                      _mm512_set1_ps(lora.scale * diagonal(lora.out_diag, n)));
  return _mm512_maskz_mul_ps(mask, b, factor);
}

LK_INLINE int64_t rank_panels(const LoraView& lora) { return ceil_div(lora.r(), kTile); }
LK_INLINE int64_t rank_tiles(const LoraView& lora) { return ceil_div(lora.r(), kTileDepth); }

// The matrix B as A tiles, of the outputs [first, first + 16 * panels): the expand step of the
// forward.
LK_INLINE void pack_b_for_expand(const LoraView& lora, int64_t first, int64_t panels, int64_t n_end,
                                 char* to) {
  const int64_t depth = rank_tiles(lora);
  for (int64_t row = 0; row < panels * kTile; ++row)
    for (int64_t t = 0; t < depth; ++t) {
      __m512i v = _mm512_setzero_si512();
      if (first + row < n_end)
        v = round_pair(scaled_b(lora, first + row, t * kTileDepth),
                       scaled_b(lora, first + row, t * kTileDepth + 16));
      _mm512_store_si512(to + (row / kTile * depth + t) * kTileBytes + row % kTile * 64, v);
    }
}

// The matrix B as B tiles, of the ranks [r, r + 16), summed over N: ds of the backward.
LK_INLINE void pack_b_for_ds(const LoraView& lora, int64_t r, int64_t n, int64_t pairs, char* to) {
  for (int64_t q = 0; q < pairs; ++q) {
    const __m512 zero = _mm512_setzero_ps();
    const __m512 even = 2 * q < n ? scaled_b(lora, 2 * q, r) : zero;
    const __m512 odd = 2 * q + 1 < n ? scaled_b(lora, 2 * q + 1, r) : zero;
    const __m512i v = round_pair(even, odd);  // 16 of even, 16 of odd
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
    _mm512_store_si512(to + q * 64, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// Rounds the sums of s, [16 ranks][columns] fp32 with rows 64 bytes apart, and writes them to s[M,
// R] and to the B tiles of the expand step: 16 of the 32 ranks of a tile, half of it.
LK_INLINE void finish_s(const float* c, float factor, int64_t r, int64_t r_end, int64_t m,
                        int64_t m_end, int64_t columns, uint16_t* s, char* half_tile) {
  const __m512 f = _mm512_set1_ps(factor);
  __m512i t[16];
  for (int q = 0; q < 8; ++q) {
    const __m512i v = round_pair(_mm512_mul_ps(_mm512_load_ps(c + 32 * q), f),
                                 _mm512_mul_ps(_mm512_load_ps(c + 32 * q + 16), f));
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(v, 1));
    t[q] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    t[q + 8] = _mm512_setzero_si512();
    _mm512_mask_storeu_epi32(half_tile + q * 4 * columns, lanes16(columns), t[q]);
  }
  transpose16(t);  // a row: the 16 ranks of one m, in its low half
  const __mmask16 mask = lanes16(r_end - r);
  for (int64_t i = 0; i < min64(m_end - m, columns); ++i)
    _mm256_mask_storeu_epi16(s + (m + i) * r_end + r, mask, _mm512_castsi512_si256(t[i]));
}

}  // namespace
}  // namespace lora_kernels

#endif
