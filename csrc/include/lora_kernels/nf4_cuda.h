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

// x[n] -> packed[(n + 1) / 2], absmax[ceil(n / block_size)], as Nf4Kernels::quantize. One launch.
// *bad, UINT64_MAX before, becomes the index of the first element that is not finite, if any is;
// the outputs are then unspecified.
cudaError_t nf4_quantize_cuda(const void* x, Dtype dtype, int64_t n, int64_t block_size,
                              int quant_type, uint8_t* packed, float* absmax,
                              unsigned long long* bad, cudaStream_t stream);

// absmax[blocks] -> codes[blocks] into nested_map[256], which ascends, and
// nested_absmax[ceil(blocks / nested_block)], as Nf4Kernels::quantize_scales. One launch. bad[0] as
// above; bad[1] becomes the index of the first map entry below the one before it.
cudaError_t nf4_quantize_scales_cuda(const float* absmax, int64_t blocks, int64_t nested_block,
                                     const float* nested_map, const float* nested_offset,
                                     uint8_t* codes, float* nested_absmax, unsigned long long* bad,
                                     cudaStream_t stream);

}  // namespace lora_kernels
