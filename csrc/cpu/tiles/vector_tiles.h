// The tile registers of tiles.h on the vectors of AVX-512 with bf16 products (vdpbf16ps: Zen 4 and
// later, Cooper Lake, and where AMX is switched off). The accumulators are in memory, in the L1
// cache; A and B are read where they lie.
//
// A product of tiles is 256 vector products of 32 multiplications: a row of B, which holds 16
// columns, by one pair of A, which every lane gets.
#pragma once

#include "target.h"

namespace lora_kernels {
namespace {

class Tiles {
 public:
  explicit Tiles(int64_t columns)
      : lanes_(static_cast<__mmask16>(columns >= 16 ? 0xffffu : (1u << columns) - 1u)) {}
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T>
  LK_INLINE void zero() {
    static_assert(T < 4);
    for (int i = 0; i < 16; ++i) _mm512_store_ps(sums_[T] + 16 * i, _mm512_setzero_ps());
  }

  template <int T>
  LK_INLINE void load(const void* p, int64_t stride) {
    if constexpr (T < 4) {
      for (int i = 0; i < 16; ++i)
        _mm512_store_ps(sums_[T] + 16 * i,
                        _mm512_load_ps(static_cast<const float*>(p) + i * stride / 4));
    } else {
      operand_[T - 4] = {static_cast<const char*>(p), stride};
    }
  }

  template <int T>
  LK_INLINE void store(float* c) {
    static_assert(T < 4);
    for (int i = 0; i < 16; ++i) _mm512_store_ps(c + 16 * i, _mm512_load_ps(sums_[T] + 16 * i));
  }

  template <int C, int A, int B>
  LK_INLINE void multiply() {
    static_assert(C < 4 && (A == 4 || A == 5) && (B == 6 || B == 7));
    const Operand &a = operand_[A - 4], &b = operand_[B - 4];
    float* c = sums_[C];
    __m512 sum[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sum[i] = _mm512_load_ps(c + 16 * i);
#pragma GCC unroll 1
    for (int q = 0; q < 16; ++q) {
      const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi32(lanes_, b.data + q * b.stride);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        sum[i] = _mm512_dpbf16_ps(sum[i], v, pair(a.data + i * a.stride + 4 * q));
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_ps(c + 16 * i, sum[i]);
  }

  // Eight rows of A by two panels of B at a time: 16 sums in registers, 10 loads for 16 products.
  template <Stream stream, class Step>
  LK_INLINE void multiply_panels(const char* a0, const char* a1, const char* b0, const char* b1,
                                 int64_t depth, const Step& step) {
    for (int64_t i = 0; i < depth; ++i) step(i);
    if (depth == 0) return;
    rows32<2>({a0, 64, kTileBytes}, {a1, 64, kTileBytes}, b0, b1, depth);
  }

  // The same with A as 32 rows in memory, `stride` bytes apart, and one panel of B or two.
  template <bool two>
  LK_INLINE void multiply_rows(const char* a, int64_t stride, const char* b0, const char* b1,
                               int64_t depth) {
    rows32<two ? 2 : 1>({a, stride, 64}, {a + 16 * stride, stride, 64}, b0, b1, depth);
  }

 private:
  struct Operand {
    const char* data;
    int64_t stride;
  };

  static LK_INLINE __m512bh pair(const char* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return (__m512bh)_mm512_set1_epi32(two);
  }

  // A panel of A: a row is `stride` bytes after the one before, a tile of it `step` bytes.
  struct Rows {
    const char* data;
    int64_t stride, step;
  };

  template <int panels>
  LK_INLINE void rows32(const Rows& first, const Rows& second, const char* b0, const char* b1,
                        int64_t depth) {
    rows8<0, panels>(first, b0, b1, depth);
    rows8<8, panels>(first, b0, b1, depth);
    rows8<16, panels>(second, b0, b1, depth);
    rows8<24, panels>(second, b0, b1, depth);
  }

  // The sums of the rows [row, row + 8) of 32 by one panel of B or two: `rows` is the panel of A
  // that has them. Not of 16 rows by one: where they are a multiple of 4 KiB apart an L1 cache with
  // eight ways cannot hold a line of each.
  template <int row, int panels>
  LK_INLINE void rows8(const Rows& rows, const char* b0, const char* b1, int64_t depth) {
    float* c = sums_[row / 16 * 2] + row % 16 * 16;
    const char* a = rows.data + row % 16 * rows.stride;
    const char* b[2] = {b0, b1};
    __m512 sum[8][panels];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int p = 0; p < panels; ++p) sum[i][p] = _mm512_load_ps(c + 256 * p + 16 * i);
    for (int64_t t = 0; t < depth; ++t, a += rows.step) {
#pragma GCC unroll 2
      for (int q = 0; q < 16; ++q) {
        __m512bh v[panels];
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p)
          v[p] = (__m512bh)_mm512_load_si512(b[p] + t * kTileBytes + 64 * q);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m512bh x = pair(a + i * rows.stride + 4 * q);
#pragma GCC unroll 2
          for (int p = 0; p < panels; ++p) sum[i][p] = _mm512_dpbf16_ps(sum[i][p], v[p], x);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int p = 0; p < panels; ++p) _mm512_store_ps(c + 256 * p + 16 * i, sum[i][p]);
  }

  alignas(64) float sums_[4][256];
  Operand operand_[4];
  __mmask16 lanes_;
};

}  // namespace
}  // namespace lora_kernels
