// The forward for few rows of x, as products of rows of W by rows of x along K (vdpbf16ps): a GEMV.
// W is read once; a dense one as it lies in memory, a 4-bit one is decoded into registers. Its time
// is that of reading or decoding W up to about 8 rows.
//
// A unit is 32 outputs, which are stored together. R rows of W and C rows of x are multiplied at a
// time, with R·C sums of 16 lanes each in registers. The products of the LoRA branch are added to
// the same sums, so that one reduction over the lanes serves both.
//
// Operations for 128 weights of a 4-bit W and M rows: 13 to decode, 4 M products.
#pragma once

#include "nf4_stream.h"
#include "tiles/lora_forward.h"

#if LK_BF16

namespace lora_kernels {
namespace {

// Rows of x up to which it is used. On AMX tiles decoding is faster for more than two.
constexpr int64_t kDotRows = 8, kDotNf4Rows = LK_AMX ? 2 : 8;
constexpr int64_t kDotPass = 8;  // rows of x multiplied at a time, at most
constexpr int64_t kDotBytes = 16 << 10;
constexpr int64_t kDotUnit = 32;  // outputs of a unit: a cache line of y

struct Bf16Rows {
  const uint16_t* data;
  int64_t stride;
  LK_INLINE const uint16_t* row(int64_t i) const { return data + i * stride; }
  LK_INLINE Bf16Rows from(int64_t i) const { return {row(i), stride}; }
};

// Rows of whole groups of 64 codes, each with an fp32 scale. They decode in strided order
// (row_readers.h).
struct Nf4Rows {
  const uint8_t* packed;
  const float* scales;
  int64_t groups;  // of a row
  const float* codes;
  LK_INLINE Nf4Rows from(int64_t i) const {
    return {packed + i * groups * 32, scales + i * groups, groups, codes};
  }
};

// The sums of the lanes of 16 vectors.
LK_INLINE __m512 sums_of_lanes(const __m512 v[16]) {
  __m512 fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512d pairs[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      pairs[j] =
          _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    }
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[1])),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[1])));
  }
  const auto halves = [](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}

// sum[c R + r] += ranks r of b · ranks c of s, in the lanes.
template <int R, int C>
LK_INLINE void add_ranks(const float* b, const float* s, int64_t ranks, __m512 sum[16]) {
  for (int64_t j = 0; j < ranks; j += 16)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512 u = _mm512_load_ps(b + r * ranks + j);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c)
        sum[c * R + r] = _mm512_fmadd_ps(u, _mm512_load_ps(s + c * ranks + j), sum[c * R + r]);
    }
}

// Lane c R + r: row r of w · row c of x + ranks r of b · ranks c of s, for r < R and c < C: 16 or
// fewer. b and s are fp32 rows of `ranks`, a multiple of 16. Rows of w from `last` on are read as
// row `last`.
template <int R, int C>
LK_INLINE __m512 dot_block(const Bf16Rows& w, int64_t last, const Bf16Rows& x, int64_t k,
                           const float* b, const float* s, int64_t ranks) {
  static_assert(R * C <= 16);
  const uint16_t *rows[R], *columns[C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) rows[r] = w.row(min64(r, last));
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) columns[c] = x.row(c);
  __m512 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
  const auto add = [&](int64_t i, __mmask32 mask) __attribute__((always_inline)) {
    __m512bh v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = (__m512bh)_mm512_maskz_loadu_epi16(mask, columns[c] + i);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512bh u = (__m512bh)_mm512_maskz_loadu_epi16(mask, rows[r] + i);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c * R + r] = _mm512_dpbf16_ps(sum[c * R + r], u, v[c]);
    }
  };
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    // The same columns of the rows that follow.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) _mm_prefetch(rows[r] + R * w.stride + i, _MM_HINT_T0);
    add(i, 0xffffffffu);
  }
  if (i < k) add(i, lanes32(k - i));
  add_ranks<R, C>(b, s, ranks, sum);
  return sums_of_lanes(sum);
}

