// The LoRA layer over a dense or a 4-bit base, forward and backward: views of its operands and the
// table of its fused CPU kernels. Without an adapter it is the plain linear layer: nf4_linear uses
// the same kernels.
//
//   s  = keep ∘ x · Aᵀ / (1 - p)                          [M, R]
//   y  = x · Wᵀ + g ∘ (scale · (d ∘ s) · Bᵀ) + bias       [M, N]
//   ds = scale · d ∘ ((g ∘ dy) · B)                       [M, R]
//   dx = dy · W + keep ∘ (ds · A) / (1 - p)               [M, K]
//
// One rounding rule for every M: a 4-bit weight is round(code · absmax) to the type of x, products
// accumulate in fp32, every result is rounded once; s and ds are of rank_dtype(type of x).
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/matrix.h"
#include "lora_kernels/nf4.h"
#include "lora_kernels/parallel.h"
#include "lora_kernels/philox.h"

namespace lora_kernels {

struct BaseView {
  MatrixView dense;        // [N, K], or absent:
  const QuantView* quant;  // [N, K], flat
  int64_t n, k;
};

struct LoraView {
  MatrixView a, b;                 // [R, K], [N, R]; absent: no LoRA branch
  MatrixView rank_diag, out_diag;  // [R], [N]; absent: ones
  float scale;
  Dropout dropout;  // threshold 0: none
  int64_t r() const { return a.data != nullptr ? a.rows : 0; }
};

struct LoraForward {
  MatrixView x;  // [M, K]
  BaseView base;
  MatrixView bias;  // [N] or absent
  LoraView lora;
  void* y;  // [M, N] contiguous, type of x
  void* s;  // [M, R] contiguous, rank_dtype
};

struct LoraBackward {
  MatrixView dy;  // [M, N]
  BaseView base;
  LoraView lora;
  void* dx;  // [M, K] contiguous, type of dy, or null
  void* ds;  // [M, R] contiguous, rank_dtype
};

// out[R, C] fp32 = leftᵀ · (keep ∘ right): the gradient of A (left = ds, right = x), and what that
// of B is made from (left = s, right = dy).
struct Wgrad {
  MatrixView left;   // [M, R]
  MatrixView right;  // [M, C]
  Dropout dropout;
  float* out;
};

// The gradients that follow from s_dy = sᵀ·dy [R, N], fp32 (Wgrad). Null: not wanted.
//   db[N, R] = scale · g ∘ s_dyᵀ ∘ d, in B's type
//   drank_diag[R] = scale · Σ_n g · B ∘ s_dyᵀ, dout_diag[N] = scale · Σ_r d · B ∘ s_dyᵀ, fp32
struct AdapterGrads {
  const float* s_dy;
  LoraView lora;
  void* db;
  float *drank_diag, *dout_diag;
};

// x and dy have one type, A and B have one, and a dense weight has one: any of the three.
struct LoraKernels {
  bool (*forward)(const LoraForward&, const Parallel&);  // false: out of memory
  bool (*backward)(const LoraBackward&, const Parallel&);
  bool (*wgrad)(const Wgrad&, const Parallel&);
  void (*adapter_grads)(const AdapterGrads&, const Parallel&);
  // out[i] = in[i] · factor in the type of out
  void (*scale_into)(const float* in, int64_t count, float factor, Dtype dtype, void* out);
};

LK_DECLARE_FAMILY(LoraKernels, lora)

}  // namespace lora_kernels
