// The expand step over rank pages on AMX tiles.
//
// C[token, 16 columns] += A[token, 32 ranks] · B[ranks, columns]. The sums of the shrink step are
// rounded to bf16 as A tiles; the rows of a page, two interleaved, are packed as B tiles.
#pragma once

#include "tiles/gather_shrink.h"

#if LK_AMX

namespace lora_kernels {
namespace {

// Packs the columns [c, c + 32 halves) of an adapter's pages as B tiles of `pairs` rows, in panels
// of 16 columns: [2 halves][depth][pairs][64 bytes]. Two interleaved rows give two panels: columns
// 8 l .. 8 l + 3 of each 32, and the four after them, l = 0 .. 3.
inline void pack_ranks(const GatherPass& f, const SlotGroup& g, int64_t c, int64_t halves,
                       int64_t depth, int64_t pairs, char* to) {
  for (int64_t d = 0; d < depth; ++d) {
    const char* row[kTileDepth];
    const int64_t there = min64(g.rank - 32 * d, 2 * pairs);
    for (int64_t r = 0; r < 2 * pairs; ++r)  // past the rank the last row stands in: it is masked
      row[r] =
          reinterpret_cast<const char*>(page_row<BFloat16>(f, g, 32 * d + min64(r, there - 1)) + c);
    for (int64_t h = 0; h < halves; ++h) {
      const __mmask32 mask = lanes32(f.columns - c - 32 * h);
      char* low = to + (2 * h * depth + d) * pairs * 64;
      char* high = low + depth * pairs * 64;
      const auto pair = [&](int64_t q, __mmask32 even_mask, __mmask32 odd_mask) {
        const char *p = row[2 * q] + 64 * h, *next = row[2 * q + 1] + 64 * h;
        const __m512i even = _mm512_maskz_loadu_epi16(even_mask, p);
        const __m512i odd = _mm512_maskz_loadu_epi16(odd_mask, next);
        _mm_prefetch(p + kAheadBytes, _MM_HINT_T1);
        _mm_prefetch(next + kAheadBytes, _MM_HINT_T1);
        _mm512_store_si512(low + q * 64, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(high + q * 64, _mm512_unpackhi_epi16(even, odd));
      };
      const int64_t full = there / 2;
      for (int64_t q = 0; q < full; ++q) pair(q, mask, mask);
      if (there % 2 != 0) pair(full, mask, 0);
      for (int64_t q = ceil_div(there, 2); q < pairs; ++q) pair(q, 0, 0);
    }
  }
}

// Tiles flush denormal numbers to zero. While this is alive, vectors do the same.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned before_;
};

// The expand step of one group of entries.
struct Expand {
  // Bytes of B tiles that stay in the L1 cache beside the A tiles of 16 tokens and their sums.
  static constexpr int64_t kBlockBytes = 24 << 10, kLongest = 512;
  // Up to this number of entries vectors are faster, as they need no packing. One token each for 64
  // adapters of rank 16, N = 4096, one thread: 0.42 ms against 0.64.
  static constexpr int64_t kVectorEntries = 4, kVectorColumns = 1024;
  const GatherPass& f;
  const SlotGroup& g;
  const float* factor;
  bool overwrite;
  const MatrixView& out;

  int64_t depth() const { return ceil_div(g.rank, kTileDepth); }
  int64_t pairs() const { return g.rank > kTile ? kTile : ceil_div(g.rank, 2); }
  int64_t column_bytes() const { return depth() * pairs() * 4; }
  int64_t block() const {
    return clamp64(kBlockBytes / column_bytes() / kWord * kWord, kWord, kLongest);
  }
  int64_t scratch() const { return block() * column_bytes() + depth() * kTileBytes; }
  int64_t size() const { return out.dtype == Dtype::f32 ? 4 : 2; }
  char* at(int32_t entry, int64_t c) const {
    return static_cast<char*>(const_cast<void*>(out.data)) +
           (f.tokens[entry] * out.stride + c) * size();
  }

