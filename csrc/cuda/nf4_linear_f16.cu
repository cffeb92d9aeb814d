#include "nf4_linear_run.cuh"

namespace lora_kernels {
namespace nf4_linear {

template cudaError_t run_tokens<__half>(Call&, float*, cudaStream_t);

}  // namespace nf4_linear
}  // namespace lora_kernels
