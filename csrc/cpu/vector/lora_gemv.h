// The LoRA layer for few rows of x, a matrix-vector product (GEMV) for up to kPassRows rows at
// once. Its time is that of reading W: each weight is read, and decoded into a register, once, and
// multiplied with every row of x while it is there.
//
// This file has the columns of y for one type of W. Every type is compiled in a file of its own
// (lora_gemv_f32.cpp and so on), as there are many variants: 1 to 8 rows of x, 1 to 4 of W.
// lora_gemv_call.h has the rest of the call.
#pragma once

#include <type_traits>

#include "vector/gemv_weights.h"
#include "vector/lora_gemv_table.h"

namespace lora_kernels {
namespace {
namespace vector {

// c[w, m] = x[m] · row w0 + w of the weights in work, for w < W and m < M.
template <class Weights, int M, int W, bool fast>
void dot_rows(const Weights& weights, const float* x, int64_t k, int64_t w0, float* c) {
  using Piece = typename Weights::template Piece<W, fast>;
  constexpr int kChains = M * W <= 4 ? 2 : 1;  // enough sums to hide the latency of one
  // Groups summed in one chain of additions: 256 products a lane, or 16 where the tier rounds every
  // product before it adds it.
  constexpr int64_t kChainGroups = kFused ? 4 * kLanes : 1;
  Vec total[W][M];
  for (int w = 0; w < W; ++w)
    for (int m = 0; m < M; ++m) total[w][m] = splat(0.0f);
  const int64_t groups = k / kGroup;
  for (int64_t begin = 0; begin < groups; begin += kChainGroups) {
    const int64_t end = min64(begin + kChainGroups, groups);
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

// c[count, M]: as many rows of W at once as their sums fit the registers.
template <class Weights, int M>
void dot_all(const Weights& weights, const float* x, int64_t k, int64_t count, float* c) {
  constexpr int kMost = LK_AVX512 && M == 1 ? 4 : LK_AVX512 || LK_NEON || M <= 3 ? 2 : 1;
  constexpr bool kAny = !Weights::kHasFastTable;
  int64_t w = 0;
  for (; w + kMost <= count; w += kMost) {
    if (kAny || weights.fast)
      dot_rows<Weights, M, kMost, true>(weights, x, k, w, c + w * M);
    else
      dot_rows<Weights, M, kMost, kAny>(weights, x, k, w, c + w * M);
  }
  for (; w < count; ++w) {
    if (kAny || weights.fast)
      dot_rows<Weights, M, 1, true>(weights, x, k, w, c + w * M);
    else
      dot_rows<Weights, M, 1, kAny>(weights, x, k, w, c + w * M);
  }
}

template <class Weights>
void dots(const Weights& weights, const float* x, int64_t m, int64_t k, int64_t count, float* c) {
  switch (m) {
#define LK_GEMV_(M) \
  case M:           \
    return dot_all<Weights, M>(weights, x, k, count, c);
    LK_GEMV_(1) LK_GEMV_(2) LK_GEMV_(3) LK_GEMV_(4) LK_GEMV_(5) LK_GEMV_(6) LK_GEMV_(7) LK_GEMV_(8)
#undef LK_GEMV_
  }
}

// The columns of y that the rows [4 begin, 4 end) of W give.
template <class Weights>
void gemv_columns(const LoraForward& f, const Lora& lora, const GemvOperands& operands,
                  Weights weights, int64_t begin, int64_t end) {
  const int64_t m = f.x.rows, k = f.base.k, n = f.base.n, r = f.lora.r();
  for (int64_t row = kRowsAtOnce * begin; row < min64(kRowsAtOnce * end, n); row += kRowsAtOnce) {
    const int64_t count = min64(n - row, kRowsAtOnce);
    float c[kRowsAtOnce * kGemvRows];  // [count, m]
    weights.begin(row, count);
    const int64_t pass = ceil_div(m, ceil_div(m, kPassRows));
    for (int64_t i = 0; i < m; i += pass) {
      const int64_t size = min64(pass, m - i);
      float part[kRowsAtOnce * kPassRows];
      dots(weights, operands.x + i * k, size, k, count, part);
      for (int64_t w = 0; w < count; ++w)
        __builtin_memcpy(c + w * m + i, part + w * size, sizeof(float) * size);
    }
    for (int64_t w = 0; w < count; ++w) {
      float piece[kMaxRead];
      for (int64_t j = 0; j < r; j += kMaxRead) {
        const int64_t size = min64(r - j, kMaxRead);
        lora.b.read(row + w, j, size, piece);
        for (int64_t i = 0; i < m; ++i) c[w * m + i] += dot(operands.s + i * r + j, piece, size);
      }
      const float bias = f.bias.data != nullptr ? at(f.bias, row + w) : 0.0f;
      for (int64_t i = 0; i < m; ++i) {
        const float y = c[w * m + i] + bias;
        narrow(&y, 1, f.x.dtype, f.y, i * n + row + w);
      }
    }
  }
}

// The same with the reader of W that suits its format. False: out of memory.
template <class T>
bool gemv_columns_as(const LoraForward& f, const GemvOperands& operands, int64_t begin,
                     int64_t end) {
  const BaseView& base = f.base;
  const Lora lora(f.lora);
  const auto scratch_of = [](int64_t size) {
    return static_cast<float*>(thread_scratch(kGemvWeights, sizeof(float) * size_t(size)));
  };
  if (base.quant == nullptr) {
    gemv_columns(f, lora, operands, DenseWeights<T>(base), begin, end);
    return true;
  }
  if constexpr (std::is_same_v<T, float>) {  // the one type that lora_gemv_call.h asks for it
    if (!grouped(base)) {
      float* scratch = scratch_of(DecodedWeights::scratch(base.k));
      if (scratch == nullptr) return false;
      gemv_columns(f, lora, operands, DecodedWeights(base, f.x.dtype, scratch), begin, end);
      return true;
    }
  }
  if (base.quant->absmax == nullptr) {
    using Nested = QuantWeights<T, true>;
    float* scratch = scratch_of(Nested::scratch(base));
    if (scratch == nullptr) return false;
    gemv_columns(f, lora, operands, Nested(base, scratch), begin, end);
  } else {
    gemv_columns(f, lora, operands, QuantWeights<T, false>(base, nullptr), begin, end);
  }
  return true;
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
