// The scales of a doubly quantised weight, by look-up.
//
// Blocks come in groups (of 256 in bitsandbytes' format) that share a scale of their own. A block's
// scale has only 256 possible values in a group: map[code] times the group's scale, plus the
// offset. These are computed once for each group; the scale of a block is then one load, where
// computing it from its code would cost more than decoding the block's weights.
#pragma once

#include <cstdint>

#include "lora_kernels/nf4.h"
#include "target.h"

namespace lora_kernels {
namespace {

// Whether all scales are zero or between 2^-100 and 2^100, so that no code * scale comes near the
// ends of fp32's range and `fast_table` (vector/row_reader.h) rounds exactly.
LK_INLINE bool in_safe_range(const float* scales, int64_t count) {
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

  // Computes the tables for the blocks [first, first + count), except those computed already.
  LK_INLINE void begin(int64_t first, int64_t count) {
    const int64_t group0 = first >> shift, end = ((first + count - 1) >> shift) + 1;
    for (int64_t g = group0 >= ready0 && group0 <= ready1 ? ready1 : group0; g < end; ++g)
      decode_group(g);
    ready0 = group0;
    ready1 = end > ready1 || group0 > ready1 ? end : ready1;
  }

  // The scales, by absmax8, of the group that this block is in, and the first block of the next
  // one.
  LK_INLINE const float* table(int64_t block) const {
    return maps + ((block >> shift) & last_slot) * kCodes;
  }
  LK_INLINE int64_t table_end(int64_t block) const { return ((block >> shift) + 1) << shift; }

  // Of all scales computed so far.
  bool in_safe_range() const { return safe; }

 private:
  static int64_t slots(const QuantView& q, int64_t blocks) {
    int64_t count = 1;
    while (q.nested_block > 0 && count < blocks / q.nested_block + 2) count *= 2;
    return count;
  }

  void decode_group(int64_t group) {
    float* to = maps + (group & last_slot) * kCodes;
    const float* map = q->nested_map;
    const float group_scale = q->nested_absmax[group], offset = q->nested_offset;
    for (int64_t i = 0; i < kCodes; ++i) {
      const float product = map[i] * group_scale;
      to[i] = product + offset;
    }
    safe &= lora_kernels::in_safe_range(to, kCodes);
  }

  const QuantView* q;
  float* maps;
  int shift;
  int64_t last_slot;
  int64_t ready0 = 0, ready1 = 0;  // the groups whose tables have been computed
  bool safe = true;
};

}  // namespace
}  // namespace lora_kernels
