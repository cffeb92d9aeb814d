// Packing: from readers (row_readers.h) to the panels of tiles that `multiply` (tiles.h) reads.
//
// A panel is 16 rows or columns of an operand, all tiles along the reduction in consecutive memory.
#pragma once

#include "tiles/row_readers.h"

#if LK_BF16

#include <new>

namespace lora_kernels {
namespace {

LK_INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Reads sixteen rows of a matrix together: `tiles` writes the four A tiles of a chunk of them.
template <class Reader>
struct PanelReader {
  explicit PanelReader(const Reader& prototype) {
    for (int64_t r = 0; r < kTile; ++r) new (rows + r) Reader(prototype);
  }
  ~PanelReader() {}

  // The rows [first, first + kTile); those from `rows_end` on are zeros.
  LK_INLINE void begin(int64_t first, int64_t rows_end, int64_t c0, int64_t c1) {
    count = clamp64(rows_end - first, 0, kTile);
    for (int64_t r = 0; r < count; ++r) rows[r].begin(first + r, c0, c1);
  }

  LK_INLINE void tiles(int64_t c, char* to) const {
    for (int64_t r = 0; r < kTile; r += 4) four_rows(c, r, to);
  }

  // Writes only the rows first .. first + 3 of the tiles.
  LK_INLINE void four_rows(int64_t c, int64_t first, char* to) const {
    for (int64_t r = first; r < first + 4; ++r) {
      __m512i v[4] = {};
      if (r < count) rows[r].chunk(c, v);
      for (int t = 0; t < 4; ++t) _mm512_store_si512(to + t * kTileBytes + r * 64, v[t]);
    }
  }

  LK_INLINE void prefetch_four(int64_t, int64_t) const {}

  int64_t count = 0;
  union {
    Reader rows[kTile];
  };
};

// The same for 4-bit weights: begin() finds the scales of all sixteen rows, so that the loop only
// decodes.
template <>
struct PanelReader<Nf4Reader> {
  explicit PanelReader(const Nf4Reader& prototype) : q(prototype.q), columns(prototype.columns) {}

  LK_INLINE void begin(int64_t first, int64_t rows_end, int64_t c0, int64_t c1) {
    count = clamp64(rows_end - first, 0, kTile);
    first_chunk = c0;
    row_bytes = columns / 2;
    packed = q->packed + first * row_bytes;
    const int64_t groups = columns / Nf4Reader::kGroup;
    if (q->absmax != nullptr && q->block_size == Nf4Reader::kGroup) {
      scale_stride = groups;
      scales = q->absmax + first * groups + 2 * c0;
      return;
    }
    scale_stride = kStride;
    scales = decoded;
    const int64_t here = min64(2 * c1, groups) - 2 * c0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (first + r) * groups + 2 * c0;
      float* to = decoded + r * kStride;
      if (q->block_size == Nf4Reader::kGroup)
        gather_scales(*q, at, here, to);
      else
        for (int64_t i = 0; i < here; ++i)
          to[i] = q->block_scale((at + i) * Nf4Reader::kGroup / q->block_size);
    }
  }

  LK_INLINE void tiles(int64_t c, char* to) const {
    for (int64_t r = 0; r < kTile; r += 4) four_rows(c, r, to);
  }

  // Also prefetches 16 cache lines from `next` on.
  LK_INLINE void tiles(int64_t c, char* to, const uint8_t* next) const {
    for (int64_t r = 0; r < kTile; r += 4) {
      for (int64_t i = r; i < r + 4; ++i) _mm_prefetch(next + i * 64, _MM_HINT_T1);
      four_rows(c, r, to);
    }
  }