// The same with a 4-bit w, two rows at a time. x is in strided order and ends with zeros, so that
// it has whole chunks.
template <int R, int C>
LK_INLINE __m512 dot_block(const Nf4Rows& w, int64_t last, const Bf16Rows& x, int64_t k,
                           const float* b, const float* s, int64_t ranks) {
  static_assert(R * C <= 16 && R % 2 == 0);
  Nf4Rows rows[R];
  const uint16_t* columns[C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) rows[r] = w.from(min64(r, last));
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) columns[c] = x.row(c);
  const __m512 codes = _mm512_loadu_ps(w.codes);
  __m512 sum[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sum[i] = _mm512_setzero_ps();
  const auto add = [&](int64_t i, bool whole) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 2) {
      __m512i v[2][4];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const uint8_t* p = rows[r + h].packed + i * (kChunk / 2);
        const float* scale = rows[r + h].scales + 2 * i;
        if (whole)
          decode_chunk(_mm512_loadu_si512(p), codes, scale, scale + 1, v[h]);
        else
          decode_half_chunk(p, codes, scale, v[h]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          const __m512bh u = (__m512bh)_mm512_load_si512(columns[c] + i * kChunk + 32 * t);
          for (int h = 0; h < 2; ++h)
            sum[c * R + r + h] = _mm512_dpbf16_ps(sum[c * R + r + h], (__m512bh)v[h][t], u);
        }
    }
  };
  const int64_t whole = k / kChunk;
  for (int64_t i = 0; i < whole; ++i) {
    // The same columns of the rows that follow.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      _mm_prefetch(rows[r].packed + R * w.groups * 32 + i * (kChunk / 2), _MM_HINT_T0);
    add(i, true);
  }
  if (k % kChunk != 0) add(whole, false);
  add_ranks<R, C>(b, s, ranks, sum);
  return sums_of_lanes(sum);
}

// out[c, r] (rows of kDotUnit floats) = row r of w · row c of x + ranks, for r < count <= kDotUnit
// and c < C.
template <int C, class Rows>
void dot_unit(const Rows& w, int64_t count, const Bf16Rows& x, int64_t k, const float* b,
              const float* s, int64_t ranks, float* out) {
  constexpr int R = C <= 2 ? 8 : C <= 4 ? 4 : 2;
  for (int64_t r = 0; r < count; r += R) {
    alignas(64) float sums[16];
    _mm512_store_ps(sums, dot_block<R, C>(w.from(r), count - r - 1, x, k, b + r * ranks, s, ranks));
    for (int c = 0; c < C; ++c)
      __builtin_memcpy(out + c * kDotUnit + r, sums + c * R, sizeof(float) * R);
  }
}

template <class Rows>
void dot_rows(const Rows& w, int64_t count, const Bf16Rows& x, int64_t m, int64_t k, const float* b,
              const float* s, int64_t ranks, float* out) {
  // Rows of x that are read again and again stay in half of an L1 cache.
  const int64_t most = k * kDotPass <= kDotBytes / 2 ? kDotPass : kDotPass / 2;
  const int64_t pass = ceil_div(m, ceil_div(m, most));
  for (int64_t i = 0; i < m; i += pass) {
    const Bf16Rows rows = x.from(i);
    switch (min64(pass, m - i)) {
#define LK_DOT_(C)                                                               \
  case C:                                                                        \
    dot_unit<C>(w, count, rows, k, b, s + i * ranks, ranks, out + i * kDotUnit); \
    break;
      LK_DOT_(1) LK_DOT_(2) LK_DOT_(3) LK_DOT_(4) LK_DOT_(5) LK_DOT_(6) LK_DOT_(7) LK_DOT_(8)
#undef LK_DOT_
    }
  }
}

// Slots of thread_scratch.
enum DotScratch { kDotOperands, kDotBranch, kDotInput, kDotScales };

// A in bf16, x with its mask, and s, of the calling thread.
struct DotBranch {
  int64_t ranks;  // of a row of s: R, padded with zeros
  float* s;       // [M, ranks]
};

// The rows [begin, end) of a reader as bf16 rows of `stride`.
template <class Reader>
LK_INLINE void read_rows(Reader rows, int64_t count, int64_t columns, uint16_t* to,
                         int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c * kChunk < columns; ++c) {
      __m512i v[4];
      rows.begin(i, c, c + 1);
      rows.chunk(c, v);
      for (int t = 0; t < 4; ++t) _mm512_store_si512(to + i * stride + c * kChunk + 32 * t, v[t]);
    }
}

