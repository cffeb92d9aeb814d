#include "vector/lora_gemv.h"

namespace lora_kernels {

LK_TABLE(GemvKernels, lora_gemv_f16) = {vector::gemv_columns_as<Half>};

}  // namespace lora_kernels
