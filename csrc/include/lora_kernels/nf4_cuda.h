// Launchers of the NF4/FP4 CUDA kernels. Every pointer is on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lora_kernels/dtype.h"

namespace lora_kernels {

// As QuantView, but the offset of nested scales stays on the device.
struct DeviceQuantView {
  const uint8_t* packed;
  const float* absmax;  // null if nested
  const uint8_t* absmax8;
  const float* nested_absmax;
  const float* nested_map;
  const float* nested_offset;
  int64_t n;
  int64_t block_size;
  int64_t nested_block;
  int quant_type;
};

// q -> out[q.n]: round(table[code] * scale), one launch, no synchronisation.
cudaError_t nf4_dequantize_cuda(const DeviceQuantView& q, Dtype out_dtype, void* out,
                                cudaStream_t stream);

}  // namespace lora_kernels
