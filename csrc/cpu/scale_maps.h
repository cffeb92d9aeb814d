// Scales of a doubly quantised weight by look-up.
//
// The scales of one group of blocks (256 in bitsandbytes' format) are 256 possible values: the map
// times the group's own scale, plus the offset. Decoding these once makes a block's scale a load at
// an address that the block's byte gives, where gathering the bytes' values costs more than
// decoding the weights does.
#pragma once

#include <cstdint>

#include "lora_kernels/nf4.h"
#include "target.h"

namespace lora_kernels {
namespace {

// Whether all scales are zero or between 2^-100 and 2^100, so that no code * scale comes near the
// ends of fp32's range.
LK_INLINE bool are_plain(const float* scales, int64_t count) {
  constexpr uint32_t kLeast = 27u << 23, kMost = 227u << 23;
  uint32_t others = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_bits(scales[i]) & 0x7fffffffu;
    others |= uint32_t(bits - kLeast > kMost - kLeast) & uint32_t(bits != 0);
  }
  return others == 0;
}

class ScaleMaps {
 public:
  static constexpr int64_t kCodes = 256;

  static bool takes(const QuantView& q) {
    return q.absmax == nullptr && q.nested_block >= 64 &&
           (q.nested_block & (q.nested_block - 1)) == 0;
  }
  // Floats of scratch for scales of `blocks` consecutive blocks at a time.
  static int64_t scratch(const QuantView& q, int64_t blocks) { return slots(q, blocks) * kCodes; }

  ScaleMaps(const QuantView& view, int64_t blocks, float* memory)
      : q(&view),
        maps(memory),
        shift(view.nested_block > 0 ? __builtin_ctzll(uint64_t(view.nested_block)) : 0),
        last_slot(slots(view, blocks) - 1) {}

  // Makes the scales of the blocks [first, first + count) ready.
  LK_INLINE void begin(int64_t first, int64_t count) {
    const int64_t group0 = first >> shift, end = ((first + count - 1) >> shift) + 1;
    for (int64_t g = group0 >= ready0 && group0 <= ready1 ? ready1 : group0; g < end; ++g)
      decode_group(g);
    ready0 = group0;
    ready1 = end > ready1 || group0 > ready1 ? end : ready1;
  }

  // By absmax8: the scales of the group that has this block, and the first block of the next group.
  LK_INLINE const float* table(int64_t block) const {
    return maps + ((block >> shift) & last_slot) * kCodes;
  }
  LK_INLINE int64_t table_end(int64_t block) const { return ((block >> shift) + 1) << shift; }

  // Whether all scales seen so far are plain.
  bool plain() const { return is_plain; }

 private:
  static int64_t slots(const QuantView& q, int64_t blocks) {
    int64_t count = 1;
    while (q.nested_block > 0 && count < blocks / q.nested_block + 2) count *= 2;
    return count;
  }

  void decode_group(int64_t group) {
    float* to = maps + (group & last_slot) * kCodes;
    const float* map = q->nested_map;
    const float outer = q->nested_absmax[group], offset = q->nested_offset;
    for (int64_t i = 0; i < kCodes; ++i) {
      const float product = map[i] * outer;
      to[i] = product + offset;
    }
    is_plain &= are_plain(to, kCodes);
  }

  const QuantView* q;
  float* maps;
  int shift;
  int64_t last_slot;
  int64_t ready0 = 0, ready1 = 0;  // the groups decoded now
  bool is_plain = true;
};

}  // namespace
}  // namespace lora_kernels
