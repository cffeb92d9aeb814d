// The passes over rank pages on fp32 vectors. A pass streams four rows of a page at a time and uses
// each element for up to four entries. It works on one block of columns at a time, so that the
// other operand stays in the L1 cache. With a single entry it streams one row after the other: the
// time is that of reading memory, which is fastest in one long stream.
#pragma once

#include "gather_schedule.h"
#include "vector/row_reader.h"

namespace lora_kernels {
namespace {
namespace vector {

constexpr int kTokens = 4;       // entries that share a row of a page
constexpr int kRows = 4;         // of a page, streamed together for several entries
constexpr int64_t kLine = 4096;  // columns of a block, times its entries; a multiple of 4 kWord

// Columns of a block. A single entry takes longer rows, which stream better.
LK_INLINE int64_t block_of(int64_t tokens) { return tokens == 1 ? kLine : kLine / kTokens; }

LK_INLINE int64_t rows_of(int64_t tokens) { return tokens == 1 ? 1 : kRows; }

LK_INLINE bool drops(const GatherPass& f, const SlotGroup& g) {
  return f.dropout.seeds != nullptr && f.dropout.thresholds[g.slot] != 0;
}

// Applies dropout to the columns from `first` on: dropped elements become zero, the others are
// scaled.
inline void mask_row(const GatherPass& f, const SlotGroup& g, int32_t entry, int64_t first,
                     int64_t count, float* values) {
  const uint32_t threshold = uint32_t(f.dropout.thresholds[g.slot]);
  const float factor = dropout_scale(threshold);
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
  apply_mask({uint64_t(f.dropout.seeds[g.slot]), f.dropout.stream, threshold},
             f.dropout.rows[entry], first, count, values);
}

// The columns [first, first + count) of an entry's row of m as fp32, after dropout, and zeros up to
// a whole vector.
LK_INLINE void read_row(const GatherPass& f, const SlotGroup& g, int32_t entry, const MatrixView& m,
                        int64_t first, int64_t count, float* out) {
  widen(m.data, m.dtype, f.tokens[entry] * m.stride + first, count, out);
  if (drops(f, g)) mask_row(f, g, entry, first, count, out);
  for (int64_t i = count; i % kLanes != 0; ++i) out[i] = 0.0f;
}

// Products summed in one chain: a long one loses accuracy (gemm.h). It divides a block.
constexpr int64_t kChain = 16 * kLanes;

// acc[row][token] += row · x[token] over a block.
template <int rows, int tokens, class P>
LK_INLINE void dots(const P* const* page, const float* x, int64_t stride, int64_t count,
                    Vec (*acc)[kTokens]) {
  for (int64_t begin = 0; begin < count; begin += kChain) {
    const int64_t end = min64(begin + kChain, count);
    Vec sum[rows][tokens], w[rows];
    for (int r = 0; r < rows; ++r)
      for (int t = 0; t < tokens; ++t) sum[r][t] = splat(0.0f);
    const auto step = [&](int64_t c) __attribute__((always_inline)) {
      for (int t = 0; t < tokens; ++t) {
        const Vec v = load(x + t * stride + c);
        for (int r = 0; r < rows; ++r) sum[r][t] = multiply_add(w[r], v, sum[r][t]);
      }
    };
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) {
      for (int r = 0; r < rows; ++r) w[r] = load(page[r] + c);
      step(c);
    }
    if (c < end) {
      for (int r = 0; r < rows; ++r) w[r] = load_some(page[r] + c, end - c);
      step(c);
    }
    for (int r = 0; r < rows; ++r)
      for (int t = 0; t < tokens; ++t) acc[r][t] += sum[r][t];
  }
}

// acc[0][0] += row · x over a block: the same sums as those of `dots`, several chains at once.
template <class P>
LK_INLINE void dot_row(const P* row, const float* x, int64_t count, Vec (*acc)[kTokens]) {
  constexpr int kChains = 8;
  int64_t begin = 0;
  for (; begin + kChains * kChain <= count; begin += kChains * kChain) {
    Vec chain[kChains];
    for (Vec& v : chain) v = splat(0.0f);
    for (int64_t c = begin; c < begin + kChain; c += kLanes)
      for (int i = 0; i < kChains; ++i)
        chain[i] = multiply_add(load(row + c + i * kChain), load(x + c + i * kChain), chain[i]);
    for (const Vec& v : chain) acc[0][0] += v;
  }
  if (begin == count) return;
  const P* rest = row + begin;
  dots<1, 1>(&rest, x + begin, 0, count - begin, acc);
}

// out[token] += Σ_row coefficient[row][token] · row over a block.
template <int rows, int tokens, class P>
LK_INLINE void axpy(const P* const* page, const float (*coefficient)[kTokens], int64_t count,
                    float* out, int64_t stride) {
  Vec by[rows][tokens];
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tokens; ++t) by[r][t] = splat(coefficient[r][t]);
  const auto step = [&](int64_t c, const Vec* w) __attribute__((always_inline)) {
    for (int t = 0; t < tokens; ++t) {
      float* to = out + t * stride + c;
      Vec sum = load(to);
      for (int r = 0; r < rows; ++r) sum = multiply_add(w[r], by[r][t], sum);
      put(to, sum);
    }
  };
  int64_t c = 0;
  Vec w[rows];
  for (; c + kLanes <= count; c += kLanes) {
    for (int r = 0; r < rows; ++r) w[r] = load(page[r] + c);
    step(c, w);
  }
  if (c < count) {
    for (int r = 0; r < rows; ++r) w[r] = load_some(page[r] + c, count - c);
    step(c, w);
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls fn(Count<rows>, Count<tokens>), so that both numbers, 1 to 4 each, are known when
// compiling.
template <class Fn>
LK_INLINE void with_counts(int64_t rows, int64_t tokens, const Fn& fn) {
  const auto of_rows = [&](auto r) {
    switch (tokens) {
      case 1:
        return fn(r, Count<1>{});
      case 2:
        return fn(r, Count<2>{});
      case 3:
        return fn(r, Count<3>{});
      default:
        return fn(r, Count<4>{});
    }
  };
  switch (rows) {
    case 1:
      return of_rows(Count<1>{});
    case 2:
      return of_rows(Count<2>{});
    case 3:
      return of_rows(Count<3>{});
    default:
      return of_rows(Count<4>{});
  }
}

// The second output of the shrink step: its sums, rounded. Null data: none.
struct Rounded {
  void* data;
  Dtype dtype;
  int64_t stride;
};

// The sums of the ranks [first, first + 16) of a group for its entries [at, at + tokens).
template <class P>
void shrink_page(const GatherPass& f, const SlotGroup& g, const MatrixView& m, int64_t first,
                 int64_t at, int64_t tokens, const Rounded& s) {
  alignas(64) float x[kLine];
  Vec acc[kPage][kTokens];
  const int64_t n = min64(kPage, g.rank - first), block = block_of(tokens);
  for (auto& row : acc)
    for (Vec& v : row) v = splat(0.0f);
  for (int64_t c = 0; c < f.columns; c += block) {
    const int64_t count = min64(block, f.columns - c);
    for (int64_t t = 0; t < tokens; ++t)
      read_row(f, g, g.entries[at + t], m, c, count, x + t * block);
    if (tokens == 1) {
      for (int64_t r = 0; r < n; ++r) dot_row(page_row<P>(f, g, first + r) + c, x, count, acc + r);
      continue;
    }
    for (int64_t r = 0; r < n; r += kRows) {
      const int64_t rows = min64(kRows, n - r);
      const P* page[kRows];
      for (int64_t i = 0; i < rows; ++i) page[i] = page_row<P>(f, g, first + r + i) + c;
      with_counts(rows, tokens, [&](auto a, auto b) {
        dots<decltype(a)::value, decltype(b)::value>(page, x, block, count, acc + r);
      });
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t e = g.entries[at + t];
    float* to = f.sums + e * f.width + first;
    for (int64_t r = 0; r < n; ++r) to[r] = sum(acc[r][t]);
    if (s.data != nullptr) narrow(to, n, s.dtype, s.data, e * s.stride + first);
  }
}

template <class P>
void shrink_as(const GatherPass& f, const MatrixView& m, const Rounded& s,
               const Parallel& parallel) {
  const auto blocks = [](const SlotGroup& g) { return ceil_div(g.count, kTokens); };
  for_each_unit(
      f, parallel, [&](const SlotGroup& g) { return Work{pages_of(g) * blocks(g), 1}; },
      [&](const SlotGroup& g, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t at = i % blocks(g) * kTokens;
          shrink_page<P>(f, g, m, i / blocks(g) * kPage, at, min64(kTokens, g.count - at), s);
        }
      });
}

// The expand step for one block of columns of up to kTokens entries of a group.
template <class P>
void expand_block(const GatherPass& f, const SlotGroup& g, const float* factor, bool overwrite,
                  const MatrixView& out, int64_t at, int64_t tokens, int64_t c, int64_t count) {
  alignas(64) float sum[kLine], before[kLine];
  const int64_t block = block_of(tokens);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < count; i += kLanes) put(sum + t * block + i, splat(0.0f));
  const int64_t together = rows_of(tokens);
  for (int64_t r = 0; r < g.rank; r += together) {
    const int64_t rows = min64(together, g.rank - r);
    const P* page[kRows];
    float by[kRows][kTokens];
    for (int64_t i = 0; i < rows; ++i) {
      page[i] = page_row<P>(f, g, r + i) + c;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t e = g.entries[at + t];
        by[i][t] = f.sums[e * f.width + r + i] * factor[e];
      }
    }
    with_counts(rows, tokens, [&](auto a, auto b) {
      axpy<decltype(a)::value, decltype(b)::value>(page, by, count, sum, block);
    });
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t e = g.entries[at + t];
    float* row = sum + t * block;
    if (g.rank > 0 && drops(f, g)) mask_row(f, g, e, c, count, row);
    const int64_t to = f.tokens[e] * out.stride + c;
    void* data = const_cast<void*>(out.data);
    if (!overwrite) {
      widen(data, out.dtype, to, count, before);
      for (int64_t i = 0; i < count; ++i) row[i] += before[i];
    }
    narrow(row, count, out.dtype, data, to);
  }
}

template <class P>
void expand_as(const GatherPass& f, const float* factor, bool overwrite, const MatrixView& out,
               const Parallel& parallel) {
  for_each_column_block(f, parallel, [&](const SlotGroup& g, int64_t first, int64_t end) {
    if (g.rank == 0 && !overwrite) return;
    for (int64_t at = 0; at < g.count; at += kTokens) {
      const int64_t tokens = min64(kTokens, g.count - at), block = block_of(tokens);
      for (int64_t c = first; c < end; c += block)
        expand_block<P>(f, g, factor, overwrite, out, at, tokens, c, min64(block, end - c));
    }
  });
}

constexpr int64_t kWgradColumns = 256;  // columns: the sums of a page stay in the L1 cache

template <class P>
void wgrad_block(const GatherPass& f, const SlotGroup& g, const MatrixView& m, int64_t first,
                 int64_t c, int64_t count) {
  alignas(64) float x[kTokens * kWgradColumns];
  alignas(64) float sum[kPage][kWgradColumns];
  const int64_t n = min64(kPage, g.rank - first);
  for (auto& row : sum)
    for (float& v : row) v = 0.0f;
  for (int64_t at = 0; at < g.count; at += kTokens) {
    const int64_t tokens = min64(kTokens, g.count - at);
    for (int64_t t = 0; t < tokens; ++t)
      read_row(f, g, g.entries[at + t], m, c, count, x + t * kWgradColumns);
    for (int64_t t = tokens; t < kTokens; ++t)
      for (int64_t i = 0; i < kWgradColumns; ++i) x[t * kWgradColumns + i] = 0.0f;
    for (int64_t r = 0; r < n; ++r) {
      Vec by[kTokens];
      for (int64_t t = 0; t < kTokens; ++t)
        by[t] = splat(t < tokens ? f.sums[g.entries[at + t] * f.width + first + r] : 0.0f);
      for (int64_t i = 0; i < count; i += kLanes) {
        Vec v = load(sum[r] + i);
        for (int64_t t = 0; t < tokens; ++t)
          v = multiply_add(by[t], load(x + t * kWgradColumns + i), v);
        put(sum[r] + i, v);
      }
    }
  }
  for (int64_t r = 0; r < kPage; ++r) {
    P* row = const_cast<P*>(page_row<P>(f, g, first)) + r * f.columns;
    narrow(sum[r], count, row + c);
  }
}

template <class P>
void wgrad_as(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  const int64_t blocks = ceil_div(f.columns, kWgradColumns);
  for_each_unit(
      f, parallel, [&](const SlotGroup& g) { return Work{pages_of(g) * blocks, g.count}; },
      [&](const SlotGroup& g, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t c = i % blocks * kWgradColumns;
          wgrad_block<P>(f, g, m, i / blocks * kPage, c, min64(kWgradColumns, f.columns - c));
        }
      });
}

