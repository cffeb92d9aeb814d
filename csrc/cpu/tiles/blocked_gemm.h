// A blocked matrix product on tiles, for many rows of x: all of them are packed into panels
// first; the weight is decoded and packed on the way, block by block.
//
// A block of the weight is some panels (16 outputs each) by one K block (tuning.h says how large).
// It stays in the L2 cache while pair after pair of activation panels passes by; the K block of a
// pair stays in L1 (tiles.h). Between K blocks the partial sums wait in L2. Where packing is cheap
// there are two buffers: the next block is packed between the tile products of the present one.
#pragma once

#include "tiles/pack.h"

#if LK_BF16

namespace lora_kernels {
namespace {

// The products of one block of the weight with some rows.
struct Stage {
  int64_t task, block;      // a thread's unit of work; the block's columns
  int64_t pair0, pair_end;  // pairs of activation panels
  int64_t k_block;
  bool first;  // of the task
};

struct BlockSchedule {
  int64_t all_panels, panels, count;  // panels of the weight and of a block; number of blocks
  int64_t depth, k_blocks, unit;      // tiles along K, in K blocks that begin at multiples of unit
  int64_t all_pairs, pairs;           // pairs of activation panels: all, those whose sums fit
  int64_t row_groups;                 // the pairs are shared among so many tasks for each block
  bool double_buffered;               // pack a block between the products of the one before

  // `grain`: panels that are packed together.
  BlockSchedule(const Blocking& by, int64_t weight_panels, int64_t grain, int64_t tiles,
                int64_t unit_tiles, int64_t m_pairs, int64_t threads)
      : all_panels(weight_panels),
        depth(tiles),
        unit(unit_tiles),
        all_pairs(m_pairs),
        double_buffered(by.double_buffered) {
    k_blocks = ceil_div(depth, by.depth);
    const int64_t grains = all_panels / grain;
    const int64_t least = ceil_div(grains * grain, by.panels);
    panels = ceil_div(grains, min64(ceil_div(least, threads) * threads, grains)) * grain;
    count = ceil_div(all_panels, panels);
    // Threads share the blocks. Where these are not a multiple of the threads, the threads share
    // the rows instead, and each takes all blocks.
    const bool even = count % threads == 0 || count >= 8 * threads;
    row_groups = even ? 1 : clamp64(threads, 1, all_pairs);
    const int64_t most = ceil_div(all_pairs, row_groups);
    const int64_t fit = max64(by.sum_bytes / (2 * panels * kTileBytes), 1);
    pairs = k_blocks == 1 ? most : min64(most, fit);
  }

  int64_t tasks() const { return count * row_groups; }
  int64_t begin(int64_t k_block) const { return depth / unit * k_block / k_blocks * unit; }
  int64_t end(int64_t k_block) const {
    return k_block + 1 == k_blocks ? depth : begin(k_block + 1);
  }
  // A line more than the tiles: panels that are written side by side must not share cache sets.
  int64_t panel_bytes() const {
    return (ceil_div(ceil_div(depth, unit), k_blocks) * unit) * kTileBytes + 64;
  }
  int64_t k_block_bytes() const { return panels * panel_bytes(); }
  int64_t buffer_bytes() const { return (double_buffered ? 2 : 1) * k_block_bytes(); }
  int64_t sum_bytes() const { return 2 * kTileBytes * (k_blocks > 1 ? pairs * panels : 2); }
  int64_t panels_of(int64_t block) const { return min64(panels, all_panels - block * panels); }

