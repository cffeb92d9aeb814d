// Every tier's cross-entropy against double, over widths that are multiples of no vector's length.
#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "lora_kernels/cross_entropy.h"

using namespace lora_kernels;

namespace {

constexpr int64_t kIgnored = -100;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
void check(Isa isa, Dtype dtype, double roundoff, int64_t m, int64_t v, float shift) {
  Random random;
  const int64_t stride = v + 3;
  std::vector<T> logits(size_t(m * stride)), grad(size_t(m * v + 1));
  std::vector<int64_t> labels(static_cast<size_t>(m));
  std::vector<float> losses(size_t(m + 1), kNan);
  for (T& z : logits) store(&z, kNan);  // between the rows
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < v; ++j) store(&logits[i * stride + j], 8 * random.uniform() + shift);
    labels[i] = i % 3 == 1 ? kIgnored : int64_t(random.next() % uint32_t(v));
  }
  for (T& g : grad) store(&g, kNan);
  const CrossEntropy call{logits.data(), dtype,         m,          v, stride, labels.data(),
                          kIgnored,      losses.data(), grad.data()};
  cross_entropy_table().rows(call, serial());
  CHECK(losses[m] != losses[m], "%s wrote past the losses", isa_name(isa));
  CHECK(to_float(grad[m * v]) != to_float(grad[m * v]), "%s wrote past the gradient",
        isa_name(isa));
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0.0;
    const T* row = &logits[i * stride];
    for (int64_t j = 0; j < v; ++j) sum += std::exp(double(to_float(row[j])) - shift);
    const bool kept = labels[i] != kIgnored;
    const double loss = kept ? std::log(sum) + shift - to_float(row[labels[i]]) : 0.0;
    CHECK(std::fabs(losses[i] - loss) <= 2e-6 * (1 + std::fabs(shift) * 0x1p-20 + std::fabs(loss)),
          "%s, row %ld of %ld: %.9g, expected %.9g", isa_name(isa), long(i), long(v), losses[i],
          loss);
    for (int64_t j = 0; j < v; ++j) {
      const double p = std::exp(double(to_float(row[j])) - shift) / sum;
      const double want = kept ? p - (j == labels[i]) : 0.0, got = to_float(grad[i * v + j]);
      CHECK(std::fabs(got - want) <= roundoff * std::fabs(want) + 4e-6 * p + 1e-7,
            "%s, element %ld, %ld of %ld: %.9g, expected %.9g", isa_name(isa), long(i), long(j),
            long(v), got, want);
    }
  }
}

}  // namespace

int main() {
  for (const Isa isa : usable_isas()) {
    set_for_testing(isa);
    for (const int64_t v : {1, 2, 7, 8, 15, 16, 17, 33, 100, 1023, 1024, 1025, 3000}) {
      for (const float shift : {0.0f, 200.0f, -3000.0f}) {
        check<float>(isa, Dtype::f32, 0x1p-24, 5, v, shift);
        check<BFloat16>(isa, Dtype::bf16, 0x1p-8, 5, v, shift);
        check<Half>(isa, Dtype::f16, 0x1p-11, 5, v, shift);
      }
    }
  }
  return 0;
}
