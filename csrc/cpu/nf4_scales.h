// The scales of the blocks of a quantised weight, many at a time: decoding, and encoding in 8 bits.
#pragma once

#include <cstdint>

#include "lora_kernels/nf4.h"
#include "lora_kernels/parallel.h"
#include "target.h"

namespace lora_kernels {
namespace {

// As QuantView::block_scales, with gather instructions.
LK_INLINE void gather_scales(const QuantView& q, int64_t first, int64_t count, float* out) {
#if LK_AVX2
  if (q.absmax == nullptr) {
    for (int64_t i = 0; i < count;) {
      const int64_t group = (first + i) / q.nested_block;
      const int64_t group_end = (group + 1) * q.nested_block - first;
      const int64_t end = group_end < count ? group_end : count;
      const float scale = q.nested_absmax[group];
#if LK_AVX512
      for (; i < end; i += 16) {
        const __mmask16 mask = end - i < 16 ? __mmask16((1u << (end - i)) - 1) : __mmask16(0xffff);
        const __m512i code =
            _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, q.absmax8 + first + i));
        const __m512 product =
            _mm512_mul_ps(_mm512_i32gather_ps(code, q.nested_map, 4), _mm512_set1_ps(scale));
        _mm512_mask_storeu_ps(out + i, mask,
                              _mm512_add_ps(product, _mm512_set1_ps(q.nested_offset)));
      }
      i = end;
#else
      for (; i + 8 <= end; i += 8) {
        const void* at = q.absmax8 + first + i;
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at)));
        const __m256 product =
            _mm256_mul_ps(_mm256_i32gather_ps(q.nested_map, code, 4), _mm256_set1_ps(scale));
        _mm256_storeu_ps(out + i, _mm256_add_ps(product, _mm256_set1_ps(q.nested_offset)));
      }
      for (; i < end; ++i) {
        const float product = q.nested_map[q.absmax8[first + i]] * scale;
        out[i] = product + q.nested_offset;
      }
#endif
    }
    return;
  }
#endif
  q.block_scales(first, count, out);
}

// The same weight with its scales decoded to fp32, if they are quantised. A kernel that reads a
// weight in pieces would decode a scale again and again. Its absmax is null where memory runs out.
inline QuantView decoded_scales(const QuantView& q, int slot, const Parallel& parallel) {
  if (q.absmax != nullptr) return q;
  float* scales = static_cast<float*>(thread_scratch(slot, sizeof(float) * size_t(q.blocks())));
  QuantView decoded = q;
  decoded.absmax = scales;
  if (scales == nullptr) return decoded;
  parallel(0, q.blocks(), 1 << 14, [&](int64_t begin, int64_t end) {
    gather_scales(q, begin, end - begin, scales + begin);
  });
  return decoded;
}

// 8-bit codes as bitsandbytes chooses them: a scaled value is first rounded to one of 65536 points
// on [-1, 1]; its code is the entry of the map nearest to that point. The table has the code of
// each point.
struct ScaleGrid {
  static constexpr int kPoints = 65536;
  uint8_t code[kPoints];

  LK_INLINE static float value(int point) { return float(point) / 32767.5f - 1.0f; }

  // `map` ascends.
  explicit ScaleGrid(const float* map) {
    // Whether x takes code c or a higher one.
    const auto reaches = [map](int c, float x) {
      if (x <= map[c - 1]) return false;
      if (c < 255 && x > map[c]) return true;
      return __builtin_fabsf(map[c] - x) < __builtin_fabsf(x - map[c - 1]);
    };
    int begin = 0;
    for (int c = 1; c < 255; ++c) {
      int low = begin, high = kPoints;  // the first point that reaches c is in [low, high]
      while (low < high) {
        const int middle = (low + high) / 2;
        if (reaches(c, value(middle)))
          high = middle;
        else
          low = middle + 1;
      }
      for (int i = begin; i < low; ++i) code[i] = uint8_t(c - 1);
      begin = low;
    }
    for (int i = begin; i < kPoints; ++i) code[i] = reaches(255, value(i)) ? 255 : 254;
  }

  // One group of `count` scales that share a scale of their own. Every step rounds as torch does.
  LK_INLINE void encode(const float* absmax, int64_t count, float offset, uint8_t* codes,
                        float* nested_absmax) const {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t m = float_bits(absmax[i] - offset) & 0x7fffffffu;
      largest = m > largest ? m : largest;
    }
    *nested_absmax = bits_float(largest);
    const float inverse = 1.0f / *nested_absmax;
    constexpr int64_t kStep = 64;
    int points[kStep];
    for (int64_t i = 0; i < count; i += kStep) {
      const int64_t step = count - i < kStep ? count - i : kStep;
      for (int64_t j = 0; j < step; ++j) {
        const float x = (absmax[i + j] - offset) * inverse;
        const float y = (x + 1.0f) * 32767.5f + 0.5f;
        const float positive = y > 0.0f ? y : 0.0f;  // of NaN too: 0 * (1 / 0), if all are equal
        points[j] = int(positive < 65535.0f ? positive : 65535.0f);
      }
      for (int64_t j = 0; j < step; ++j) codes[i + j] = code[points[j]];
    }
  }
};

}  // namespace
}  // namespace lora_kernels
