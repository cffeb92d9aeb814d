// The kernels' views (lora_kernels/lora.h) of the ops' tensors.
#pragma once

#include "bindings/common.h"
#include "lora_kernels/lora.h"

namespace lora_kernels {

// [rows, columns] with unit column stride, or an error that names the argument.
MatrixView matrix_view(const char* name, const Tensor& t, int64_t rows, int64_t columns);
// [size], contiguous; absent where the tensor is.
MatrixView vector_view(const char* name, const std::optional<Tensor>& t, int64_t size);

// The view of a base; it is not copied, as `view` points to `quant`.
struct Base {
  Base(const std::vector<Tensor>& base, const std::vector<int64_t>& meta);
  Base(const Base&) = delete;
  Meta meta;
  QuantView quant;
  BaseView view;
};

LoraView lora_view(const Base& base, const Tensor& a, const Tensor& b, double scale,
                   double dropout_p, const std::optional<Tensor>& seed,
                   const std::optional<Tensor>& rank_diag, const std::optional<Tensor>& out_diag,
                   int64_t stream);

// Activations have any strides, and kernels read rows: the tensor itself, or a contiguous copy.
Tensor rows_of(const char* name, const Tensor& t, int64_t columns);

// A new tensor of x's leading sizes and dtype: [..., columns].
Tensor rows_like(const Tensor& x, int64_t columns);
void check_memory(bool ok);

// What a backward has, as the rows that kernels read. dx gets the leading sizes of dy.
struct LoraSaved {
  Tensor dy;
  MatrixView dy_rows, x_rows, s_rows;
};
struct LoraNeeds {
  bool x, a, b, rank_diag, out_diag;
};
struct LoraGrads {
  std::optional<Tensor> dx, da, db, drank_diag, dout_diag;
};
// The gradients that are needed, those of the parameters in the parameters' types.
LoraGrads lora_grads(const LoraSaved& saved, const Base& base, const LoraView& lora,
                     const Tensor& a, const Tensor& b, const std::optional<Tensor>& rank_diag,
                     const std::optional<Tensor>& out_diag, const LoraNeeds& needs);
Tensor bias_grad(const Tensor& dy);

// The base alone: y [M, N] = x · Wᵀ + bias, and dx [M, K] = dy · W.
Tensor linear_forward(const Tensor& x, const Base& base, const std::optional<Tensor>& bias);
Tensor linear_backward(const Tensor& dy, const Base& base);

// The forward of a layer that is not trained: no dropout, no diagonals, and s is not kept. x is
// [..., K]. Nothing where it is not as usual; then lora_linear_fwd, or the checks before it, have a
// say.
std::optional<Tensor> lora_linear_infer(const Tensor& x, const std::vector<Tensor>& base,
                                        const std::vector<int64_t>& meta, const Tensor& a,
                                        const Tensor& b, double scale,
                                        const std::optional<Tensor>& bias);
// A plain layer of bf16 that is not trained, for as few rows as its time is that of reading W.
// Nothing where torch's product may be faster.
std::optional<Tensor> linear_infer(const Tensor& x, const Tensor& weight,
                                   const std::optional<Tensor>& bias);

}  // namespace lora_kernels
