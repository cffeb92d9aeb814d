// lora_kernels_native::nf4_quantize, nf4_quantize_scales, nf4_dequantize on CUDA.
#include <array>

#include "bindings/cuda.h"

namespace lora_kernels {
namespace {

constexpr int64_t kNone = -1;

// The first bad element that a quantising kernel found. Reading it waits for the kernel, which does
// not matter: weights are quantised once.
class Faults {
 public:
  explicit Faults(const Tensor& like) : found_(new_tensor(like, {2}, ScalarType::Long)) {
    torch::stable::fill_(found_, static_cast<double>(kNone));
  }
  unsigned long long* data() { return static_cast<unsigned long long*>(found_.mutable_data_ptr()); }
  std::array<int64_t, 2> read(const char* op, cudaStream_t stream) const {
    std::array<int64_t, 2> values;
    check_cuda(op, cudaMemcpyAsync(values.data(), found_.const_data_ptr(), sizeof(values),
                                   cudaMemcpyDeviceToHost, stream));
    check_cuda(op, cudaStreamSynchronize(stream));
    return values;
  }

 private:
  Tensor found_;
};

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& w, int64_t block_size, int64_t quant_type) {
  const Dtype dtype = kernel_dtype("w", w);
  const int32_t device = cuda_device("w", w);
  check_contiguous("w", w);
  const int64_t n = w.numel();
  const Meta meta = parse_meta({n, 1, block_size, quant_type, 0});
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  Tensor packed = new_tensor(w, {(n + 1) / 2}, ScalarType::Byte);
  Tensor absmax = new_tensor(w, {(n + block_size - 1) / block_size}, ScalarType::Float);
  Faults faults(w);
  check_cuda("nf4_quantize", nf4_quantize_cuda(w.const_data_ptr(), dtype, n, meta.block_size,
                                               meta.quant_type, mutable_data<uint8_t>(packed),
                                               mutable_data<float>(absmax), faults.data(), stream));
  const int64_t bad = faults.read("nf4_quantize", stream)[0];
  LK_CHECK(bad == kNone, "w: element ", bad, " (flat index) is not finite");
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> nf4_quantize_scales(const Tensor& absmax, const Tensor& nested_map,
                                               const Tensor& nested_offset,
                                               int64_t nested_block_size) {
  const int32_t device = cuda_device("absmax", absmax);
  const auto check = [&](const char* name, const Tensor& t, int64_t size) {
    check_dtype(name, t, ScalarType::Float);
    check_shape(name, t, {size});
    check_contiguous(name, t);
    check_on(name, t, device);
  };
  check("absmax", absmax, -1);
  check("nested_map", nested_map, 256);
  check("nested_offset", nested_offset, 1);
  LK_CHECK(nested_block_size > 0, "nested_block_size: got ", nested_block_size, ", expected > 0");
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int64_t blocks = absmax.numel();
  Tensor codes = new_tensor(absmax, {blocks}, ScalarType::Byte);
  Tensor nested_absmax = new_tensor(
      absmax, {blocks / nested_block_size + (blocks % nested_block_size > 0)}, ScalarType::Float);
  Faults faults(absmax);
  check_cuda("nf4_quantize_scales",
             nf4_quantize_scales_cuda(data<float>(absmax), blocks, nested_block_size,
                                      data<float>(nested_map), data<float>(nested_offset),
                                      mutable_data<uint8_t>(codes),
                                      mutable_data<float>(nested_absmax), faults.data(), stream));
  const auto [scale, entry] = faults.read("nf4_quantize_scales", stream);
  LK_CHECK(entry == kNone, "nested_map: entry ", entry,
           " is below the one before it, expected rising values");
  LK_CHECK(scale == kNone, "absmax: element ", scale, " is not finite");
  return {codes, nested_absmax};
}

Tensor nf4_dequantize(const std::vector<Tensor>& base, const std::vector<int64_t>& meta_list,
                      ScalarType dtype) {
  const Meta meta = parse_meta(meta_list);
  LK_CHECK(!base.empty(), "base: got no tensors");
  const int32_t device = cuda_device("base", base[0]);
  const DeviceQuantView q = device_view(base, meta, device);
  const Dtype out_dtype = kernel_dtype("dtype", dtype);
  const DeviceGuard guard(device);
  Tensor out = new_tensor(base[0], {meta.n, meta.k}, dtype);
  check_cuda("nf4_dequantize",
             nf4_dequantize_cuda(q, out_dtype, out.mutable_data_ptr(), current_stream(device)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_native, CUDA, m) {
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_quantize_scales", TORCH_BOX(&nf4_quantize_scales));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
}

}  // namespace lora_kernels
