// The shrink step over rank pages on AMX tiles, for bf16 pages and activations, and what the three
// passes on tiles share. (gather_expand.h, gather_wgrad.h: the other two.)
//
// C[rank, token] += A[rank, 32 columns] · B[columns, token]. The rows of a page are A tiles as they
// stand in memory; the tokens' rows are packed as B tiles, except that of a single token,
// which is a B tile already. An element of C is summed in the same order whatever other tokens are
// in the batch.
#pragma once

#include "gather_schedule.h"
#include "tiles/pack.h"

#if LK_AMX

namespace lora_kernels {
namespace {

// Slot of thread_scratch.
constexpr int kGatherTiles = 0;

LK_INLINE bool drops_tiles(const GatherPass& f, const SlotGroup& g) {
  return f.dropout.seeds != nullptr && f.dropout.thresholds[g.slot] != 0;
}
LK_INLINE Dropout dropout_of(const GatherPass& f, const SlotGroup& g) {
  return {uint64_t(f.dropout.seeds[g.slot]), f.dropout.stream,
          uint32_t(f.dropout.thresholds[g.slot])};
}
LK_INLINE float kept_factor(const GatherPass& f, const SlotGroup& g) {
  return drops_tiles(f, g) ? dropout_scale(uint32_t(f.dropout.thresholds[g.slot])) : 1.0f;
}

// Packs the rows of the entries [at, at + tokens) as B tiles of 64 * tokens bytes. Dropped elements
// become zero. The factor of kept ones is applied later, to the sums (`kept_factor`).
inline void pack_tokens(const GatherPass& f, const SlotGroup& g, const MatrixView& m, int64_t at,
                        int64_t tokens, char* to) {
  const bool masked = drops_tiles(f, g);
  const int64_t tiles = ceil_div(f.columns, kTileDepth);
  const auto row = [&](int64_t t) {
    return static_cast<const uint16_t*>(m.data) + f.tokens[g.entries[at + t]] * m.stride;
  };
  // Reads 64 columns, those of one word of the dropout mask.
  const auto read = [&](int64_t t, int64_t tile, __m512i* low, __m512i* high) {
    const int64_t c = tile * kTileDepth, left = f.columns - c;
    const uint64_t keep =
        masked ? keep_mask64(dropout_of(f, g), uint32_t(f.dropout.rows[g.entries[at + t]]),
                             uint32_t(c / kWord))
               : ~uint64_t(0);
    *low = _mm512_maskz_loadu_epi16(lanes32(left) & uint32_t(keep), row(t) + c);
    *high = _mm512_maskz_loadu_epi16(lanes32(left - 32) & uint32_t(keep >> 32), row(t) + c + 32);
  };
  __m512i v[2][16];
  for (int64_t k = 0; k < tiles; k += 2) {
    for (int64_t t = 0; t < tokens; ++t) read(t, k, &v[0][t], &v[1][t]);
    for (int64_t h = 0; h < min64(2, tiles - k); ++h) {
      char* tile = to + (k + h) * 64 * tokens;
      if (tokens == 1) {  // one row of x is already a tile
        _mm512_storeu_si512(tile, v[h][0]);
        continue;
      }
      for (int64_t t = tokens; t < kTile; ++t) v[h][t] = _mm512_setzero_si512();
      transpose16(v[h]);
      for (int q = 0; q < 16; ++q)
        _mm512_mask_storeu_epi32(tile + q * 4 * tokens, lanes16(tokens), v[h][q]);
    }
  }
}

// Row `row` of four tiles of sums, in the order of its 64 columns. Packing interleaved two rows,
// which put the columns 8 l .. 8 l + 3 of each 32 into one tile and the four after them into the
// next.
LK_INLINE void row_in_order(const float (*tiles)[256], int64_t row, __m512 v[4]) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int i = 0; i < 4; i += 2) {
    const __m512i a = _mm512_load_si512(tiles[i] + row * 16);
    const __m512i b = _mm512_load_si512(tiles[i + 1] + row * 16);
    v[i] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(a, low, b));
    v[i + 1] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(a, high, b));
  }
}

constexpr int64_t kAheadBytes = 512;  // how far ahead the rows of a page are prefetched into L2

