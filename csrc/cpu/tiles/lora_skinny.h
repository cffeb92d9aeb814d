// The forward for a 4-bit weight and at most 32 rows of x (a skinny matrix product): W is read
// once. A chunk of 32 rows of W is decoded into the L1 cache while the tiles multiply the chunk
// before it. Its time is that of decoding, about 0.1 instructions a weight; the tile unit works
// beside that.
#pragma once

#include "tiles/lora_forward.h"

#if LK_BF16

namespace lora_kernels {
namespace {

constexpr int64_t kSkinnyRows = 32;
constexpr int64_t kStepRows = 2 * kTile;  // rows of W worked on together
constexpr int64_t kStepChunkBytes = 2 * kChunkTiles * kTileBytes;

// Two panels of W by one of x. Accumulators 0 and 1 take the even steps, 2 and 3 the odd ones, so
// that no product waits for the one before.
LK_INLINE void multiply_narrow(Tiles& tiles, const char* w, const char* x, int64_t x_tile,
                               int64_t depth) {
  const char* w1 = w + depth * kTileBytes;
  for (int64_t t = 0; t < depth; ++t) {
    const int64_t o = t * kTileBytes;
    tiles.load<6>(x + t * x_tile, x_tile / 16);
    tiles.load<4>(w + o, 64);
    tiles.load<5>(w1 + o, 64);
    if (t % 2 == 0) {
      tiles.multiply<0, 4, 6>();
      tiles.multiply<1, 5, 6>();
    } else {
      tiles.multiply<2, 4, 6>();
      tiles.multiply<3, 5, 6>();
    }
  }
}

LK_INLINE void add_tiles(float* to, const float* from) {
  for (int i = 0; i < 256; i += 16)
    _mm512_store_ps(to + i, _mm512_add_ps(_mm512_load_ps(to + i), _mm512_load_ps(from + i)));
}

inline bool forward_skinny(const Nf4Reader& prototype, const LoraForward& f,
                           const Parallel& parallel) {
  constexpr Order order = Nf4Reader::kOrder;
  const int64_t m = f.x.rows, n = f.base.n, chunks = ceil_div(f.base.k, kChunk);
  const int64_t depth = rank_tiles(f.lora);
  const bool wide = m > kTile;
  ForwardPacked p{nullptr, nullptr, nullptr, chunks, wide ? kTile : m};
  const int64_t panels = wide ? 2 : 1;
  const int64_t x_tile = 64 * p.columns, x_bytes = panels * p.x_panel_bytes();
  p.x = static_cast<char*>(thread_scratch(kActivations, size_t(x_bytes + panels * depth * x_tile)));
  char* dropped = static_cast<char*>(thread_scratch(kBlock, size_t(p.x_panel_bytes())));
  if (p.x == nullptr || dropped == nullptr || !pack_adapters<order>(f, &p)) return false;
  p.s = p.x + x_bytes;
  {
    Tiles tiles(p.columns);
    for (int64_t i = 0; i < panels; ++i) pack_x<order>(tiles, f, p, i, i * kTile, m, dropped);
  }
  bool ok = true;
  parallel(0, ceil_div(n, kStepRows), 1, [&](int64_t begin, int64_t end) {
    Tiles tiles(p.columns);
    alignas(64) float c[4][256];
    char* stage = static_cast<char*>(
        thread_scratch(kBlock, size_t(2 * kStepChunkBytes + 2 * depth * kTileBytes)));
    if (stage == nullptr) return void(ok = false);
    PanelReader<Nf4Reader> upper(prototype), lower(prototype);
    char* expand = stage + 2 * kStepChunkBytes;
    const auto consume = [&](int64_t c_index) {
      const char* w = stage + c_index % 2 * kStepChunkBytes;
      const char* x = p.x + c_index * kChunkTiles * x_tile;
      if (wide)
        multiply(tiles, w, w + kChunkTiles * kTileBytes, x, x + p.x_panel_bytes(), kChunkTiles);
      else
        multiply_narrow(tiles, w, x, x_tile, kChunkTiles);
    };
    for (int64_t group = begin; group < end; ++group) {
      const int64_t row = group * kStepRows;
      const uint8_t* next = f.base.quant->packed + (row + kStepRows) * f.base.k / 2;
      zero_accumulators(tiles);
      for (int64_t c0 = 0; c0 < chunks; c0 += Nf4Reader::kMaxChunks) {
        const int64_t c1 = min64(c0 + Nf4Reader::kMaxChunks, chunks);
        upper.begin(row, n, c0, c1);
        lower.begin(row + kTile, n, c0, c1);
        for (int64_t i = c0; i < c1; ++i) {
          char* to = stage + i % 2 * kStepChunkBytes;
          // Prefetches as many lines of the next 32 rows, in the order of their addresses, which
          // the hardware follows: 8 rows of x took 10 % longer when each row was prefetched.
          upper.tiles(i, to, next);
          lower.tiles(i, to + kChunkTiles * kTileBytes, next + kTile * 64);
          next += kStepRows * 64;
          if (i > 0) consume(i - 1);
        }
      }
      consume(chunks - 1);
      if (depth > 0) {
        pack_b_for_expand(f.lora, row, 2, n, expand);
        if (wide)
          multiply(tiles, expand, expand + depth * kTileBytes, p.s, p.s + depth * x_tile, depth);
        else
          multiply_narrow(tiles, expand, p.s, x_tile, depth);
      }
      store_accumulators(tiles, c[0]);
      if (wide) {
        store_y(f, c[0], c[2], row, 0, m);
        store_y(f, c[1], c[3], row, kTile, m);
      } else {
        add_tiles(c[0], c[2]);
        add_tiles(c[1], c[3]);
        store_y(f, c[0], c[1], row, 0, m);
      }
    }
  });
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
