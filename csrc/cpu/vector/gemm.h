// A blocked fp32 matrix product (GEMM) with a low-rank branch. It serves the LoRA layer forward and
// backward, and the gradients of its adapters:
//
//   s[M, R]   = (keep ∘ left) · shrink                     rounded to s_dtype
//   out[M, C] = left · base + keep ∘ (s · expand) + bias   rounded once
//
// left[M, D], base[D, C], shrink[D, R], expand[R, C]. In the forward left is x and D is K; in the
// backward left is dy, D is N, and s is ds. An element is always summed in the same order (s ·
// expand first, then K blocks of kDepth in fp32), so results depend neither on the number of
// threads nor on how rows and columns are cut into blocks.
//
// A block of rows of left is packed once in fp32, in tiles of at most kRowTile rows, K block by K
// block. Threads then share the columns: kDepth x kColumns of the right operand are decoded and
// packed into panels that stay in L2. One panel at a time is in L1 while the tiles of rows pass by.
#pragma once

#include "lora_kernels/tuning.h"
#include "vector/row_reader.h"

namespace lora_kernels {
namespace {
namespace vector {

constexpr int64_t kDepth = 256;
constexpr int64_t kColumns = 128;
constexpr int64_t kUnit = 64;  // threads share the columns in units of a word of the dropout mask
constexpr int64_t kPanel = kLanes * kTileVectors;
constexpr int64_t kPanels = kColumns / kPanel;
static_assert(kUnit % kPanel == 0 && kDepth <= kMaxRead && kDepth % 64 == 0, "block sizes");

// Products are summed in chains that begin at zero, and the chains' sums are added: a long chain of
// additions loses accuracy, most of all where a tier rounds each product before it adds it. With
// few rows torch sums in the lanes of vectors. A chain of 32 has the error of that; one of 256 has
// three times as much (K = 576). With few rows the short chains cost 5 to 8 per cent of the time,
// most of which is decoding. s always gets short chains: its errors are multiplied by the expand
// step, and it is a small part of the work.
constexpr int64_t kShortChain = LK_AVX2 || LK_NEON ? 32 : 16;
constexpr int64_t kLongChain = LK_AVX2 || LK_NEON ? kDepth : 16;
constexpr int64_t kShortChainRows = 64;

// A right operand [depth, columns]. `transposed`: it is stored, and its mask counted, as [columns,
// depth].
struct RightOperand {
  RowReader rows{};
  bool transposed = false;
};

struct FusedGemm {
  RowReader left;        // [M, D], or
  bool left_transposed;  // [D, M]
  int64_t m, d, c, r;    // r = 0: no branch
  RightOperand base, shrink, expand;
  Dropout left_dropout{}, out_dropout{};
  void* s = nullptr;  // [M, R]
  Dtype s_dtype = Dtype::f32;
  MatrixView bias{};
  void* out = nullptr;  // [M, C], contiguous; null: only s
  Dtype out_dtype = Dtype::f32;

