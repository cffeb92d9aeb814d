// AMX-BF16 tiles: C[16, 16] fp32 += A[16, 32] bf16 · B[32, 16] bf16.
//
// A row of an A tile holds 32 consecutive elements along the reduction. A B tile holds pairs: its
// row q has, for each of the 16 columns, the elements 2q and 2q + 1 along the reduction. Every tile
// here is 1 KiB of consecutive memory. A panel is the tiles of 16 output rows or columns, one after
// the other along the reduction, so that loads never compete for a set of the L1 cache.
#pragma once

#include "target.h"

#if LK_AMX

#include "lora_kernels/isa.h"

namespace lora_kernels {
namespace {

constexpr int64_t kTile = 16;       // output rows or columns of a tile
constexpr int64_t kTileDepth = 32;  // reduction elements of a tile
constexpr int64_t kTileBytes = 1024;

// Tiles 0-3 accumulate, 4-5 hold A, 6-7 hold B with `columns` output columns.
class TileScope {
 public:
  explicit TileScope(int columns = 16) {
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; ++t) {
      const bool narrow = t < 4 || t > 5;
      config[16 + 2 * t] = static_cast<uint8_t>(narrow ? 4 * columns : 64);
      config[48 + t] = 16;
    }
    _tile_loadconfig(config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

LK_INLINE void zero_accumulators() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// c: four tiles, (row panel 0 or 1) x (column panel 0 or 1).
LK_INLINE void load_accumulators(const float* c) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + 256, 64);
  _tile_loadd(2, c + 512, 64);
  _tile_loadd(3, c + 768, 64);
}

LK_INLINE void store_accumulators(float* c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

// The tile numbers of the intrinsics are literals.
#define LK_TILE_LOAD(operand, tile, p) \
  if (stream == operand)               \
    _tile_stream_loadd(tile, p, 64);   \
  else                                 \
    _tile_loadd(tile, p, 64)

// The operand that is read once, by streaming loads, which leave the other one in the L1 cache.
enum class Stream { none, a, b };

struct NoStep {
  LK_INLINE void operator()(int64_t) const {}
};

// Adds two panels by two panels, over `depth` tiles, to the four accumulators: four loads for four
// products, the best ratio that eight tile registers allow. Four loads from the L2 cache take 105
// cycles, four products 64. So with many panels one pair stays in L1 and the others are streamed
// (tuning.h says how deep). `step` is called between the products, for other work.
template <Stream stream = Stream::none, class Step = NoStep>
LK_INLINE void multiply(const char* a0, const char* a1, const char* b0, const char* b1,
                        int64_t depth, const Step& step = Step()) {
  for (int64_t i = 0; i < depth; ++i) {
    const int64_t o = i * kTileBytes;
    LK_TILE_LOAD(Stream::a, 4, a0 + o);
    LK_TILE_LOAD(Stream::b, 6, b0 + o);
    _tile_dpbf16ps(0, 4, 6);
    step(i);
    LK_TILE_LOAD(Stream::b, 7, b1 + o);
    _tile_dpbf16ps(1, 4, 7);
    LK_TILE_LOAD(Stream::a, 5, a1 + o);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

#undef LK_TILE_LOAD

}  // namespace
}  // namespace lora_kernels

#endif
