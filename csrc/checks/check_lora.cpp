// The linear kernels of every tier against sums in double, over shapes that are multiples of no
// block size. The allowed error is the a-priori bound of a sum of K rounded products, gamma_K
// Σ|x||w|, one rounding of the result, and one of each adapter element, which kernels may round to
// the type of x.
//
// Results start as NaN, as does what lies between the rows of operands. So the check notices an
// element that was not written, and one that must not be read.
#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>

#include "check.h"
#include "lora_kernels/lora.h"
#include "lora_kernels/tuning.h"

using namespace lora_kernels;

namespace {

constexpr float kGuard = -7.0f;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kPad = 3;  // columns between rows

float round_as(Dtype dtype, float v) {
  return dtype == Dtype::f16    ? to_float(to_half(v))
         : dtype == Dtype::bf16 ? to_float(to_bfloat16(v))
                                : v;
}

double unit_roundoff(Dtype dtype) {
  return dtype == Dtype::f16 ? 0x1p-11 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-24;
}

// Rows of numbers of a type, `stride` apart, NaN between them; there is no memory behind the last
// one.
struct Array {
  Dtype dtype;
  int64_t rows, columns, stride;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Array(Dtype type, int64_t m, int64_t n, int64_t pad)
      : dtype(type), rows(m), columns(n), stride(n + pad) {
    const size_t size = m > 0 ? size_t(m * stride - pad) : 0;
    (type == Dtype::f32 ? wide.resize(size) : narrow.resize(size));
    for (size_t i = 0; i < size; ++i) set(int64_t(i), kNan);
  }
  static Array random(Dtype type, int64_t m, int64_t n, int64_t pad, Random& random) {
    Array out(type, m, n, pad);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) out.set(i * out.stride + j, random.uniform());
    return out;
  }
  // A result [m, n], all NaN, and a guard behind it.
  static Array result(Dtype type, int64_t m, int64_t n) {
    Array out(type, 1, m * n + 1, 0);
    out.set(m * n, kGuard);
    out.stride = n;
    return out;
  }
  void set(int64_t i, float v) {
    if (dtype == Dtype::f32) wide[i] = v;
    if (dtype == Dtype::f16) narrow[i] = to_half(v).bits;
    if (dtype == Dtype::bf16) narrow[i] = to_bfloat16(v).bits;
  }
  float get(int64_t i) const {
    return dtype == Dtype::f16    ? to_float(Half{narrow[i]})
           : dtype == Dtype::bf16 ? to_float(BFloat16{narrow[i]})
                                  : wide[i];
  }
  float at(int64_t i, int64_t j) const { return get(i * stride + j); }
  void* data() { return dtype == Dtype::f32 ? (void*)wide.data() : (void*)narrow.data(); }
  MatrixView view() { return {data(), dtype, rows, columns, stride}; }
  void check_guard(const char* what) const {
    CHECK(get(int64_t(wide.size() + narrow.size()) - 1) == kGuard, "%s: %s: wrote past the end",
          isa_name(current()), what);
  }
  bool operator==(const Array& other) const { return wide == other.wide && narrow == other.narrow; }
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
  double value = 0, magnitude = 0, rounded = 0;  // rounded: products of a factor that may be
  int64_t terms = 0;
  void add(double product) {
    value += product;
    magnitude += std::fabs(product);
    ++terms;
  }
  void add_rounded(double product) {
    add(product);
    rounded += std::fabs(product);
  }
  void check(Dtype dtype, float got, const char* what, int64_t i, int64_t j) const {
    const double n = double(terms + 4), gamma = n * 0x1p-24 / (1 - n * 0x1p-24);
    const double u = 1.01 * unit_roundoff(dtype);
    const double allowed = gamma * magnitude + u * rounded + u * std::fabs(value) +
                           (dtype == Dtype::f16 ? 0x1p-24 : 0.0);
    CHECK(std::fabs(got - value) <= allowed, "%s: %s[%ld, %ld] = %g, expected %g within %g",
          isa_name(current()), what, long(i), long(j), got, value, allowed);
  }
};

