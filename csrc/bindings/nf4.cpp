// lora_kernels_native::nf4_quantize, nf4_quantize_scales, nf4_dequantize and nf4_linear_{fwd,bwd}
// on the CPU. The last two run the kernels of the LoRA layer, without an adapter.
#include "lora_kernels/nf4.h"

#include "bindings/lora.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// Whether the system has already provided the memory of a large tensor, judged by a few of its
// pages.
bool has_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr size_t kLarge = 16 << 20, kPage = 4096, kSamples = 4;
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes < kLarge) return false;
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  for (size_t i = 0; i < kSamples; ++i) {
    const uintptr_t page = (begin + bytes / kSamples * i + bytes / 8) / kPage * kPage;
    unsigned char there = 0;
    if (mincore(reinterpret_cast<void*>(page), 1, &there) != 0 || (there & 1) == 0) return false;
  }
  return true;
#else
  return false;
#endif
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& w, int64_t block_size, int64_t quant_type) {
  const Dtype dtype = kernel_dtype("w", w);
  check_cpu_contiguous("w", w);
  const int64_t n = w.numel();
  const Meta meta = parse_meta({n, 1, block_size, quant_type, 0});
  Tensor packed = new_tensor(w, {(n + 1) / 2}, ScalarType::Byte);
  Tensor absmax = new_tensor(w, {(n + block_size - 1) / block_size}, ScalarType::Float);
  const int64_t bad = nf4_table().quantize[static_cast<int>(dtype)](
      w.const_data_ptr(), n, meta.block_size, meta.quant_type, mutable_data<uint8_t>(packed),
      mutable_data<float>(absmax), torch_parallel());
  LK_CHECK(bad < 0, "w: element ", bad, " (flat index) is ", element(w, dtype, bad),
           ", expected finite values");
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> nf4_quantize_scales(const Tensor& absmax, const Tensor& nested_map,
                                               const Tensor& nested_offset,
                                               int64_t nested_block_size) {
  check_cpu("absmax", absmax, ScalarType::Float, {-1});
  check_cpu("nested_map", nested_map, ScalarType::Float, {256});
  check_cpu("nested_offset", nested_offset, ScalarType::Float, {1});
  LK_CHECK(nested_block_size > 0, "nested_block_size: got ", nested_block_size, ", expected > 0");
  const float* map = data<float>(nested_map);
  for (int i = 1; i < 256; ++i)
    LK_CHECK(map[i - 1] <= map[i], "nested_map: got ", map[i - 1], " before ", map[i],
             ", expected rising values");
  const int64_t blocks = absmax.numel();
  Tensor codes = new_tensor(absmax, {blocks}, ScalarType::Byte);
  Tensor nested_absmax = new_tensor(
      absmax, {blocks / nested_block_size + (blocks % nested_block_size > 0)}, ScalarType::Float);
  const int64_t bad = nf4_table().quantize_scales(
      data<float>(absmax), blocks, nested_block_size, map, *data<float>(nested_offset),
      mutable_data<uint8_t>(codes), mutable_data<float>(nested_absmax), torch_parallel());
  LK_CHECK(bad < 0, "absmax: element ", bad, " is ", element(absmax, Dtype::f32, bad),
           ", expected finite values");
  return {codes, nested_absmax};
}

Tensor nf4_dequantize(const std::vector<Tensor>& base, const std::vector<int64_t>& meta_list,
                      ScalarType dtype) {
  const Meta meta = parse_meta(meta_list);
  const QuantView q = quant_view(base, meta);
  const Dtype out_dtype = kernel_dtype("dtype", dtype);
  Tensor out = new_tensor(base[0], {meta.n, meta.k}, dtype);
  nf4_table().dequantize[static_cast<int>(out_dtype)](q, out.mutable_data_ptr(), has_pages(out),
                                                      torch_parallel());
  return out;
}

Tensor nf4_linear_fwd(const Tensor& x, const std::vector<Tensor>& base_tensors,
                      const std::vector<int64_t>& meta, const std::optional<Tensor>& bias) {
  return linear_forward(x, Base(base_tensors, meta), bias);
}

Tensor nf4_linear_bwd(const Tensor& dy, const std::vector<Tensor>& base_tensors,
                      const std::vector<int64_t>& meta) {
  return linear_backward(dy, Base(base_tensors, meta));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_BOX(&nf4_quantize_scales));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
  m.impl("nf4_linear_fwd", TORCH_BOX(&nf4_linear_fwd));
  m.impl("nf4_linear_bwd", TORCH_BOX(&nf4_linear_bwd));
}

}  // namespace lora_kernels
