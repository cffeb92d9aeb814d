// lora_kernels_native::{glu_fwd,glu_bwd} on the CPU.
#include "lora_kernels/glu.h"

#include "bindings/common.h"

namespace lora_kernels {
namespace {

// Rows of unit stride, of the shape and type of g.
Tensor rows_like(const char* name, const Tensor& t, const Tensor& g) {
  check_shape(name, t, {g.size(0), g.size(1)});
  check_dtype(name, t, g.scalar_type());
  LK_CHECK(t.is_cpu(), name, ": is not on the CPU");
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

Glu call_of(const Tensor& g, const Tensor& u, int64_t activation) {
  LK_CHECK(activation >= 0 && activation < kActivations, "activation: got ", activation,
           ", expected 0 to ", kActivations - 1);
  Glu call{};
  call.activation = static_cast<Activation>(activation);
  call.dtype = kernel_dtype("g", g);
  call.rows = g.size(0);
  call.columns = g.size(1);
  call.g = g.const_data_ptr();
  call.g_stride = g.stride(0);
  call.u = u.const_data_ptr();
  call.u_stride = u.stride(0);
  return call;
}

Tensor glu_fwd(const Tensor& any_g, const Tensor& any_u, int64_t activation) {
  check_shape("g", any_g, {-1, -1});
  const Tensor g = rows_like("g", any_g, any_g), u = rows_like("u", any_u, any_g);
  Glu call = call_of(g, u, activation);
  Tensor h = new_tensor(g, {g.size(0), g.size(1)}, g.scalar_type());
  call.h = h.mutable_data_ptr();
  glu_table().forward(call, torch_parallel());
  return h;
}

std::tuple<Tensor, Tensor, Tensor> glu_bwd(const Tensor& any_dh, const Tensor& any_g,
                                           const Tensor& any_u, int64_t activation, bool need_h) {
  check_shape("g", any_g, {-1, -1});
  const Tensor g = rows_like("g", any_g, any_g), u = rows_like("u", any_u, any_g);
  const Tensor dh = rows_like("dh", any_dh, any_g);
  Glu call = call_of(g, u, activation);
  const auto result = [&] { return new_tensor(g, {g.size(0), g.size(1)}, g.scalar_type()); };
  Tensor dg = result(), du = result();
  Tensor h = need_h ? result() : new_tensor(g, {0}, g.scalar_type());
  call.dh = dh.const_data_ptr();
  call.dh_stride = dh.stride(0);
  call.dg = dg.mutable_data_ptr();
  call.du = du.mutable_data_ptr();
  call.h = need_h ? h.mutable_data_ptr() : nullptr;
  glu_table().backward(call, torch_parallel());
  return {dg, du, h};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("glu_fwd", TORCH_BOX(&glu_fwd));
  m.impl("glu_bwd", TORCH_BOX(&glu_bwd));
}

}  // namespace lora_kernels
