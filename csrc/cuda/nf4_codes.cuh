// The NF4/FP4 codes in constant memory. Each file that includes this has its own copy.
#pragma once

#include "lora_kernels/nf4_codes.h"

namespace lora_kernels {

constexpr unsigned kAll = 0xffffffffu;  // every lane of a warp

#define LK_CODE_ROW(type)                                                                  \
  {kCodeTable[type][0],  kCodeTable[type][1],  kCodeTable[type][2],  kCodeTable[type][3],  \
   kCodeTable[type][4],  kCodeTable[type][5],  kCodeTable[type][6],  kCodeTable[type][7],  \
   kCodeTable[type][8],  kCodeTable[type][9],  kCodeTable[type][10], kCodeTable[type][11], \
   kCodeTable[type][12], kCodeTable[type][13], kCodeTable[type][14], kCodeTable[type][15]}
static __constant__ float device_codes[2][16] = {LK_CODE_ROW(kNf4), LK_CODE_ROW(kFp4)};
#undef LK_CODE_ROW

}  // namespace lora_kernels
