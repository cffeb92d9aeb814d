// Element types of the kernels and their scalar conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "lora_kernels/macros.h"

namespace lora_kernels {

enum class Dtype : int { f32 = 0, f16, bf16 };
constexpr int kDtypes = 3;

// The type of s = x · Aᵀ and ds = dy · B, by that of the activations. For fp16 it is fp32: they may
// leave the range of fp16 where the output does not.
constexpr Dtype rank_dtype(Dtype dtype) { return dtype == Dtype::f16 ? Dtype::f32 : dtype; }

// Storage only; arithmetic is in fp32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Calls fn with a value of the C++ type for `dtype`.
template <class Fn>
LK_INLINE void with_type(Dtype dtype, const Fn& fn) {
  switch (dtype) {
    case Dtype::f16:
      return fn(Half{});
    case Dtype::bf16:
      return fn(BFloat16{});
    default:
      return fn(float{});
  }
}

LK_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

LK_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

LK_INLINE float to_float(float value) { return value; }

LK_INLINE float to_float(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

LK_INLINE float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // inf, NaN
    return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: an integer times 2^-24.
  return bits_float(sign | float_bits(float(magnitude) * 0x1p-24f));
}

// Round to nearest even. A NaN stays a quiet NaN of the same sign.
LK_INLINE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<uint16_t>(((bits >> 16) & 0x8000u) | 0x7fc0u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

LK_INLINE Half to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return {static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude >= 0x38800000u) {                                                // normal
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
  // Subnormal: adding 0.5 leaves a last place of 2^-24, and the adder rounds to nearest even.
  return {static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u))};
}

LK_INLINE void store(float* p, float value) { *p = value; }
LK_INLINE void store(Half* p, float value) { *p = to_half(value); }
LK_INLINE void store(BFloat16* p, float value) { *p = to_bfloat16(value); }

}  // namespace lora_kernels
