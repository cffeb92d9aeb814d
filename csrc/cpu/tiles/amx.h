// The tile registers of AMX-BF16. (tiles.h says what they hold.)
#pragma once

#include "target.h"

namespace lora_kernels {
namespace {

// The tile numbers of the intrinsics are literals.
#define LK_EACH_TILE_(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

class Tiles {
 public:
  Tiles() = default;  // use() comes first
  explicit Tiles(int64_t columns) { use(16, 16, columns); }
  ~Tiles() {
    if (rows_ > 0) _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  // C[rows, columns] += A[rows, 2 pairs] · B[2 pairs, columns]
  LK_INLINE void use(int64_t rows, int64_t pairs, int64_t columns) {
    if (rows == rows_ && pairs == pairs_ && columns == columns_) return;
    rows_ = rows, pairs_ = pairs, columns_ = columns;
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = uint8_t(4 * (t == 4 || t == 5 ? pairs : columns));
      config[48 + t] = uint8_t(t < 6 ? rows : pairs);
    }
    _tile_loadconfig(config);
  }

  template <int T>
  LK_INLINE void zero() {
#define LK_ZERO_(t) \
  if constexpr (T == t) _tile_zero(t);
    LK_EACH_TILE_(LK_ZERO_)
#undef LK_ZERO_
  }

  template <int T>
  LK_INLINE void load(const void* p, int64_t stride) {
#define LK_LOAD_(t) \
  if constexpr (T == t) _tile_loadd(t, p, stride);
    LK_EACH_TILE_(LK_LOAD_)
#undef LK_LOAD_
  }

  template <int T>
  LK_INLINE void store(float* c) {
#define LK_STORE_(t) \
  if constexpr (T == t) _tile_stored(t, c, 64);
    LK_EACH_TILE_(LK_STORE_)
#undef LK_STORE_
  }

  template <int C, int A, int B>
  LK_INLINE void multiply() {
#define LK_PRODUCT_(c, a, b) \
  if constexpr (C == c && A == a && B == b) _tile_dpbf16ps(c, a, b);
#define LK_PRODUCTS_(c) \
  LK_PRODUCT_(c, 4, 6) LK_PRODUCT_(c, 4, 7) LK_PRODUCT_(c, 5, 6) LK_PRODUCT_(c, 5, 7)
    static_assert(C < 4 && (A == 4 || A == 5) && (B == 6 || B == 7));
    LK_PRODUCTS_(0) LK_PRODUCTS_(1) LK_PRODUCTS_(2) LK_PRODUCTS_(3)
#undef LK_PRODUCTS_
#undef LK_PRODUCT_
  }

  // Four loads for four products, the best ratio that eight tile registers allow. Four loads from
  // the L2 cache take 105 cycles, four products 64. So with many panels one pair stays in L1 and
  // the others are streamed (tuning.h says how deep). `step` is called between the products.
  template <Stream stream, class Step>
  LK_INLINE void multiply_panels(const char* a0, const char* a1, const char* b0, const char* b1,
                                 int64_t depth, const Step& step) {
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t o = i * kTileBytes;
      load_panel<4, stream == Stream::a>(a0 + o);
      load_panel<6, stream == Stream::b>(b0 + o);
      multiply<0, 4, 6>();
      step(i);
      load_panel<7, stream == Stream::b>(b1 + o);
      multiply<1, 4, 7>();
      load_panel<5, stream == Stream::a>(a1 + o);
      multiply<2, 5, 6>();
      multiply<3, 5, 7>();
    }
  }

  // The same with A as 32 rows in memory, `stride` bytes apart, and one panel of B or two. The
  // lines of the 32 rows that follow are prefetched.
  template <bool two>
  LK_INLINE void multiply_rows(const char* a, int64_t stride, const char* b0, const char* b1,
                               int64_t depth) {
    const char* second = a + 16 * stride;
    for (int64_t i = 0; i < depth; ++i) {
      const int64_t o = i * kTileBytes;
      load<4>(a + 64 * i, stride);
      load<6>(b0 + o, 64);
      multiply<0, 4, 6>();
      for (int r = 32; r < 64; ++r) _mm_prefetch(a + r * stride + 64 * i, _MM_HINT_T1);
      if constexpr (two) {
        load<7>(b1 + o, 64);
        multiply<1, 4, 7>();
      }
      load<5>(second + 64 * i, stride);
      multiply<2, 5, 6>();
      if constexpr (two) multiply<3, 5, 7>();
    }
  }

 private:
  template <int T, bool streamed>
  LK_INLINE void load_panel(const char* p) {
#define LK_STREAM_(t) \
  if constexpr (T == t && streamed) _tile_stream_loadd(t, p, 64);
    LK_EACH_TILE_(LK_STREAM_)
#undef LK_STREAM_
    if constexpr (!streamed) load<T>(p, 64);
  }

  int64_t rows_ = 0, pairs_ = 0, columns_ = 0;
};

#undef LK_EACH_TILE_

}  // namespace
}  // namespace lora_kernels
