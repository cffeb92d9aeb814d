// Cross-entropy and its gradient, a row of logits at a time: the row stays in the private caches
// through its three passes (maximum, sum, gradient), so memory is read once and written once.
//
// Bytes it cannot avoid: the logits once, the gradient once. Exponentials are computed twice, for
// the sum and for the gradient; kept as fp32 they would take too much of the caches.
#include "lora_kernels/cross_entropy.h"

#include <cmath>
#include <limits>

#include "vector/functions.h"

namespace lora_kernels {
namespace {

using vector::exponential;
using vector::kLanes;
using vector::load;
using vector::put;
using vector::select;
using vector::splat;
using vector::Vec;
using vector::Words;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

LK_INLINE float largest(Vec v) {
  float lanes[kLanes], most = -kInfinity;
  put(lanes, v);
  for (const float lane : lanes) most = lane > most ? lane : most;
  return most;
}

// Calls fn(i, v) for each vector of the row; lanes past its end are -inf.
template <class T, class Fn>
LK_INLINE void each(const T* row, int64_t count, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) fn(i, load(row + i));
  if (i == count) return;
  float rest[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) rest[j] = i + j < count ? to_float(row[i + j]) : -kInfinity;
  fn(i, load(rest));
}

// The maximum; NaN where the row holds a NaN, or is all -inf, or holds +inf.
template <class T>
float maximum(const T* row, int64_t count) {
  Vec most = splat(-kInfinity);
  Words numbers = ~Words{};
  each(row, count, [&](int64_t, Vec v) {
    most = select((Words)(v > most), v, most);
    numbers &= (Words)(v == v);
  });
  const float value = largest(most);
  for (int i = 0; i < kLanes; ++i)
    if (numbers[i] == 0) return kNan;
  return std::fabs(value) < kInfinity ? value : kNan;
}

// Σ exp(x - most), in sums of a few vectors so that no chain of additions grows long.
template <class T>
float sum_of_exponentials(const T* row, int64_t count, float most) {
  constexpr int64_t kStretch = 64 * kLanes;
  Vec total = splat(0.0f);
  for (int64_t i = 0; i < count; i += kStretch) {
    Vec part = splat(0.0f);
    each(row + i, vector::min64(kStretch, count - i),
         [&](int64_t, Vec v) { part += exponential(v - splat(most)); });
    total += part;
  }
  return vector::sum(total);
}

template <class T>
void gradient(const T* row, int64_t count, int64_t label, float most, float log_sum, T* out) {
  each(row, count, [&](int64_t i, Vec v) {
    const Vec p = exponential(v - splat(most) - splat(log_sum));
    if (i + kLanes <= count) return put(out + i, p);
    float rest[kLanes];
    put(rest, p);
    for (int64_t j = i; j < count; ++j) store(out + j, rest[j - i]);
  });
  float p[kLanes];
  put(p, exponential(splat(to_float(row[label]) - most - log_sum)));
  store(out + label, p[0] - 1.0f);
}

template <class T>
void rows_as(const CrossEntropy& c, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* row = static_cast<const T*>(c.logits) + m * c.stride;
    T* out = c.dlogits != nullptr ? static_cast<T*>(c.dlogits) + m * c.columns : nullptr;
    const int64_t label = c.labels[m];
    const bool ignored = label == c.ignored;
    const float most = ignored ? 0.0f : maximum(row, c.columns);
    if (ignored || most != most) {
      c.losses[m] = ignored ? 0.0f : kNan;
      for (int64_t i = 0; out != nullptr && i < c.columns; ++i) store(out + i, c.losses[m]);
      continue;
    }
    const float log_sum = std::log(sum_of_exponentials(row, c.columns, most));  // less `most`
    c.losses[m] = log_sum - (to_float(row[label]) - most);
    if (out != nullptr) gradient(row, c.columns, label, most, log_sum, out);
  }
}

void rows(const CrossEntropy& c, const Parallel& parallel) {
  constexpr int64_t kGrain = 1 << 14;  // elements that a thread takes at least
  parallel(0, c.rows, vector::ceil_div(kGrain, c.columns), [&](int64_t begin, int64_t end) {
    switch (c.dtype) {
      case Dtype::f16:
        return rows_as<Half>(c, begin, end);
      case Dtype::bf16:
        return rows_as<BFloat16>(c, begin, end);
      default:
        return rows_as<float>(c, begin, end);
    }
  });
}

}  // namespace

LK_TABLE(CrossEntropyKernels, cross_entropy) = {rows};

}  // namespace lora_kernels
