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

// The base alone: y [M, N] = x · Wᵀ + bias, and dx [M, K] = dy · W.
Tensor linear_forward(const Tensor& x, const Base& base, const std::optional<Tensor>& bias);
Tensor linear_backward(const Tensor& dy, const Base& base);

}  // namespace lora_kernels
