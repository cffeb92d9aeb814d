// lora_kernels_native::cross_entropy on the CPU.
#include "lora_kernels/cross_entropy.h"

#include "bindings/common.h"

namespace lora_kernels {
namespace {

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& any_logits, const Tensor& labels,
                                         int64_t ignored, bool need_grad) {
  check_shape("logits", any_logits, {-1, -1});
  LK_CHECK(any_logits.is_cpu(), "logits: is not on the CPU");
  const Dtype dtype = kernel_dtype("logits", any_logits);
  const bool rows_whole = any_logits.size(1) <= 1 || any_logits.stride(1) == 1;
  const Tensor logits = rows_whole ? any_logits : torch::stable::contiguous(any_logits);
  const int64_t m = logits.size(0), v = logits.size(1);
  check_cpu("labels", labels, ScalarType::Long, {m});
  const int64_t* label = data<int64_t>(labels);
  for (int64_t i = 0; i < m; ++i)
    LK_CHECK(label[i] == ignored || (label[i] >= 0 && label[i] < v), "labels: got ", label[i],
             " at index ", i, ", expected 0 to ", v - 1, " or ", ignored);
  Tensor losses = new_tensor(logits, {m}, ScalarType::Float);
  Tensor dlogits = need_grad ? new_tensor(logits, {m, v}, logits.scalar_type())
                             : new_tensor(logits, {0}, logits.scalar_type());
  const CrossEntropy call{logits.const_data_ptr(),
                          dtype,
                          m,
                          v,
                          logits.stride(0),
                          label,
                          ignored,
                          mutable_data<float>(losses),
                          need_grad ? dlogits.mutable_data_ptr() : nullptr};
  if (m > 0) cross_entropy_table().rows(call, torch_parallel());
  return {losses, dlogits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}

}  // namespace lora_kernels
