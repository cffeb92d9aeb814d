// NF4 and FP4: a view of a quantised weight, and the table of CPU kernels.
//
// Format (bitsandbytes): the weight is flat; byte i holds code[2i] in its high and code[2i+1] in
// its low nibble; one scale (absmax) per block of `block_size` elements, the last block may be
// short. value = table[code] * absmax in fp32, then one rounding to nearest even to the output
// type.
#pragma once

#include <cstdint>

#include "lora_kernels/dtype.h"
#include "lora_kernels/isa.h"
#include "lora_kernels/nf4_codes.h"
#include "lora_kernels/parallel.h"

namespace lora_kernels {

struct QuantView {
  const uint8_t* packed;       // [(n + 1) / 2]
  const float* absmax;         // [blocks], null if nested
  const uint8_t* absmax8;      // [blocks], null if not nested
  const float* nested_absmax;  // [ceil(blocks / nested_block)]
  const float* nested_map;     // [256]
  float nested_offset;
  int64_t n;           // elements
  int64_t block_size;  // power of two, 32 to 4096
  int64_t nested_block;
  int quant_type;

  LK_INLINE int64_t blocks() const { return (n + block_size - 1) / block_size; }

  // Two roundings in the nested case: the product, then the sum. Compile with
  // -ffp-contract=off (CMakeLists.txt does), or a fused multiply-add changes the last bit.
  LK_INLINE float block_scale(int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    const float product = nested_map[absmax8[block]] * nested_absmax[block / nested_block];
    return product + nested_offset;
  }

  // Scales of the blocks [first, first + count).
  LK_INLINE void block_scales(int64_t first, int64_t count, float* out) const {
    if (absmax != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] = absmax[first + i];
      return;
    }
    for (int64_t i = 0; i < count;) {
      const int64_t group = (first + i) / nested_block;
      const int64_t group_end = (group + 1) * nested_block - first;
      const int64_t end = group_end < count ? group_end : count;
      const float scale = nested_absmax[group];
      for (; i < end; ++i) {
        const float product = nested_map[absmax8[first + i]] * scale;
        out[i] = product + nested_offset;
      }
    }
  }

  LK_INLINE uint8_t code(int64_t i) const {
    return (i & 1) ? (packed[i >> 1] & 15) : (packed[i >> 1] >> 4);
  }
};

// Arrays are indexed by Dtype.
struct Nf4Kernels {
  // x[n] -> packed[(n + 1) / 2], absmax[ceil(n / block)]. Returns -1, or the index of the first
  // element that is not finite (the outputs are then unspecified). An odd n is padded with the code
  // of 0.
  int64_t (*quantize[kDtypes])(const void* x, int64_t n, int64_t block_size, int quant_type,
                               uint8_t* packed, float* absmax, const Parallel& parallel);
  // q -> out[q.n]. `past_caches` writes straight to memory where the tier can: twice as fast where
  // the memory of `out` was used before but is in no cache, much slower where the system has yet to
  // provide its pages.
  void (*dequantize[kDtypes])(const QuantView& q, void* out, bool past_caches,
                              const Parallel& parallel);
  // absmax[blocks] -> codes[blocks] into map[256], which ascends, of (absmax - offset) /
  // nested_absmax[ceil(blocks / nested_block)]. Returns as quantize does.
  int64_t (*quantize_scales)(const float* absmax, int64_t blocks, int64_t nested_block,
                             const float* map, float offset, uint8_t* codes, float* nested_absmax,
                             const Parallel& parallel);
};

LK_DECLARE_FAMILY(Nf4Kernels, nf4)

}  // namespace lora_kernels