  // The sums of an entry for 32 ranks from `rank` on, rounded; zeros past the adapter's rank.
  LK_INLINE __m512i sums32(int32_t entry, int64_t rank) const {
    const float* from = f.sums + entry * f.width + rank;
    const int64_t left = g.rank - rank;
    return round_pair(_mm512_maskz_loadu_ps(lanes16(left), from),
                      _mm512_maskz_loadu_ps(lanes16(left - 16), from + 16));
  }

  // out (+)= factor · drop'(v) for the 64 columns from c on, as far as they are below `end`.
  LK_INLINE void finish(int32_t entry, int64_t c, int64_t end, __m512 v[4]) const {
    const uint64_t keep =
        drops_tiles(f, g)
            ? keep_mask64(dropout_of(f, g), uint32_t(f.dropout.rows[entry]), uint32_t(c / kWord))
            : ~uint64_t(0);
    const __m512 by = _mm512_set1_ps(factor[entry] * kept_factor(f, g));
    char* to = at(entry, c);
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_maskz_mul_ps(__mmask16(keep >> (16 * i)), v[i], by);
      const __mmask16 mask = lanes16(end - c - 16 * i);
      if (!overwrite) v[i] = _mm512_add_ps(v[i], load_floats(to, out.dtype, 16 * i, mask));
      if (out.dtype == Dtype::f32)
        _mm512_mask_storeu_ps(reinterpret_cast<float*>(to) + 16 * i, mask, v[i]);
    }
    if (out.dtype == Dtype::f32) return;
    for (int i = 0; i < 4; i += 2)
      _mm512_mask_storeu_epi16(to + 32 * i, lanes32(end - c - 16 * i), round_pair(v[i], v[i + 1]));
  }

  // 64 columns, four panels of B tiles, for the tokens [first, first + tokens).
  LK_INLINE void word(Tiles& tiles, int64_t first, int64_t tokens, const char* sums,
                      const char* ranks, int64_t c, int64_t end) const {
    alignas(64) float sum[4][256];
    const int64_t tile = pairs() * 64, panel = depth() * tile;
    zero_accumulators(tiles);
    for (int64_t d = 0; d < depth(); ++d, ranks += tile)
      multiply_four(tiles, sums + d * kTileBytes, ranks, panel);
    store_accumulators(tiles, sum[0]);
    for (int64_t t = 0; t < tokens; ++t) {
      __m512 v[4];
      row_in_order(sum, t, v);
      finish(g.entries[first + t], c, end, v);
    }
  }

  void on_tiles(int64_t first, int64_t end, char* ranks) const {
    Tiles tiles;
    char* sums = ranks + block() * column_bytes();
    for (int64_t c = first; c < end; c += block()) {
      const int64_t words = ceil_div(min64(block(), end - c), kWord);
      pack_ranks(f, g, c, 2 * words, depth(), pairs(), ranks);
      for (int64_t panel = 0; panel < g.count; panel += kTile) {
        const int64_t tokens = min64(kTile, g.count - panel);
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t d = 0; d < depth(); ++d)
            _mm512_store_si512(sums + d * kTileBytes + t * 64,
                               sums32(g.entries[panel + t], d * kTileDepth));
        tiles.use(tokens, pairs(), kTile);
        for (int64_t w = 0; w < words; ++w)
          word(tiles, panel, tokens, sums, ranks + w * kWord * column_bytes(), c + w * kWord, end);
      }
    }
  }

