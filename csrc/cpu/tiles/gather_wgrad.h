// The gradients of rank pages (wgrad) on AMX tiles.
//
// C[rank, 16 columns] += A[rank, 32 entries] · B[entries, columns]. The sums of the entries are
// rounded to bf16 and transposed into A tiles, for all pages of the adapter; the rows of the
// entries, two interleaved, are packed as B tiles.
#pragma once

#include "tiles/gather_shrink.h"

#if LK_AMX

namespace lora_kernels {
namespace {

// Packs an A tile: 16 ranks from `rank` on, 32 entries of a group from `first` on.
inline void pack_entries(const GatherPass& f, const SlotGroup& g, int64_t first, int64_t rank,
                         char* tile) {
  const __mmask16 mask = lanes16(g.rank - rank);
  const auto row = [&](int64_t i) {
    if (i >= g.count) return _mm512_setzero_si512();
    const __m512 sums = _mm512_maskz_loadu_ps(mask, f.sums + g.entries[i] * f.width + rank);
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(sums));
  };
  __m512i v[16];
  for (int64_t q = 0; q < 16; ++q)  // a 32-bit word: one rank of two entries
    v[q] = _mm512_or_si512(row(first + 2 * q), _mm512_slli_epi32(row(first + 2 * q + 1), 16));
  transpose16(v);
  for (int r = 0; r < 16; ++r) _mm512_store_si512(tile + 64 * r, v[r]);
}

// Packs four B tiles: 64 columns of 32 entries. Dropped elements become zero.
inline void pack_rows(const GatherPass& f, const SlotGroup& g, const MatrixView& m, int64_t first,
                      int64_t word, char* tiles) {
  const int64_t c = word * kWord;
  const bool masked = drops_tiles(f, g);
  const auto row = [&](int64_t i, __m512i v[2]) {
    v[0] = v[1] = _mm512_setzero_si512();
    if (i >= g.count) return;
    const int64_t e = g.entries[i];
    const uint64_t keep =
        masked ? keep_mask64(dropout_of(f, g), uint32_t(f.dropout.rows[e]), uint32_t(word))
               : ~uint64_t(0);
    const uint16_t* p = static_cast<const uint16_t*>(m.data) + f.tokens[e] * m.stride + c;
    for (int h = 0; h < 2; ++h)
      v[h] = _mm512_maskz_loadu_epi16(lanes32(f.columns - c - 32 * h) & uint32_t(keep >> (32 * h)),
                                      p + 32 * h);
  };
  for (int64_t q = 0; q < 16; ++q) {
    __m512i even[2], odd[2];
    row(first + 2 * q, even);
    row(first + 2 * q + 1, odd);
    for (int h = 0; h < 2; ++h) {
      char* to = tiles + 2 * h * kTileBytes + q * 64;
      _mm512_store_si512(to, _mm512_unpacklo_epi16(even[h], odd[h]));
      _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(even[h], odd[h]));
    }
  }
}

inline bool wgrad_tiles(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  bool ok = true;
  const auto units = [&](const SlotGroup& g) {
    return Work{ceil_div(f.columns, kWord), ceil_div(g.count, kTile) + pages_of(g)};
  };
  for_each_unit(f, parallel, units, [&](const SlotGroup& g, int64_t from, int64_t to) {
    const int64_t depth = ceil_div(g.count, kTileDepth), pages = pages_of(g);
    char* left =
        static_cast<char*>(thread_scratch(kGatherTiles, size_t((pages + 4) * depth * kTileBytes)));
    if (left == nullptr) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    char* right = left + pages * depth * kTileBytes;
    Tiles tiles;
    tiles.use(kTile, kTile, kTile);
    for (int64_t p = 0; p < pages; ++p)
      for (int64_t d = 0; d < depth; ++d)
        pack_entries(f, g, d * kTileDepth, p * kPage, left + (p * depth + d) * kTileBytes);
    const __m512 factor = _mm512_set1_ps(kept_factor(f, g));
    alignas(64) float sum[4][256];
    for (int64_t w = from; w < to; ++w) {
      for (int64_t d = 0; d < depth; ++d)
        pack_rows(f, g, m, d * kTileDepth, w, right + d * 4 * kTileBytes);
      for (int64_t p = 0; p < pages; ++p) {
        zero_accumulators(tiles);
        for (int64_t d = 0; d < depth; ++d)
          multiply_four(tiles, left + (p * depth + d) * kTileBytes, right + d * 4 * kTileBytes,
                        kTileBytes);
        store_accumulators(tiles, sum[0]);
        const int64_t c = w * kWord;
        BFloat16* page = const_cast<BFloat16*>(page_row<BFloat16>(f, g, p * kPage)) + c;
        for (int64_t r = 0; r < kPage; ++r) {
          __m512 v[4] = {};
          if (p * kPage + r < g.rank) row_in_order(sum, r, v);
          for (int i = 0; i < 4; i += 2)
            _mm512_mask_storeu_epi16(
                page + r * f.columns + 16 * i, lanes32(f.columns - c - 16 * i),
                round_pair(_mm512_mul_ps(v[i], factor), _mm512_mul_ps(v[i + 1], factor)));
        }
      }
    }
  });
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
