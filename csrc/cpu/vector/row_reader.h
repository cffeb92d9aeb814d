// Rows of a matrix as fp32, whatever they are stored as: dense of any type or 4-bit codes, with the
// factors and the dropout mask that a product wants.
#pragma once

#include "lora_kernels/lora.h"
#include "lora_kernels/philox.h"
#include "nf4_scales.h"
#include "philox_simd.h"
#include "vector/vec.h"

namespace lora_kernels {
namespace {
namespace vector {

constexpr int64_t kMaxRead = 256;

// The 16 values of a block, round(code * scale) to T, as nf4_decode.h takes a table of fp32.
#if LK_AVX512
template <class T>
LK_INLINE __m512 rounded_table(const float* codes, float scale, T type) {
  return rounded(load(codes) * splat(scale), type);
}
#elif LK_AVX2
template <class T>
LK_INLINE FloatTable rounded_table(const float* codes, float scale, T type) {
  const Vec s = splat(scale);
  return {rounded(load(codes) * s, type), rounded(load(codes + 8) * s, type)};
}
#else
template <class T>
LK_INLINE auto rounded_table(const float* codes, float scale, T type) {
  float values[16];
  for (int i = 0; i < 16; i += kLanes)
    put(values + i, rounded(load(codes + i) * splat(scale), type));
  return scaled_table(values, 1.0f, values);
}
#endif

// The same values, faster, for scales that are in_safe_range (nf4_scale_maps.h). For bf16, which
// keeps 8 of 24 bits, two operations instead of eight: 65536 p - round(65535 p) is p with its lower
// 16 bits rounded away, as the products' last bit is worth 2^-7 of p's first one; ties go to even,
// as 65536 p is even then.
template <class T>
LK_INLINE auto fast_table(const float* codes, float scale, T type) {
  return rounded_table(codes, scale, type);
}
#if LK_AVX2
LK_INLINE Vec fast_round(Vec p) { return multiply_add(p, splat(65536.0f), -(p * splat(65535.0f))); }
#if LK_AVX512
LK_INLINE __m512 fast_table(const float* codes, float scale, BFloat16) {
  return fast_round(load(codes) * splat(scale));
}
#else
LK_INLINE FloatTable fast_table(const float* codes, float scale, BFloat16) {
  const Vec s = splat(scale);
  return {fast_round(load(codes) * s), fast_round(load(codes + 8) * s)};
}
#endif
#endif

// Elements [first, first + count) of a 4-bit weight with fp32 scales, rounded to T. Block numbers
// are found by shifts: 64-bit divisions would take longer than the decoding.
template <class T>
void decode_range(const QuantView& q, int64_t first, int64_t count, float* out, T type) {
  const float* codes = kCodeTable[q.quant_type];
  const int shift = __builtin_ctzll(uint64_t(q.block_size));
  if ((first | count) % 64 == 0 && shift >= 6) {
    for (int64_t i = 0; i < count; i += 64) {
      const auto table = rounded_table(codes, q.absmax[(first + i) >> shift], type);
      decode32(q.packed + (first + i) / 2, table, out + i);
      decode32(q.packed + (first + i) / 2 + 16, table, out + i + 32);
    }
    return;
  }
  for (int64_t i = first, end = first + count; i < end;) {
    const int64_t stop = min64(((i >> shift) + 1) << shift, end);
    const auto table = rounded_table(codes, q.absmax[i >> shift], type);
    if (i % 2 == 0) {
      decode(q.packed + i / 2, stop - i, table, out + (i - first));
    } else {  // from the middle of a byte
      float shifted[kMaxRead + 1];
      decode(q.packed + i / 2, stop - i + 1, table, shifted);
      __builtin_memcpy(out + (i - first), shifted + 1, sizeof(float) * (stop - i));
    }
    i = stop;
  }
}

LK_INLINE void prefetch(const void* p, int64_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Zeros where the mask drops (row, first + i); `first` is a multiple of 64.
LK_INLINE void apply_mask(const Dropout& dropout, int64_t row, int64_t first, int64_t count,
                          float* out) {
  for (int64_t i = 0; i < count; i += 64) {
    const uint64_t keep = keep_mask64(dropout, uint32_t(row), uint32_t((first + i) / 64));
    const int64_t last = min64(count - i, 64);
    int64_t j = 0;
#if LK_AVX512
    for (; j + 16 <= last; j += 16)
      put(out + i + j, _mm512_maskz_loadu_ps(__mmask16(keep >> j), out + i + j));
#elif LK_AVX2
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (; j + 8 <= last; j += 8) {
      const __m256i bits = _mm256_and_si256(_mm256_set1_epi32(int(keep >> j)), lane);
      const __m256 kept = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bits, lane));
      put(out + i + j, _mm256_and_ps(kept, load(out + i + j)));
    }
#endif
    for (; j < last; ++j) out[i + j] = (keep >> j) & 1 ? out[i + j] : 0.0f;
  }
}

LK_INLINE float at(const MatrixView& v, int64_t i) {
  float f = 1.0f;
  if (v.data != nullptr) widen(v.data, v.dtype, i, 1, &f);
  return f;
}

// Reads factor * row_diag[row] * element * column_diag[column], zero where `dropout` drops.
struct RowReader {
  MatrixView dense{};
  const QuantView* quant = nullptr;  // in place of dense; values are rounded to `dtype`
  int64_t columns = 0;
  Dtype dtype = Dtype::f32;
  float factor = 1.0f;
  MatrixView row_diag{}, column_diag{};
  Dropout dropout{};