// s = (keep ∘ x) · Aᵀ / (1 - p), written to f.s in bf16 and, as what that holds, to branch->s.
// False: out of memory.
inline bool dot_shrink(const LoraForward& f, DotBranch* branch, const Parallel& parallel) {
  using Natural = DenseReader<Order::natural>;
  const int64_t m = f.x.rows, k = f.base.k, r = f.lora.r();
  const bool drops = f.lora.dropout.threshold != 0, rounds = f.lora.a.dtype != Dtype::bf16;
  const int64_t stride = round_up(k, kChunk), ranks = branch->ranks;
  const int64_t words = (rounds ? r : 0) * stride + (drops ? m : 0) * stride;
  char* memory = static_cast<char*>(
      thread_scratch(kDotOperands, size_t(sizeof(float) * m * ranks + 2 * words + 64)));
  if (memory == nullptr) return false;
  branch->s = reinterpret_cast<float*>(memory);
  uint16_t* next = reinterpret_cast<uint16_t*>(memory + sizeof(float) * m * ranks);
  Bf16Rows a{static_cast<const uint16_t*>(f.lora.a.data), f.lora.a.stride};
  Bf16Rows x{static_cast<const uint16_t*>(f.x.data), f.x.stride};
  if (rounds) {
    read_rows(Natural{f.lora.a.data, f.lora.a.dtype, f.lora.a.stride, k}, r, k, next, stride);
    a = {next, stride};
    next += r * stride;
  }
  if (drops) {
    read_rows(MaskedReader<Order::natural>{{f.x.data, f.x.dtype, f.x.stride, k}, f.lora.dropout}, m,
              k, next, stride);
    x = {next, stride};
  }
  const float factor = drops ? dropout_scale(f.lora.dropout.threshold) : 1.0f;
  const auto ranks_of = [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kDotRows * kDotUnit];
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t j = unit * 8, count = min64(8, r - j);
      const bool last = j + 8 >= r;  // which writes the zeros behind the ranks too
      dot_rows(a.from(j), count, x, m, k, nullptr, nullptr, 0, sums);
      for (int64_t i = 0; i < m; ++i) {
        const __mmask16 mask = lanes16(count);
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(
            _mm512_mul_ps(_mm512_maskz_load_ps(mask, sums + i * kDotUnit), _mm512_set1_ps(factor)));
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(f.s) + i * r + j, mask, rounded);
        const __m512i floats = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
        _mm512_mask_storeu_ps(branch->s + i * ranks + j, lanes16(last ? ranks - j : 8),
                              _mm512_castsi512_ps(floats));
      }
    }
  };
  const int64_t units = ceil_div(r, 8);
  constexpr int64_t kWorthThreads = int64_t(1) << 19;  // products; some 10 us of one thread
  if (m * r * k < kWorthThreads)
    ranks_of(0, units);
  else
    parallel(0, units, 1, ranks_of);
  return true;
}

inline bool takes_dots(const LoraForward& f) {
  const BaseView& base = f.base;
  if (base.quant != nullptr)
    return f.x.rows <= kDotNf4Rows && Nf4Reader::takes(*base.quant, base.k);
  return f.x.rows <= kDotRows && base.dense.dtype == Dtype::bf16;
}

// The rows of W of a unit, [row, row + count).
struct DenseUnit {
  const BaseView& base;
  LK_INLINE Bf16Rows operator()(int64_t row, int64_t) const {
    return {static_cast<const uint16_t*>(base.dense.data) + row * base.dense.stride,
            base.dense.stride};
  }
};

struct Nf4Unit {
  const BaseView& base;
  Nf4Rows operator()(int64_t row, int64_t count) const {
    const QuantView& q = *base.quant;
    const int64_t groups = base.k / Nf4Reader::kGroup, at = row * groups;
    const int shift = __builtin_ctzll(uint64_t(q.block_size / Nf4Reader::kGroup));
    const float* scales = q.absmax + at;
    if (shift != 0 || q.absmax == nullptr) {
      const int64_t all = count * groups;
      float* decoded =
          static_cast<float*>(thread_scratch(kDotScales, sizeof(float) * size_t(all + 16)));
      if (decoded != nullptr && shift == 0) gather_scales(q, at, all, decoded);
      if (decoded != nullptr && shift != 0)
        for (int64_t i = 0; i < all; ++i) decoded[i] = q.block_scale((at + i) >> shift);
      scales = decoded;
    }
    return {q.packed + row * base.k / 2, scales, groups, kCodeTable[q.quant_type]};
  }
};

