// lora_kernels_native::nf4_quantize, nf4_dequantize on the CPU.
#include "lora_kernels/nf4.h"

#include "bindings/common.h"

namespace lora_kernels {
namespace {

float element(const Tensor& t, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f16:
      return to_float(data<Half>(t)[i]);
    case Dtype::bf16:
      return to_float(data<BFloat16>(t)[i]);
    default:
      return data<float>(t)[i];
  }
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& w, int64_t block_size, int64_t quant_type) {
  const Dtype dtype = kernel_dtype("w", w);
  check_cpu_contiguous("w", w);
  const int64_t n = w.numel();
  const Meta meta = parse_meta({n, 1, block_size, quant_type, 0});
  Tensor packed = new_tensor(w, {(n + 1) / 2}, ScalarType::Byte);
  Tensor absmax = new_tensor(w, {(n + block_size - 1) / block_size}, ScalarType::Float);
  const int64_t bad = nf4_kernels().quantize[static_cast<int>(dtype)](
      w.const_data_ptr(), n, meta.block_size, meta.quant_type, mutable_data<uint8_t>(packed),
      mutable_data<float>(absmax), torch_parallel());
  LK_CHECK(bad < 0, "w: element ", bad, " (flat index) is ", element(w, dtype, bad),
           ", expected finite values");
  return {packed, absmax};
}

Tensor nf4_dequantize(const std::vector<Tensor>& base, const std::vector<int64_t>& meta_list,
                      ScalarType dtype) {
  const Meta meta = parse_meta(meta_list);
  const QuantView q = quant_view(base, meta);
  const Dtype out_dtype = kernel_dtype("dtype", dtype);
  Tensor out = new_tensor(base[0], {meta.n, meta.k}, dtype);
  nf4_kernels().dequantize[static_cast<int>(out_dtype)](q, out.mutable_data_ptr(),
                                                        torch_parallel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
}

}  // namespace lora_kernels
