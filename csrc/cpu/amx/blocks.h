// A long product: blocks of the weight, decoded piece by piece while the tiles multiply the piece
// before, against pairs of strips of the activations, packed beforehand.
//
// The weight is cut into blocks of strips (16 outputs wide), and these into parts of the reduction
// (tuning.h says how long), so that a pair of activation strips stays in the L1 cache while a part
// streams past it from L2 (tiles.h). Sums wait in L2 between the parts.
#pragma once

#include "amx/pack.h"

#if LK_AMX

namespace lora_kernels {
namespace {

struct Stage {
  int64_t task, block;
  int64_t pair0, pair_end;  // of activation strips
  int64_t part;
  bool first;  // of the task
};

struct Blocks {
  int64_t all_strips, strips, count;  // of the weight; of a block; blocks
  int64_t depth, parts, unit;         // of the reduction in tiles; cut at multiples of unit
  int64_t all_pairs, pairs;           // of activation strips; as many as the sums hold
  int64_t groups;                     // of pairs: tasks of a block
  bool ahead;                         // whether a part is written beside the products of another

  // `grain`: strips that belong together.
  Blocks(const Blocking& by, int64_t weight_strips, int64_t grain, int64_t tiles, int64_t tile_unit,
         int64_t m_pairs, int64_t threads)
      : all_strips(weight_strips),
        depth(tiles),
        unit(tile_unit),
        all_pairs(m_pairs),
        ahead(by.ahead) {
    parts = ceil_div(depth, by.depth);
    const int64_t grains = all_strips / grain;
    const int64_t least = ceil_div(grains * grain, by.strips);
    strips = ceil_div(grains, min64(ceil_div(least, threads) * threads, grains)) * grain;
    count = ceil_div(all_strips, strips);
    // Threads share the blocks; where these do not come out even, each takes all of them for its
    // part of the rows.
    const bool even = count % threads == 0 || count >= 8 * threads;
    groups = even ? 1 : clamp64(threads, 1, all_pairs);
    const int64_t most = ceil_div(all_pairs, groups);
    const int64_t fit = max64(by.sum_bytes / (2 * strips * kTileBytes), 1);
    pairs = parts == 1 ? most : min64(most, fit);
  }

  int64_t tasks() const { return count * groups; }
  int64_t begin(int64_t part) const { return depth / unit * part / parts * unit; }
  int64_t end(int64_t part) const { return part + 1 == parts ? depth : begin(part + 1); }
  // A line more than the tiles: strips that are written side by side must not share cache sets.
  int64_t strip_bytes() const {
    return (ceil_div(ceil_div(depth, unit), parts) * unit) * kTileBytes + 64;
  }
  int64_t part_bytes() const { return strips * strip_bytes(); }
  int64_t all_part_bytes() const { return (ahead ? 2 : 1) * part_bytes(); }
  int64_t sum_bytes() const { return 2 * kTileBytes * (parts > 1 ? pairs * strips : 2); }
  int64_t strips_of(int64_t block) const { return min64(strips, all_strips - block * strips); }

  Stage start(int64_t task) const {
    const int64_t each = ceil_div(all_pairs, groups), pair0 = task / count * each;
    const int64_t end = min64(pair0 + each, all_pairs);
    return {task, task % count, pair0, min64(pair0 + pairs, end), 0, true};
  }
  // The stage after `s`, if it is before the task `end_task`.
  bool advance(Stage* s, int64_t end_task) const {
    s->first = false;
    if (++s->part < parts) return true;
    s->part = 0;
    const int64_t end = min64((s->task / count + 1) * ceil_div(all_pairs, groups), all_pairs);
    if (s->pair_end < end) {
      s->pair0 = s->pair_end;
      s->pair_end = min64(s->pair0 + pairs, end);
      return true;
    }
    if (s->task + 1 >= end_task) return false;
    *s = start(s->task + 1);
    return true;
  }
};

// Consecutive tiles of a strip; strips `stride` bytes apart.
struct Strips {
  const char* data;
  int64_t stride;
  LK_INLINE const char* at(int64_t strip, int64_t tile) const {
    return data + strip * stride + tile * kTileBytes;
  }
};

// The tasks [begin, end) on the calling thread, which has the tiles configured. The weight's strips
// are the operand `stream` of the tiles.
//   feeder: writes the tiles of a part, step by step (pack.h).
//   load(stage, to): points the feeder at the part of a stage.
//   finish(stage, pair, strip, c): the sums of a pair of strips are in the accumulators; c is room
//     for them. `strip` counts from the block's first.
template <Stream stream, class Feeder, class Load, class Finish>
LK_INLINE void multiply_blocks(const Blocks& blocks, const Strips& rows, int64_t begin, int64_t end,
                               char* memory, float* sums, Feeder& feeder, const Load& load,
                               const Finish& finish) {
  if (begin >= end) return;
  Stage now = blocks.start(begin);
  load(now, memory);
  feeder.finish();
  for (int64_t turn = 0;; ++turn) {
    const int64_t now_at = blocks.ahead ? turn % 2 : 0, next_at = blocks.ahead ? 1 - now_at : 0;
    const Strips weight{memory + now_at * blocks.part_bytes(), blocks.strip_bytes()};
    Stage next = now;
    const bool more = blocks.advance(&next, end);
    if (more && blocks.ahead) load(next, memory + next_at * blocks.part_bytes());
    const int64_t strips = blocks.strips_of(now.block), tile0 = blocks.begin(now.part);
    const int64_t depth = blocks.end(now.part) - tile0;
    const int64_t steps = (now.pair_end - now.pair0) * (strips / 2) * depth;
    const int64_t feed = ceil_div(feeder.left, steps);
    const bool last = now.part + 1 == blocks.parts;
    for (int64_t pair = now.pair0; pair < now.pair_end; ++pair) {
      const char *x0 = rows.at(2 * pair, tile0), *x1 = rows.at(2 * pair + 1, tile0);
      for (int64_t i = 0; i < strips; i += 2) {
        float* c = sums;
        if (blocks.parts > 1) c += 1024 * ((pair - now.pair0) * (strips / 2) + i / 2);
        if (now.part == 0)
          zero_accumulators();
        else
          load_accumulators(c);
        // Four calls fetch the next pair: a quarter of its tiles each, 512 bytes a step.
        constexpr int kLines = 8;
        const bool fetch = i < 8;
        const char* ahead = rows.at(2 * pair + 2 + i / 4, tile0) + i / 2 % 2 * depth * kLines * 64;
        const auto step = [&](int64_t k) __attribute__((always_inline)) {
          if (fetch)
            for (int line = 0; line < kLines; ++line)
              _mm_prefetch(ahead + (k * kLines + line) * 64, _MM_HINT_T1);
          for (int64_t j = 0; j < feed && feeder.left > 0; ++j) feeder.step();
        };
        const char *w0 = weight.at(i, 0), *w1 = weight.at(i + 1, 0);
        if (stream == Stream::a)
          multiply<Stream::a>(w0, w1, x0, x1, depth, step);
        else
          multiply<Stream::b>(x0, x1, w0, w1, depth, step);
        if (last)
          finish(now, pair, i, c);
        else
          store_accumulators(c);
      }
    }
    if (!more) return;
    if (!blocks.ahead) load(next, memory);
    feeder.finish();
    now = next;
  }
}

}  // namespace
}  // namespace lora_kernels

#endif
