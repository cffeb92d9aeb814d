// What the launchers share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lora_kernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool multiple(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline int log2_floor(int64_t v) {
  int shift = 0;
  while (v > 1) v >>= 1, ++shift;
  return shift;
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 0;
}

// Whether a kernel may start while the one before it still runs (programmatic dependent launch).
inline bool may_follow() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// Launches; `follows`: the kernel may start while the one before it still runs, and waits for it
// inside. Grids are checked by the callers where a size could exceed what a grid takes.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared,
                   cudaStream_t stream, bool follows, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = follows ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace lora_kernels