// A 4-bit weight of any bytes, decoded.
struct Quantised {
  std::vector<uint8_t> packed, absmax8;
  std::vector<float> absmax, map, nested;
  QuantView q;

  Quantised(int64_t n, int64_t block, int64_t nested_block, int type, Random& random)
      : packed((n + 1) / 2),
        absmax8((n + block - 1) / block),
        absmax(absmax8.size()),
        map(256),
        nested(nested_block > 0 ? (absmax8.size() + nested_block - 1) / nested_block : 0) {
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

struct Shape {
  int64_t m, n, k, r;     // r = 0: no adapter
  int64_t block, nested;  // block 0: dense
  double p;
  bool diagonals;
};

// The operands of one layer; sums over the base, which no adapter changes, are computed once.
struct Layer {
  Shape shape;
  Dtype dtype;
  Quantised quantised;
  Array x, dy, bias, dense, a, b, d, g;
  BaseView base;
  LoraView lora{};
  double keep_scale = 1.0;
  std::vector<float> w;  // [N, K] as the products take it
  std::vector<Sum> y, dx;

  Layer(const Shape& s, Dtype type, Dtype adapters, Random& random)
      : shape(s),
        dtype(type),
        quantised(s.block > 0 ? s.n * s.k : 0, s.block > 0 ? s.block : 64, s.nested,
                  int(s.m + s.n) % 2, random),
        x(Array::random(type, s.m, s.k, kPad, random)),
        dy(Array::random(type, s.m, s.n, kPad, random)),
        bias(Array::random(type, 1, s.n, 0, random)),
        dense(Array::random(type, s.block > 0 ? 0 : s.n, s.k, kPad, random)),
        a(Array::random(adapters, s.r, s.k, kPad, random)),
        b(Array::random(adapters, s.n, s.r, kPad, random)),
        d(Array::random(adapters, 1, s.r, 0, random)),
        g(Array::random(adapters, 1, s.n, 0, random)),
        base{{nullptr, Dtype::f32, 0, 0, 0}, nullptr, s.n, s.k},
        w(s.n * s.k),
        y(s.m * s.n),
        dx(s.m * s.k) {
    if (s.block > 0)
      base.quant = &quantised.q;
    else
      base.dense = dense.view();
    if (s.r > 0) {
      lora.a = a.view();
      lora.b = b.view();
      if (s.diagonals) lora.rank_diag = d.view(), lora.out_diag = g.view();
      lora.scale = 1.5f;
      lora.dropout = {7, 0, dropout_threshold(s.p)};
      if (lora.dropout.threshold != 0) keep_scale = dropout_scale(lora.dropout.threshold);
    }
    for (int64_t j = 0; j < s.n; ++j)
      for (int64_t i = 0; i < s.k; ++i)
        w[j * s.k + i] = s.block > 0 ? quantised.get(j * s.k + i, type) : dense.at(j, i);
    for (int64_t i = 0; i < s.m; ++i)
      for (int64_t j = 0; j < s.n; ++j) {
        const double grad = dy.at(i, j);
        Sum& sum = y[i * s.n + j];
        for (int64_t l = 0; l < s.k; ++l) {
          sum.add(double(x.at(i, l)) * w[j * s.k + l]);
          dx[i * s.k + l].add(grad * w[j * s.k + l]);
        }
        sum.add(bias.get(j));
      }
  }
  bool keeps(int64_t m, int64_t k) const {
    return keep_bits8(lora.dropout, uint32_t(m), uint32_t(k / 8)) >> (k % 8) & 1;
  }
  double rank_factor(int64_t r) const { return shape.diagonals ? d.get(r) : 1.0; }
  double out_factor(int64_t n) const { return shape.diagonals ? g.get(n) : 1.0; }
  double expand(int64_t n, int64_t r) const {
    return double(lora.scale) * out_factor(n) * rank_factor(r) * b.at(n, r);
  }
};

// y and s; the sums of y take s as the kernel rounded it.
std::vector<Array> check_forward(Layer& f, const Parallel& parallel) {
  const auto& [m, n, k, r, block, nested, p, diagonals] = f.shape;
  Array y = Array::result(f.dtype, m, n), s = Array::result(rank_dtype(f.dtype), m, r);
  const LoraForward call{f.x.view(), f.base,   f.bias.view(),
                         f.lora,     y.data(), r > 0 ? s.data() : nullptr};
  CHECK(lora_table().forward(call, parallel), "out of memory");
  y.check_guard("y");
  s.check_guard("s");
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      Sum sum;
      for (int64_t l = 0; l < k; ++l)
        if (f.keeps(i, l)) sum.add_rounded(f.keep_scale * f.x.at(i, l) * f.a.at(j, l));
      sum.check(f.dtype, s.at(i, j), "s", i, j);
    }
    for (int64_t j = 0; j < n; ++j) {
      Sum sum = f.y[i * n + j];
      for (int64_t l = 0; l < r; ++l) sum.add_rounded(s.at(i, l) * f.expand(j, l));
      sum.check(f.dtype, y.at(i, j), "y", i, j);
    }
  }
  return {y, s};
}

