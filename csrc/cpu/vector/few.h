// Few rows of x, where reading the weight sets the pace: a weight is read (and decoded into a
// register) once and used at once for every row. x is put in the order of the weights' vectors
// first.
#pragma once

#include "vector/few_weights.h"

namespace lora_kernels {
namespace {
namespace vector {

// As many rows at once as sums fit the registers; more rows in turns, decoding again, up to where
// decoding into a panel takes over: 4096 x 4096, 16 rows: 6.0 against 8.0 ms with AVX-512, 9.4
// against 11.1 with AVX2; at 24 rows they are level.
constexpr int64_t kTurnRows = 8, kFewRows = 16;
// Slots of thread_scratch.
enum FewScratch { kFewInput, kFewWeights, kFewScales };

// c[w M + m] = x[m] · row w0 + w of the weights in work, w < W
template <class Weights, int M, int W, bool plain>
void dot_rows(const Weights& weights, const float* x, int64_t k, int64_t w0, float* c) {
  using Piece = typename Weights::template Piece<W, plain>;
  constexpr int kChains = M * W <= 4 ? 2 : 1;  // enough sums to hide the latency of one
  // Groups in one sum: 256 products a lane, 16 where every product is rounded too.
  constexpr int64_t kStretch = kFused ? 4 * kLanes : 1;
  Vec total[W][M];
  for (int w = 0; w < W; ++w)
    for (int m = 0; m < M; ++m) total[w][m] = splat(0.0f);
  const int64_t groups = k / kGroup;
  for (int64_t begin = 0; begin < groups; begin += kStretch) {
    const int64_t end = min64(begin + kStretch, groups);
    Vec sums[kChains][W][M];
#pragma GCC unroll 32
    for (int i = 0; i < kChains * W * M; ++i) sums[i / (W * M)][i / M % W][i % M] = splat(0.0f);
    const auto add = [&](const Piece& piece, int64_t g, bool fetch) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        if (fetch) piece.fetch(w, g);
        const auto group = piece(w, g);
#pragma GCC unroll 16
        for (int t = 0; t < kGroupVectors; ++t) {
          const Vec a = group(t);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const Vec v = load(x + m * k + g * kGroup + t * kLanes);
            sums[t % kChains][w][m] = multiply_add(a, v, sums[t % kChains][w][m]);
          }
        }
      }
    };
    for (int64_t g = begin; g < end;) {
      const Piece piece(weights, w0, g, end);
      for (; g + 2 <= piece.end; g += 2) {
        add(piece, g, true);
        add(piece, g + 1, false);
      }
      if (g < piece.end) add(piece, g++, true);
    }
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        total[w][m] += kChains > 1 ? sums[0][w][m] + sums[kChains - 1][w][m] : sums[0][w][m];
  }
  for (int w = 0; w < W; ++w)
    for (int m = 0; m < M; ++m) c[w * M + m] = sum(total[w][m]) + weights.tail(w0 + w, x + m * k);
}

// Rows in work together while their sums fit the registers. c[count, M]
template <class Weights, int M>
void dot_all(const Weights& weights, const float* x, int64_t k, int64_t count, float* c) {
  constexpr int kMost = LK_AVX512 && M == 1 ? 4 : LK_AVX512 || LK_NEON || M <= 3 ? 2 : 1;
  constexpr bool kAny = !Weights::kPlainDiffers;
  int64_t w = 0;
  for (; w + kMost <= count; w += kMost) {
    if (kAny || weights.plain)
      dot_rows<Weights, M, kMost, true>(weights, x, k, w, c + w * M);
    else
      dot_rows<Weights, M, kMost, kAny>(weights, x, k, w, c + w * M);
  }
  for (; w < count; ++w) {
    if (kAny || weights.plain)
      dot_rows<Weights, M, 1, true>(weights, x, k, w, c + w * M);
    else
      dot_rows<Weights, M, 1, kAny>(weights, x, k, w, c + w * M);
  }
}

template <class Weights>
void dots(const Weights& weights, const float* x, int64_t m, int64_t k, int64_t count, float* c) {
  switch (m) {
#define LK_FEW_(M) \
  case M:          \
    return dot_all<Weights, M>(weights, x, k, count, c);
    LK_FEW_(1) LK_FEW_(2) LK_FEW_(3) LK_FEW_(4) LK_FEW_(5) LK_FEW_(6) LK_FEW_(7) LK_FEW_(8)
#undef LK_FEW_
  }
}

// inner[M, R] = x · Aᵀ as `rows` gives A, rounded; x[M, K] fp32.
inline void few_inner(const Rows& a, const float* x, int64_t m, int64_t k, int64_t r, Dtype dtype,
                      void* inner, const Parallel& parallel) {
  parallel(0, r, 4, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float sums[kFewRows] = {}, piece[kMaxPiece];
      for (int64_t i = 0; i < k; i += kMaxPiece) {
        const int64_t count = min64(k - i, kMaxPiece);
        a.piece(j, i, count, piece);
        for (int64_t row = 0; row < m; ++row) sums[row] += dot(x + row * k + i, piece, count);
      }
      for (int64_t row = 0; row < m; ++row) narrow(sums + row, 1, dtype, inner, row * r + j);
    }
  });
}

// x[M, K] in the order of the weights' groups and inner[M, R], in fp32.
struct FewOperands {
  const float *x, *inner;
};