  // The same sums on vectors: sums[token, halves, 16 even and 16 odd columns]. They are added in
  // the order of the tiles, so that both give the same bits: for each 32 ranks one chain over the
  // even and one over the odd ranks, whose sum is added to the total.
  template <int tokens>
  void vector_sums(int64_t c, int64_t halves, float* sums) const {
    const FlushDenormals mode;
    for (int64_t d = 0; d < depth(); ++d) {
      const int64_t ranks = min64(g.rank - d * kTileDepth, kTileDepth);
      alignas(64) float by[kTileDepth][tokens];
      for (int t = 0; t < tokens; ++t) {
        alignas(64) uint16_t rounded[kTileDepth];
        _mm512_store_si512(rounded, sums32(g.entries[t], d * kTileDepth));
        for (int64_t r = 0; r < kTileDepth; ++r) by[r][t] = to_float(BFloat16{rounded[r]});
      }
      const char* row[kTileDepth];
      for (int64_t r = 0; r < ranks; ++r)
        row[r] = reinterpret_cast<const char*>(page_row<BFloat16>(f, g, d * kTileDepth + r) + c);
      for (int64_t h = 0; h < halves; ++h) {
        const __mmask32 mask = lanes32(f.columns - c - 32 * h);
        __m512 chain[2][tokens][2] = {};
        const auto add = [&](int64_t r, __m512(*to)[2]) __attribute__((always_inline)) {
          const __m512i v = _mm512_maskz_loadu_epi16(mask, row[r] + 64 * h);
          _mm_prefetch(row[r] + 64 * h + kAheadBytes, _MM_HINT_T1);
          const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
          const __m512 odd =
              _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000u))));
          for (int t = 0; t < tokens; ++t) {
            const __m512 factor = _mm512_set1_ps(by[r][t]);
            to[t][0] = _mm512_fmadd_ps(factor, even, to[t][0]);
            to[t][1] = _mm512_fmadd_ps(factor, odd, to[t][1]);
          }
        };
        int64_t r = 0;
        for (; r + 2 <= ranks; r += 2) {
          add(r, chain[0]);
          add(r + 1, chain[1]);
        }
        if (r < ranks) add(r, chain[0]);
        for (int t = 0; t < tokens; ++t)
          for (int i = 0; i < 2; ++i) {
            float* to = sums + t * kVectorColumns + 32 * h + 16 * i;
            const __m512 before = d == 0 ? _mm512_setzero_ps() : _mm512_load_ps(to);
            _mm512_store_ps(to,
                            _mm512_add_ps(before, _mm512_add_ps(chain[0][t][i], chain[1][t][i])));
          }
      }
    }
  }

  void on_vectors(int64_t first, int64_t end) const {
    alignas(64) float sums[kVectorEntries * kVectorColumns];
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t c = first; c < end; c += kVectorColumns) {
      const int64_t words = ceil_div(min64(kVectorColumns, end - c), kWord);
      switch (g.count) {
        case 1:
          vector_sums<1>(c, 2 * words, sums);
          break;
        case 2:
          vector_sums<2>(c, 2 * words, sums);
          break;
        case 3:
          vector_sums<3>(c, 2 * words, sums);
          break;
        default:
          vector_sums<4>(c, 2 * words, sums);
      }
      for (int64_t t = 0; t < g.count; ++t)
        for (int64_t w = 0; w < words; ++w) {
          const float* from = sums + t * kVectorColumns + w * kWord;
          __m512 v[4];
          for (int i = 0; i < 4; i += 2) {
            const __m512 even = _mm512_load_ps(from + 16 * i),
                         odd = _mm512_load_ps(from + 16 * i + 16);
            v[i] = _mm512_permutex2var_ps(even, low, odd);
            v[i + 1] = _mm512_permutex2var_ps(even, high, odd);
          }
          finish(g.entries[t], c + w * kWord, end, v);
        }
    }
  }

  void zero(int64_t first, int64_t end) const {
    for (int64_t i = 0; i < g.count; ++i)
      __builtin_memset(at(g.entries[i], first), 0, size_t((end - first) * size()));
  }
};

inline bool expand_tiles(const GatherPass& f, const float* factor, bool overwrite,
                         const MatrixView& out, const Parallel& parallel) {
  bool ok = true;
  for_each_column_block(f, parallel, [&](const SlotGroup& g, int64_t first, int64_t end) {
    const Expand call{f, g, factor, overwrite, out};
    if (g.rank == 0) {
      if (overwrite) call.zero(first, end);
      return;
    }
    if (g.count <= Expand::kVectorEntries) return call.on_vectors(first, end);
    char* ranks = static_cast<char*>(thread_scratch(kGatherTiles, size_t(call.scratch())));
    if (ranks == nullptr) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
    call.on_tiles(first, end, ranks);
  });
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