  Stage start(int64_t task) const {
    const int64_t each = ceil_div(all_pairs, row_groups), pair0 = task / count * each;
    const int64_t end = min64(pair0 + each, all_pairs);
    return {task, task % count, pair0, min64(pair0 + pairs, end), 0, true};
  }
  // The stage after `s`, if it is before the task `end_task`.
  bool advance(Stage* s, int64_t end_task) const {
    s->first = false;
    if (++s->k_block < k_blocks) return true;
    s->k_block = 0;
    const int64_t end = min64((s->task / count + 1) * ceil_div(all_pairs, row_groups), all_pairs);
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

// Panels of consecutive tiles, `stride` bytes apart.
struct Panels {
  const char* data;
  int64_t stride;
  LK_INLINE const char* at(int64_t panel, int64_t tile) const {
    return data + panel * stride + tile * kTileBytes;
  }
};

// Runs the tasks [begin, end) on the calling thread. `stream` says
// which operand of the tile products the weight is.
//   packer: packs a block of the weight, step by step (pack.h).
//   load(stage, to): points the packer at the block of a stage.
//   finish(stage, pair, panel, c): called when the accumulators hold the sums over all of K of a
//     pair of activation panels and two panels of the block, `panel` and the next; c is room for
//     them.
template <Stream stream, class Packer, class Load, class Finish>
LK_INLINE void blocked_gemm(Tiles& tiles, const BlockSchedule& schedule, const Panels& rows,
                            int64_t begin, int64_t end, char* memory, float* sums, Packer& packer,
                            const Load& load, const Finish& finish) {
  if (begin >= end) return;
  Stage now = schedule.start(begin);
  load(now, memory);
  packer.finish();
  for (int64_t turn = 0;; ++turn) {
    const int64_t now_at = schedule.double_buffered ? turn % 2 : 0,
                  next_at = schedule.double_buffered ? 1 - now_at : 0;
    const Panels weight{memory + now_at * schedule.k_block_bytes(), schedule.panel_bytes()};
    Stage next = now;
    const bool more = schedule.advance(&next, end);
    if (more && schedule.double_buffered) load(next, memory + next_at * schedule.k_block_bytes());
    const int64_t panels = schedule.panels_of(now.block), tile0 = schedule.begin(now.k_block);
    const int64_t depth = schedule.end(now.k_block) - tile0;
    const int64_t steps = (now.pair_end - now.pair0) * (panels / 2) * depth;
    const int64_t per_step = ceil_div(packer.left, steps);
    const bool last = now.k_block + 1 == schedule.k_blocks;
    for (int64_t pair = now.pair0; pair < now.pair_end; ++pair) {
      const char *x0 = rows.at(2 * pair, tile0), *x1 = rows.at(2 * pair + 1, tile0);
      for (int64_t i = 0; i < panels; i += 2) {
        float* c = sums;
        if (schedule.k_blocks > 1) c += 1024 * ((pair - now.pair0) * (panels / 2) + i / 2);
        if (now.k_block == 0)
          zero_accumulators(tiles);
        else
          load_accumulators(tiles, c);
        // The first four products prefetch the next pair of activation panels: a quarter of its
        // tiles each, 512 bytes a step.
        constexpr int kLines = 8;
        const bool fetch = i < 8;
        const char* ahead = rows.at(2 * pair + 2 + i / 4, tile0) + i / 2 % 2 * depth * kLines * 64;
        const auto step = [&](int64_t k) __attribute__((always_inline)) {
          if (fetch)
            for (int line = 0; line < kLines; ++line)
              _mm_prefetch(ahead + (k * kLines + line) * 64, _MM_HINT_T1);
          for (int64_t j = 0; j < per_step && packer.left > 0; ++j) packer.step();
        };
        const char *w0 = weight.at(i, 0), *w1 = weight.at(i + 1, 0);
        if (stream == Stream::a)
          multiply<Stream::a>(tiles, w0, w1, x0, x1, depth, step);
        else
          multiply<Stream::b>(tiles, x0, x1, w0, w1, depth, step);
        if (last)
          finish(now, pair, i, c);
        else
          store_accumulators(tiles, c);
      }
    }
    if (!more) return;
    if (!schedule.double_buffered) load(next, memory);
    packer.finish();
    now = next;
  }
}

}  // namespace
}  // namespace lora_kernels

#endif
