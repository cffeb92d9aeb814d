#include "bindings/common.h"

#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lora_kernels {

std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i > 0 ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool ok = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (ok && size >= 0) ok = t.size(i) == size;
    ++i;
  }
  if (ok) return;
  std::ostringstream expected;
  const char* comma = "";
  for (const int64_t size : shape) {
    expected << comma << (size < 0 ? "any" : std::to_string(size));
    comma = ", ";
  }
  fail(name, ": got shape ", shape_text(t), ", expected [", expected.str(), "]");
}

void check_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  LK_CHECK(t.scalar_type() == dtype, name, ": got dtype ", dtype_name(t.scalar_type()),
           ", expected ", dtype_name(dtype));
}

void check_contiguous(const char* name, const Tensor& t) {
  LK_CHECK(t.is_contiguous(), name, ": is not contiguous");
}

void check_cpu_contiguous(const char* name, const Tensor& t) {
  LK_CHECK(t.is_cpu(), name, ": is not on the CPU");
  check_contiguous(name, t);
}

void check_cpu(const char* name, const Tensor& t, ScalarType dtype,
               std::initializer_list<int64_t> shape) {
  check_dtype(name, t, dtype);
  check_shape(name, t, shape);
  check_cpu_contiguous(name, t);
}

Dtype kernel_dtype(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    default:
      fail(name, ": got dtype ", dtype_name(dtype), ", expected float32, float16 or bfloat16");
  }
}

namespace {

std::atomic<bool> filled{false};
constexpr size_t kMostDimensions = 8;

// torch::stable::new_empty goes through the dispatcher by name and takes 1.7 us on a Zen 4 machine,
// this one 0.6.
Tensor empty_on_cpu(Sizes shape, ScalarType dtype) {
  int64_t strides[kMostDimensions];
  const size_t dims = shape.size();
  int64_t stride = 1;
  for (size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(dims), shape.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace

void fill_new_tensors(bool on) { filled = on; }

Tensor new_tensor(const Tensor& like, Sizes shape, ScalarType dtype) {
  const bool short_way = shape.size() <= kMostDimensions && like.is_cpu() && !filled;
  Tensor t = short_way ? empty_on_cpu(shape, dtype) : torch::stable::new_empty(like, shape, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes >= 2 * kHugePage && t.is_cpu()) {
    const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return t;
}

Parallel torch_parallel() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
          }};
}

Meta parse_meta(const std::vector<int64_t>& meta) {
  LK_CHECK(meta.size() == 2 || meta.size() == 5, "meta: got ", meta.size(),
           " numbers, expected [N, K] or [N, K, block_size, quant_type, nested_block_size]");
  Meta m{meta[0], meta[1], 0, 0, 0};
  LK_CHECK(m.n >= 0 && m.k >= 0, "meta: got N = ", m.n, ", K = ", m.k, ", expected none negative");
  constexpr int64_t kMost = INT64_C(1) << 60;
  LK_CHECK(m.n == 0 || m.k <= kMost / m.n, "meta: got N = ", m.n, ", K = ", m.k,
           ", expected N K <= 2^60");
  if (meta.size() == 2) return m;
  m.block_size = meta[2];
  m.nested_block = meta[4];
  LK_CHECK(m.block_size >= kMinBlock && m.block_size <= kMaxBlock &&
               (m.block_size & (m.block_size - 1)) == 0,
           "block_size: got ", m.block_size, ", expected a power of two from ", kMinBlock, " to ",
           kMaxBlock);
  LK_CHECK(meta[3] == kNf4 || meta[3] == kFp4, "quant_type: got ", meta[3],
           ", expected 0 (nf4) or 1 (fp4)");
  LK_CHECK(m.nested_block >= 0, "nested_block_size: got ", m.nested_block, ", expected >= 0");
  m.quant_type = static_cast<int>(meta[3]);
  return m;
}

namespace {

// `size` elements.
void check_component(const char* name, const Tensor& t, ScalarType dtype, int64_t size) {
  check_dtype(name, t, dtype);
  check_shape(name, t, {size});
  check_contiguous(name, t);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void check_quantised(const std::vector<Tensor>& base, const Meta& meta) {
  LK_CHECK(!meta.dense(), "base: is dense, expected a 4-bit weight");
  const bool nested = meta.nested_block > 0;
  const size_t expected = nested ? 5 : 2;
  LK_CHECK(base.size() == expected, "base: got ", base.size(), " tensors, expected ", expected);

  const int64_t n = meta.n * meta.k;
  const int64_t blocks = divide_up(n, meta.block_size);
  check_component("packed", base[0], ScalarType::Byte, divide_up(n, 2));
  check_component("absmax", base[1], nested ? ScalarType::Byte : ScalarType::Float, blocks);
  if (nested) {
    check_component("nested_absmax", base[2], ScalarType::Float,
                    divide_up(blocks, meta.nested_block));
    check_component("nested_map", base[3], ScalarType::Float, 256);
    check_component("nested_offset", base[4], ScalarType::Float, 1);
  }
}

QuantView quant_view(const std::vector<Tensor>& base, const Meta& meta) {
  check_quantised(base, meta);
  for (const Tensor& t : base) LK_CHECK(t.is_cpu(), "base: is not on the CPU");
  QuantView q = view_without_offset<QuantView>(base, meta);
  if (meta.nested_block > 0) q.nested_offset = *data<float>(base[4]);
  return q;
}

}  // namespace lora_kernels