  LK_INLINE void four_rows(int64_t c, int64_t first, char* to) const {
    const __m512 codes = _mm512_loadu_ps(kCodeTable[q->quant_type]);
    const uint8_t* p = packed + c * (kChunk / 2) + first * row_bytes;
    const float* s = scales + 2 * (c - first_chunk) + first * scale_stride;
    const bool whole = (c + 1) * kChunk <= columns;
    if (whole && first + 4 <= count) {
#pragma GCC unroll 4
      for (int64_t r = first; r < first + 4; ++r, p += row_bytes, s += scale_stride) {
        __m512i v[4];
        decode_chunk(_mm512_loadu_si512(p), codes, s, s + 1, v);
        for (int t = 0; t < 4; ++t) _mm512_store_si512(to + t * kTileBytes + r * 64, v[t]);
      }
      return;
    }
    for (int64_t r = first; r < first + 4; ++r, p += row_bytes, s += scale_stride) {
      __m512i v[4] = {};
      if (r < count && whole)
        decode_chunk(_mm512_loadu_si512(p), codes, s, s + 1, v);
      else if (r < count)
        decode_half_chunk(p, codes, s, v);
      for (int t = 0; t < 4; ++t) _mm512_store_si512(to + t * kTileBytes + r * 64, v[t]);
    }
  }

  // Prefetches the chunk of the same four rows of the next panel.
  LK_INLINE void prefetch_four(int64_t c, int64_t first) const {
    const char* p = reinterpret_cast<const char*>(packed) + c * (kChunk / 2);
    for (int64_t r = kTile + first; r < kTile + first + 4; ++r)
      _mm_prefetch(p + r * row_bytes, _MM_HINT_T1);
  }

  static constexpr int64_t kStride = 2 * Nf4Reader::kMaxChunks + 16;
  const QuantView* q;
  int64_t columns, count = 0, first_chunk = 0, row_bytes = 0, scale_stride = 0;
  const uint8_t* packed = nullptr;
  const float* scales = nullptr;
  alignas(64) float decoded[kTile * kStride];
};

// A panel of A tiles: the chunks [c0, c1) of the rows [first, first + 16).
template <class Reader>
LK_INLINE void pack_a_panel(PanelReader<Reader>& rows, int64_t first, int64_t rows_end, int64_t c0,
                            int64_t c1, char* to) {
  rows.begin(first, rows_end, c0, c1);
  for (int64_t c = c0; c < c1; ++c, to += kChunkTiles * kTileBytes) rows.tiles(c, to);
}

// A panel of B tiles: its columns are the rows [first, first + count), count <= 16. A tile takes 64
// * columns bytes: narrow tiles keep a few long rows of x in the L1 cache.
template <class Reader>
LK_INLINE void pack_b_panel(Reader& rows, int64_t first, int64_t count, int64_t columns, int64_t c0,
                            int64_t c1, char* panel) {
  const __mmask16 mask = lanes16(columns);
  for (int64_t c = c0; c < c1; ++c) {
    if (columns == 1) {  // one row of x is the tile as it stands
      __m512i w[4];
      rows.begin(first, c, c + 1);
      rows.chunk(c, w);
      for (int t = 0; t < 4; ++t)
        _mm512_store_si512(panel + ((c - c0) * kChunkTiles + t) * 64, w[t]);
      continue;
    }
    __m512i v[4][16];
    for (int64_t r = 0; r < kTile; ++r) {
      __m512i w[4] = {};
      if (r < count) {
        rows.begin(first + r, c, c + 1);
        rows.chunk(c, w);
      }
      for (int t = 0; t < 4; ++t) v[t][r] = w[t];
    }
    for (int t = 0; t < 4; ++t) {
      transpose16(v[t]);
      char* tile = panel + ((c - c0) * kChunkTiles + t) * 64 * columns;
      for (int q = 0; q < 16; ++q) _mm512_mask_storeu_epi32(tile + q * 4 * columns, mask, v[t][q]);
    }
  }
}

// B tiles whose columns are the elements of rows, and whose reduction runs over the rows (the
// backward, wgrad): rows 2p and 2p + 1 are interleaved. Each vector t of a chunk gives two panels:
// `unpacklo` takes the elements 8 l .. 8 l + 3 of the vector, `unpackhi` the four after them, l = 0
// .. 3. eight_columns and kept16 (below) undo this order.
constexpr int64_t kChunkPanels = kChunk / kTile;

// Writes a chunk of the rows 2p and 2p + 1 to its eight panels, `panel_bytes` apart.
LK_INLINE void store_pair(const __m512i v[4], const __m512i w[4], char* to, int64_t panel_bytes) {
  for (int t = 0; t < 4; ++t) {
    char* panel = to + 2 * t * panel_bytes;
    _mm512_store_si512(panel, _mm512_unpacklo_epi16(v[t], w[t]));
    _mm512_store_si512(panel + panel_bytes, _mm512_unpackhi_epi16(v[t], w[t]));
  }
}

// Packers write the panels of a block of a weight in steps small enough to hide between two tile
// products (blocked_gemm.h). Rows from `rows_end` on are zeros. They prefetch, because the hardware
// does not for such short pieces of rows.
constexpr int64_t kRowsAhead = 8;

// Panels of A tiles, of sixteen rows each. A step is one chunk of four rows; the tiles of a chunk
// are finished before the next chunk. (A dense weight takes 68 ms instead of 72 then: 4096 x 4096,
// 2048 rows.)
template <class Reader>
class PanelPacker {
 public:
  int64_t left = 0;  // steps to do

