// lora_kernels_native::dropout_mask on the CPU.
#include "lora_kernels/dropout.h"

#include "bindings/common.h"

namespace lora_kernels {
namespace {

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p, int64_t stream) {
  check_dtype("seed", seed, ScalarType::Long);
  check_cpu_contiguous("seed", seed);
  LK_CHECK(seed.numel() == 1, "seed: got ", seed.numel(), " elements, expected 1");
  LK_CHECK(rows >= 0 && rows <= INT64_C(0xffffffff), "rows: got ", rows,
           ", expected 0 to 2^32 - 1");
  LK_CHECK(cols >= 0 && cols / 8 <= INT64_C(0xffffffff), "cols: got ", cols,
           ", expected 0 to 2^35 - 1");
  LK_CHECK(p >= 0.0 && p <= 1.0, "p: got ", p, ", expected 0 to 1");
  LK_CHECK(stream >= 0 && stream <= INT64_C(0xffffffff), "stream: got ", stream,
           ", expected 0 to 2^32 - 1");
  const Dropout dropout{static_cast<uint64_t>(*data<int64_t>(seed)), static_cast<uint32_t>(stream),
                        dropout_threshold(p)};
  Tensor keep = new_tensor(seed, {rows, cols}, ScalarType::Bool);
  dropout_table().mask(dropout, rows, cols, mutable_data<uint8_t>(keep), torch_parallel());
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace lora_kernels
