// ds = scale · d ∘ ((g ∘ dy)·B) and dx = dy·W + keep ∘ (ds·A) / (1 - p): rows of dy are A tiles,
// and pairs of decoded rows of W, interleaved, are B tiles.
//
// FLOPs 2MNK + 2MR(N + K); bytes at least: dy once, W once, dx once.
#pragma once

#include "amx/forward.h"

#if LK_AMX

namespace lora_kernels {
namespace {

// A block of W for dx: up to this many chunks of columns by as many rows as fill kBlockBytes.
constexpr int64_t kGradChunks = 2;

struct BackwardPacked {
  char* dy;        // [M / 16] A strips of `depth` tiles
  char* ds;        // [M / 16] A strips of rank_tiles
  char* b;         // [R / 16] B strips of `depth` tiles
  int64_t chunks;  // of N
  int64_t depth() const { return chunks * kChunkTiles; }
  int64_t strip() const { return depth() * kTileBytes; }
};

// Packs dy rows [m, m + 16) and computes their ds.
LK_INLINE void pack_dy(const LinearBackward& f, const BackwardPacked& p, int64_t strip, int64_t m,
                       int64_t m_end) {
  Strip<DenseRows<Order::natural>> dy_rows({f.dy.data, f.dy.dtype, f.dy.stride, f.base.n});
  char* dy = p.dy + strip * p.strip();
  pack_a_strip(dy_rows, m, m_end, 0, p.chunks, dy);
  const int64_t r = f.lora.r(), depth = rank_tiles(f.lora);
  char* ds_tiles = p.ds + strip * depth * kTileBytes;
  alignas(64) float c[2][256];
  for (int64_t t = 0; t < depth; ++t) {
    _tile_zero(0);
    _tile_zero(1);
    const bool second = t * kTileDepth + kTile < r;
    const char* b = p.b + 2 * t * p.strip();
    for (int64_t i = 0; i < p.depth(); ++i) {
      _tile_loadd(4, dy + i * kTileBytes, 64);
      _tile_loadd(6, b + i * kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (second) {
        _tile_loadd(7, b + p.strip() + i * kTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
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

// dx[m .. m + 32) of one chunk. c, and c_lora where a mask applies: four pairs of strips, each
// [row strip][column strip][16][16].
template <Order order>
LK_INLINE void store_dx(const LinearBackward& f, const float* c, const float* c_lora, int64_t chunk,
                        int64_t m, int64_t m_end) {
  const Dropout& dropout = f.lora.dropout;
  const __m512 factor = _mm512_set1_ps(dropout_scale(dropout.threshold));
  const int64_t k = chunk * kChunk;
  for (int64_t i = 0; i < min64(m_end - m, 2 * kTile); ++i) {
    const int64_t at = i / kTile * 512 + i % kTile * 16;
    __m512 v[8];
    for (int strip = 0; strip < 8; ++strip)
      v[strip] = _mm512_load_ps(c + strip / 2 * 1024 + strip % 2 * 256 + at);
    if (c_lora != nullptr) {
      const uint64_t low = keep_mask64(dropout, uint32_t(m + i), uint32_t(2 * chunk));
      const uint64_t high = keep_mask64(dropout, uint32_t(m + i), uint32_t(2 * chunk + 1));
      for (int strip = 0; strip < 8; ++strip)
        v[strip] =
            _mm512_mask3_fmadd_ps(_mm512_load_ps(c_lora + strip / 2 * 1024 + strip % 2 * 256 + at),
                                  factor, v[strip], kept16<order>(low, high, strip / 2, strip % 2));
    }
    __m512i out[4];
    eight_columns<order>(v, out);
    uint16_t* dx = static_cast<uint16_t*>(f.dx) + (m + i) * f.base.k + k;
    for (int t = 0; t < 4; ++t)
      _mm512_mask_storeu_epi16(dx + 32 * t, lanes32(f.base.k - k - 32 * t), out[t]);
  }
}

template <class Rows>
bool backward_blocks(const Rows& prototype, const LinearBackward& f, const Parallel& parallel) {
  constexpr Order order = Rows::kOrder;
  const int64_t m_all = f.dy.rows, n = f.base.n, k_chunks = ceil_div(f.base.k, kChunk);
  const int64_t depth = rank_tiles(f.lora);
  const bool masked = depth > 0 && f.lora.dropout.threshold != 0;
  BackwardPacked p{nullptr, nullptr, nullptr, ceil_div(n, kChunk)};
  const int64_t piece = piece_rows(m_all, p.chunks);
  const int64_t dy_bytes = piece / kTile * p.strip();
  p.dy = static_cast<char*>(
      thread_scratch(kActivations, size_t(dy_bytes + piece / kTile * depth * kTileBytes)));
  const int64_t r_strips = rank_strips(f.lora);
  p.b = static_cast<char*>(thread_scratch(kAdapters, size_t(2 * depth * p.strip())));
  if (p.dy == nullptr || (depth > 0 && p.b == nullptr)) return false;
  p.ds = p.dy + dy_bytes;
  parallel(0, r_strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack_b_for_ds(f.lora, i * kTile, n, p.depth() * 16, p.b + i * p.strip());
  });

  const int64_t share = ceil_div(k_chunks, parallel.threads);
  const int64_t block_chunks = min64(kGradChunks, share);
  const int64_t strips = block_chunks * kChunkStrips;
  const int64_t fit = kBlockBytes / (strips * kTileBytes);
  const int64_t n_blocks = ceil_div(ceil_div(n, kTileDepth), fit);
  const int64_t block_depth = ceil_div(ceil_div(n, kTileDepth), n_blocks);
  // The strips are written side by side: a line's offset keeps them out of each other's cache sets.
  const int64_t strip_bytes = block_depth * kTileBytes + 64;
  const int64_t k_blocks = ceil_div(k_chunks, block_chunks);
  bool ok = true;

  for (int64_t m0 = 0; m0 < m_all; m0 += piece) {
    const int64_t m_end = min64(m0 + piece, m_all);
    const int64_t m_pairs = ceil_div(m_end - m0, 2 * kTile);
    parallel(0, 2 * m_pairs, 1, [&](int64_t begin, int64_t end) {
      TileScope tiles;
      for (int64_t i = begin; i < end; ++i) pack_dy(f, p, i, m0 + i * kTile, m_end);
    });
    if (f.dx == nullptr) continue;
    const int64_t m_groups = clamp64(ceil_div(parallel.threads, k_blocks), 1, m_pairs);
    const int64_t group_pairs = ceil_div(m_pairs, m_groups);
    parallel(0, k_blocks * m_groups, 1, [&](int64_t begin, int64_t end) {
      TileScope tiles;
      Rows even = prototype, odd = prototype;
      const int64_t pairs_per_block = strips / 2;
      char* block = static_cast<char*>(
          thread_scratch(kBlock, size_t(strips * (strip_bytes + depth * kTileBytes))));
      // The last 8 KiB x 4 floats: a chunk's LoRA terms where a mask keeps them apart.
      float* sums = static_cast<float*>(thread_scratch(
          kAccumulators,
          size_t(4 * kTileBytes * (group_pairs * pairs_per_block + (masked ? 4 : 0)))));
      if (block == nullptr || sums == nullptr) return void(ok = false);
      char* a = block + strips * strip_bytes;
      float* lora_sums = masked ? sums + 1024 * group_pairs * pairs_per_block : nullptr;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c0 = task / m_groups * block_chunks, c1 = min64(c0 + block_chunks, k_chunks);
        const int64_t pair0 = task % m_groups * group_pairs;
        const int64_t pair_end = min64(pair0 + group_pairs, m_pairs);
        if (depth > 0) {
          DenseRows<order> first{f.lora.a.data, f.lora.a.dtype, f.lora.a.stride, f.base.k};
          DenseRows<order> second = first;
          pack_b_pairs(first, second, 0, depth * kTileDepth, f.lora.r(), c0, c1, a,
                       depth * kTileBytes);
        }
        for (int64_t d0 = 0; d0 * kTileDepth < n; d0 += block_depth) {
          const int64_t d1 = min64(d0 + block_depth, ceil_div(n, kTileDepth));
          pack_b_pairs(even, odd, d0 * kTileDepth, d1 * kTileDepth, n, c0, c1, block, strip_bytes);
          const bool last = d1 * kTileDepth >= n;
          for (int64_t mp = pair0; mp < pair_end; ++mp) {
            const char* dy = p.dy + 2 * mp * p.strip() + d0 * kTileBytes;
            const char* ds = p.ds + 2 * mp * depth * kTileBytes;
            for (int64_t i = 0; i < (c1 - c0) * kChunkStrips; i += 2) {
              float* c = sums + 1024 * ((mp - pair0) * pairs_per_block + i / 2);
              if (d0 == 0)
                zero_accumulators();
              else
                load_accumulators(c);
              const char* w = block + i * strip_bytes;
              multiply(dy, dy + p.strip(), w, w + strip_bytes, d1 - d0);
              const char* a_strip = a + i * depth * kTileBytes;
              const auto add_lora = [&] {
                multiply(ds, ds + depth * kTileBytes, a_strip, a_strip + depth * kTileBytes, depth);
              };
              if (last && depth > 0 && !masked) add_lora();
              store_accumulators(c);
              if (!last) continue;
              if (masked) {
                zero_accumulators();
                add_lora();
                store_accumulators(lora_sums + 1024 * (i / 2 % 4));
              }
              if (i % kChunkStrips == kChunkStrips - 2)
                store_dx<order>(f, c - 3 * 1024, lora_sums, c0 + i / kChunkStrips,
                                m0 + 2 * mp * kTile, m_end);
            }
          }
        }
      }
    });
  }
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
