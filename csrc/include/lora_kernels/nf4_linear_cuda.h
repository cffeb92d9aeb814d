// Launcher of a linear layer over an NF4/FP4 weight for few tokens. Every pointer is on the device.
#pragma once

#include "lora_kernels/nf4_cuda.h"

namespace lora_kernels {

constexpr int64_t kNf4LinearMaxTokens = 64;

// y[M, N] = x[M, K] Wᵀ + bias[N] + scale s[M, R] B[N, R]ᵀ, s = x A[R, K]ᵀ rounded to x's type;
// of fp16 x the 11 bits of that type in fp32, which has the range.
//
// q holds W [N, K]. x, bias and y are of one type, s of its rank_dtype, A and B of the same as x or
// fp32; rows have unit column stride and `ld*` elements from one to the next.
struct Nf4Linear {
  DeviceQuantView q;
  const void* x;
  int64_t m, n, k, ldx;
  const void* bias;  // null if there is none
  const void* a;     // null: s is there already
  int64_t lda;
  void* s;
  int64_t lds;
  const void* b;
  int64_t ldb;
  int64_t rank;  // 0: no LoRA term
  float scale;
  Dtype adapters;  // type of A and B
  void* y;
  int64_t ldy;
};

// Bytes of workspace, 16-byte aligned, that a call needs on the current device: 0 where one block
// takes all of K.
int64_t nf4_linear_workspace(int64_t m, int64_t n, int64_t k, Dtype dtype);

// One launch, two where K is split, one more where s is computed. No synchronisation, no
// allocation; on one device the same bits every time. cudaErrorInvalidValue: M over
// kNf4LinearMaxTokens, sizes past the grid's limits, or adapters of another type.
cudaError_t nf4_linear_cuda(const Nf4Linear& call, Dtype dtype, float* workspace,
                            cudaStream_t stream);

}  // namespace lora_kernels
