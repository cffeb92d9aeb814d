// lora_kernels_native::nf4_dequantize on CUDA. Built only where torch has CUDA.
#include "lora_kernels/nf4_cuda.h"

#include <torch/csrc/stable/accelerator.h>

#include "bindings/common.h"

namespace lora_kernels {
namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

DeviceQuantView device_view(const std::vector<Tensor>& base, const Meta& meta) {
  check_quantised(base, meta);
  const int32_t device = base[0].get_device_index();
  for (const Tensor& t : base)
    LK_CHECK(t.is_cuda() && t.get_device_index() == device, "base: is not on one CUDA device");
  DeviceQuantView q{};
  q.n = meta.n * meta.k;
  q.block_size = meta.block_size;
  q.nested_block = meta.nested_block;
  q.quant_type = meta.quant_type;
  q.packed = data<uint8_t>(base[0]);
  if (meta.nested_block == 0) {
    q.absmax = data<float>(base[1]);
    return q;
  }
  q.absmax8 = data<uint8_t>(base[1]);
  q.nested_absmax = data<float>(base[2]);
  q.nested_map = data<float>(base[3]);
  q.nested_offset = data<float>(base[4]);
  return q;
}

Tensor nf4_dequantize(const std::vector<Tensor>& base, const std::vector<int64_t>& meta_list,
                      ScalarType dtype) {
  const Meta meta = parse_meta(meta_list);
  const DeviceQuantView q = device_view(base, meta);
  const Dtype out_dtype = kernel_dtype("dtype", dtype);
  const int32_t device = base[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = new_tensor(base[0], {meta.n, meta.k}, dtype);
  const cudaError_t error =
      nf4_dequantize_cuda(q, out_dtype, out.mutable_data_ptr(), current_stream(device));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("nf4_dequantize: ") + cudaGetErrorString(error));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
}

}  // namespace lora_kernels
