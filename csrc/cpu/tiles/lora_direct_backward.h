// The backward as products of a thread's own rows of dy, which are A tiles as they lie in memory,
// by columns of W, which are packed a chunk at a time. (lora_direct.h says why a thread packs what
// it needs by itself.)
//
//   ds = scale · d ∘ ((g ∘ dy) · B)
//   dx = dy · W + keep ∘ (ds · A) / (1 - p)
#pragma once

#include "tiles/lora_backward.h"
#include "tiles/lora_direct.h"

#if LK_BF16 && !LK_AMX

namespace lora_kernels {
namespace {

// Bytes of rows of dy that stay in an L2 cache beside a chunk of W.
constexpr int64_t kDyBytes = 384 << 10;

struct DirectBackward {
  const LoraBackward& f;
  const char* b;     // [R / 16] B panels over N (pack_b_for_ds)
  int64_t n_chunks;  // of N
  int64_t panel_bytes() const { return n_chunks * kChunkTiles * kTileBytes; }
  int64_t ranks() const { return rank_tiles(f.lora); }
};

// ds of the rows [m, m + 32): to f.ds and, as two panels of A tiles, to `tiles_of_ds`.
LK_INLINE void direct_ds(Tiles& tiles, const DirectBackward& call, const DenseRows& dy, int64_t m,
                         int64_t m_end, char* tiles_of_ds) {
  const LoraBackward& f = call.f;
  const int64_t r = f.lora.r(), depth = call.ranks();
  alignas(64) float c[4][256];
  for (int64_t t = 0; t < depth; ++t) {
    const bool second = t * kTileDepth + kTile < r;
    const char* b = call.b + 2 * t * call.panel_bytes();
    zero_accumulators(tiles);
    if (second)
      dy.multiply<true>(tiles, b, call.panel_bytes());
    else
      dy.multiply<false>(tiles, b, call.panel_bytes());
    store_accumulators(tiles, c[0]);
    const __mmask32 mask = lanes32(r - t * kTileDepth);
    for (int64_t i = 0; i < 2 * kTile; ++i) {
      const float* sums = c[i / kTile * 2] + i % kTile * 16;
      const __m512i v = round_pair(_mm512_load_ps(sums), _mm512_load_ps(sums + 256));
      _mm512_store_si512(tiles_of_ds + (i / kTile * depth + t) * kTileBytes + i % kTile * 64, v);
      if (m + i < m_end)
        _mm512_mask_storeu_epi16(static_cast<uint16_t*>(f.ds) + (m + i) * r + t * kTileDepth, mask,
                                 v);
    }
  }
}

// dx of the rows [m0, m_end) and of the chunks [c0, c1) of K, and ds of these rows, by the calling
// thread. False: out of memory.
template <class Reader>
bool direct_dx(const Reader& reader, const DirectBackward& call, int64_t m0, int64_t m_end,
               int64_t c0, int64_t c1) {
  constexpr Order order = Reader::kOrder;
  const LoraBackward& f = call.f;
  const int64_t n = f.base.n, k = f.base.k, depth = call.ranks();
  const int64_t n_tiles = ceil_div(n, kTileDepth), pairs = ceil_div(m_end - m0, kPairRows);
  const bool masked = depth > 0 && f.lora.dropout.threshold != 0;
  const int64_t ds_bytes = 2 * depth * kTileBytes, a_panel = depth * kTileBytes;
  // A line more than the tiles: panels that are written side by side must not share cache sets.
  const int64_t w_panel = n_tiles * kTileBytes + 64;
  const int64_t copy_bytes = kGroupRows * ceil_div(n, kChunk) * kChunk * 2;
  char* memory = static_cast<char*>(thread_scratch(
      kBlock, size_t(pairs * ds_bytes + kChunkPanels * (w_panel + a_panel) + copy_bytes)));
  float* sums = static_cast<float*>(
      thread_scratch(kAccumulators, sizeof(float) * 1024 * kChunkPanels / 2 * (masked ? 2 : 1)));
  if (memory == nullptr || sums == nullptr) return false;
  char* ds = memory;
  char* a = ds + pairs * ds_bytes;
  char* w = a + kChunkPanels * a_panel;
  char* copy = w + kChunkPanels * w_panel;
  float* lora_sums = masked ? sums + 1024 * kChunkPanels / 2 : nullptr;
  Tiles tiles(kTile);
  DenseRows rows;
  if (depth > 0)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      rows.begin(f.dy, m0 + pair * kPairRows, m_end, copy);
      direct_ds(tiles, call, rows, m0 + pair * kPairRows, m_end, ds + pair * ds_bytes);
    }
  if (f.dx == nullptr) return true;
  const DenseReader<order> lora_a{f.lora.a.data, f.lora.a.dtype, f.lora.a.stride, k};
  for (int64_t c = c0; c < c1; ++c) {
    pack_b_pairs(reader, 0, n_tiles * kTileDepth, n, c, c + 1, w, w_panel);
    if (depth > 0) pack_b_pairs(lora_a, 0, depth * kTileDepth, f.lora.r(), c, c + 1, a, a_panel);
    // In natural order the panels past the last column of W are not needed.
    const int64_t left = k - c * kChunk;
    const int64_t panels = order == Order::natural && left < kChunk
                               ? round_up(ceil_div(left, kTile), 2)
                               : kChunkPanels;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t m = m0 + pair * kPairRows;
      rows.begin(f.dy, m, m_end, copy);
      for (int64_t p = 0; p < panels; p += 2) {
        float* sum = sums + 512 * p;
        const char* d = ds + pair * ds_bytes;
        const auto add_lora = [&] {
          multiply(tiles, d, d + a_panel, a + p * a_panel, a + (p + 1) * a_panel, depth);
        };
        zero_accumulators(tiles);
        rows.multiply<true>(tiles, w + p * w_panel, w_panel);
        if (depth > 0 && !masked) add_lora();
        store_accumulators(tiles, sum);
        if (masked) {
          zero_accumulators(tiles);
          add_lora();
          store_accumulators(tiles, lora_sums + 512 * p);
        }
      }
      store_dx<order>(f, sums, lora_sums, c, m, m_end);
    }
  }
  return true;
}