inline bool shrink(const GatherPass& f, const MatrixView& m, void* s, int64_t stride,
                   const Parallel& parallel) {
  with_type(f.dtype, [&](auto p) {
    shrink_as<decltype(p)>(f, m, {s, rank_dtype(m.dtype), stride}, parallel);
  });
  return true;
}

inline bool expand(const GatherPass& f, const float* factor, bool overwrite, const MatrixView& out,
                   const Parallel& parallel) {
  with_type(f.dtype, [&](auto p) { expand_as<decltype(p)>(f, factor, overwrite, out, parallel); });
  return true;
}

inline bool wgrad(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  with_type(f.dtype, [&](auto p) { wgrad_as<decltype(p)>(f, m, parallel); });
  return true;
}

inline void add_sums(const float* sums, const uint8_t* touched, bool overwrite,
                     const MatrixView& out, const Parallel& parallel) {
  parallel(0, out.rows, 8, [&](int64_t begin, int64_t end) {
    alignas(64) float row[kLine];
    void* data = const_cast<void*>(out.data);
    for (int64_t i = begin; i < end; ++i) {
      if (!touched[i] && !overwrite) continue;
      for (int64_t c = 0; c < out.columns; c += kLine) {
        const int64_t count = min64(kLine, out.columns - c), at = i * out.stride + c;
        const float* from = sums + i * out.columns + c;
        if (overwrite) {
          narrow(from, count, out.dtype, data, at);
          continue;
        }
        widen(data, out.dtype, at, count, row);
        for (int64_t j = 0; j < count; ++j) row[j] += from[j];
        narrow(row, count, out.dtype, data, at);
      }
    }
  });
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