  int64_t chain() const { return min64(m, c) <= kShortChainRows ? kShortChain : kLongChain; }
};

// c[rows, V kLanes] (+)= left[rows, depth] · right[depth, V kLanes]. It prefetches `next`, the tile
// of left that follows, a cache line a step, as that may be in L3 only.
template <int R, int V>
void multiply_tile(const float* left, const float* next, const float* right, int64_t depth,
                   int64_t chain, float* c, int64_t c_stride, bool add) {
  Vec total[R][V];
  for (int64_t begin = 0; begin < depth; begin += chain) {
    const int64_t end = min64(begin + chain, depth);
    Vec sum[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = splat(0.0f);
    for (int64_t k = begin; k < end; ++k) {
      Vec w[V];
      for (int v = 0; v < V; ++v) w[v] = load(right + k * kPanel + v * kLanes);
      __builtin_prefetch(next + k * 16, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec x = splat(left[i * kDepth + k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(x, w[v], sum[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[i][v] = begin == 0 ? sum[i][v] : total[i][v] + sum[i][v];
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) {
      float* to = c + i * c_stride + v * kLanes;
      put(to, add ? load(to) + total[i][v] : total[i][v]);
    }
}

template <int V>
void multiply_rows(int64_t rows, const float* left, const float* next, const float* right,
                   int64_t depth, int64_t chain, float* c, int64_t c_stride, bool add) {
  switch (rows) {
#define LK_ROWS_(R) \
  case R:           \
    return multiply_tile<R, V>(left, next, right, depth, chain, c, c_stride, add)
    LK_ROWS_(1);
    LK_ROWS_(2);
    LK_ROWS_(3);
    LK_ROWS_(4);
    LK_ROWS_(5);
    LK_ROWS_(6);
#if LK_AVX512
    LK_ROWS_(7);
    LK_ROWS_(8);
    LK_ROWS_(9);
    LK_ROWS_(10);
    LK_ROWS_(11);
    LK_ROWS_(12);
#endif
#undef LK_ROWS_
  }
}

// c[rows, columns] (+)= left · panels, whose columns beyond `columns` are zeros.
inline void multiply(int64_t rows, const float* left, const float* next, const float* panels,
                     int64_t columns, int64_t depth, int64_t chain, float* c, int64_t c_stride,
                     bool add) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const float* panel = panels + j * kDepth;
    if (columns - j > kLanes)
      multiply_rows<kTileVectors>(rows, left, next, panel, depth, chain, c + j, c_stride, add);
    else
      multiply_rows<1>(rows, left, next, panel, depth, chain, c + j, c_stride, add);
  }
}

// The columns that multiply() reads: the last panel's first vector, or all of it.
LK_INLINE int64_t padded(int64_t columns) {
  const int64_t last = columns % kPanel;
  return columns - last + (last == 0 ? 0 : last <= kLanes ? kLanes : kPanel);
}

constexpr int64_t kStageFloats = kLanes * kDepth;

LK_INLINE void zero(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0.0f;
}

// right[d0 .. d0 + depth, c0 .. c0 + columns] -> panels [kDepth, kPanel] of kPanel columns each.
inline void pack_right(const RightOperand& right, int64_t d0, int64_t depth, int64_t c0,
                       int64_t columns, float* panels, float* stage) {
  if (right.transposed) {
    const int64_t whole = ceil_div(depth, kLanes) * kLanes;
    for (int64_t j = 0; j < padded(columns); j += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        float* row = stage + i * kDepth;
        if (j + i < columns) {
          right.rows.read(c0 + j + i, d0, depth, row);
          right.rows.fetch(c0 + j + i, d0 + kDepth, kDepth);  // the next chunk
          zero(row + depth, whole - depth);
        } else {
          zero(row, whole);
        }
      }
      float* panel = panels + j / kPanel * kPanel * kDepth + j % kPanel;
      for (int64_t k = 0; k < whole; k += kLanes)
        transpose(stage + k, kDepth, panel + k * kPanel, kPanel);
    }
    return;
  }
  const int64_t whole = padded(columns);
  for (int64_t k = 0; k < depth; ++k) {
    right.rows.read(d0 + k, c0, columns, stage);
    right.rows.fetch(d0 + k + kDepth, c0, columns);
    zero(stage + columns, whole - columns);
    for (int64_t j = 0; j < whole; j += kLanes)
      put(panels + j / kPanel * kPanel * kDepth + k * kPanel + j % kPanel, load(stage + j));
  }
}

// How a block of rows is cut into tiles of nearly equal height.
struct Tiles {
  int64_t rows, height, count;
  explicit Tiles(int64_t m) : rows(m) {
    height = ceil_div(m, ceil_div(m, kRowTile));
    count = ceil_div(m, height);
  }
  int64_t begin(int64_t t) const { return t * height; }
  int64_t size(int64_t t) const { return min64(height, rows - t * height); }
};

// Slots of thread_scratch. The calling thread keeps the first two and the last for the whole call.
enum Scratch { kPackedLeft, kPackedShrink, kStage, kBlock, kScales };

struct Packed {
  float* left;    // [tiles][chunks][tile rows][kDepth]
  float* s;       // [tiles][s chunks][tile rows][kDepth]
  float* shrink;  // [chunks][panels][kDepth][kPanel]
  int64_t chunks, s_chunks, shrink_panels;

  float* left_at(const Tiles& tiles, int64_t t, int64_t chunk) const {
    return left + (tiles.begin(t) * chunks + tiles.size(t) * chunk) * kDepth;
  }
  float* s_at(const Tiles& tiles, int64_t t, int64_t chunk) const {
    return s + (tiles.begin(t) * s_chunks + tiles.size(t) * chunk) * kDepth;
  }
  float* shrink_at(int64_t chunk) const { return shrink + chunk * shrink_panels * kPanel * kDepth; }
};

// rows m0 .. m0 + rows, chunk `chunk` of left -> out[rows, kDepth]
inline void pack_left(const FusedGemm& p, int64_t m0, int64_t rows, int64_t chunk, float* out) {
  const int64_t d0 = chunk * kDepth, depth = min64(p.d - d0, kDepth);
  if (!p.left_transposed) {
    for (int64_t i = 0; i < rows; ++i) p.left.read(m0 + i, d0, depth, out + i * kDepth);
    return;
  }
  float row[kRowTile];
  for (int64_t k = 0; k < depth; ++k) {
    p.left.read(d0 + k, m0, rows, row);
    for (int64_t i = 0; i < rows; ++i) out[i * kDepth + k] = row[i];
  }
}

// Packs one tile of rows and computes its rows of s. False: out of memory.
inline bool pack_tile(const FusedGemm& p, const Packed& packed, const Tiles& tiles, int64_t t,
                      int64_t first_row) {
  const int64_t rows = tiles.size(t), m0 = first_row + tiles.begin(t);
  const int64_t width = packed.shrink_panels * kPanel;
  const bool masked = p.left_dropout.threshold != 0;
  float* sums = static_cast<float*>(
      thread_scratch(kStage, sizeof(float) * kRowTile * size_t(width + kDepth)));
  if (sums == nullptr) return false;
  float* dropped = sums + kRowTile * width;
  for (int64_t chunk = 0; chunk < packed.chunks; ++chunk) {
    float* left = p.out != nullptr ? packed.left_at(tiles, t, chunk) : dropped;
    pack_left(p, m0, rows, chunk, left);
    if (p.r == 0) continue;
    const int64_t d0 = chunk * kDepth, depth = min64(p.d - d0, kDepth);
    if (masked) {
      if (left != dropped) __builtin_memcpy(dropped, left, sizeof(float) * rows * kDepth);
      for (int64_t i = 0; i < rows; ++i)
        apply_mask(p.left_dropout, m0 + i, d0, depth, dropped + i * kDepth);
      left = dropped;
    }
    multiply(rows, left, left, packed.shrink_at(chunk), p.r, depth, kShortChain, sums, width,
             chunk > 0);
  }
  if (p.r == 0) return true;
  if (packed.chunks == 0) zero(sums, rows * width);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (m0 + i) * p.r;
    narrow(sums + i * width, p.r, p.s_dtype, p.s, at);
    if (p.out == nullptr) continue;
    for (int64_t chunk = 0; chunk < packed.s_chunks; ++chunk)
      widen(p.s, p.s_dtype, at + chunk * kDepth, min64(p.r - chunk * kDepth, kDepth),
            packed.s_at(tiles, t, chunk) + i * kDepth);
  }
  return true;
}

// Tiles [t0, t1) x columns [c0, c0 + columns) of out. False: out of memory.
inline bool gemm_block(const FusedGemm& p, const Packed& packed, const Tiles& tiles,
                       int64_t first_row, int64_t t0, int64_t t1, int64_t c0, int64_t columns) {
  const int64_t row0 = tiles.begin(t0), rows = min64(tiles.begin(t1), tiles.rows) - row0;
  float* panels = static_cast<float*>(
      thread_scratch(kStage, sizeof(float) * (kPanels * kPanel * kDepth + kStageFloats)));
  float* c = static_cast<float*>(thread_scratch(kBlock, sizeof(float) * size_t(rows * kColumns)));
  if (panels == nullptr || c == nullptr) return false;
  float* stage = panels + kPanels * kPanel * kDepth;
  const auto tile_c = [&](int64_t t) { return c + (tiles.begin(t) - row0) * kColumns; };
  bool add = false;
  for (int64_t chunk = 0; chunk < packed.s_chunks; ++chunk, add = true) {
    const int64_t d0 = chunk * kDepth, depth = min64(p.r - d0, kDepth);
    pack_right(p.expand, d0, depth, c0, columns, panels, stage);
    for (int64_t t = t0; t < t1; ++t)
      multiply(tiles.size(t), packed.s_at(tiles, t, chunk), packed.s_at(tiles, t, chunk), panels,
               columns, depth, p.chain(), tile_c(t), kColumns, add);
  }
  if (add && p.out_dropout.threshold != 0)
    for (int64_t i = 0; i < rows; ++i)
      apply_mask(p.out_dropout, first_row + row0 + i, c0, columns, c + i * kColumns);
  for (int64_t chunk = 0; chunk < packed.chunks; ++chunk, add = true) {
    const int64_t d0 = chunk * kDepth, depth = min64(p.d - d0, kDepth);
    pack_right(p.base, d0, depth, c0, columns, panels, stage);
    for (int64_t j = 0; j < columns; j += kPanel)  // a panel stays in L1 while the tiles pass by
      for (int64_t t = t0; t < t1; ++t)
        multiply(tiles.size(t), packed.left_at(tiles, t, chunk),
                 packed.left_at(tiles, t + 1 < t1 ? t + 1 : t0, chunk), panels + j * kDepth,
                 min64(columns - j, kPanel), depth, p.chain(), tile_c(t) + j, kColumns, add);
  }
  if (!add) zero(c, rows * kColumns);
  if (p.bias.data != nullptr) widen(p.bias.data, p.bias.dtype, c0, columns, stage);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = c + i * kColumns;
    if (p.bias.data != nullptr)
      for (int64_t j = 0; j < columns; ++j) row[j] += stage[j];
    narrow(row, columns, p.out_dtype, p.out, (first_row + row0 + i) * p.c + c0);
  }
  return true;
}

inline bool gemm_rows(const FusedGemm& p, const Packed& packed, int64_t first_row, int64_t rows,
                      const Parallel& parallel) {
  const Tiles tiles(rows);
  bool ok = true;
  const auto failed = [&] { __atomic_store_n(&ok, false, __ATOMIC_RELAXED); };
  parallel(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (!pack_tile(p, packed, tiles, t, first_row)) return failed();
  });
  if (!ok || p.out == nullptr) return ok;
  // Columns first; where they are too few for the threads, rows as well.
  const int64_t units = ceil_div(p.c, kUnit);
  const int64_t splits =
      units >= 4 * parallel.threads ? 1 : min64(tiles.count, ceil_div(4 * parallel.threads, units));
  parallel(0, units * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t c0 = i / splits * kUnit, split = i % splits;
      const int64_t together = splits == 1 ? min64(end - i, kColumns / kUnit) : 1;
      if (!gemm_block(p, packed, tiles, first_row, split * tiles.count / splits,
                      (split + 1) * tiles.count / splits, c0, min64(together * kUnit, p.c - c0)))
        return failed();
      i += together;
    }
  });
  return ok;
}

// False: out of memory.
inline bool gemm(const FusedGemm& p, const Parallel& parallel) {
  if (p.m == 0) return true;
  const int64_t chunks = ceil_div(p.d, kDepth);
  const int64_t s_chunks = p.out != nullptr ? ceil_div(p.r, kDepth) : 0;
  Packed packed{nullptr, nullptr, nullptr, chunks, s_chunks, ceil_div(p.r, kPanel)};
  const int64_t row_floats = (chunks + s_chunks) * kDepth;
  const Tuning& sizes = tuning();
  const int64_t fit = sizes.packed_bytes / int64_t(sizeof(float)) / max64(row_floats, 1);
  const int64_t most = min64(max64(fit, sizes.packed_fewest_rows), sizes.packed_most_rows);
  const int64_t blocks = ceil_div(p.m, most);
  const int64_t rows = min64(ceil_div(ceil_div(p.m, blocks), kRowTile) * kRowTile, p.m);
  if (p.out != nullptr) {
    packed.left = static_cast<float*>(
        thread_scratch(kPackedLeft, sizeof(float) * size_t(max64(rows * row_floats, 1))));
    if (packed.left == nullptr) return false;
    packed.s = packed.left + rows * chunks * kDepth;
  }
  bool ok = true;
  if (p.r > 0) {
    packed.shrink = static_cast<float*>(thread_scratch(
        kPackedShrink,
        sizeof(float) * size_t(max64(chunks, 1) * packed.shrink_panels * kPanel * kDepth)));
    if (packed.shrink == nullptr) return false;
    parallel(0, chunks, 1, [&](int64_t begin, int64_t end) {
      float* stage = static_cast<float*>(thread_scratch(kStage, sizeof(float) * kStageFloats));
      if (stage == nullptr) return __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < p.r; j += kColumns)
          pack_right(p.shrink, i * kDepth, min64(p.d - i * kDepth, kDepth), j,
                     min64(p.r - j, kColumns), packed.shrink_at(i) + j * kDepth, stage);
    });
  }
  for (int64_t first = 0; ok && first < p.m; first += rows)
    ok = gemm_rows(p, packed, first, min64(rows, p.m - first), parallel);
  return ok;
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