std::vector<Array> check_backward(Layer& f, const Parallel& parallel, bool wants_dx) {
  const auto& [m, n, k, r, block, nested, p, diagonals] = f.shape;
  Array dx = Array::result(f.dtype, m, k), ds = Array::result(rank_dtype(f.dtype), m, r);
  const LoraBackward call{f.dy.view(), f.base, f.lora, wants_dx ? dx.data() : nullptr,
                          r > 0 ? ds.data() : nullptr};
  CHECK(lora_table().backward(call, parallel), "out of memory");
  dx.check_guard("dx");
  ds.check_guard("ds");
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      Sum sum;
      for (int64_t l = 0; l < n; ++l) sum.add_rounded(f.dy.at(i, l) * f.expand(l, j));
      sum.check(f.dtype, ds.at(i, j), "ds", i, j);
    }
    for (int64_t j = 0; wants_dx && j < k; ++j) {
      Sum sum = f.dx[i * k + j];
      for (int64_t l = 0; l < r && f.keeps(i, j); ++l)
        sum.add_rounded(f.keep_scale * ds.at(i, l) * f.a.at(l, j));
      sum.check(f.dtype, dx.at(i, j), "dx", i, j);
    }
  }
  return {dx, ds};
}

// The products summed over M for the gradients of A and B, and all gradients that follow from that
// of B.
std::vector<Array> check_gradients(Layer& f, const Parallel& parallel, Random random) {
  const auto& [m, n, k, r, block, nested, p, diagonals] = f.shape;
  Array left = Array::random(rank_dtype(f.dtype), m, r, kPad, random);
  std::vector<Array> outs;
  for (const bool of_a : {true, false}) {
    Array& right = of_a ? f.x : f.dy;
    const Dropout dropout = of_a ? f.lora.dropout : Dropout{};
    Array out = Array::result(Dtype::f32, r, right.columns);
    const Wgrad call{left.view(), right.view(), dropout, out.wide.data()};
    CHECK(lora_table().wgrad(call, parallel), "out of memory");
    out.check_guard("s_dy");
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < right.columns; ++j) {
        Sum sum;
        for (int64_t l = 0; l < m; ++l)
          if (!of_a || f.keeps(l, j)) sum.add(double(left.at(l, i)) * right.at(l, j));
        sum.check(Dtype::f32, out.at(i, j), "s_dy", i, j);
      }
    outs.push_back(out);
  }
  const Array& s_dy = outs[1];  // [R, N]
  const Dtype adapters = f.b.dtype;
  Array db = Array::result(adapters, n, r), dd = Array::result(Dtype::f32, 1, r),
        dg = Array::result(Dtype::f32, 1, n);
  const AdapterGrads call{s_dy.wide.data(), f.lora, db.data(), dd.wide.data(), dg.wide.data()};
  lora_table().adapter_grads(call, parallel);
  std::vector<Sum> rank_sums(r);
  for (int64_t i = 0; i < n; ++i) {
    Sum out_sum;
    for (int64_t j = 0; j < r; ++j) {
      const double scaled = double(f.lora.scale) * s_dy.at(j, i), b = f.b.at(i, j);
      Sum sum;
      sum.add(scaled * f.out_factor(i) * f.rank_factor(j));
      sum.check(adapters, db.at(i, j), "db", i, j);
      rank_sums[j].add(scaled * f.out_factor(i) * b);
      out_sum.add(scaled * f.rank_factor(j) * b);
    }
    out_sum.check(Dtype::f32, dg.get(i), "dout_diag", 0, i);
  }
  for (int64_t j = 0; j < r; ++j) rank_sums[j].check(Dtype::f32, dd.get(j), "drank_diag", 0, j);

  Array scaled = Array::result(adapters, r, n);
  lora_table().scale_into(s_dy.wide.data(), r * n, 0.3f, adapters, scaled.data());
  for (int64_t i = 0; i < r * n; ++i) {
    Sum sum;
    sum.add(double(0.3f) * s_dy.wide[i]);
    sum.check(adapters, scaled.get(i), "scaled", 0, i);
  }
  for (const Array* out : {&db, &dd, &dg, &scaled}) {
    out->check_guard("a gradient");
    outs.push_back(*out);
  }
  return outs;
}

