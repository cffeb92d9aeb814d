// A call of the GEMV (lora_gemv.h): x in the weights' order, s, and the threads' shares of y.
#pragma once

#include "vector/gemv_weights.h"
#include "vector/lora_gemv_table.h"

namespace lora_kernels {
namespace {
namespace vector {

// s[M, R] = x · Aᵀ, rounded to `dtype`; x[M, K] fp32.
inline void gemv_shrink(const RowReader& a, const float* x, int64_t m, int64_t k, int64_t r,
                        Dtype dtype, void* s, const Parallel& parallel) {
  parallel(0, r, 4, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float sums[kGemvRows] = {}, piece[kMaxRead];
      for (int64_t i = 0; i < k; i += kMaxRead) {
        const int64_t count = min64(k - i, kMaxRead);
        a.read(j, i, count, piece);
        for (int64_t row = 0; row < m; ++row) sums[row] += dot(x + row * k + i, piece, count);
      }
      for (int64_t row = 0; row < m; ++row) narrow(sums + row, 1, dtype, s, row * r + j);
    }
  });
}

// Decoded rows are fp32, whatever they are rounded to.
inline const GemvKernels& gemv_kernels(const LoraForward& f) {
  const bool dense = f.base.quant == nullptr, decoded = !dense && !grouped(f.base);
  switch (dense ? f.base.dense.dtype : decoded ? Dtype::f32 : f.x.dtype) {
    case Dtype::f16:
      return LK_CAT_(lora_gemv_f16_table_, LK_TIER);
    case Dtype::bf16:
      return LK_CAT_(lora_gemv_bf16_table_, LK_TIER);
    default:
      return LK_CAT_(lora_gemv_f32_table_, LK_TIER);
  }
}

// False: out of memory.
inline bool forward_gemv(LoraForward f, const Parallel& parallel) {
  const int64_t m = f.x.rows, k = f.base.k, r = f.lora.r();
  const bool masked = r > 0 && f.lora.dropout.threshold != 0;
  QuantView decoded;
  if (f.base.quant != nullptr && !(grouped(f.base) && ScaleMaps::takes(*f.base.quant))) {
    decoded = decoded_scales(*f.base.quant, kGemvScales, parallel);
    if (decoded.absmax == nullptr) return false;
    f.base.quant = &decoded;
  }
  float* x = static_cast<float*>(
      thread_scratch(kGemvInput, sizeof(float) * size_t(max64(2 * m * k + m * r, 1))));
  if (x == nullptr) return false;
  float *natural = x + m * k, *s = natural + m * k;
  for (int64_t i = 0; i < m; ++i) {
    widen(f.x.data, f.x.dtype, i * f.x.stride, k, natural + i * k);
    if (grouped(f.base))
      to_lane_order(natural + i * k, k, x + i * k);
    else
      __builtin_memcpy(x + i * k, natural + i * k, sizeof(float) * k);
    if (masked) apply_mask(f.lora.dropout, i, 0, k, natural + i * k);
  }
  if (r > 0) {
    const Dtype dtype = rank_dtype(f.x.dtype);
    gemv_shrink(Lora(f.lora).a, natural, m, k, r, dtype, f.s, parallel);
    widen(f.s, dtype, 0, m * r, s);
  }
  const GemvOperands operands{x, s};
  const auto columns = gemv_kernels(f).columns;
  bool ok = true;
  constexpr int64_t kAtLeast = 4;
  parallel(0, ceil_div(f.base.n, kRowsAtOnce), kAtLeast, [&](int64_t begin, int64_t end) {
    if (!columns(f, operands, begin, end)) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
  });
  return ok;
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
