// The linear layers of every dtype on fp32 vectors: which rows and factors meet in which product.
#pragma once

#include "vector/few.h"
#include "vector/product.h"

namespace lora_kernels {
namespace {
namespace vector {

// The base as the right operand of a product. `plain` keeps the view of decoded scales.
inline bool base_rows(const BaseView& base, Dtype dtype, const Parallel& parallel, QuantView* plain,
                      Rows* rows) {
  rows->dense = base.dense;
  rows->columns = base.k;
  rows->dtype = dtype;
  if (base.quant == nullptr) return true;
  *plain = plain_scales(*base.quant, kScales, parallel);
  rows->quant = plain;
  return plain->absmax != nullptr;
}

inline Rows dense_rows(const MatrixView& m) {
  Rows rows;
  rows.dense = m;
  rows.columns = m.columns;
  return rows;
}

inline bool forward(const LinearForward& f, const Parallel& parallel) {
  const BaseView& base = f.base;
  if (f.x.rows <= kFewRows) return forward_few(f, parallel);
  const Lora lora(f.lora);
  Product p{};
  p.left = dense_rows(f.x);
  p.m = f.x.rows;
  p.d = base.k;
  p.c = base.n;
  p.r = f.lora.r();
  p.base.transposed = true;
  QuantView plain;
  if (!base_rows(base, f.x.dtype, parallel, &plain, &p.base.rows)) return false;
  p.shrink = {lora.a, true};
  p.expand = {lora.b, true};
  p.left_dropout = f.lora.dropout;
  p.inner = f.s;
  p.inner_dtype = rank_dtype(f.x.dtype);
  p.bias = f.bias;
  p.out = f.y;
  p.out_dtype = f.x.dtype;
  return run(p, parallel);
}

inline bool backward(const LinearBackward& f, const Parallel& parallel) {
  const Lora lora(f.lora);
  Product p{};
  p.left = dense_rows(f.dy);
  p.m = f.dy.rows;
  p.d = f.base.n;
  p.c = f.base.k;
  p.r = f.lora.r();
  p.out = f.dx;
  QuantView plain;
  if (p.out != nullptr && !base_rows(f.base, f.dy.dtype, parallel, &plain, &p.base.rows))
    return false;
  p.shrink = {lora.b, false};
  p.expand = {lora.a, false};
  p.out_dropout = f.lora.dropout;
  p.inner = f.ds;
  p.inner_dtype = rank_dtype(f.dy.dtype);
  p.out_dtype = f.dy.dtype;
  return run(p, parallel);
}

inline bool outer_sum(const OuterSum& f, const Parallel& parallel) {
  Product p{};
  p.left = dense_rows(f.left);
  p.left_transposed = true;
  p.m = f.left.columns;
  p.d = f.left.rows;
  p.c = f.right.columns;
  p.base = {dense_rows(f.right), false};
  p.base.rows.dropout = f.dropout;
  p.out = f.out;
  return run(p, parallel);
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
