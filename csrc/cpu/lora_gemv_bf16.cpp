#include "vector/lora_gemv.h"

namespace lora_kernels {

LK_TABLE(GemvKernels, lora_gemv_bf16) = {vector::gemv_columns_as<BFloat16>};

}  // namespace lora_kernels
