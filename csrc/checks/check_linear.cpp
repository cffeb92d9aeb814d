// The linear kernels of every tier against sums in double. The allowed error is the a-priori bound
// of a sum of K rounded products, gamma_K Σ|x||w|, and one rounding of the result.
#include <cmath>
#include <cstdint>
#include <thread>

#include "check.h"
#include "lora_kernels/linear.h"

using namespace lora_kernels;

namespace {

constexpr float kGuard = -7.0f;
constexpr int64_t kPad = 3;  // columns between rows, which no kernel may touch

float round_as(Dtype dtype, float v) {
  return dtype == Dtype::f16    ? to_float(to_half(v))
         : dtype == Dtype::bf16 ? to_float(to_bfloat16(v))
                                : v;
}

double unit_roundoff(Dtype dtype) {
  return dtype == Dtype::f16 ? 0x1p-11 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-24;
}

// Numbers of a type, with the fp32 value of each.
struct Array {
  Dtype dtype;
  std::vector<float> value;
  std::vector<uint16_t> bits;

  Array(Dtype type, int64_t count, Random& random) : dtype(type), value(count), bits(count) {
    for (int64_t i = 0; i < count; ++i) set(i, random.uniform());
  }
  void set(int64_t i, float v) {
    value[i] = round_as(dtype, v);
    bits[i] = dtype == Dtype::f16 ? to_half(v).bits : to_bfloat16(v).bits;
  }
  float get(int64_t i) const {
    return dtype == Dtype::f16    ? to_float(Half{bits[i]})
           : dtype == Dtype::bf16 ? to_float(BFloat16{bits[i]})
                                  : value[i];
  }
  void* data() { return dtype == Dtype::f32 ? (void*)value.data() : (void*)bits.data(); }
  MatrixView view(int64_t rows, int64_t columns, int64_t stride) {
    return {data(), dtype, rows, columns, stride};
  }
};

// Three pieces in reverse order, on threads.
void run_threads(int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) {
  std::vector<std::thread> threads;
  const int64_t piece = (end - begin + 2) / 3;
  for (int64_t b = begin + 2 * piece; b >= begin; b -= piece)
    if (b < end) threads.emplace_back(body, b, b + piece < end ? b + piece : end, context);
  for (std::thread& t : threads) t.join();
}
const Parallel kThreads{3, run_threads};

struct Sum {
  double value = 0, magnitude = 0;
  void add(double product) {
    value += product;
    magnitude += std::fabs(product);
  }
};

void check_sum(const Sum& sum, int64_t terms, Dtype dtype, float got, const char* what, int64_t i,
               int64_t j) {
  const double u = 0x1p-24, gamma = terms * u / (1 - terms * u);
  const double allowed = gamma * sum.magnitude +
                         unit_roundoff(dtype) * std::fabs(sum.value) * 1.01 +
                         (dtype == Dtype::f16 ? 0x1p-24 : 0.0);
  CHECK(std::fabs(got - sum.value) <= allowed, "%s: %s[%ld, %ld] = %g, expected %g within %g",
        isa_name(current()), what, long(i), long(j), got, sum.value, allowed);
}

struct Weight {
  std::vector<uint8_t> packed, absmax8;
  std::vector<float> absmax, map, nested;
  QuantView q;

  Weight(int64_t n, int64_t block, int64_t nested_block, int type, Random& random)
      : packed((n + 1) / 2),
        absmax8((n + block - 1) / block),
        absmax(absmax8.size()),
        map(256),
        nested(nested_block > 0 ? absmax8.size() / nested_block + 1 : 0) {
    for (uint8_t& b : packed) b = static_cast<uint8_t>(random.next());
    for (uint8_t& b : absmax8) b = static_cast<uint8_t>(random.next());
    for (std::vector<float>* values : {&absmax, &map, &nested})
      for (float& f : *values) f = random.uniform();
    q = {packed.data(), nullptr, absmax8.data(), nested.data(), map.data(),
         0.25f,         n,       block,          nested_block,  type};
    if (nested_block == 0) q.absmax = absmax.data();
  }
  float get(int64_t i, Dtype dtype) const {
    return round_as(dtype, kCodeTable[q.quant_type][q.code(i)] * q.block_scale(i / q.block_size));
  }
};

void check_forward(Isa isa, Dtype dtype, int64_t m, int64_t n, int64_t k, const QuantView* q,
                   const Weight& weight, const Parallel& parallel, Array* y, Random& random) {
  set_for_testing(isa);
  Array x(dtype, m * (k + kPad), random), bias(dtype, n, random),
      dense(dtype, n * (k + kPad), random);
  *y = Array(dtype, m * n + 1, random);
  y->set(m * n, kGuard);
  BaseView base{{nullptr, Dtype::f32, 0, 0, 0}, q, n, k};
  if (q == nullptr) base.dense = dense.view(n, k, k + kPad);
  const LinearForward call{
      x.view(m, k, k + kPad), base, bias.view(1, n, n), LoraView{}, y->data(), nullptr};
  CHECK(linear_kernels().forward(call, parallel), "out of memory");
  CHECK(y->get(m * n) == kGuard, "%s wrote past the end", isa_name(isa));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      for (int64_t d = 0; d < k; ++d) {
        const float w = q != nullptr ? weight.get(j * k + d, dtype) : dense.get(j * (k + kPad) + d);
        sum.add(double(x.get(i * (k + kPad) + d)) * w);
      }
      sum.add(bias.get(j));
      check_sum(sum, k + 1, dtype, y->get(i * n + j), "y", i, j);
    }
  }
}

