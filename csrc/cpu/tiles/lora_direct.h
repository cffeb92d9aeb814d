// The forward as products of 32 rows of W by a thread's own rows of x. The rows of a dense bf16 W
// are A tiles as they lie in memory and are never packed; those of a 4-bit W are decoded to tiles,
// 32 at a time.
//
// Threads share the rows of x where there are many, else the columns of y. A thread packs the rows
// of x that it needs by itself, even if another one packs the same rows. A core takes longer to
// read what another core has just written than to pack it again, and the writer's next call is
// slower too. (512 rows of x, 576 -> 192, two threads on a Zen 4: 1.74 times the plain layer's time
// with shared packing, 1.23 times with each thread's own.) The packing is shared only where many
// threads would compute the same s.
#pragma once

#include "tiles/lora_forward.h"

#if LK_BF16

namespace lora_kernels {
namespace {

// Rows of x up to which it is used. AMX runs at full speed only on operands in the L1 cache, so
// with more rows it is faster to pack W.
constexpr int64_t kDirectRows = LK_AMX ? 64 : INT64_MAX;
constexpr int64_t kGroupRows = 2 * kTile;    // rows of W worked on together
constexpr int64_t kPairRows = 2 * kTile;     // rows of x worked on together
constexpr int64_t kPairsOfThread = 4;        // at least, where threads share the rows
constexpr int64_t kDirectBytes = 768 << 10;  // of packed rows of x that stay in an L2 cache

inline bool takes_direct(const LoraForward& f) {
  const BaseView& base = f.base;
  if (base.quant != nullptr) return !LK_AMX && Nf4Reader::takes(*base.quant, base.k);
  return f.x.rows <= kDirectRows && base.dense.dtype == Dtype::bf16;
}

// 32 rows of a dense bf16 matrix, `stride` bytes apart, and their last tile along K if that is not
// whole.
struct DenseRows {
  static constexpr Order kOrder = Order::natural;
  const char* data;
  int64_t stride, whole;  // tiles along K
  bool ragged;
  alignas(64) char rest[kGroupRows * 64];

  DenseRows() = default;
  explicit DenseRows(const BaseView&) {}

  LK_INLINE void begin(const LoraForward& f, int64_t row, char* copy) {
    begin(f.base.dense, row, f.base.n, copy);
  }

  // `copy`: memory for 32 rows of whole chunks, used where fewer than 32 rows are left.
  LK_INLINE void begin(const MatrixView& matrix, int64_t row, int64_t rows_end, char* copy) {
    const int64_t k = matrix.columns, count = min64(kGroupRows, rows_end - row);
    stride = matrix.stride * 2;
    data = static_cast<const char*>(matrix.data) + row * stride;
    if (count < kGroupRows) {
      const int64_t row_bytes = ceil_div(k, kChunk) * kChunk * 2;
      __builtin_memset(copy, 0, size_t(kGroupRows * row_bytes));
      for (int64_t i = 0; i < count; ++i)
        __builtin_memcpy(copy + i * row_bytes, data + i * stride, size_t(2 * k));
      data = copy;
      stride = row_bytes;
    }
    whole = k / kTileDepth;
    ragged = k % kTileDepth != 0;
    if (!ragged) return;
    for (int64_t i = 0; i < kGroupRows; ++i)
      _mm512_store_si512(rest + i * 64, _mm512_maskz_loadu_epi16(lanes32(k % kTileDepth),
                                                                 data + i * stride + whole * 64));
  }

  // Adds the products with one panel of x, or two.
  template <bool two>
  LK_INLINE void multiply(Tiles& tiles, const char* x, int64_t panel_bytes) const {
    tiles.multiply_rows<two>(data, stride, x, x + panel_bytes, whole);
    if (!ragged) return;
    x += whole * kTileBytes;
    tiles.multiply_rows<two>(rest, 64, x, x + panel_bytes, 1);
  }
};

// 32 rows of a 4-bit W with fp32 scales, decoded to two panels.
struct DecodedRows {
  static constexpr Order kOrder = Order::strided;
  PanelReader<Nf4Reader> rows;
  int64_t chunks;
  const char* panels = nullptr;

  explicit DecodedRows(const BaseView& base)
      : rows(Nf4Reader(*base.quant, base.k)), chunks(ceil_div(base.k, kChunk)) {}

  LK_INLINE void begin(const LoraForward& f, int64_t row, char* memory) {
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t c0 = 0; c0 < chunks; c0 += Nf4Reader::kMaxChunks) {
        const int64_t c1 = min64(c0 + Nf4Reader::kMaxChunks, chunks);
        rows.begin(row + half * kTile, f.base.n, c0, c1);
        for (int64_t i = c0; i < c1; ++i)
          rows.tiles(i, memory + (half * chunks + i) * kChunkTiles * kTileBytes);
      }
    panels = memory;
  }

