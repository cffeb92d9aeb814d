// The gradients of the adapters (wgrad), summed over M: out[R, C] = leftᵀ·(keep ∘ right). For A
// left is ds and right is x, for B left is s and right is dy. right is read once; its rows, two
// interleaved, are packed as B tiles.
#pragma once

#include "tiles/lora_forward.h"

#if LK_BF16

namespace lora_kernels {
namespace {

constexpr int64_t kWgradRows = 128;  // rows of `right` that are packed at a time
constexpr int64_t kWgradChunks = 4;  // columns of a task, in chunks

// left[M, R] as panels of A tiles: row r of a tile holds 32 consecutive m.
LK_INLINE void pack_left(const MatrixView& left, int64_t depth, int64_t panels, char* to) {
  const uint16_t* data = static_cast<const uint16_t*>(left.data);
  for (int64_t s = 0; s < panels; ++s)
    for (int64_t t = 0; t < depth; ++t) {
      // 16 pairs of rows as dwords, transposed: one dword holds (m, m + 1) of one rank.
      __m512i v[16];
      for (int64_t q = 0; q < 16; ++q) {
        const int64_t m = t * kTileDepth + 2 * q;
        const __mmask16 mask = lanes16(left.columns - s * kTile);
        const uint16_t* p = data + m * left.stride + s * kTile;
        __m256i even = _mm256_setzero_si256(), odd = even;
        if (m < left.rows) even = _mm256_maskz_loadu_epi16(mask, p);
        if (m + 1 < left.rows) odd = _mm256_maskz_loadu_epi16(mask, p + left.stride);
        v[q] = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      }
      transpose16(v);
      char* tile = to + (s * depth + t) * kTileBytes;
      for (int r = 0; r < 16; ++r) _mm512_store_si512(tile + 64 * r, v[r]);
    }
}

// Writes a row of two neighbouring panels of sums as 32 columns in order.
LK_INLINE void store_columns(__m512 low, __m512 high, float* out, int64_t left) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
  const __m512i v = _mm512_permutex2var_epi64(a, first, b);
  const __m512i w = _mm512_permutex2var_epi64(a, second, b);
  _mm512_mask_storeu_epi32(out, lanes16(left), v);
  _mm512_mask_storeu_epi32(out + 16, lanes16(left - 16), w);
}

template <class Reader>
LK_INLINE void wgrad_task(Tiles& tiles, const Wgrad& f, const Reader& right, const char* left_tiles,
                          int64_t c0, int64_t c1, char* block, float* sums) {
  const int64_t m = f.right.rows, r = f.left.columns;
  const int64_t depth = ceil_div(m, kTileDepth), r_panels = ceil_div(r, kTile);
  const int64_t r_pairs = ceil_div(r_panels, 2);
  constexpr int64_t kPairs = kChunkPanels / 2;
  constexpr int64_t kPanelBytes = kWgradRows / kTileDepth * kTileBytes;
  for (int64_t m0 = 0; m0 < m; m0 += kWgradRows) {
    const int64_t rows = min64(kWgradRows, round_up(m - m0, kTileDepth));
    for (int64_t c = c0; c < c1; ++c) {
      pack_b_pairs(right, m0, m0 + rows, m, c, c + 1, block, kPanelBytes);
      for (int64_t rp = 0; rp < r_pairs; ++rp) {
        const char* l0 = left_tiles + (2 * rp * depth + m0 / kTileDepth) * kTileBytes;
        const char* l1 = 2 * rp + 1 < r_panels ? l0 + depth * kTileBytes : l0;
        for (int64_t i = 0; i < kPairs; ++i) {
          float* sum = sums + 1024 * (((c - c0) * r_pairs + rp) * kPairs + i);
          if (m0 == 0)
            zero_accumulators(tiles);
          else
            load_accumulators(tiles, sum);
          const char* z = block + 2 * i * kPanelBytes;
          multiply(tiles, l0, l1, z, z + kPanelBytes, rows / kTileDepth);
          store_accumulators(tiles, sum);
        }
      }
    }
  }
  for (int64_t c = c0; c < c1; ++c)
    for (int64_t row = 0; row < r; ++row)
      for (int64_t i = 0; i < kPairs; ++i) {
        const float* sum = sums + 1024 * (((c - c0) * r_pairs + row / 32) * kPairs + i) +
                           row % 32 / 16 * 512 + row % 16 * 16;
        const int64_t column = c * kChunk + 32 * i;
        store_columns(_mm512_load_ps(sum), _mm512_load_ps(sum + 256),
                      f.out + row * f.right.columns + column, f.right.columns - column);
      }
}

inline bool wgrad_bf16(const Wgrad& f, const Parallel& parallel) {
  const int64_t chunks = ceil_div(f.right.columns, kChunk);
  const int64_t depth = ceil_div(f.right.rows, kTileDepth);
  const int64_t r_panels = ceil_div(f.left.columns, kTile);
  char* left =
      static_cast<char*>(thread_scratch(kActivations, size_t(r_panels * depth * kTileBytes)));
  if (left == nullptr) return false;
  pack_left(f.left, depth, r_panels, left);
  const int64_t block_chunks = clamp64(ceil_div(chunks, parallel.threads), 1, kWgradChunks);
  bool ok = true;
  parallel(0, ceil_div(chunks, block_chunks), 1, [&](int64_t begin, int64_t end) {
    Tiles tiles(kTile);
    char* block = static_cast<char*>(
        thread_scratch(kBlock, size_t(kChunkPanels * kWgradRows / kTileDepth * kTileBytes)));
    float* sums = static_cast<float*>(thread_scratch(
        kAccumulators, size_t(block_chunks * ceil_div(r_panels, 2) * 4 * 4 * kTileBytes)));
    if (block == nullptr || sums == nullptr) return void(ok = false);
    const DenseReader<Order::natural> rows{f.right.data, f.right.dtype, f.right.stride,
                                           f.right.columns};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = task * block_chunks, c1 = min64(c0 + block_chunks, chunks);
      if (f.dropout.threshold == 0) {
        wgrad_task(tiles, f, rows, left, c0, c1, block, sums);
      } else {
        const MaskedReader<Order::natural> masked{rows, f.dropout};
        wgrad_task(tiles, f, masked, left, c0, c1, block, sums);
      }
    }
  });
  return ok;
}

}  // namespace
}  // namespace lora_kernels

#endif