// Blocks as small as they get, or as large.
Tuning extreme(bool large) {
  Tuning t;
  for (const Knob& knob : kKnobs) t.*knob.value = large ? knob.most : knob.least;
  return t;
}

void check_layer(const Shape& shape, Dtype dtype, Dtype adapters, Random& random) {
  Layer layer(shape, dtype, adapters, random);
  bool large = random.next() % 2 == 1;
  for (const Isa isa : usable_isas()) {
    set_for_testing(isa);
    // On one thread with the default sizes, and on several with extreme ones.
    const auto same = [&](const auto& check) {
      set_tuning(Tuning{});
      const std::vector<Array> usual = check(serial());
      set_tuning(extreme(large));
      CHECK(usual == check(kThreads), "%s: depends on threads or %s blocks", isa_name(isa),
            large ? "large" : "small");
      large = !large;
    };
    same([&](const Parallel& parallel) { return check_forward(layer, parallel); });
    same([&](const Parallel& parallel) { return check_backward(layer, parallel, true); });
    if (shape.r == 0) continue;
    check_backward(layer, kThreads, false);
    same([&](const Parallel& parallel) { return check_gradients(layer, parallel, random); });
  }
}

}  // namespace

int main() {
  const int64_t sizes[][2] = {{1, 1},    {3, 64},   {5, 128},   {7, 77}, {16, 33},
                              {34, 192}, {65, 127}, {130, 320}, {9, 1},  {257, 15}};
  const int64_t layouts[][2] = {{0, 0},    {64, 0},    {64, 256}, {32, 16},
                                {128, 16}, {4096, 16}, {64, 3}};
  const int64_t ranks[] = {0, 1, 8, 15, 16, 17, 33};
  const double dropouts[] = {0.0, 0.1, 0.5};
  Random random;
  uint32_t turn = 0;  // every layout meets every rank, and so on, but not all of them at once
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    const auto check = [&](int64_t m, int64_t n, int64_t k, const int64_t (&layout)[2], int64_t r) {
      const Dtype adapters = random.next() % 2 ? Dtype::f32 : dtype;
      const Shape shape{
          m, n, k, r, layout[0], layout[1], dropouts[random.next() % 3], random.next() % 2 == 1};
      check_layer(shape, dtype, adapters, random);
    };
    for (const int64_t m : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 40})
      for (const auto& [n, k] : sizes) {
        for (int i = 0; i < 2; ++i, ++turn) check(m, n, k, layouts[turn % 7], ranks[turn / 7 % 7]);
      }
    // More than one block of K, of N and of R.
    check(5, 70, 2368, layouts[2], 17);
    check(35, 340, 1100, layouts[0], 65);
    check(67, 1100, 130, layouts[1], 300);
  }
  return 0;
}