  PanelPacker(const Reader& prototype, int64_t end) : rows(prototype), rows_end(end) {}

  // Chunks [first, last) of the rows [first_row, first_row + 16 * panels).
  LK_INLINE void begin(int64_t first_row, int64_t panels, int64_t first, int64_t last, char* memory,
                       int64_t bytes) {
    row = first_row;
    c0 = c = first;
    c1 = last;
    to = memory;
    panel_bytes = bytes;
    four = 0;
    left = panels * (kTile / 4) * (c1 - c0);
  }

  LK_INLINE void step() {
    if (c == c0 && four == 0) rows.begin(row, rows_end, c0, c1);
    rows.four_rows(c, four, to + (c - c0) * kChunkTiles * kTileBytes);
    rows.prefetch_four(c, four);
    --left;
    if ((four += 4) < kTile) return;
    four = 0;
    if (++c < c1) return;
    c = c0;
    row += kTile;
    to += panel_bytes;
  }

  void finish() {
    while (left > 0) step();
  }

 private:
  PanelReader<Reader> rows;
  int64_t rows_end, row = 0, c0 = 0, c1 = 0, c = 0, four = 0, panel_bytes = 0;
  char* to = nullptr;
};

// Panels of B tiles from pairs of rows. A step is one chunk of a pair.
template <class Reader>
class PairPacker {
 public:
  int64_t left = 0;

  PairPacker(const Reader& prototype, int64_t end)
      : even(prototype), odd(prototype), rows_end(end) {}

  // Chunks [first, last) of the rows [first_row, last_row).
  LK_INLINE void begin(int64_t first_row, int64_t last_row, int64_t first, int64_t last,
                       char* memory, int64_t bytes) {
    row = row0 = first_row;
    c0 = c = first;
    c1 = last;
    to = memory;
    panel_bytes = bytes;
    left = (last_row - first_row) / 2 * (c1 - c0);
  }

  LK_INLINE void step() {
    if (c == c0) {
      if (row < rows_end) even.begin(row, c0, c1);
      if (row + 1 < rows_end) odd.begin(row + 1, c0, c1);
    }
    __m512i v[4] = {}, w[4] = {};
    if (row < rows_end) even.chunk(c, v);
    if (row + 1 < rows_end) odd.chunk(c, w);
    for (int64_t ahead = row + kRowsAhead; ahead < min64(row + kRowsAhead + 2, rows_end); ++ahead)
      even.prefetch(ahead, c);
    const int64_t pair = (row - row0) / 2;
    store_pair(v, w,
               to + (c - c0) * kChunkPanels * panel_bytes + pair / 16 * kTileBytes + pair % 16 * 64,
               panel_bytes);
    --left;
    if (++c < c1) return;
    c = c0;
    row += 2;
  }

