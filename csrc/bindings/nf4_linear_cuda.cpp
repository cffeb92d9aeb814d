// lora_kernels_native::{nf4_linear,lora_linear}_fwd on CUDA: 4-bit weights, few tokens, no dropout.
// One kernel serves both ops. lora_kernels/ops/*/native.py leaves all other calls to other
// backends.
#include "lora_kernels/nf4_linear_cuda.h"

#include "bindings/cuda.h"
#include "lora_kernels/philox.h"

namespace lora_kernels {
namespace {

// Rows with unit column stride; a tensor without elements may have any strides.
int64_t leading(const char* name, const Tensor& t) {
  LK_CHECK(t.numel() == 0 || t.size(1) <= 1 || t.stride(1) == 1, name, ": has stride ", t.stride(1),
           " along its rows, expected 1");
  return t.stride(0);
}

// x as the kernel reads it, fastest where rows start at multiples of 16 bytes.
Tensor rows_of(const Tensor& x) {
  const bool rows = x.size(1) <= 1 || x.stride(1) == 1;
  const bool wide = x.stride(0) * static_cast<int64_t>(x.element_size()) % 16 == 0;
  return rows && wide ? x : torch::stable::contiguous(x);
}

// A call without an adapter; `x` and `y` must outlive it.
Nf4Linear linear_call(const Tensor& x, const std::vector<Tensor>& base, const Meta& meta,
                      const std::optional<Tensor>& bias, Tensor& y) {
  const int32_t device = cuda_device("x", x);
  Nf4Linear call{};
  call.q = device_view(base, meta, device);
  if (bias.has_value()) {
    check_dtype("bias", *bias, x.scalar_type());
    check_shape("bias", *bias, {meta.n});
    check_contiguous("bias", *bias);
    check_on("bias", *bias, device);
    call.bias = bias->const_data_ptr();
  }
  call.x = x.const_data_ptr();
  call.m = x.size(0);
  call.n = meta.n;
  call.k = meta.k;
  call.ldx = x.stride(0);
  call.y = y.mutable_data_ptr();
  call.ldy = meta.n;
  return call;
}

void run(const char* op, const Tensor& x, const Nf4Linear& call) {
  const Dtype dtype = kernel_dtype("x", x);
  const int64_t bytes = nf4_linear_workspace(call.m, call.n, call.k, dtype);
  Tensor workspace = new_tensor(x, {bytes / 4}, ScalarType::Float);
  const cudaStream_t stream = current_stream(x.get_device_index());
  check_cuda(op, nf4_linear_cuda(call, dtype, mutable_data<float>(workspace), stream));
}

void check_x(const Tensor& x, const Meta& meta) {
  LK_CHECK(!meta.dense(), "meta: is that of a dense weight, expected a 4-bit one");
  check_shape("x", x, {-1, meta.k});
  kernel_dtype("x", x);
  cuda_device("x", x);
  LK_CHECK(x.size(0) <= kNf4LinearMaxTokens, "x: got ", x.size(0),
           " tokens; the CUDA kernel takes at most ", kNf4LinearMaxTokens,
           ": choose another backend");
}

Tensor nf4_linear_fwd(const Tensor& any_x, const std::vector<Tensor>& base,
                      const std::vector<int64_t>& meta_list, const std::optional<Tensor>& bias) {
  const Meta meta = parse_meta(meta_list);
  check_x(any_x, meta);
  const DeviceGuard guard(any_x.get_device_index());
  const Tensor x = rows_of(any_x);
  Tensor y = new_tensor(x, {x.size(0), meta.n}, x.scalar_type());
  run("nf4_linear_fwd", x, linear_call(x, base, meta, bias, y));
  return y;
}

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& any_x, const std::vector<Tensor>& base,
                                           const std::vector<int64_t>& meta_list, const Tensor& a,
                                           const Tensor& b, double scale,
                                           const std::optional<Tensor>& bias, double dropout_p,
                                           const std::optional<Tensor>& seed,
                                           const std::optional<Tensor>& rank_diag,
                                           const std::optional<Tensor>& out_diag, int64_t) {
  const Meta meta = parse_meta(meta_list);
  check_x(any_x, meta);
  const int32_t device = any_x.get_device_index();
  LK_CHECK(!seed.has_value() || dropout_threshold(dropout_p) == 0,
           "dropout_p: the CUDA kernel takes no dropout: choose another backend");
  LK_CHECK(!rank_diag.has_value() && !out_diag.has_value(),
           "rank_diag, out_diag: the CUDA kernel takes neither: choose another backend");
  check_shape("lora_a", a, {-1, meta.k});
  const int64_t rank = a.size(0);
  check_shape("lora_b", b, {meta.n, rank});
  check_dtype("lora_b", b, a.scalar_type());
  LK_CHECK(a.scalar_type() == any_x.scalar_type() || a.scalar_type() == ScalarType::Float,
           "lora_a: got dtype ", dtype_name(a.scalar_type()), ", expected that of x or float32");
  check_on("lora_a", a, device);
  check_on("lora_b", b, device);

  const DeviceGuard guard(device);
  const Tensor x = rows_of(any_x);
  Tensor y = new_tensor(x, {x.size(0), meta.n}, x.scalar_type());
  Tensor s = new_tensor(x, {x.size(0), rank}, rank_dtype(x.scalar_type()));
  Nf4Linear call = linear_call(x, base, meta, bias, y);
  call.a = a.const_data_ptr();
  call.lda = leading("lora_a", a);
  call.s = s.mutable_data_ptr();
  call.lds = rank;
  call.b = b.const_data_ptr();
  call.ldb = leading("lora_b", b);
  call.rank = rank;
  call.scale = static_cast<float>(scale);
  call.adapters = kernel_dtype("lora_a", a);
  // Without elements A may have no memory either, and a null A stands for an s that is there.
  if (a.numel() == 0) torch::stable::zero_(s);
  run("lora_linear_fwd", x, call);
  return {y, s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("nf4_linear_fwd", TORCH_BOX(&nf4_linear_fwd));
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
}

}  // namespace lora_kernels
