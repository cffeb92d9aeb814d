// The LoRA layer of every dtype on fp32 vectors: its products as calls of the GEMM, or of the GEMV
// for few rows.
#pragma once

#include "vector/gemm.h"
#include "vector/lora_gemv_call.h"

namespace lora_kernels {
namespace {
namespace vector {

// The base as the right operand of a product. `decoded` keeps the view with decoded scales.
inline bool base_rows(const BaseView& base, Dtype dtype, const Parallel& parallel,
                      QuantView* decoded, RowReader* rows) {
  rows->dense = base.dense;
  rows->columns = base.k;
  rows->dtype = dtype;
  if (base.quant == nullptr) return true;
  *decoded = decoded_scales(*base.quant, kScales, parallel);
  rows->quant = decoded;
  return decoded->absmax != nullptr;
}

inline RowReader dense_rows(const MatrixView& m) {
  RowReader rows;
  rows.dense = m;
  rows.columns = m.columns;
  return rows;
}

inline bool forward(const LoraForward& f, const Parallel& parallel) {
  const BaseView& base = f.base;
  if (f.x.rows <= kGemvRows) return forward_gemv(f, parallel);
  const Lora lora(f.lora);
  FusedGemm p{};
  p.left = dense_rows(f.x);
  p.m = f.x.rows;
  p.d = base.k;
  p.c = base.n;
  p.r = f.lora.r();
  p.base.transposed = true;
  QuantView decoded;
  if (!base_rows(base, f.x.dtype, parallel, &decoded, &p.base.rows)) return false;
  p.shrink = {lora.a, true};
  p.expand = {lora.b, true};
  p.left_dropout = f.lora.dropout;
  p.s = f.s;
  p.s_dtype = rank_dtype(f.x.dtype);
  p.bias = f.bias;
  p.out = f.y;
  p.out_dtype = f.x.dtype;
  return gemm(p, parallel);
}

inline bool backward(const LoraBackward& f, const Parallel& parallel) {
  const Lora lora(f.lora);
  FusedGemm p{};
  p.left = dense_rows(f.dy);
  p.m = f.dy.rows;
  p.d = f.base.n;
  p.c = f.base.k;
  p.r = f.lora.r();
  p.out = f.dx;
  QuantView decoded;
  if (p.out != nullptr && !base_rows(f.base, f.dy.dtype, parallel, &decoded, &p.base.rows))
    return false;
  p.shrink = {lora.b, false};
  p.expand = {lora.a, false};
  p.out_dropout = f.lora.dropout;
  p.s = f.ds;
  p.s_dtype = rank_dtype(f.dy.dtype);
  p.out_dtype = f.dy.dtype;
  return gemm(p, parallel);
}

inline bool wgrad(const Wgrad& f, const Parallel& parallel) {
  FusedGemm p{};
  p.left = dense_rows(f.left);
  p.left_transposed = true;
  p.m = f.left.columns;
  p.d = f.left.rows;
  p.c = f.right.columns;
  p.base = {dense_rows(f.right), false};
  p.base.rows.dropout = f.dropout;
  p.out = f.out;
  return gemm(p, parallel);
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