void check_backward(Isa isa, Dtype dtype, int64_t m, int64_t n, int64_t k, const Weight& weight,
                    Random& random) {
  set_for_testing(isa);
  Array dy(dtype, m * (n + kPad), random), dx(dtype, m * k + 1, random);
  dx.set(m * k, kGuard);
  const LinearBackward call{dy.view(m, n, n + kPad),
                            {{nullptr, Dtype::f32, 0, 0, 0}, &weight.q, n, k},
                            LoraView{},
                            dx.data(),
                            nullptr};
  CHECK(linear_kernels().backward(call, kThreads), "out of memory");
  CHECK(dx.get(m * k) == kGuard, "%s wrote past the end", isa_name(isa));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      Sum sum;
      for (int64_t d = 0; d < n; ++d)
        sum.add(double(dy.get(i * (n + kPad) + d)) * weight.get(d * k + j, dtype));
      check_sum(sum, n, dtype, dx.get(i * k + j), "dx", i, j);
    }
  }
}

void check_outer_sum(Isa isa, Dtype dtype, int64_t m, int64_t r, int64_t c, Random& random) {
  set_for_testing(isa);
  Array left(dtype, m * r, random), right(dtype, m * (c + kPad), random);
  const Dropout dropout{7, 0, dropout_threshold(0.3)};
  std::vector<float> out(r * c + 1, kGuard);
  const OuterSum call{left.view(m, r, r), right.view(m, c, c + kPad), dropout, out.data()};
  CHECK(linear_kernels().outer_sum(call, kThreads), "out of memory");
  CHECK(out.back() == kGuard, "%s wrote past the end", isa_name(isa));
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < c; ++j) {
      Sum sum;
      for (int64_t d = 0; d < m; ++d)
        if (keep_bits8(dropout, uint32_t(d), uint32_t(j / 8)) >> (j % 8) & 1)
          sum.add(double(left.get(d * r + i)) * right.get(d * (c + kPad) + j));
      check_sum(sum, m, Dtype::f32, out[i * c + j], "outer", i, j);
    }
  }
}

}  // namespace

int main() {
  const int64_t shapes[][2] = {{1, 1}, {3, 64}, {5, 128}, {7, 77}, {34, 192}, {130, 320}, {9, 1}};
  const int64_t layouts[][2] = {{64, 0}, {64, 256}, {32, 16}, {128, 16}, {4096, 16}};
  Random seeds;
  for (const Isa isa : usable_isas()) {
    for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
      for (const int64_t m : {1, 2, 7, 8, 9, 16, 17, 40}) {
        for (const auto& [n, k] : shapes) {
          Random random = seeds;
          for (const auto& [block, nested] : layouts) {
            const Weight weight(n * k, block, nested, int(m % 2), random);
            Array serially(dtype, 1, random), threaded(dtype, 1, random);
            Random again = random;
            check_forward(isa, dtype, m, n, k, &weight.q, weight, serial(), &serially, random);
            check_forward(isa, dtype, m, n, k, &weight.q, weight, kThreads, &threaded, again);
            CHECK(serially.value == threaded.value && serially.bits == threaded.bits,
                  "%s depends on threads", isa_name(isa));
            check_backward(isa, dtype, m, n, k, weight, random);
          }
          const Weight unused(0, 64, 0, 0, random);
          Array y(dtype, 1, random);
          check_forward(isa, dtype, m, n, k, nullptr, unused, kThreads, &y, random);
          check_outer_sum(isa, dtype, m, n < 70 ? n : 70, k, random);
        }
      }
    }
  }
  return 0;
}
