// The backward of the LoRA layer. Rows of dy are packed as A tiles; decoded rows of W, two
// interleaved, as B tiles.
//
//   ds = scale · d ∘ ((g ∘ dy) · B)
//   dx = dy · W + keep ∘ (ds · A) / (1 - p)
//
// FLOPs 2MNK + 2MR(N + K); bytes at least: dy once, W once, dx once.
#pragma once

#include "tiles/lora_forward.h"

#if LK_BF16

namespace lora_kernels {
namespace {

struct BackwardPacked {
  char* dy;        // [M / 16] A panels of `depth` tiles
  char* ds;        // [M / 16] A panels of rank_tiles
  char* b;         // [R / 16] B panels of `depth` tiles
  int64_t chunks;  // of N
  int64_t depth() const { return chunks * kChunkTiles; }
  int64_t panel_bytes() const { return depth() * kTileBytes; }
};

// Packs the rows [m, m + 16) of dy and computes their ds.
LK_INLINE void pack_dy(Tiles& tiles, const LoraBackward& f, const BackwardPacked& p, int64_t panel,
                       int64_t m, int64_t m_end) {
  PanelReader<DenseReader<Order::natural>> dy_rows({f.dy.data, f.dy.dtype, f.dy.stride, f.base.n});
  char* dy = p.dy + panel * p.panel_bytes();
  pack_a_panel(dy_rows, m, m_end, 0, p.chunks, dy);
  const int64_t r = f.lora.r(), depth = rank_tiles(f.lora);
  char* ds_tiles = p.ds + panel * depth * kTileBytes;
  alignas(64) float c[2][256];
  for (int64_t t = 0; t < depth; ++t) {
    tiles.zero<0>();
    tiles.zero<1>();
    const bool second = t * kTileDepth + kTile < r;
    const char* b = p.b + 2 * t * p.panel_bytes();
    for (int64_t i = 0; i < p.depth(); ++i) {
      tiles.load<4>(dy + i * kTileBytes, 64);
      tiles.load<6>(b + i * kTileBytes, 64);
      tiles.multiply<0, 4, 6>();
      if (second) {
        tiles.load<7>(b + p.panel_bytes() + i * kTileBytes, 64);
        tiles.multiply<1, 4, 7>();
      }
    }
    tiles.store<0>(c[0]);
    tiles.store<1>(c[1]);
    const __mmask32 mask = lanes32(r - t * kTileDepth);
    for (int64_t i = 0; i < kTile; ++i) {
      const __m512i v = round_pair(_mm512_load_ps(c[0] + 16 * i), _mm512_load_ps(c[1] + 16 * i));
      _mm512_store_si512(ds_tiles + t * kTileBytes + i * 64, v);
      if (m + i < m_end)
        _mm512_mask_storeu_epi16(static_cast<uint16_t*>(f.ds) + (m + i) * r + t * kTileDepth, mask,
                                 v);
    }
  }
}

// Writes dx[m .. m + 32) of one chunk from the sums c, and c_lora where a mask applies to the
// branch: four pairs of panels, each [row panel][column panel][16][16].
template <Order order>
LK_INLINE void store_dx(const LoraBackward& f, const float* c, const float* c_lora, int64_t chunk,
                        int64_t m, int64_t m_end) {
  const Dropout& dropout = f.lora.dropout;
  const __m512 factor = _mm512_set1_ps(dropout_scale(dropout.threshold));
  const int64_t k = chunk * kChunk;
  for (int64_t i = 0; i < min64(m_end - m, 2 * kTile); ++i) {
    const int64_t at = i / kTile * 512 + i % kTile * 16;
    __m512 v[8];
    for (int panel = 0; panel < 8; ++panel)
      v[panel] = _mm512_load_ps(c + panel / 2 * 1024 + panel % 2 * 256 + at);
    if (c_lora != nullptr) {
      const uint64_t low = keep_mask64(dropout, uint32_t(m + i), uint32_t(2 * chunk));
      const uint64_t high = keep_mask64(dropout, uint32_t(m + i), uint32_t(2 * chunk + 1));
      for (int panel = 0; panel < 8; ++panel)
        v[panel] =
            _mm512_mask3_fmadd_ps(_mm512_load_ps(c_lora + panel / 2 * 1024 + panel % 2 * 256 + at),
                                  factor, v[panel], kept16<order>(low, high, panel / 2, panel % 2));
    }
    __m512i out[4];
    eight_columns<order>(v, out);
    uint16_t* dx = static_cast<uint16_t*>(f.dx) + (m + i) * f.base.k + k;
    for (int t = 0; t < 4; ++t)
      _mm512_mask_storeu_epi16(dx + 32 * t, lanes32(f.base.k - k - 32 * t), out[t]);
  }
}

template <class Reader>
bool backward_blocked(const Reader& prototype, const LoraBackward& f, const Parallel& parallel) {
  constexpr Order order = Reader::kOrder;
  const int64_t m_all = f.dy.rows, n = f.base.n, k_chunks = ceil_div(f.base.k, kChunk);
  const int64_t depth = rank_tiles(f.lora);
  const bool masked = depth > 0 && f.lora.dropout.threshold != 0;
  BackwardPacked p{nullptr, nullptr, nullptr, ceil_div(n, kChunk)};
  const Tuning& sizes = tuning();
  const int64_t piece = piece_rows(m_all, p.chunks, sizes.activation_bytes);
  const int64_t dy_bytes = piece / kTile * p.panel_bytes();
  p.dy = static_cast<char*>(
      thread_scratch(kActivations, size_t(dy_bytes + piece / kTile * depth * kTileBytes)));
  const int64_t r_panels = rank_panels(f.lora);
  p.b = static_cast<char*>(thread_scratch(kAdapters, size_t(2 * depth * p.panel_bytes())));
  if (p.dy == nullptr || (depth > 0 && p.b == nullptr)) return false;
  p.ds = p.dy + dy_bytes;
  parallel(0, r_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack_b_for_ds(f.lora, i * kTile, n, p.depth() * 16, p.b + i * p.panel_bytes());
  });

