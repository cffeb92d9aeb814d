// The forward of the LoRA layer, as yᵀ = W·xᵀ + B·sᵀ: rows of W are A tiles as they are decoded; x
// is packed as B tiles once a call.
//
// FLOPs 2MNK + 2MR(N + K); bytes at least: W once, x once, y once.
#pragma once

#include "tiles/blocked_gemm.h"
#include "tiles/lora_adapters.h"

#if LK_BF16

namespace lora_kernels {
namespace {

// Slots of thread_scratch. The calling thread keeps packed activations, packed adapters and decoded
// scales in its own; each worker keeps its block of W and its sums.
enum Scratch { kActivations, kAdapters, kBlock, kAccumulators, kScales };

LK_INLINE int64_t round_up(int64_t v, int64_t to) { return ceil_div(v, to) * to; }

// Rows of activations that are packed at a time, so that they take about `bytes`: a multiple of 32.
LK_INLINE int64_t piece_rows(int64_t m, int64_t chunks, int64_t bytes) {
  const int64_t fit = bytes / (chunks * kChunk * 2) / 32 * 32;
  return min64(round_up(m, 32), max64(fit, 512));
}

struct ForwardPacked {
  char* x;  // [M / 16] panels of `chunks` chunks
  char* s;  // [M / 16] panels of rank_tiles
  char* a;  // [R / 16] panels of `chunks` chunks
  int64_t chunks, columns;
  int64_t x_panel_bytes() const { return chunks * kChunkTiles * 64 * columns; }
  int64_t a_panel_bytes() const { return chunks * kChunkTiles * kTileBytes; }
};

template <Order order>
LK_INLINE bool pack_adapters(const LoraForward& f, ForwardPacked* p) {
  const int64_t panels = rank_panels(f.lora);
  if (panels == 0) return true;
  p->a = static_cast<char*>(thread_scratch(kAdapters, size_t(panels * p->a_panel_bytes())));
  if (p->a == nullptr) return false;
  PanelReader<DenseReader<order>> a({f.lora.a.data, f.lora.a.dtype, f.lora.a.stride, f.base.k});
  for (int64_t i = 0; i < panels; ++i)
    pack_a_panel(a, i * kTile, f.lora.r(), 0, p->chunks, p->a + i * p->a_panel_bytes());
  return true;
}

// Packs the rows [m, m + 16) of x as a panel and computes their s. `dropped` is room for a panel of
// masked rows.
template <Order order>
LK_INLINE void pack_x(Tiles& tiles, const LoraForward& f, const ForwardPacked& p, int64_t panel,
                      int64_t m, int64_t m_end, char* dropped) {
  const int64_t count = clamp64(m_end - m, 0, kTile);
  char* x = p.x + panel * p.x_panel_bytes();
  DenseReader<order> rows{f.x.data, f.x.dtype, f.x.stride, f.base.k};
  pack_b_panel(rows, m, count, p.columns, 0, p.chunks, x);
  const int64_t r = f.lora.r();
  if (r == 0) return;
  const bool drops = f.lora.dropout.threshold != 0;
  if (drops) {
    MaskedReader<order> masked{{f.x.data, f.x.dtype, f.x.stride, f.base.k}, f.lora.dropout};
    pack_b_panel(masked, m, count, p.columns, 0, p.chunks, dropped);
    x = dropped;
  }
  const float factor = drops ? dropout_scale(f.lora.dropout.threshold) : 1.0f;
  const int64_t half_bytes = 32 * p.columns;
  char* s_tiles = p.s + panel * rank_tiles(f.lora) * 64 * p.columns;
  alignas(64) float c[256];
  for (int64_t i = 0; i < 2 * rank_tiles(f.lora); ++i) {
    char* half = s_tiles + i * half_bytes;
    if (i * kTile >= r) {
      for (int64_t b = 0; b < half_bytes; ++b) half[b] = 0;
      continue;
    }
    const char* a = p.a + i * p.a_panel_bytes();
    tiles.zero<0>();
    for (int64_t t = 0; t < p.chunks * kChunkTiles; ++t) {
      tiles.load<4>(a + t * kTileBytes, 64);
      tiles.load<6>(x + t * 64 * p.columns, 4 * p.columns);
      tiles.multiply<0, 4, 6>();
    }
    tiles.store<0>(c);
    finish_s(c, factor, i * kTile, r, m, m_end, p.columns, static_cast<uint16_t*>(f.s), half);
  }
}

// Writes y[m .. m + 16)[n .. n + 32) from c0 and c1, of [16 n][16 m] each.
LK_INLINE void store_y(const LoraForward& f, const float* c0, const float* c1, int64_t n, int64_t m,
                       int64_t m_end) {
  __m512i t0[16], t1[16];
  for (int i = 0; i < 16; ++i) {
    t0[i] = _mm512_load_si512(c0 + 16 * i);
    t1[i] = _mm512_load_si512(c1 + 16 * i);
  }
  transpose16(t0);
  transpose16(t1);
  const int64_t left = f.base.n - n;
  __m512 b0 = _mm512_setzero_ps(), b1 = b0;
  if (f.bias.data != nullptr) {
    b0 = load_floats(f.bias.data, f.bias.dtype, n, lanes16(left));
    b1 = load_floats(f.bias.data, f.bias.dtype, n + 16, lanes16(left - 16));
  }
  const __mmask32 mask = lanes32(left);
  uint16_t* y = static_cast<uint16_t*>(f.y) + m * f.base.n + n;
  for (int64_t i = 0; i < clamp64(m_end - m, 0, kTile); ++i)
    _mm512_mask_storeu_epi16(y + i * f.base.n, mask,
                             round_pair(_mm512_add_ps(_mm512_castsi512_ps(t0[i]), b0),
                                        _mm512_add_ps(_mm512_castsi512_ps(t1[i]), b1)));
}

template <class Reader>
bool forward_blocked(const Reader& prototype, const LoraForward& f, const Parallel& parallel) {
  constexpr Order order = Reader::kOrder;
  const int64_t m_all = f.x.rows, n = f.base.n, chunks = ceil_div(f.base.k, kChunk);
  const int64_t depth = rank_tiles(f.lora);
  const Tuning& sizes = tuning();
  const int64_t piece = piece_rows(m_all, chunks, sizes.activation_bytes);
  ForwardPacked p{nullptr, nullptr, nullptr, chunks, kTile};
  const int64_t x_bytes = piece / kTile * p.x_panel_bytes();
  p.x = static_cast<char*>(
      thread_scratch(kActivations, size_t(x_bytes + piece / kTile * depth * kTileBytes)));
  if (p.x == nullptr || !pack_adapters<order>(f, &p)) return false;
  p.s = p.x + x_bytes;
  bool ok = true;

  for (int64_t m0 = 0; m0 < m_all; m0 += piece) {
    const int64_t m_end = min64(m0 + piece, m_all);
    const int64_t m_pairs = ceil_div(m_end - m0, 2 * kTile);
    parallel(0, 2 * m_pairs, 1, [&](int64_t begin, int64_t end) {
      Tiles tiles(kTile);
      char* dropped = static_cast<char*>(thread_scratch(kBlock, size_t(p.x_panel_bytes())));
      if (dropped == nullptr) return void(ok = false);
      for (int64_t i = begin; i < end; ++i)
        pack_x<order>(tiles, f, p, i, m0 + i * kTile, m_end, dropped);
    });
    const BlockSchedule schedule(Reader::blocking(sizes), round_up(ceil_div(n, kTile), 2), 2,
                                 chunks * kChunkTiles, kChunkTiles, m_pairs, parallel.threads);
    const int64_t expand_bytes = schedule.panels * depth * kTileBytes;
    parallel(0, schedule.tasks(), 1, [&](int64_t begin, int64_t end) {
      Tiles tiles(kTile);
      PanelPacker<Reader> packer(prototype, n);
      char* memory = static_cast<char*>(
          thread_scratch(kBlock, size_t(schedule.buffer_bytes() + 2 * expand_bytes)));
      float* sums =
          static_cast<float*>(thread_scratch(kAccumulators, size_t(schedule.sum_bytes())));
      if (memory == nullptr || sums == nullptr) return void(ok = false);
      char* expand = memory + schedule.buffer_bytes();
      const auto load = [&](const Stage& stage, char* to) {
        const int64_t row = stage.block * schedule.panels * kTile;
        const int64_t panels = schedule.panels_of(stage.block);
        if (stage.first && depth > 0)
          pack_b_for_expand(f.lora, row, panels, n, expand + stage.task % 2 * expand_bytes);
        packer.begin(row, panels, schedule.begin(stage.k_block) / kChunkTiles,
                     schedule.end(stage.k_block) / kChunkTiles, to, schedule.panel_bytes());
      };
      const auto finish = [&](const Stage& stage, int64_t pair, int64_t panel, float* c) {
        if (depth > 0) {
          const char* b = expand + stage.task % 2 * expand_bytes + panel * depth * kTileBytes;
          const char* s = p.s + 2 * pair * depth * kTileBytes;
          multiply(tiles, b, b + depth * kTileBytes, s, s + depth * kTileBytes, depth);
        }
        store_accumulators(tiles, c);
        const int64_t row = (stage.block * schedule.panels + panel) * kTile;
        const int64_t m = m0 + 2 * pair * kTile;
        store_y(f, c, c + 512, row, m, m_end);
        store_y(f, c + 256, c + 768, row, m + kTile, m_end);
      };
      blocked_gemm<Stream::a>(tiles, schedule, Panels{p.x, p.x_panel_bytes()}, begin, end, memory,
                              sums, packer, load, finish);
    });
  }
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
