// Counter-based dropout: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011; 7 rounds pass BigCrush). One call decides eight elements.
//
// key = the 64-bit seed, low word first; counter = (k / 8, m, stream, 0). Element (m, k) takes the
// 16-bit half number k % 8 of the result, low half of word 0 first, and is kept when
// half >= T, T = round(65536 p). Kept elements are scaled by 1 / (1 - T / 65536).
#pragma once

#include <cstdint>

#include "lora_kernels/macros.h"

namespace lora_kernels {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxKey1 = 0xBB67AE85u;
constexpr int kDropoutRounds = 7;

struct PhiloxBlock {
  uint32_t word[4];
};

LK_INLINE PhiloxBlock philox4x32(PhiloxBlock c, uint32_t key0, uint32_t key1, int rounds) {
  for (int r = 0; r < rounds; ++r) {
    const uint64_t p0 = uint64_t(kPhiloxMul0) * c.word[0];
    const uint64_t p1 = uint64_t(kPhiloxMul1) * c.word[2];
    c = {{uint32_t(p1 >> 32) ^ c.word[1] ^ key0, uint32_t(p1),
          uint32_t(p0 >> 32) ^ c.word[3] ^ key1, uint32_t(p0)}};
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  return c;
}

// T, 0 to 65536. Ties (65536 p = n + 1/2) go to the even integer, as Python's round() does.
LK_INLINE uint32_t dropout_threshold(double p) {
  const double t = p * 65536.0;
  uint32_t whole = uint32_t(t);
  const double rest = t - double(whole);
  if (rest > 0.5 || (rest == 0.5 && (whole & 1u))) ++whole;
  return whole;
}

LK_INLINE float dropout_scale(uint32_t threshold) {
  return threshold >= 65536u ? 0.0f : float(1.0 / (1.0 - double(threshold) / 65536.0));
}

// What a kernel needs to regenerate one projection's mask.
struct Dropout {
  uint64_t seed;
  uint32_t stream;
  uint32_t threshold;
};

// The keep bits of elements (m, 8 group .. 8 group + 7), element 8 group in bit 0.
LK_INLINE uint32_t keep_bits8(const Dropout& d, uint32_t m, uint32_t group) {
  const PhiloxBlock r = philox4x32({{group, m, d.stream, 0u}}, uint32_t(d.seed),
                                   uint32_t(d.seed >> 32), kDropoutRounds);
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t half = (r.word[i >> 1] >> (16 * (i & 1))) & 0xffffu;
    bits |= uint32_t(half >= d.threshold) << i;
  }
  return bits;
}

}  // namespace lora_kernels