  void finish() {
    while (left > 0) step();
  }

 private:
  Reader even, odd;
  int64_t rows_end, row0 = 0, row = 0, c0 = 0, c1 = 0, c = 0, panel_bytes = 0;
  char* to = nullptr;
};

// The eight B panels of each chunk of columns, over the rows [first, last).
template <class Reader>
LK_INLINE void pack_b_pairs(const Reader& rows, int64_t first, int64_t last, int64_t rows_end,
                            int64_t c0, int64_t c1, char* panels, int64_t panel_bytes) {
  PairPacker<Reader> packer(rows, rows_end);
  packer.begin(first, last, c0, c1, panels, panel_bytes);
  packer.finish();
}

// The dropout mask of the 16 columns of panel 2 t + half, out of the 128 bits of a chunk.
template <Order order>
LK_INLINE __mmask16 kept16(uint64_t low, uint64_t high, int t, int half) {
  uint64_t of_vector;
  if (order == Order::strided) {
    const uint64_t every_fourth = UINT64_C(0x1111111111111111) << t;
    of_vector = _pext_u64(low, every_fourth) | _pext_u64(high, every_fourth) << 16;
  } else {
    of_vector = (t < 2 ? low : high) >> (32 * (t & 1));
  }
  return static_cast<__mmask16>(_pext_u64(of_vector, half ? 0xf0f0f0f0u : 0x0f0f0f0fu));
}

// One row of the fp32 sums of a chunk's eight panels, rounded to bf16 and in the order of columns.
template <Order order>
LK_INLINE void eight_columns(const __m512 panels[8], __m512i out[4]) {
  // round_pair(lo, hi) holds 16 of lo, then 16 of hi; vector element 8 l + i is lo[4 l + i], 8 l +
  // 4 + i is hi[4 l + i].
  const __m512i merge = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i v[4];
  for (int t = 0; t < 4; ++t)
    v[t] = _mm512_permutexvar_epi64(merge, round_pair(panels[2 * t], panels[2 * t + 1]));
  if (order == Order::natural) {
    for (int t = 0; t < 4; ++t) out[t] = v[t];
    return;
  }
  // Element 4 j + t is v[t][j]: words of (v0, v1) and (v2, v3) interleave, then their pairs.
  const __m512i a = _mm512_unpacklo_epi16(v[0], v[1]), b = _mm512_unpackhi_epi16(v[0], v[1]);
  const __m512i c = _mm512_unpacklo_epi16(v[2], v[3]), d = _mm512_unpackhi_epi16(v[2], v[3]);
  // 128-bit lane l of each holds j = 8 l .. 8 l + 3 (a, c) and 8 l + 4 .. 8 l + 7 (b, d).
  const __m512i e0 = _mm512_unpacklo_epi32(a, c), e1 = _mm512_unpackhi_epi32(a, c);
  const __m512i e2 = _mm512_unpacklo_epi32(b, d), e3 = _mm512_unpackhi_epi32(b, d);
  // Lane l of e0 .. e3 are consecutive: transpose the 128-bit lanes.
  const __m512i f0 = _mm512_shuffle_i64x2(e0, e1, 0x44), f1 = _mm512_shuffle_i64x2(e2, e3, 0x44);
  const __m512i f2 = _mm512_shuffle_i64x2(e0, e1, 0xee), f3 = _mm512_shuffle_i64x2(e2, e3, 0xee);
  out[0] = _mm512_shuffle_i64x2(f0, f1, 0x88);
  out[1] = _mm512_shuffle_i64x2(f0, f1, 0xdd);
  out[2] = _mm512_shuffle_i64x2(f2, f3, 0x88);
  out[3] = _mm512_shuffle_i64x2(f2, f3, 0xdd);
}

}  // namespace
}  // namespace lora_kernels

#endif
