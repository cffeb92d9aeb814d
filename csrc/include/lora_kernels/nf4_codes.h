// The NF4 and FP4 codes: the only table of them in C++, for CPU and GPU.
#pragma once

#include <cstdint>

#include "lora_kernels/macros.h"

namespace lora_kernels {

enum QuantType : int { kNf4 = 0, kFp4 = 1 };

// By code. The NF4 table is sorted; FP4 is sign and magnitude, both zeros +0.
constexpr float kCodeTable[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.0625f / 12.0f, 8.0f / 12.0f, 1.0f, 4.0f / 12.0f, 6.0f / 12.0f, 2.0f / 12.0f,
     3.0f / 12.0f, 0.0f, -0.0625f / 12.0f, -8.0f / 12.0f, -1.0f, -4.0f / 12.0f, -6.0f / 12.0f,
     -2.0f / 12.0f, -3.0f / 12.0f},
};

// kCodeOrder[type][rank]: the code of the rank-th smallest table value.
constexpr uint8_t kCodeOrder[2][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3},
};

// The rank of x is the number of thresholds strictly below x: a tie takes the lower rank.
LK_INLINE float code_threshold(int quant_type, int i) {
  const float* table = kCodeTable[quant_type];
  const uint8_t* order = kCodeOrder[quant_type];
  return (table[order[i]] + table[order[i + 1]]) / 2.0f;
}

// A scale below this is taken as this when dividing, so that 1/absmax stays finite.
constexpr float kMinAbsmax = 1e-38f;

constexpr int64_t kMinBlock = 32;
constexpr int64_t kMaxBlock = 4096;

}  // namespace lora_kernels
