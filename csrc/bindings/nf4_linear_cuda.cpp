// lora_kernels_native::nf4_linear_fwd on CUDA, for few tokens. Built only where torch has CUDA.
#include "lora_kernels/nf4_linear_cuda.h"

#include <torch/csrc/stable/accelerator.h>

#include "bindings/common.h"

namespace lora_kernels {
namespace {

void check_on(const char* name, const Tensor& t, int32_t device) {
  LK_CHECK(t.is_cuda() && t.get_device_index() == device, name, ": is not on the CUDA device of x");
}

Tensor nf4_linear_fwd(const Tensor& any_x, const std::vector<Tensor>& base,
                      const std::vector<int64_t>& meta_list, const std::optional<Tensor>& bias) {
  const Meta meta = parse_meta(meta_list);
  LK_CHECK(!meta.dense(), "meta: is that of a dense weight, expected a 4-bit one");
  check_quantised(base, meta);
  check_shape("x", any_x, {-1, meta.k});
  const Dtype dtype = kernel_dtype("x", any_x);
  LK_CHECK(any_x.is_cuda(), "x: is not on a CUDA device");
  const int32_t device = any_x.get_device_index();
  for (const Tensor& t : base) check_on("base", t, device);
  LK_CHECK(any_x.size(0) <= kNf4LinearMaxTokens, "x: got ", any_x.size(0),
           " tokens; the CUDA kernel takes at most ", kNf4LinearMaxTokens,
           ": choose another backend");
  if (bias.has_value()) {
    check_dtype("bias", *bias, any_x.scalar_type());
    check_shape("bias", *bias, {meta.n});
    check_contiguous("bias", *bias);
    check_on("bias", *bias, device);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  // The kernel reads rows, fastest where they start at multiples of 16 bytes.
  const bool rows = meta.k <= 1 || any_x.stride(1) == 1;
  const bool wide = any_x.stride(0) * static_cast<int64_t>(any_x.element_size()) % 16 == 0;
  const Tensor x = rows && wide ? any_x : torch::stable::contiguous(any_x);

  Nf4Linear call{};
  call.q.packed = data<uint8_t>(base[0]);
  call.q.n = meta.n * meta.k;
  call.q.block_size = meta.block_size;
  call.q.nested_block = meta.nested_block;
  call.q.quant_type = meta.quant_type;
  if (meta.nested_block == 0) {
    call.q.absmax = data<float>(base[1]);
  } else {
    call.q.absmax8 = data<uint8_t>(base[1]);
    call.q.nested_absmax = data<float>(base[2]);
    call.q.nested_map = data<float>(base[3]);
    call.q.nested_offset = data<float>(base[4]);
  }
  call.x = x.const_data_ptr();
  call.m = x.size(0);
  call.n = meta.n;
  call.k = meta.k;
  call.ldx = x.stride(0);
  call.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  Tensor y = new_tensor(x, {call.m, meta.n}, x.scalar_type());
  call.y = y.mutable_data_ptr();
  call.ldy = meta.n;
  const int64_t bytes = nf4_linear_workspace(call.m, call.n, call.k, dtype);
  Tensor workspace = new_tensor(x, {bytes / 4}, ScalarType::Float);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const cudaError_t error = nf4_linear_cuda(call, dtype, mutable_data<float>(workspace),
                                            static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("nf4_linear_fwd: ") + cudaGetErrorString(error));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("nf4_linear_fwd", TORCH_BOX(&nf4_linear_fwd));
}

}  // namespace lora_kernels