  // With one panel of x, its products are computed twice.
  template <bool two>
  LK_INLINE void multiply(Tiles& tiles, const char* x, int64_t panel_bytes) const {
    const int64_t depth = chunks * kChunkTiles;
    tiles.multiply_panels<Stream::none>(panels, panels + depth * kTileBytes, x,
                                        two ? x + panel_bytes : x, depth, NoStep());
  }
};

// The rows [m0, m_end) of y, which p.x and p.s have from their first panel on, and the columns of
// the groups [begin, end). False: out of memory.
template <class Rows>
bool direct_columns(Tiles& tiles, const LoraForward& f, const ForwardPacked& p, int64_t m0,
                    int64_t m_end, int64_t begin, int64_t end) {
  const int64_t depth = rank_tiles(f.lora), panels = ceil_div(m_end - m0, kTile);
  const int64_t expand_bytes = 2 * depth * kTileBytes;
  char* memory = static_cast<char*>(
      thread_scratch(kBlock, size_t(expand_bytes + kGroupRows * p.chunks * kChunk * 2)));
  if (memory == nullptr) return false;
  alignas(64) float c[4][256];
  Rows rows(f.base);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t row = group * kGroupRows;
    rows.begin(f, row, memory + expand_bytes);
    if (depth > 0) pack_b_for_expand(f.lora, row, 2, f.base.n, memory);
    for (int64_t panel = 0; panel < panels; panel += 2) {
      const char* x = p.x + panel * p.x_panel_bytes();
      const char* s = p.s + panel * depth * kTileBytes;
      const bool two = panel + 1 < panels;
      zero_accumulators(tiles);
      if (two)
        rows.template multiply<true>(tiles, x, p.x_panel_bytes());
      else
        rows.template multiply<false>(tiles, x, p.x_panel_bytes());
      // With one panel of x the sums of a second are not stored.
      multiply(tiles, memory, memory + depth * kTileBytes, s, two ? s + depth * kTileBytes : s,
               depth);
      store_accumulators(tiles, c[0]);
      store_y(f, c[0], c[2], row, m0 + panel * kTile, m_end);
      if (two) store_y(f, c[1], c[3], row, m0 + (panel + 1) * kTile, m_end);
    }
  }
  return true;
}

// Packs the rows [m0, m_end) of x and computes their s. False: out of memory.
template <class Rows>
bool direct_pack(Tiles& tiles, const LoraForward& f, const ForwardPacked& p, int64_t m0,
                 int64_t begin, int64_t end, int64_t m_end) {
  char* dropped = static_cast<char*>(thread_scratch(kBlock, size_t(p.x_panel_bytes())));
  if (dropped == nullptr) return false;
  for (int64_t i = begin; i < end; ++i)
    pack_x<Rows::kOrder>(tiles, f, p, i, m0 + i * kTile, m_end, dropped);
  return true;
}

// Memory for the packed rows of x and their s. Null: out of memory.
inline char* direct_memory(ForwardPacked* p, int64_t panels, int64_t depth) {
  const int64_t x_bytes = panels * p->x_panel_bytes();
  p->x = static_cast<char*>(
      thread_scratch(kActivations, size_t(x_bytes + panels * depth * kTileBytes)));
  p->s = p->x + x_bytes;
  return p->x;
}

// The rows [m0, m_end) and the columns of the groups [begin, end) by the calling thread alone.
template <class Rows>
bool direct_alone(const LoraForward& f, ForwardPacked p, int64_t m0, int64_t m_end, int64_t begin,
                  int64_t end) {
  const int64_t panels = ceil_div(m_end - m0, kTile);
  if (direct_memory(&p, panels, rank_tiles(f.lora)) == nullptr) return false;
  Tiles tiles(kTile);
  return direct_pack<Rows>(tiles, f, p, m0, 0, panels, m_end) &&
         direct_columns<Rows>(tiles, f, p, m0, m_end, begin, end);
}

template <class Rows>
bool forward_direct_of(const LoraForward& f, const Parallel& parallel) {
  const int64_t m = f.x.rows, n = f.base.n, r = f.lora.r(), chunks = ceil_div(f.base.k, kChunk);
  const int64_t groups = ceil_div(n, kGroupRows), pairs = ceil_div(m, kPairRows);
  ForwardPacked p{nullptr, nullptr, nullptr, chunks, kTile};
  if (!pack_adapters<Rows::kOrder>(f, &p)) return false;
  bool ok = true;
  const auto keep = [&](bool done) {
    if (!done) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
  };

  if (pairs >= kPairsOfThread * parallel.threads) {
    const int64_t fit = max64(kDirectBytes / (2 * p.x_panel_bytes()), 2);
    parallel(0, pairs, 1, [&](int64_t begin, int64_t end) {
      const int64_t blocks = ceil_div(end - begin, fit), each = ceil_div(end - begin, blocks);
      for (int64_t i = begin; i < end; i += each)
        keep(direct_alone<Rows>(f, p, i * kPairRows, min64(min64(i + each, end) * kPairRows, m), 0,
                                groups));
    });
    return ok;
  }
  if (4 * r * parallel.threads <= n) {
    parallel(0, groups, 1, [&](int64_t begin, int64_t end) {
      LoraForward own = f;
      if (begin > 0 && r > 0) {  // one thread writes s
        own.s = thread_scratch(kAccumulators, sizeof(uint16_t) * size_t(m * r));
        if (own.s == nullptr) return keep(false);
      }
      keep(direct_alone<Rows>(own, p, 0, m, begin, end));
    });
    return ok;
  }
  const int64_t panels = ceil_div(m, kTile);
  if (direct_memory(&p, panels, rank_tiles(f.lora)) == nullptr) return false;
  parallel(0, panels, 1, [&](int64_t begin, int64_t end) {
    Tiles tiles(kTile);
    keep(direct_pack<Rows>(tiles, f, p, 0, begin, end, m));
  });
  if (ok)
    parallel(0, groups, 1, [&](int64_t begin, int64_t end) {
      Tiles tiles(kTile);
      keep(direct_columns<Rows>(tiles, f, p, 0, m, begin, end));
    });
  return ok;
}

inline bool forward_direct(const LoraForward& f, const Parallel& parallel) {
  if (f.base.quant == nullptr) return forward_direct_of<DenseRows>(f, parallel);
  LoraForward decoded = f;
  const QuantView q = decoded_scales(*f.base.quant, kScales, parallel);
  if (q.absmax == nullptr) return false;
  decoded.base.quant = &q;
  return forward_direct_of<DecodedRows>(decoded, parallel);
}

}  // namespace
}  // namespace lora_kernels

#endif