  bool ok = true;

  for (int64_t m0 = 0; m0 < m_all; m0 += piece) {
    const int64_t m_end = min64(m0 + piece, m_all);
    const int64_t m_pairs = ceil_div(m_end - m0, 2 * kTile);
    parallel(0, 2 * m_pairs, 1, [&](int64_t begin, int64_t end) {
      Tiles tiles(kTile);
      for (int64_t i = begin; i < end; ++i) pack_dy(tiles, f, p, i, m0 + i * kTile, m_end);
    });
    if (f.dx == nullptr) continue;
    const BlockSchedule schedule(Reader::blocking(sizes), k_chunks * kChunkPanels, kChunkPanels,
                                 ceil_div(n, kTileDepth), 1, m_pairs, parallel.threads);
    const int64_t expand_bytes = schedule.panels * depth * kTileBytes;
    parallel(0, schedule.tasks(), 1, [&](int64_t begin, int64_t end) {
      Tiles tiles(kTile);
      PairPacker<Reader> packer(prototype, n);
      char* memory = static_cast<char*>(
          thread_scratch(kBlock, size_t(schedule.buffer_bytes() + 2 * expand_bytes)));
      // The sums, and behind them those of the LoRA branch of one chunk, where a mask keeps them
      // apart. With one K block the sums of one chunk are enough.
      const int64_t chunk_bytes = kChunkPanels * 2 * kTileBytes;
      const int64_t sum_bytes = max64(schedule.sum_bytes(), chunk_bytes);
      float* sums = static_cast<float*>(
          thread_scratch(kAccumulators, size_t(sum_bytes + (masked ? chunk_bytes : 0))));
      if (memory == nullptr || sums == nullptr) return void(ok = false);
      float* lora_sums = masked ? sums + sum_bytes / 4 : nullptr;
      char* expand = memory + schedule.buffer_bytes();
      const auto load = [&](const Stage& stage, char* to) {
        const int64_t panel0 = stage.block * schedule.panels;
        const int64_t c0 = panel0 / kChunkPanels;
        const int64_t c1 = c0 + schedule.panels_of(stage.block) / kChunkPanels;
        if (stage.first && depth > 0) {
          const DenseReader<order> a{f.lora.a.data, f.lora.a.dtype, f.lora.a.stride, f.base.k};
          pack_b_pairs(a, 0, depth * kTileDepth, f.lora.r(), c0, c1,
                       expand + stage.task % 2 * expand_bytes, depth * kTileBytes);
        }
        packer.begin(schedule.begin(stage.k_block) * kTileDepth,
                     schedule.end(stage.k_block) * kTileDepth, c0, c1, to, schedule.panel_bytes());
      };
      const auto finish = [&](const Stage& stage, int64_t pair, int64_t panel, float* c) {
        const int64_t in_chunk = panel % kChunkPanels / 2;
        const auto add_lora = [&] {
          const char* ds = p.ds + 2 * pair * depth * kTileBytes;
          const char* a = expand + stage.task % 2 * expand_bytes + panel * depth * kTileBytes;
          multiply(tiles, ds, ds + depth * kTileBytes, a, a + depth * kTileBytes, depth);
        };
        float* sum = schedule.k_blocks > 1 ? c : sums + 1024 * in_chunk;
        if (depth > 0 && !masked) add_lora();
        store_accumulators(tiles, sum);
        if (masked) {
          zero_accumulators(tiles);
          add_lora();
          store_accumulators(tiles, lora_sums + 1024 * in_chunk);
        }
        if (in_chunk == kChunkPanels / 2 - 1)
          store_dx<order>(f, sum - 3 * 1024, lora_sums,
                          (stage.block * schedule.panels + panel) / kChunkPanels,
                          m0 + 2 * pair * kTile, m_end);
      };
      blocked_gemm<Stream::b>(tiles, schedule, Panels{p.dy, p.panel_bytes()}, begin, end, memory,
                              sums, packer, load, finish);
    });
  }
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