// y of the rows [4 begin, 4 end) of W.
template <class Weights>
void few_columns(const LinearForward& f, const Lora& lora, const FewOperands& operands,
                 Weights weights, int64_t begin, int64_t end) {
  const int64_t m = f.x.rows, k = f.base.k, n = f.base.n, r = f.lora.r();
  for (int64_t row = kRowsAtOnce * begin; row < min64(kRowsAtOnce * end, n); row += kRowsAtOnce) {
    const int64_t count = min64(n - row, kRowsAtOnce);
    float c[kRowsAtOnce * kFewRows];  // [count, m]
    weights.begin(row, count);
    const int64_t turn = ceil_div(m, ceil_div(m, kTurnRows));
    for (int64_t i = 0; i < m; i += turn) {
      const int64_t size = min64(turn, m - i);
      float part[kRowsAtOnce * kTurnRows];
      dots(weights, operands.x + i * k, size, k, count, part);
      for (int64_t w = 0; w < count; ++w)
        __builtin_memcpy(c + w * m + i, part + w * size, sizeof(float) * size);
    }
    for (int64_t w = 0; w < count; ++w) {
      float piece[kMaxPiece];
      for (int64_t j = 0; j < r; j += kMaxPiece) {
        const int64_t size = min64(r - j, kMaxPiece);
        lora.b.piece(row + w, j, size, piece);
        for (int64_t i = 0; i < m; ++i)
          c[w * m + i] += dot(operands.inner + i * r + j, piece, size);
      }
      const float bias = f.bias.data != nullptr ? at(f.bias, row + w) : 0.0f;
      for (int64_t i = 0; i < m; ++i) {
        const float y = c[w * m + i] + bias;
        narrow(&y, 1, f.x.dtype, f.y, i * n + row + w);
      }
    }
  }
}

// Rows of whole groups, a group of one scale.
inline bool grouped(const BaseView& base) {
  return base.quant != nullptr && base.k % kGroup == 0 && base.quant->block_size % kGroup == 0;
}

template <class T>
bool few_columns_as(const LinearForward& f, const Lora& lora, const FewOperands& operands,
                    int64_t begin, int64_t end) {
  const BaseView& base = f.base;
  using Mapped = QuantWeights<T, true>;
  using Plain = QuantWeights<T, false>;
  const bool quantised = base.quant != nullptr, groups = grouped(base);
  const bool mapped = groups && base.quant->absmax == nullptr;
  const int64_t size = mapped                 ? Mapped::scratch(base)
                       : quantised && !groups ? DecodedWeights::scratch(base.k)
                                              : 1;
  float* scratch = static_cast<float*>(thread_scratch(kFewWeights, sizeof(float) * size_t(size)));
  if (scratch == nullptr) return false;
  if (mapped)
    few_columns(f, lora, operands, Mapped(base, scratch), begin, end);
  else if (groups)
    few_columns(f, lora, operands, Plain(base, scratch), begin, end);
  else if (quantised)
    few_columns(f, lora, operands, DecodedWeights(base, f.x.dtype, scratch), begin, end);
  else
    few_columns(f, lora, operands, DenseWeights<T>(base, scratch), begin, end);
  return true;
}

inline bool few_columns(const LinearForward& f, const Lora& lora, const FewOperands& operands,
                        int64_t begin, int64_t end) {
  switch (f.base.quant == nullptr ? f.base.dense.dtype : f.x.dtype) {
    case Dtype::f16:
      return few_columns_as<Half>(f, lora, operands, begin, end);
    case Dtype::bf16:
      return few_columns_as<BFloat16>(f, lora, operands, begin, end);
    default:
      return few_columns_as<float>(f, lora, operands, begin, end);
  }
}

// False: out of memory.
inline bool forward_few(LinearForward f, const Parallel& parallel) {
  const int64_t m = f.x.rows, k = f.base.k, r = f.lora.r();
  const bool masked = r > 0 && f.lora.dropout.threshold != 0;
  QuantView plain;
  if (f.base.quant != nullptr && !(grouped(f.base) && ScaleMaps::takes(*f.base.quant))) {
    plain = plain_scales(*f.base.quant, kFewScales, parallel);
    if (plain.absmax == nullptr) return false;
    f.base.quant = &plain;
  }
  float* x = static_cast<float*>(
      thread_scratch(kFewInput, sizeof(float) * size_t(max64(2 * m * k + m * r, 1))));
  if (x == nullptr) return false;
  float *natural = x + m * k, *inner = natural + m * k;
  for (int64_t i = 0; i < m; ++i) {
    widen(f.x.data, f.x.dtype, i * f.x.stride, k, natural + i * k);
    if (grouped(f.base))
      arrange(natural + i * k, k, x + i * k);
    else
      __builtin_memcpy(x + i * k, natural + i * k, sizeof(float) * k);
    if (masked) apply_mask(f.lora.dropout, i, 0, k, natural + i * k);
  }
  const Lora lora(f.lora);
  if (r > 0) {
    const Dtype dtype = rank_dtype(f.x.dtype);
    few_inner(lora.a, natural, m, k, r, dtype, f.s, parallel);
    widen(f.s, dtype, 0, m * r, inner);
  }
  const FewOperands operands{x, inner};
  bool ok = true;
  constexpr int64_t kAtLeast = 4;
  parallel(0, ceil_div(f.base.n, kRowsAtOnce), kAtLeast, [&](int64_t begin, int64_t end) {
    if (!few_columns(f, lora, operands, begin, end)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
  });
  return ok;
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
