// W as the GEMV (lora_gemv.h) reads it: groups of 64 consecutive elements, as vectors.
//
// The 64 codes of a group are 32 bytes. They are loaded so that each 32-bit lane holds 4 (AVX-512)
// or 8 (AVX2) neighbouring codes. Shifting the lanes right then brings one code after the other to
// the lowest bits, where the table look-up reads it. So vector t of a group holds every 4th or 8th
// element, and x is put in the same order (to_lane_order) once a call.
#pragma once

#include "nf4_scale_maps.h"
#include "vector/row_reader.h"

namespace lora_kernels {
namespace {
namespace vector {

constexpr bool kFused = LK_AVX2 || LK_NEON;  // multiply_add is one instruction, rounded once
constexpr int64_t kGroup = 64;
constexpr int kGroupVectors = kGroup / kLanes;
constexpr int64_t kRowsAtOnce = 4;  // of W, at most

#if LK_AVX512

constexpr int kLaneCodes = 4;
struct Group {
  __m512i words;
  Vec table;
  LK_INLINE Group(const uint8_t* packed, Vec values)
      : words(_mm512_cvtepu16_epi32(words16(packed))), table(values) {}
  LK_INLINE Vec operator()(int t) const {  // the look-up takes the lowest four bits
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * t), table);
  }
};

#elif LK_AVX2

constexpr int kLaneCodes = 8;
struct Group {
  __m256i words;
  FloatTable table;
  LK_INLINE Group(const uint8_t* packed, const FloatTable& values)
      : words(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed))), table(values) {}
  LK_INLINE Vec operator()(int t) const {  // the look-up takes three bits; the fourth is a sign
    const __m256i index = _mm256_srli_epi32(words, 4 * t);
    const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * t));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.first, index),
                            _mm256_permutevar8x32_ps(table.second, index), pick);
  }
};

#else

constexpr int kLaneCodes = 1;  // in order
struct Group {
  float values[kGroup];
  template <class Table>
  LK_INLINE Group(const uint8_t* packed, const Table& table) {
    decode32(packed, table, values);
    decode32(packed + 16, table, values + 32);
  }
  LK_INLINE Vec operator()(int t) const { return load(values + t * kLanes); }
};

#endif

LK_INLINE float dot(const float* a, const float* b, int64_t count) {
  Vec total = splat(0.0f);
  int64_t i = 0;
  while (i + kLanes <= count) {
    Vec part = splat(0.0f);
    const int64_t end = min64(i + kLanes * (kFused ? kMaxRead : 16), count);
    for (; i + kLanes <= end; i += kLanes) part = multiply_add(load(a + i), load(b + i), part);
    total += part;
  }
  if (i < count) {
    float rest[2][kLanes] = {};
    for (int64_t j = 0; i + j < count; ++j) rest[0][j] = a[i + j], rest[1][j] = b[i + j];
    total = multiply_add(load(rest[0]), load(rest[1]), total);
  }
  return sum(total);
}

// Whether W is read by groups: its rows are whole groups, and a group has one scale.
inline bool grouped(const BaseView& base) {
  return base.quant != nullptr && base.k % kGroup == 0 && base.quant->block_size % kGroup == 0;
}

// x in the order of the weights: lane i of vector t is element kLaneCodes i + (t ^ 1), as the high
// nibble of a byte comes first.
inline void to_lane_order(const float* in, int64_t k, float* out) {
  for (int64_t g = 0; g < k; g += kGroup)
    for (int t = 0; t < kGroupVectors; ++t)
      for (int i = 0; i < kLanes; ++i)
        out[g + t * kLanes + i] =
            in[g + (kLaneCodes > 1 ? i * kLaneCodes + (t ^ 1) : t * kLanes + i)];
}

// A 4-bit weight whose rows are whole groups with one scale each, decoded and rounded to T. Its
// scales are fp32, or `nested`: 8-bit codes, looked up in the tables of ScaleMaps.
template <class T, bool nested>
struct QuantWeights {
  static constexpr bool kHasFastTable = sizeof(T) == sizeof(BFloat16) && LK_AVX2;
  const QuantView& q;
  const float* codes;
  int64_t groups;
  int each_shift;  // log2 of the groups that share a scale
  ScaleMaps maps;
  int64_t first = 0;  // the first group of the rows in work
  const uint8_t* packed = nullptr;
  bool fast = true;  // whether all their scales are in_safe_range

  static int64_t blocks(const BaseView& base) {
    return kRowsAtOnce * base.k / base.quant->block_size + 2;
  }
  static int64_t scratch(const BaseView& base) {
    return nested ? ScaleMaps::scratch(*base.quant, blocks(base)) : 1;
  }
  QuantWeights(const BaseView& base, float* memory)
      : q(*base.quant),
        codes(kCodeTable[q.quant_type]),
        groups(base.k / kGroup),
        each_shift(__builtin_ctzll(uint64_t(q.block_size / kGroup))),
        maps(q, blocks(base), memory) {}