LK_INLINE bool there(const Bf16Rows&) { return true; }
LK_INLINE bool there(const Nf4Rows& rows) { return rows.scales != nullptr; }

// Whether no weight is subnormal: vdpbf16ps treats subnormal numbers as zero.
LK_INLINE bool usual(const Bf16Rows&, int64_t) { return true; }
LK_INLINE bool usual(const Nf4Rows& rows, int64_t count) {
  return ordinary(rows.scales, count * rows.groups, BFloat16{});
}

enum class Dots { done, unusual, out_of_memory };

template <class Unit>
Dots forward_dots_of(const LoraForward& f, const Unit& rows_of, const Bf16Rows& x,
                     const DotBranch& branch, const Parallel& parallel) {
  const int64_t m = f.x.rows, n = f.base.n, k = f.base.k, ranks = branch.ranks;
  Dots result = Dots::done;
  const auto stop = [&](Dots why) { __atomic_store_n(&result, why, __ATOMIC_RELAXED); };
  parallel(0, ceil_div(n, kDotUnit), 2, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[kDotRows * kDotUnit];
    float* b = static_cast<float*>(
        thread_scratch(kDotBranch, size_t(sizeof(float) * max64(kDotUnit * ranks, 16))));
    if (b == nullptr) return stop(Dots::out_of_memory);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit * kDotUnit, count = min64(kDotUnit, n - row);
      for (int64_t i = 0; i < kDotUnit; ++i)
        for (int64_t j = 0; j < ranks; j += 16)
          _mm512_store_ps(b + i * ranks + j,
                          i < count ? scaled_b(f.lora, row + i, j) : _mm512_setzero_ps());
      const auto rows = rows_of(row, count);
      if (!there(rows)) return stop(Dots::out_of_memory);
      if (!usual(rows, count)) return stop(Dots::unusual);
      dot_rows(rows, count, x, m, k, b, branch.s, ranks, sums);
      __m512 b0 = _mm512_setzero_ps(), b1 = b0;
      if (f.bias.data != nullptr) {
        b0 = load_floats(f.bias.data, f.bias.dtype, row, lanes16(count));
        b1 = load_floats(f.bias.data, f.bias.dtype, row + 16, lanes16(count - 16));
      }
      for (int64_t i = 0; i < m; ++i)
        _mm512_mask_storeu_epi16(
            static_cast<uint16_t*>(f.y) + i * n + row, lanes32(count),
            round_pair(_mm512_add_ps(_mm512_load_ps(sums + i * kDotUnit), b0),
                       _mm512_add_ps(_mm512_load_ps(sums + i * kDotUnit + 16), b1)));
    }
  });
  return result;
}

inline Dots forward_dots(const LoraForward& f, const Parallel& parallel) {
  const int64_t m = f.x.rows, k = f.base.k;
  DotBranch branch{round_up(f.lora.r(), 16), nullptr};
  if (f.lora.r() > 0 && !dot_shrink(f, &branch, parallel)) return Dots::out_of_memory;
  const Bf16Rows x{static_cast<const uint16_t*>(f.x.data), f.x.stride};
  if (f.base.quant == nullptr) return forward_dots_of(f, DenseUnit{f.base}, x, branch, parallel);
  const int64_t stride = round_up(k, kChunk);
  uint16_t* strided =
      static_cast<uint16_t*>(thread_scratch(kDotInput, sizeof(uint16_t) * size_t(m * stride)));
  if (strided == nullptr) return Dots::out_of_memory;
  read_rows(DenseReader<Order::strided>{f.x.data, f.x.dtype, f.x.stride, k}, m, k, strided, stride);
  return forward_dots_of(f, Nf4Unit{f.base}, Bf16Rows{strided, stride}, branch, parallel);
}

}  // namespace
}  // namespace lora_kernels

#endif
