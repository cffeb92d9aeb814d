// Readers: they give the rows of a matrix as bf16 vectors, a chunk of 128 elements at a time,
// whether the matrix is dense, masked or 4-bit. A reader has
//   begin(row, c0, c1)    the chunks [c0, c1) of this row are read next
//   chunk(c, v)           the four vectors of a chunk
//   prefetch(row, c)      asks for a chunk of any row
//   blocking(tuning)      the block sizes that suit it (blocked_gemm.h)
//
// 64 bytes of 4-bit codes decode to four vectors, each of every fourth element of the chunk. To put
// them in order would cost more than to decode them, so they stay as they are: vector t holds the
// elements 4 j + t (Order::strided) instead of 32 t + j (Order::natural), j = 0 .. 31. A sum over K
// may run in any order as long as both operands have the same, so x is packed in strided order too.
#pragma once

#include "tiles/tiles.h"

#if LK_BF16

#include "lora_kernels/dtype.h"
#include "lora_kernels/lora.h"
#include "lora_kernels/nf4.h"
#include "lora_kernels/tuning.h"
#include "nf4_decode.h"
#include "nf4_scales.h"
#include "philox_simd.h"

namespace lora_kernels {
namespace {

enum class Order { natural, strided };

constexpr int64_t kChunk = 128;
constexpr int64_t kChunkTiles = kChunk / kTileDepth;

LK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
LK_INLINE int64_t clamp64(int64_t v, int64_t low, int64_t high) {
  return min64(max64(v, low), high);
}

// Masks of the lowest `count` of 32 and of 16 lanes.
LK_INLINE __mmask32 lanes32(int64_t count) {
  return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
}
LK_INLINE __mmask16 lanes16(int64_t count) {
  return static_cast<__mmask16>(lanes32(clamp64(count, 0, 16)));
}

LK_INLINE __m512i round_pair(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// From natural to strided order.
LK_INLINE void stride_by_four(__m512i v[4]) {
  alignas(64) static constexpr uint16_t kPick01[32] = {0,  4,  8,  12, 16, 20, 24, 28, 32, 36, 40,
                                                       44, 48, 52, 56, 60, 1,  5,  9,  13, 17, 21,
                                                       25, 29, 33, 37, 41, 45, 49, 53, 57, 61};
  const __m512i pick01 = _mm512_load_si512(kPick01);
  const __m512i pick23 = _mm512_add_epi16(pick01, _mm512_set1_epi16(2));
  const __m512i a01 = _mm512_permutex2var_epi16(v[0], pick01, v[1]);
  const __m512i a23 = _mm512_permutex2var_epi16(v[0], pick23, v[1]);
  const __m512i b01 = _mm512_permutex2var_epi16(v[2], pick01, v[3]);
  const __m512i b23 = _mm512_permutex2var_epi16(v[2], pick23, v[3]);
  v[0] = _mm512_inserti64x4(a01, _mm512_castsi512_si256(b01), 1);
  v[1] = _mm512_shuffle_i64x2(a01, b01, 0xee);
  v[2] = _mm512_inserti64x4(a23, _mm512_castsi512_si256(b23), 1);
  v[3] = _mm512_shuffle_i64x2(a23, b23, 0xee);
}

// 16 elements of any float type as fp32; lanes outside the mask are 0.
LK_INLINE __m512 load_floats(const void* p, Dtype dtype, int64_t i, __mmask16 mask) {
  if (dtype == Dtype::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  const __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  if (dtype == Dtype::f16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

// How blocked_gemm.h cuts a weight into blocks.
struct Blocking {
  int64_t depth;         // tiles along K
  int64_t sum_bytes;     // partial sums kept between K blocks; more rows read the weight again
  int64_t panels;        // of 16 outputs
  bool double_buffered;  // pack a block between the products of the one before
};
LK_INLINE Blocking nf4_blocking(const Tuning& t) {
  return {t.nf4_k_tiles, t.nf4_sum_bytes, t.block_panels, true};
}
LK_INLINE Blocking dense_blocking(const Tuning& t) {
  return {t.dense_k_tiles, t.dense_sum_bytes, t.block_panels, false};
}

// A row-major matrix of any float type, rounded to bf16 on the way.
template <Order order>
struct DenseReader {
  static constexpr Order kOrder = order;
  const void* data;
  Dtype dtype;
  int64_t stride, columns;
  int64_t row = 0;

  static LK_INLINE Blocking blocking(const Tuning& t) { return dense_blocking(t); }

  LK_INLINE void begin(int64_t r, int64_t, int64_t) { row = r; }

  LK_INLINE void prefetch(int64_t r, int64_t c) const {
    const int64_t size = dtype == Dtype::f32 ? 4 : 2;
    const char* p = static_cast<const char*>(data) + (r * stride + c * kChunk) * size;
    for (int64_t i = 0; i < kChunk * size; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
  }

  LK_INLINE void chunk(int64_t c, __m512i v[4]) const {
    const int64_t k = c * kChunk;
    if (dtype == Dtype::bf16) {
      const uint16_t* p = static_cast<const uint16_t*>(data) + row * stride + k;
      for (int t = 0; t < 4; ++t)
        v[t] = _mm512_maskz_loadu_epi16(lanes32(columns - k - 32 * t), p + 32 * t);
    } else {
      const int64_t at = row * stride + k;
      for (int t = 0; t < 4; ++t) {
        const int64_t left = columns - k - 32 * t;
        v[t] = round_pair(load_floats(data, dtype, at + 32 * t, lanes16(left)),
                          load_floats(data, dtype, at + 32 * t + 16, lanes16(left - 16)));
      }
    }
    if (order == Order::strided) stride_by_four(v);
  }
};

// bf16 rows with a dropout mask applied, but without the factor 1 / (1 - p).
template <Order order>
struct MaskedReader {
  static constexpr Order kOrder = order;
  DenseReader<Order::natural> rows;
  Dropout dropout;

  LK_INLINE void begin(int64_t r, int64_t first, int64_t last) { rows.begin(r, first, last); }
  LK_INLINE void prefetch(int64_t r, int64_t c) const { rows.prefetch(r, c); }

  LK_INLINE void chunk(int64_t c, __m512i v[4]) const {
    rows.chunk(c, v);
    for (int h = 0; h < 2; ++h) {
      const uint64_t keep = keep_mask64(dropout, uint32_t(rows.row), uint32_t(2 * c + h));
      v[2 * h] = _mm512_maskz_mov_epi16(__mmask32(keep), v[2 * h]);
      v[2 * h + 1] = _mm512_maskz_mov_epi16(__mmask32(keep >> 32), v[2 * h + 1]);
    }
    if (order == Order::strided) stride_by_four(v);
  }
};

// 128 weights of two quantisation blocks. 3 shifts, 2 logic operations, 4 look-ups, and 4 for the
// table: 0.1 instructions a weight.
LK_INLINE void decode_chunk(__m512i packed, __m512 codes, const float* first, const float* second,
                            __m512i v[4]) {
  const __m512i low_nibbles = _mm512_set1_epi16(0x0f0f);
  const __m512i second_block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
  const __m512i table = round_pair(_mm512_mul_ps(codes, _mm512_set1_ps(*first)),
                                   _mm512_mul_ps(codes, _mm512_set1_ps(*second)));
  constexpr int kAndOr = 0xea;
  const __m512i odd = _mm512_ternarylogic_epi32(packed, low_nibbles, second_block, kAndOr);
  const __m512i even =
      _mm512_ternarylogic_epi32(_mm512_srli_epi16(packed, 4), low_nibbles, second_block, kAndOr);
  v[0] = _mm512_permutexvar_epi16(even, table);
  v[1] = _mm512_permutexvar_epi16(odd, table);
  v[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table);
  v[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table);
}

// 64 weights at the end of a row, and zeros (of either sign) for the missing half of the chunk.
LK_INLINE void decode_half_chunk(const uint8_t* packed, __m512 codes, const float* scale,
                                 __m512i v[4]) {
  static constexpr float kZero = 0.0f;
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
  decode_chunk(_mm512_zextsi256_si512(half), codes, scale, &kZero, v);
}

// A 4-bit weight whose rows are whole groups of 64 elements, each with one scale.
struct Nf4Reader {
  static constexpr Order kOrder = Order::strided;
  static constexpr int64_t kGroup = 64;
  static constexpr int64_t kMaxChunks = 128;
  static_assert(kMostKTiles <= kMaxChunks * kChunkTiles, "a K block of a row");
  const QuantView* q;
  int64_t columns;
  int group_shift;                    // log2(block_size / 64)
  const uint8_t* packed = nullptr;    // of the row
  const float* row_scales = nullptr;  // of the row's groups, from first_group on
  int64_t first_group = 0;
  alignas(64) float decoded[2 * kMaxChunks + 16];

  static bool takes(const QuantView& q, int64_t columns) {
    return columns % kGroup == 0 && q.block_size % kGroup == 0;
  }
  static LK_INLINE Blocking blocking(const Tuning& t) { return nf4_blocking(t); }

  Nf4Reader(const QuantView& view, int64_t k)
      : q(&view), columns(k), group_shift(__builtin_ctzll(uint64_t(view.block_size / kGroup))) {}

  LK_INLINE void begin(int64_t row, int64_t first_chunk, int64_t last_chunk) {
    packed = q->packed + row * columns / 2;
    first_group = 2 * first_chunk;
    const int64_t at = row * (columns / kGroup) + first_group;
    if (group_shift == 0 && q->absmax != nullptr) {
      row_scales = q->absmax + at;
      return;
    }
    const int64_t groups = min64(2 * last_chunk, columns / kGroup) - first_group;
    row_scales = decoded;
    if (group_shift == 0)
      gather_scales(*q, at, groups, decoded);
    else
      for (int64_t i = 0; i < groups; ++i) decoded[i] = q->block_scale((at + i) >> group_shift);
  }

  LK_INLINE void prefetch(int64_t row, int64_t c) const {
    _mm_prefetch(q->packed + (row * columns + c * kChunk) / 2, _MM_HINT_T1);
  }

  LK_INLINE void chunk(int64_t c, __m512i v[4]) const {
    const __m512 codes = _mm512_loadu_ps(kCodeTable[q->quant_type]);
    const uint8_t* p = packed + c * (kChunk / 2);
    const float* s = row_scales + 2 * c - first_group;
    if ((c + 1) * kChunk <= columns)
      decode_chunk(_mm512_loadu_si512(p), codes, s, s + 1, v);
    else
      decode_half_chunk(p, codes, s, v);
  }
};

// Any other 4-bit weight: begin() decodes the chunks to memory, in natural order. That is as slow
// as reading a dense weight, so it has a dense weight's block sizes.
struct AnyNf4Reader {
  static constexpr Order kOrder = Order::natural;
  static constexpr int64_t kMaxChunks = 18;
  static_assert(kMostBlockPanels <= kMaxChunks * kChunk / kTile, "a row of a block");
  const QuantView* q;
  int64_t columns;
  int64_t first = 0;
  alignas(64) BFloat16 decoded[kMaxChunks * kChunk];

  AnyNf4Reader(const QuantView& view, int64_t k) : q(&view), columns(k) {}

  static LK_INLINE Blocking blocking(const Tuning& t) {
    Blocking by = dense_blocking(t);
    by.depth = min64(by.depth, kMaxChunks * kChunkTiles);
    return by;
  }

  LK_INLINE void begin(int64_t r, int64_t first_chunk, int64_t last_chunk) {
    first = first_chunk;
    const int64_t begin = r * columns + first_chunk * kChunk;
    const int64_t end = r * columns + min64(last_chunk * kChunk, columns);
    for (int64_t i = begin; i < end;) {
      const int64_t block = i / q->block_size;
      const int64_t stop = min64((block + 1) * q->block_size, end);
      const float scale = q->block_scale(block);
      BFloat16* out = decoded + (i - begin);
      if (i % 2 == 0) {
        decode(q->packed + i / 2, stop - i, kCodeTable[q->quant_type], scale, out);
      } else {
        for (int64_t j = i; j < stop; ++j)
          store(out + (j - i), kCodeTable[q->quant_type][q->code(j)] * scale);
      }
      i = stop;
    }
    const int64_t padded = (last_chunk - first_chunk) * kChunk;
    for (int64_t i = max64(end - begin, 0); i < padded; ++i) decoded[i] = BFloat16{0};
  }

  LK_INLINE void prefetch(int64_t row, int64_t c) const {
    _mm_prefetch(q->packed + (row * columns + c * kChunk) / 2, _MM_HINT_T1);
  }

  LK_INLINE void chunk(int64_t c, __m512i v[4]) const {
    for (int t = 0; t < 4; ++t) v[t] = _mm512_load_si512(decoded + (c - first) * kChunk + 32 * t);
  }
};

}  // namespace
}  // namespace lora_kernels

#endif
