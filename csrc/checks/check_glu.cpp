// Every tier's gated linear units against double, over widths that are multiples of no vector's
// length, and over the whole range of the activations.
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "lora_kernels/glu.h"

using namespace lora_kernels;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const double kPi = std::acos(-1.0);

struct Exact {
  double value, slope;
};

Exact exact(Activation activation, double g) {
  if (activation == Activation::gelu) {
    const double p = 0.5 * std::erfc(-g / std::sqrt(2.0));
    return {g * p, p + g * std::exp(-g * g / 2) / std::sqrt(2 * kPi)};
  }
  const bool tanh = activation == Activation::gelu_tanh;
  const double root = 2 * std::sqrt(2 / kPi);
  const double z = tanh ? root * (g + 0.044715 * g * g * g) : g;
  const double dz = tanh ? root * (1 + 3 * 0.044715 * g * g) : 1;
  const double s = 1 / (1 + std::exp(-z)), r = 1 / (1 + std::exp(z));
  return {g * s, s + g * s * r * dz};
}

template <class T>
std::vector<T> filled(int64_t m, int64_t columns, int64_t stride, Random* random, float width) {
  std::vector<T> t(size_t(m * stride + 1));
  for (T& v : t) store(&v, kNan);  // between the rows
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < columns; ++j) store(&t[i * stride + j], width * random->uniform());
  return t;
}

// `roundoff` of one rounding, and half the `smallest` number; fp32's own errors are a few 2^-24 of
// g, however small the result.
template <class T>
void check(Isa isa, Activation activation, Dtype dtype, double roundoff, double smallest, int64_t m,
           int64_t n, float width) {
  Random random;
  const int64_t stride = n + 3;
  const auto g = filled<T>(m, n, stride, &random, width);
  const auto u = filled<T>(m, n, n + 1, &random, 2), dh = filled<T>(m, n, n, &random, 2);
  std::vector<T> h(size_t(m * n + 1)), again(h.size()), dg(h.size()), du(h.size());
  for (auto* t : {&h, &again, &dg, &du})
    for (T& v : *t) store(&v, kNan);
  Glu call{activation, dtype, m, n,        g.data(), u.data(), dh.data(),
           stride,     n + 1, n, h.data(), nullptr,  nullptr};
  glu_table().forward(call, serial());
  call.h = again.data();
  call.dg = dg.data();
  call.du = du.data();
  glu_table().backward(call, serial());
  for (auto* t : {&h, &again, &dg, &du})
    CHECK(to_float(t->back()) != to_float(t->back()), "%s wrote past the end", isa_name(isa));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double at = to_float(g[i * stride + j]), up = to_float(u[i * (n + 1) + j]);
      const double d = to_float(dh[i * n + j]);
      const Exact want = exact(activation, at);
      const double few = 4 * 0x1p-24;
      const double of_value = few * std::fabs(at) * std::exp(std::fmin(at, 0) / 8);
      const double of_slope = few * (1 + std::fabs(at) * std::exp(-std::fabs(at) / 8));
      const auto near = [&](const char* name, double got, double exact, double error) {
        CHECK(std::fabs(got - exact) <= roundoff * std::fabs(exact) + error + smallest,
              "%s, activation %d, %s at g = %.9g: %.9g, expected %.9g", isa_name(isa),
              int(activation), name, at, got, exact);
      };
      const int64_t k = i * n + j;
      near("h", to_float(h[k]), want.value * up, of_value * std::fabs(up));
      near("du", to_float(du[k]), want.value * d, of_value * std::fabs(d));
      near("dg", to_float(dg[k]), want.slope * d * up, of_slope * std::fabs(d * up));
      CHECK(to_float(h[k]) == to_float(again[k]), "the backward's h differs from the forward's");
    }
  }
  call.h = nullptr;
  glu_table().backward(call, serial());
}

void check_ends(Isa isa, Activation activation) {
  const float huge = std::numeric_limits<float>::max() / 4;
  const float g[] = {huge, -huge, kNan, 0.0f, -0.0f}, u[] = {1, 1, 1, 1, 1};
  float h[5], dg[5], du[5];
  Glu call{activation, Dtype::f32, 1, 5, g, u, u, 5, 5, 5, h, dg, du};
  glu_table().backward(call, serial());
  CHECK(h[0] == huge && std::fabs(h[1]) == 0, "%s: %g, %g", isa_name(isa), h[0], h[1]);
  CHECK(h[2] != h[2] && dg[2] != dg[2] && du[2] != du[2], "%s lost a NaN", isa_name(isa));
  CHECK(h[3] == 0 && h[4] == 0 && dg[3] == 0.5f && dg[4] == 0.5f, "%s at 0", isa_name(isa));
}

}  // namespace

int main() {
  for (const Isa isa : usable_isas()) {
    set_for_testing(isa);
    for (int a = 0; a < kActivations; ++a) {
      const auto activation = static_cast<Activation>(a);
      check_ends(isa, activation);
      for (const int64_t n : {1, 3, 4, 7, 8, 15, 16, 17, 33, 1023, 1024, 1025, 3000}) {
        for (const float width : {0.5f, 4.0f, 20.0f, 200.0f}) {
          check<float>(isa, activation, Dtype::f32, 0x1p-24, 1e-36, 3, n, width);
          check<BFloat16>(isa, activation, Dtype::bf16, 0x1p-8, 1e-36, 3, n, width);
          check<Half>(isa, activation, Dtype::f16, 0x1p-11, 0x1p-25, 3, n, width);
        }
      }
    }
  }
  return 0;
}
