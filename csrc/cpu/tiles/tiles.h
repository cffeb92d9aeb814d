// Tiles of bf16: C[16, 16] fp32 += A[16, 32] bf16 · B[32, 16] bf16, on AMX (amx.h) or, where a
// processor has none, on vectors (vector_tiles.h).
//
// A row of an A tile holds 32 consecutive elements along the reduction. A B tile holds pairs: its
// row q has, for each of the 16 columns, the elements 2q and 2q + 1 along the reduction. Every tile
// here is 1 KiB of consecutive memory. A panel is the tiles of 16 output rows or columns, one after
// the other along the reduction, so that loads never compete for a set of the L1 cache.
//
// A `Tiles` is the eight tile registers of the calling thread: 0-3 accumulate, 4-5 hold A, 6-7 hold
// B with `columns` output columns. It has
//   zero<T>(), load<T>(p, stride), multiply<C, A, B>(), store<T>(c)
//                                       one register; rows of C are 64 bytes apart
//   multiply_panels<stream>(...)        two panels by two panels
#pragma once

#include "target.h"

#if LK_BF16

#include "lora_kernels/isa.h"

namespace lora_kernels {
namespace {

constexpr int64_t kTile = 16;       // output rows or columns of a tile
constexpr int64_t kTileDepth = 32;  // reduction elements of a tile
constexpr int64_t kTileBytes = 1024;

// The operand that is read once, by streaming loads, which leave the other one in the L1 cache.
enum class Stream { none, a, b };

struct NoStep {
  LK_INLINE void operator()(int64_t) const {}
};

}  // namespace
}  // namespace lora_kernels

#if LK_AMX
#include "tiles/amx.h"
#else
#include "tiles/vector_tiles.h"
#endif

namespace lora_kernels {
namespace {

LK_INLINE void zero_accumulators(Tiles& tiles) {
  tiles.zero<0>();
  tiles.zero<1>();
  tiles.zero<2>();
  tiles.zero<3>();
}

// c: four tiles, (row panel 0 or 1) x (column panel 0 or 1).
LK_INLINE void load_accumulators(Tiles& tiles, const float* c) {
  tiles.load<0>(c, 64);
  tiles.load<1>(c + 256, 64);
  tiles.load<2>(c + 512, 64);
  tiles.load<3>(c + 768, 64);
}

LK_INLINE void store_accumulators(Tiles& tiles, float* c) {
  tiles.store<0>(c);
  tiles.store<1>(c + 256);
  tiles.store<2>(c + 512);
  tiles.store<3>(c + 768);
}

// Adds one A tile by four B tiles, `stride` bytes apart, to the four accumulators in turn.
LK_INLINE void multiply_four(Tiles& tiles, const char* a, const char* b, int64_t stride) {
  tiles.load<4>(a, 64);
  tiles.load<6>(b, 64);
  tiles.multiply<0, 4, 6>();
  tiles.load<7>(b + stride, 64);
  tiles.multiply<1, 4, 7>();
  tiles.load<6>(b + 2 * stride, 64);
  tiles.multiply<2, 4, 6>();
  tiles.load<7>(b + 3 * stride, 64);
  tiles.multiply<3, 4, 7>();
}

// Adds two panels by two panels, over `depth` tiles, to the four accumulators. `step` is called
// once for each tile of depth, for other work.
template <Stream stream = Stream::none, class Step = NoStep>
LK_INLINE void multiply(Tiles& tiles, const char* a0, const char* a1, const char* b0,
                        const char* b1, int64_t depth, const Step& step = Step()) {
  tiles.multiply_panels<stream>(a0, a1, b0, b1, depth, step);
}

}  // namespace
}  // namespace lora_kernels

#endif
