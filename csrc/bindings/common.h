// What the bindings share: argument checks, the visit of dtypes, torch's threads, the view of a
// quantised base weight. Headers of torch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "lora_kernels/dtype.h"
#include "lora_kernels/nf4.h"
#include "lora_kernels/parallel.h"

namespace lora_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The Python side has already checked the arguments, with better messages. These checks keep a
// direct call of lora_kernels_native::<op> from reading or writing out of bounds.
// std::invalid_argument becomes ValueError in Python.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

#define LK_CHECK(condition, ...)                         \
  do {                                                   \
    if (!(condition)) ::lora_kernels::fail(__VA_ARGS__); \
  } while (0)

std::string shape_text(const Tensor& t);
const char* dtype_name(ScalarType dtype);

// Sizes; -1 takes any.
void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape);
void check_dtype(const char* name, const Tensor& t, ScalarType dtype);
void check_contiguous(const char* name, const Tensor& t);
void check_cpu_contiguous(const char* name, const Tensor& t);
// dtype, shape, a contiguous tensor on the CPU.
void check_cpu(const char* name, const Tensor& t, ScalarType dtype,
               std::initializer_list<int64_t> shape);

// Float, Half or BFloat16, or an error that names the argument.
Dtype kernel_dtype(const char* name, ScalarType dtype);
// rank_dtype of the kernels.
inline ScalarType rank_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}
inline Dtype kernel_dtype(const char* name, const Tensor& t) {
  return kernel_dtype(name, t.scalar_type());
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// An uninitialised tensor on the device of `like`. A large one asks for huge pages, as the kernel's
// first touch of 4 KiB pages costs more than most kernels do.
Tensor new_tensor(const Tensor& like, Sizes shape, ScalarType dtype);
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  return new_tensor(like, Sizes(shape.begin(), shape.size()), dtype);
}
// Have torch fill new tensors as it fills its own in its deterministic mode: for tests.
void fill_new_tensors(bool on);

// torch's intra-op threads.
Parallel torch_parallel();

// How the ops describe a base weight: `Tensor[] base, int[] meta`
// (lora_kernels/ops/common/base.py).
struct Meta {
  int64_t n, k, block_size, nested_block;
  int quant_type;
  bool dense() const { return block_size == 0; }
};
Meta parse_meta(const std::vector<int64_t>& meta);
// Checks every component tensor of a 4-bit base: number, dtype, shape, contiguity.
void check_quantised(const std::vector<Tensor>& base, const Meta& meta);
// Fills a view from a base that check_quantised has accepted. nested_offset is left to the caller:
// QuantView holds its value, DeviceQuantView its address.
template <class View>
View view_without_offset(const std::vector<Tensor>& base, const Meta& meta) {
  View q{};
  q.n = meta.n * meta.k;
  q.block_size = meta.block_size;
  q.nested_block = meta.nested_block;
  q.quant_type = meta.quant_type;
  q.packed = data<uint8_t>(base[0]);
  if (meta.nested_block == 0) {
    q.absmax = data<float>(base[1]);
    return q;
  }
  q.absmax8 = data<uint8_t>(base[1]);
  q.nested_absmax = data<float>(base[2]);
  q.nested_map = data<float>(base[3]);
  return q;
}
// Checks a 4-bit base on the CPU and returns a view of it. The view owns no memory.
QuantView quant_view(const std::vector<Tensor>& base, const Meta& meta);

}  // namespace lora_kernels
