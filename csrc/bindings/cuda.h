// What the CUDA bindings share. Built only where torch has CUDA.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/common.h"
#include "lora_kernels/nf4_cuda.h"

namespace lora_kernels {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(const char* op, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

inline int32_t cuda_device(const char* name, const Tensor& t) {
  LK_CHECK(t.is_cuda(), name, ": is not on a CUDA device");
  return t.get_device_index();
}

inline void check_on(const char* name, const Tensor& t, int32_t device) {
  LK_CHECK(t.is_cuda() && t.get_device_index() == device, name, ": is not on CUDA device ", device,
           ", as the input is");
}

// Checks a 4-bit base on a device and returns a view of it. The view owns no memory.
inline DeviceQuantView device_view(const std::vector<Tensor>& base, const Meta& meta,
                                   int32_t device) {
  check_quantised(base, meta);
  for (const Tensor& t : base) check_on("base", t, device);
  DeviceQuantView q = view_without_offset<DeviceQuantView>(base, meta);
  if (meta.nested_block > 0) q.nested_offset = data<float>(base[4]);
  return q;
}

}  // namespace lora_kernels
