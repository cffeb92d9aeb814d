// lora_kernels::lora_linear_eval and linear_eval on the CPU: what a compiled graph calls for a
// layer that is not trained. They run without Python, unless the call is unusual or observed
// (observers.h).
#include <array>
#include <atomic>

#include "bindings/lora.h"
#include "bindings/observers.h"

namespace lora_kernels {
namespace {

std::atomic<int> observers{0};

// The first result of an op, found by its name.
template <class... Args>
Tensor call(const char* op, const Args&... args) {
  constexpr size_t kResults = 2;  // at most
  std::array<StableIValue, std::max(sizeof...(args), kResults)> stack{
      torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor lora_linear_eval(const Tensor& x, const std::vector<Tensor>& base,
                        const std::vector<int64_t>& meta, const Tensor& a, const Tensor& b,
                        double scale, const std::optional<Tensor>& bias) {
  if (!observed()) {
    const std::optional<Tensor> y = lora_linear_infer(x, base, meta, a, b, scale, bias);
    if (y.has_value()) return *y;
  }
  return call("lora_kernels::lora_linear_any", x, base, meta, a, b, scale, bias);
}

Tensor linear_eval(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const std::optional<Tensor> y = linear_infer(x, weight, bias);
  return y.has_value() ? *y : call("aten::linear", x, weight, bias);
}

}  // namespace

void set_observers(int count) { observers = count; }
bool observed() { return observers.load(std::memory_order_relaxed) > 0; }

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
  m.impl("lora_linear_eval", TORCH_BOX(&lora_linear_eval));
  m.impl("linear_eval", TORCH_BOX(&linear_eval));
}

}  // namespace lora_kernels
