// A view of a matrix or a vector.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"

namespace lora_kernels {

// Row-major; rows lie `stride` elements apart. A vector is a matrix of one row. Null data: absent.
struct MatrixView {
  const void* data;
  Dtype dtype;
  int64_t rows, columns, stride;
};

}  // namespace lora_kernels