// c [16, 16] = the first `ranks` rows of `page` · the packed tokens x.
inline void multiply_page(Tiles& tiles, const char* page, int64_t columns, int64_t ranks,
                          const char* x, int64_t tokens, float* c) {
  const int64_t stride = 2 * columns, whole = columns / kTileDepth, x_tile = 64 * tokens;
  // Four accumulators in turn, so that no product waits for the one before.
  zero_accumulators(tiles);
  int64_t k = 0;
#define LK_STEP_(sum, a, b)                                              \
  tiles.load<a>(page + k * 64, stride);                                  \
  tiles.load<b>(x + k * x_tile, 4 * tokens);                             \
  tiles.multiply<sum, a, b>();                                           \
  for (int64_t r = 0; r < ranks; ++r)                                    \
    _mm_prefetch(page + r * stride + k * 64 + kAheadBytes, _MM_HINT_T1); \
  ++k
  while (k + 4 <= whole) {
    LK_STEP_(0, 4, 6);
    LK_STEP_(1, 5, 7);
    LK_STEP_(2, 4, 6);
    LK_STEP_(3, 5, 7);
  }
  while (k < whole) {
    LK_STEP_(0, 4, 6);
  }
#undef LK_STEP_
  alignas(64) char tail[kTileBytes];
  if (const int64_t left = columns % kTileDepth; left != 0) {
    for (int64_t r = 0; r < ranks; ++r)
      _mm512_store_si512(tail + r * 64,
                         _mm512_maskz_loadu_epi16(lanes32(left), page + r * stride + k * 64));
    tiles.load<4>(tail, 64);
    tiles.load<6>(x + k * x_tile, 4 * tokens);
    tiles.multiply<0, 4, 6>();
  }
  alignas(64) float sums[4][256];
  store_accumulators(tiles, sums[0]);
  for (int64_t r = 0; r < ranks; ++r) {
    const auto of = [&](int i) { return _mm512_load_ps(sums[i] + r * 16); };
    _mm512_store_ps(c + r * 16,
                    _mm512_add_ps(_mm512_add_ps(of(0), of(1)), _mm512_add_ps(of(2), of(3))));
  }
}

constexpr int64_t kPagesTogether = 4;  // pages multiplied with tokens that are packed once

inline bool shrink_tiles(const GatherPass& f, const MatrixView& m, void* s, int64_t stride,
                         const Parallel& parallel) {
  const auto pieces = [](const SlotGroup& g) { return ceil_div(pages_of(g), kPagesTogether); };
  bool ok = true;
  const auto units = [&](const SlotGroup& g) {
    const int64_t panels = ceil_div(g.count, kTile);
    return Work{panels * pieces(g), min64(pages_of(g), kPagesTogether)};
  };
  for_each_unit(f, parallel, units, [&](const SlotGroup& g, int64_t from, int64_t to) {
    Tiles tiles;
    const int64_t depth = ceil_div(f.columns, kTileDepth);
    char* x =
        static_cast<char*>(thread_scratch(kGatherTiles, size_t(max64(depth, 1) * kTileBytes)));
    if (x == nullptr) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    alignas(64) float c[256];
    int64_t packed = -1;
    for (int64_t i = from; i < to; ++i) {
      const int64_t at = i / pieces(g) * kTile, tokens = min64(kTile, g.count - at);
      if (at != packed) pack_tokens(f, g, m, at, tokens, x);
      packed = at;
      const int64_t first = i % pieces(g) * kPagesTogether * kPage;
      for (int64_t j = first; j < min64(first + kPagesTogether * kPage, g.rank); j += kPage) {
        const int64_t ranks = min64(kPage, g.rank - j);
        tiles.use(ranks, kTile, tokens);
        multiply_page(tiles, reinterpret_cast<const char*>(page_row<BFloat16>(f, g, j)), f.columns,
                      ranks, x, tokens, c);
        __m512i v[16];
        const __m512 factor = _mm512_set1_ps(kept_factor(f, g));
        for (int64_t r = 0; r < kTile; ++r)
          v[r] = r < ranks ? _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(c + r * 16), factor))
                           : _mm512_setzero_si512();
        transpose16(v);  // a row: the ranks of a token
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t e = g.entries[at + t];
          const __m512 row = _mm512_castsi512_ps(v[t]);
          _mm512_mask_storeu_ps(f.sums + e * f.width + j, lanes16(ranks), row);
          if (s != nullptr)
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(s) + e * stride + j, lanes16(ranks),
                                     (__m256i)_mm512_cvtneps_pbh(row));
        }
      }
    }
  });
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