  LK_INLINE void begin(int64_t row, int64_t count) {
    first = row * groups;
    packed = q.packed + first * (kGroup / 2);
    const int64_t block = first >> each_shift;
    const int64_t size = ((first + count * groups - 1) >> each_shift) - block + 1;
    if (nested) maps.begin(block, size);
    fast = nested ? maps.in_safe_range() : lora_kernels::in_safe_range(q.absmax + block, size);
  }

  // The rows w0 .. w0 + W - 1 from group g up to `end`, where the next table of scales begins.
  template <int W, bool fast_table_fits>
  struct Piece {
    const QuantWeights& all;
    const uint8_t* packed[W];
    int64_t group[W];
    const float* scales[W];
    int64_t end;

    LK_INLINE Piece(const QuantWeights& weights, int64_t w0, int64_t g, int64_t limit)
        : all(weights), end(limit) {
      for (int w = 0; w < W; ++w) {
        const int64_t row = (w0 + w) * all.groups;
        packed[w] = all.packed + row * (kGroup / 2);
        group[w] = all.first + row;
        scales[w] = all.q.absmax;
        if (!nested) continue;
        const int64_t block = (group[w] + g) >> all.each_shift;
        scales[w] = all.maps.table(block);
        end = min64(end, (all.maps.table_end(block) << all.each_shift) - group[w]);
      }
    }
    LK_INLINE Group operator()(int w, int64_t g) const {
      const int64_t block = (group[w] + g) >> all.each_shift;
      const float scale = scales[w][nested ? int64_t(all.q.absmax8[block]) : block];
      const uint8_t* p = packed[w] + g * (kGroup / 2);
      if (fast_table_fits) return Group(p, fast_table(all.codes, scale, T{}));
      return Group(p, rounded_table(all.codes, scale, T{}));
    }
    // Two groups are a cache line. The hardware's prefetcher stops at the end of a page, so lines
    // of the next pages are asked for too, in the order of their addresses, which it then follows.
    LK_INLINE void fetch(int w, int64_t g) const {
      constexpr int64_t kNear = 2048, kFar = 16384, kLine = kGroup;
      __builtin_prefetch(packed[w] + g * (kGroup / 2) + kNear, 0, 3);
      __builtin_prefetch(packed[0] + kFar + (g / 2 * W + w) * kLine, 0, 2);
    }
  };

  LK_INLINE float tail(int64_t, const float*) const { return 0.0f; }
};

// A dense weight, in its own order.
template <class T>
struct DenseWeights {
  static constexpr bool kHasFastTable = false, fast = true;
  struct Values {
    const T* p;
    LK_INLINE Vec operator()(int t) const { return load(p + t * kLanes); }
  };
  const T* data;
  int64_t stride, k;
  const T* row0 = nullptr;

  explicit DenseWeights(const BaseView& base)
      : data(static_cast<const T*>(base.dense.data)), stride(base.dense.stride), k(base.k) {}

  LK_INLINE void begin(int64_t row, int64_t) { row0 = data + row * stride; }
  template <int W, bool>
  struct Piece {
    const DenseWeights& all;
    const T* first;
    int64_t end;

    LK_INLINE Piece(const DenseWeights& weights, int64_t w0, int64_t, int64_t limit)
        : all(weights), first(weights.row0 + w0 * weights.stride), end(limit) {}
    LK_INLINE Values operator()(int w, int64_t g) const {
      return {first + w * all.stride + g * kGroup};
    }
    LK_INLINE void fetch(int w, int64_t g) const {  // two groups of the rows after these
      const auto* p = reinterpret_cast<const char*>(first + (W + w) * all.stride + g * kGroup);
      for (size_t i = 0; i < 2 * kGroup * sizeof(T); i += 64) __builtin_prefetch(p + i);
    }
  };
  LK_INLINE float tail(int64_t w, const float* x) const {
    const int64_t whole = k / kGroup * kGroup;
    if (whole == k) return 0.0f;
    float rest[kGroup];
    widen(row0 + w * stride + whole, k - whole, rest);
    return dot(x + whole, rest, k - whole);
  }
};

// Any other 4-bit weight, with fp32 scales: its rows are decoded to memory first.
struct DecodedWeights : DenseWeights<float> {
  RowReader reader;
  float* decoded;

  static int64_t scratch(int64_t k) { return kRowsAtOnce * k + 1; }
  DecodedWeights(const BaseView& base, Dtype dtype, float* scratch)
      : DenseWeights<float>(base), decoded(scratch) {
    reader.quant = base.quant;
    reader.columns = stride = k;
    reader.dtype = dtype;
    row0 = scratch;
  }

  LK_INLINE void begin(int64_t row, int64_t count) {
    for (int64_t w = 0; w < count; ++w)
      for (int64_t i = 0; i < k; i += kMaxRead)
        reader.read(row + w, i, min64(k - i, kMaxRead), decoded + w * k + i);
  }
};

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
