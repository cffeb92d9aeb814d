// Elementary functions on fp32 vectors of the tier being compiled.
#pragma once

#include <initializer_list>

#include "vector/vec.h"

namespace lora_kernels {
namespace {
namespace vector {

// Lanes of a comparison are all ones or zeros.
LK_INLINE Vec select(Words mask, Vec yes, Vec no) {
  return (Vec)((mask & (Words)yes) | (~mask & (Words)no));
}

LK_INLINE Vec magnitude(Vec x) { return (Vec)((Words)x & 0x7fffffffu); }

// exp of x <= 0, within 1.2 units in the last place; 0 below -87 and for NaN. Cody and Waite's
// reduction to |r| <= ln 2 / 2, then the Taylor polynomial of degree 7.
LK_INLINE Vec exponential(Vec x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = multiply_add(x, splat(kLog2e), splat(kRound));
  const Vec n = shifted - splat(kRound);
  Vec r = multiply_add(n, splat(-kLn2High), x);
  r = multiply_add(n, splat(-kLn2Low), r);
  Vec p = splat(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = multiply_add(p, r, splat(c));
  const Vec value = (Vec)((Words)p + ((Words)shifted << 23));
  return (Vec)((Words)value & (Words)(x > splat(-87.0f)));
}

// A probability and its complement, each without cancellation.
struct Chance {
  Vec below, above;
};

// 1 / (1 + exp(-x)).
LK_INLINE Chance logistic(Vec x) {
  const Vec e = exponential((Vec)((Words)x | 0x80000000u));
  const Vec large = splat(1.0f) / (splat(1.0f) + e), small = e * large;
  const Words negative = (Words)(x < splat(0.0f));
  return {select(negative, small, large), select(negative, large, small)};
}

// The normal distribution: its probability, and its density phi.
//
// For z = |x|, exp(z^2 / 2) * P(X > z) is smooth and falls as 1 / z: a polynomial of degree 10 in
// w = 1 / (1 + 0.4 z) without a constant term, fitted by weighted least squares to a relative error
// of 1.5e-8. The probability of |x| > 13.2 is 0, as is its exponential.
LK_INLINE Chance normal(Vec x, Vec* density) {
  constexpr float kMost = 16.0f, kRootOf2Pi = 2.50662827f;
  const Vec any = magnitude(x);
  const Vec z = select((Words)(any < splat(kMost)), any, splat(kMost));
  const Vec square = z * z;
  // What rounding took from the square would take bits from the exponential of a large one.
  const Vec lost = multiply_add(z, z, splat(0.0f) - square);
  Vec e = exponential(square * splat(-0.5f));
  e = multiply_add(e, lost * splat(-0.5f), e);
  const Vec w = splat(1.0f) / multiply_add(z, splat(0.4f), splat(1.0f));
  Vec p = splat(0.0320987329f);
  for (const float c : {-0.176180497f, 0.380798101f, -0.371989906f, 0.117760204f, -0.0258983523f,
                        0.0910063609f, 0.133209854f, 0.159619227f, 0.159576297f})
    p = multiply_add(p, w, splat(c));
  const Vec small = e * (p * w), large = splat(1.0f) - small;
  *density = e * splat(1.0f / kRootOf2Pi);
  const Words negative = (Words)(x < splat(0.0f));
  return {select(negative, small, large), select(negative, large, small)};
}

}  // namespace vector
}  // namespace
}  // namespace lora_kernels