template <class Reader>
bool backward_direct(const Reader& reader, const LoraBackward& f, const Parallel& parallel) {
  const int64_t m = f.dy.rows, n = f.base.n, r = f.lora.r();
  const int64_t chunks = ceil_div(f.base.k, kChunk), pairs = ceil_div(m, kPairRows);
  DirectBackward call{f, nullptr, ceil_div(n, kChunk)};
  if (r > 0) {
    const int64_t panels = 2 * call.ranks();
    char* b = static_cast<char*>(thread_scratch(kAdapters, size_t(panels * call.panel_bytes())));
    if (b == nullptr) return false;
    for (int64_t i = 0; i < rank_panels(f.lora); ++i)
      pack_b_for_ds(f.lora, i * kTile, n, call.n_chunks * kChunkTiles * 16,
                    b + i * call.panel_bytes());
    call.b = b;
  }
  bool ok = true;
  const auto keep = [&](bool done) {
    if (!done) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
  };
  const bool even = pairs % parallel.threads == 0 || pairs >= kPairsOfThread * parallel.threads;
  if (pairs >= parallel.threads && even) {
    const int64_t fit = max64(kDyBytes / (kPairRows * n * 2), 1);
    parallel(0, pairs, 1, [&](int64_t begin, int64_t end) {
      const int64_t blocks = ceil_div(end - begin, fit), each = ceil_div(end - begin, blocks);
      for (int64_t i = begin; i < end; i += each)
        keep(direct_dx(reader, call, i * kPairRows, min64(min64(i + each, end) * kPairRows, m), 0,
                       chunks));
    });
    return ok;
  }
  parallel(0, chunks, 1, [&](int64_t begin, int64_t end) {
    LoraBackward own = f;
    if (begin > 0 && r > 0) {  // one thread writes ds
      own.ds = thread_scratch(kActivations, sizeof(uint16_t) * size_t(m * r));
      if (own.ds == nullptr) return keep(false);
    }
    keep(direct_dx(reader, DirectBackward{own, call.b, call.n_chunks}, 0, m, begin, end));
  });
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
