// Passes over rank pages (gather.h).
//
// FLOPs: 2 r (K + N) of an entry. Bytes at least: the pages of the adapters in use, each once, x
// and y; so with an entry or two of each adapter the pages' bytes are the time. Every pass streams
// four rows of a page at a time, over blocks of columns that leave the other operand in the first
// cache, and serves up to four entries with each row that it has loaded.
#include "lora_kernels/gather.h"

#include "philox_simd.h"
#include "vector/vec.h"

namespace lora_kernels {
namespace {

using vector::ceil_div;
using vector::kLanes;
using vector::load;
using vector::min64;
using vector::multiply_add;
using vector::put;
using vector::splat;
using vector::Vec;

constexpr int64_t kBlock = 1024;         // columns; a multiple of 64, which is a word of a mask
constexpr int64_t kChain = 16 * kLanes;  // columns of a sum that is then added to others
constexpr int kTokens = 4;               // entries that share a row of a page
constexpr int kRows = 4;                 // of a page, streamed together

template <class T>
LK_INLINE Vec load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? to_float(p[i]) : 0.0f;
  return load(lanes);
}

// Groups and what of each a thread takes: `units` of a group are numbered one after the other.
template <class Units, class Fn>
void over_units(const GatherPass& f, int64_t begin, int64_t end, const Units& units, const Fn& fn) {
  int64_t first = 0;
  for (int64_t g = 0; g < f.group_count && first < end; ++g) {
    const int64_t count = units(f.groups[g]);
    const int64_t from = begin > first ? begin - first : 0;
    for (int64_t i = from; i < min64(count, end - first); ++i) fn(f.groups[g], i);
    first += count;
  }
}

template <class Units>
int64_t total(const GatherPass& f, const Units& units) {
  int64_t sum = 0;
  for (int64_t g = 0; g < f.group_count; ++g) sum += units(f.groups[g]);
  return sum;
}

// values[i] of columns first + i: times the mask's factor, zero where it drops.
void mask_row(const GatherPass& f, const SlotGroup& g, int64_t entry, int64_t first, int64_t count,
              float* values) {
  if (f.dropout.seeds == nullptr || f.dropout.thresholds[g.slot] == 0) return;
  const uint32_t threshold = uint32_t(f.dropout.thresholds[g.slot]);
  const Dropout d{uint64_t(f.dropout.seeds[g.slot]), f.dropout.stream, threshold};
  const float factor = dropout_scale(threshold);
  for (int64_t i = 0; i < count; i += 64) {
    const uint64_t bits =
        keep_mask64(d, uint32_t(f.dropout.rows[entry]), uint32_t((first + i) / 64));
    for (int64_t j = 0; j < min64(64, count - i); ++j)
      values[i + j] = bits >> j & 1 ? values[i + j] * factor : 0.0f;
  }
}

// Columns [first, first + count) of an entry's row of m as fp32, masked; zeros up to whole vectors.
LK_INLINE void read_row(const GatherPass& f, const SlotGroup& g, int64_t entry, const MatrixView& m,
                        int64_t first, int64_t count, float* out) {
  vector::widen(m.data, m.dtype, f.tokens[entry] * m.stride + first, count, out);
  mask_row(f, g, entry, first, count, out);
  for (int64_t i = count; i % kLanes != 0; ++i) out[i] = 0.0f;
}

template <class P>
LK_INLINE const P* page_row(const GatherPass& f, const SlotGroup& g, int64_t rank) {
  const int64_t row = g.pages[rank / kPage] * kPage + rank % kPage;
  return static_cast<const P*>(f.pages) + row * f.columns;
}

// acc[row][token] += row · x[token] over a chain, whose sums begin anew: long ones lose bits.
template <int rows, int tokens, class P>
LK_INLINE void dots(const P* const* page, const float (*x)[kBlock], int64_t first, int64_t end,
                    Vec (*acc)[kTokens]) {
  Vec sum[rows][tokens];
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tokens; ++t) sum[r][t] = splat(0.0f);
  for (int64_t c = first; c < end; c += kLanes) {
    Vec v[tokens];
    for (int t = 0; t < tokens; ++t) v[t] = load(x[t] + c);
    for (int r = 0; r < rows; ++r) {
      const Vec w = load_some(page[r] + c, end - c);
      for (int t = 0; t < tokens; ++t) sum[r][t] = multiply_add(w, v[t], sum[r][t]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tokens; ++t) acc[r][t] = acc[r][t] + sum[r][t];
}

// out[token] += Σ_row coefficient[row][token] · row over a block.
template <int rows, int tokens, class P>
LK_INLINE void spread(const P* const* page, const float (*coefficient)[kTokens], int64_t count,
                      float (*out)[kBlock]) {
  Vec by[rows][tokens];
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tokens; ++t) by[r][t] = splat(coefficient[r][t]);
  for (int64_t c = 0; c < count; c += kLanes) {
    Vec sum[tokens];
    for (int t = 0; t < tokens; ++t) sum[t] = load(out[t] + c);
    for (int r = 0; r < rows; ++r) {
      const Vec w = load_some(page[r] + c, count - c);
      for (int t = 0; t < tokens; ++t) sum[t] = multiply_add(w, by[r][t], sum[t]);
    }
    for (int t = 0; t < tokens; ++t) put(out[t] + c, sum[t]);
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// fn(Count<rows>, Count<tokens>) of the numbers at run time, 1 to 4 each.
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

// Ranks [first, first + n) of a group for entries [entry, entry + tokens).
template <class P>
void shrink_page(const GatherPass& f, const SlotGroup& g, const MatrixView& m, int64_t first,
                 int64_t entry, int64_t tokens) {
  alignas(64) float x[kTokens][kBlock];
  Vec acc[kPage][kTokens];
  const int64_t n = min64(kPage, g.rank - first);
  for (auto& row : acc)
    for (Vec& v : row) v = splat(0.0f);
  for (int64_t c = 0; c < f.columns; c += kBlock) {
    const int64_t count = min64(kBlock, f.columns - c);
    for (int64_t t = 0; t < tokens; ++t) read_row(f, g, entry + t, m, c, count, x[t]);
    for (int64_t r = 0; r < n; r += kRows) {
      const int64_t rows = min64(kRows, n - r);
      const P* page[kRows];
      for (int64_t i = 0; i < rows; ++i) page[i] = page_row<P>(f, g, first + r + i) + c;
      with_counts(rows, tokens, [&](auto a, auto b) {
        for (int64_t i = 0; i < count; i += kChain)
          dots<decltype(a)::value, decltype(b)::value>(page, x, i, min64(i + kChain, count),
                                                       acc + r);
      });
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < n; ++r)
      f.sums[(entry + t) * f.width + first + r] = vector::sum(acc[r][t]);
}

template <class P>
void shrink_as(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  const auto blocks = [](const SlotGroup& g) { return ceil_div(g.end - g.begin, kTokens); };
  const auto units = [&](const SlotGroup& g) { return ceil_div(g.rank, kPage) * blocks(g); };
  parallel(0, total(f, units), 1, [&](int64_t begin, int64_t end) {
    over_units(f, begin, end, units, [&](const SlotGroup& g, int64_t i) {
      const int64_t entry = g.begin + i % blocks(g) * kTokens;
      shrink_page<P>(f, g, m, i / blocks(g) * kPage, entry, min64(kTokens, g.end - entry));
    });
  });
}

// One block of columns of up to kTokens entries of a group.
template <class P>
void expand_block(const GatherPass& f, const SlotGroup& g, const float* factor, bool overwrite,
                  const MatrixView& out, int64_t entry, int64_t tokens, int64_t c, int64_t count) {
  alignas(64) float sum[kTokens][kBlock];
  const int64_t whole = ceil_div(count, kLanes) * kLanes;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < whole; i += kLanes) put(sum[t] + i, splat(0.0f));
  for (int64_t r = 0; r < g.rank; r += kRows) {
    const int64_t rows = min64(kRows, g.rank - r);
    const P* page[kRows];
    float by[kRows][kTokens];
    for (int64_t i = 0; i < rows; ++i) {
      page[i] = page_row<P>(f, g, r + i) + c;
      for (int64_t t = 0; t < tokens; ++t)
        by[i][t] = f.sums[(entry + t) * f.width + r + i] * factor[entry + t];
    }
    with_counts(rows, tokens, [&](auto a, auto b) {
      spread<decltype(a)::value, decltype(b)::value>(page, by, count, sum);
    });
  }
  for (int64_t t = 0; t < tokens; ++t) {
    mask_row(f, g, entry + t, c, count, sum[t]);
    const int64_t at = f.tokens[entry + t] * out.stride + c;
    void* data = const_cast<void*>(out.data);
    if (!overwrite) {
      alignas(64) float before[kBlock];
      vector::widen(data, out.dtype, at, count, before);
      for (int64_t i = 0; i < count; ++i) sum[t][i] += before[i];
    }
    vector::narrow(sum[t], count, out.dtype, data, at);
  }
}

// Threads share the columns, so that no two of them write to a token.
template <class P>
void expand_as(const GatherPass& f, const float* factor, bool overwrite, const MatrixView& out,
               const Parallel& parallel) {
  constexpr int64_t kWord = 64;
  parallel(0, ceil_div(f.columns, kWord), 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = min64(end * kWord, f.columns);
    for (int64_t i = 0; i < f.group_count; ++i) {
      const SlotGroup& g = f.groups[i];
      if (g.rank == 0 && !overwrite) continue;
      for (int64_t entry = g.begin; entry < g.end; entry += kTokens)
        for (int64_t c = begin * kWord; c < stop; c += kBlock)
          expand_block<P>(f, g, factor, overwrite, out, entry, min64(kTokens, g.end - entry), c,
                          min64(kBlock, stop - c));
    }
  });
}

constexpr int64_t kOuterBlock = 256;  // columns whose sums of a page stay in the first cache

template <class P>
void outer_block(const GatherPass& f, const SlotGroup& g, const MatrixView& m, int64_t first,
                 int64_t c, int64_t count) {
  alignas(64) float x[kTokens][kBlock];
  alignas(64) float sum[kPage][kOuterBlock];
  const int64_t n = min64(kPage, g.rank - first);
  for (auto& row : sum)
    for (float& v : row) v = 0.0f;
  for (int64_t entry = g.begin; entry < g.end; entry += kTokens) {
    const int64_t tokens = min64(kTokens, g.end - entry);
    for (int64_t t = 0; t < tokens; ++t) read_row(f, g, entry + t, m, c, count, x[t]);
    for (int64_t r = 0; r < n; ++r) {
      const float* by = f.sums + entry * f.width + first + r;
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec factor = splat(by[t * f.width]);
        for (int64_t i = 0; i < count; i += kLanes)
          put(sum[r] + i, multiply_add(factor, load(x[t] + i), load(sum[r] + i)));
      }
    }
  }
  for (int64_t r = 0; r < kPage; ++r) {
    P* row = const_cast<P*>(page_row<P>(f, g, first)) + r * f.columns;
    vector::narrow(sum[r], count, row + c);
  }
}

template <class P>
void outer_as(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  const int64_t blocks = ceil_div(f.columns, kOuterBlock);
  const auto units = [&](const SlotGroup& g) { return ceil_div(g.rank, kPage) * blocks; };
  parallel(0, total(f, units), 1, [&](int64_t begin, int64_t end) {
    over_units(f, begin, end, units, [&](const SlotGroup& g, int64_t i) {
      const int64_t c = i % blocks * kOuterBlock;
      outer_block<P>(f, g, m, i / blocks * kPage, c, min64(kOuterBlock, f.columns - c));
    });
  });
}

template <class Fn>
void with_pages(Dtype dtype, const Fn& fn) {
  switch (dtype) {
    case Dtype::f16:
      return fn(Half{});
    case Dtype::bf16:
      return fn(BFloat16{});
    default:
      return fn(float{});
  }
}

void shrink(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  with_pages(f.dtype, [&](auto p) { shrink_as<decltype(p)>(f, m, parallel); });
}

void expand(const GatherPass& f, const float* factor, bool overwrite, const MatrixView& out,
            const Parallel& parallel) {
  with_pages(f.dtype, [&](auto p) { expand_as<decltype(p)>(f, factor, overwrite, out, parallel); });
}

void outer(const GatherPass& f, const MatrixView& m, const Parallel& parallel) {
  with_pages(f.dtype, [&](auto p) { outer_as<decltype(p)>(f, m, parallel); });
}

void add(const float* sums, bool overwrite, const MatrixView& out, const Parallel& parallel) {
  parallel(0, out.rows, 8, [&](int64_t begin, int64_t end) {
    alignas(64) float row[kBlock];
    void* data = const_cast<void*>(out.data);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < out.columns; c += kBlock) {
        const int64_t count = min64(kBlock, out.columns - c), at = i * out.stride + c;
        const float* from = sums + i * out.columns + c;
        if (overwrite) {
          vector::narrow(from, count, out.dtype, data, at);
          continue;
        }
        vector::widen(data, out.dtype, at, count, row);
        for (int64_t j = 0; j < count; ++j) row[j] += from[j];
        vector::narrow(row, count, out.dtype, data, at);
      }
    }
  });
}

}  // namespace

LK_TABLE(GatherKernels, gather) = {shrink, expand, outer, add};

}  // namespace lora_kernels