  // `count` <= kMaxRead elements of a row.
  void read(int64_t row, int64_t first, int64_t count, float* out) const {
    if (quant != nullptr) return decoded(row * columns + first, count, out);
    widen(dense.data, dense.dtype, row * dense.stride + first, count, out);
    if (factor != 1.0f || row_diag.data != nullptr) {
      const float f = factor * at(row_diag, row);
      for (int64_t i = 0; i < count; ++i) out[i] *= f;
    }
    if (column_diag.data != nullptr) {
      float d[kMaxRead];
      widen(column_diag.data, column_diag.dtype, first, count, d);
      for (int64_t i = 0; i < count; ++i) out[i] *= d[i];
    }
    if (dropout.threshold != 0) apply_mask(dropout, row, first, count, out);
  }

  // Prefetches what will be read a little later. (It must be inlined: GCC drops calls of a function
  // that only prefetches, as it has no effects.)
  LK_INLINE void fetch(int64_t row, int64_t first, int64_t count) const {
    if (first + count > columns) return;
    if (quant != nullptr) return prefetch(quant->packed + (row * columns + first) / 2, count / 2);
    const int64_t size = dense.dtype == Dtype::f32 ? 4 : 2;
    prefetch(static_cast<const char*>(dense.data) + (row * dense.stride + first) * size,
             count * size);
  }

  void decoded(int64_t first, int64_t count, float* out) const {
    switch (dtype) {
      case Dtype::f16:
        return decode_range(*quant, first, count, out, Half{});
      case Dtype::bf16:
        return decode_range(*quant, first, count, out, BFloat16{});
      default:
        return decode_range(*quant, first, count, out, 0.0f);
    }
  }
};

// A and B with the factors that forward and backward share:
//   s = (keep ∘ x) · aᵀ, y += s · bᵀ;  ds = dy · b, dx += keep ∘ (ds · a)
struct Lora {
  RowReader a, b;  // A / (1 - p), [R, K];  scale · g ∘ B ∘ d, [N, R]

  explicit Lora(const LoraView& lora) {
    a.dense = lora.a;
    if (lora.dropout.threshold != 0) a.factor = dropout_scale(lora.dropout.threshold);
    b.dense = lora.b;
    b.factor = lora.scale;
    b.row_diag = lora.out_diag;
    b.column_diag = lora.rank_diag;
  }
};

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
