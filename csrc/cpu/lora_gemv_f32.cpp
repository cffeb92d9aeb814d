#include "vector/lora_gemv.h"

namespace lora_kernels {

LK_TABLE(GemvKernels, lora_gemv_f32) = {vector::gemv_columns_as<float>};

}  // namespace lora_kernels
