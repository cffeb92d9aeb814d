// Every tier's passes over rank pages against double, over ranks, groups and widths that are
// multiples of no block size. The allowed error is the a-priori bound of a sum of rounded products,
// and one rounding of the sums that meet 16-bit pages.
//
// Ranks past an adapter's own and what lies between rows are NaN, and there is no memory behind the
// last page. So the check notices a read of what must not be read.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "check.h"
#include "lora_kernels/gather.h"
#include "lora_kernels/philox.h"

using namespace lora_kernels;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kTokens = 29, kPad = 3;

Dtype type_of(float) { return Dtype::f32; }
Dtype type_of(Half) { return Dtype::f16; }
Dtype type_of(BFloat16) { return Dtype::bf16; }

double roundoff(Dtype dtype) {
  return dtype == Dtype::f16 ? 0x1p-11 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-24;
}

// Pieces of any length, as many threads would take them, the last ones first.
Parallel pieces(int threads) {
  return {threads, [](int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) {
            const int64_t size = (end - begin + 2) / 3;
            for (int64_t at = begin + 2 * size; at >= begin; at -= size)
              if (at < end) body(at, at + size < end ? at + size : end, context);
          }};
}

template <class T>
std::vector<T> nans(int64_t size) {
  std::vector<T> t(static_cast<size_t>(size));
  for (T& v : t) store(&v, kNan);
  return t;
}

template <class T>
struct Rows {
  int64_t columns, stride;
  std::vector<T> values;

  Rows(int64_t rows, int64_t n, Random& random)
      : columns(n), stride(n + kPad), values(nans<T>(rows * stride - kPad)) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < n; ++c) store(&values[i * stride + c], random.uniform());
  }
  double at(int64_t row, int64_t c) const { return to_float(values[row * stride + c]); }
  MatrixView view() {
    const auto rows = int64_t(values.size() + kPad) / stride;
    return {values.data(), type_of(T{}), rows, columns, stride};
  }
};

// Three adapters whose pages lie scattered, the last page of the pool among them.
template <class P>
struct Pool {
  std::vector<int64_t> ranks;
  int64_t columns, width = 0;
  std::vector<std::vector<int32_t>> table;
  std::vector<P> pages;

  Pool(std::vector<int64_t> r, int64_t n, Random& random) : ranks(std::move(r)), columns(n) {
    int32_t count = 0;
    for (const int64_t rank : ranks) {
      table.emplace_back();
      for (int64_t i = 0; i < rank; i += kPage) table.back().insert(table.back().begin(), count++);
      width = std::max(width, int64_t(table.back().size()) * kPage);
    }
    pages = nans<P>(count * kPage * columns);
    for (size_t slot = 0; slot < ranks.size(); ++slot)
      for (int64_t j = 0; j < ranks[slot]; ++j)
        for (int64_t c = 0; c < columns; ++c) store(&pages[at(slot, j) + c], random.uniform());
  }
  size_t at(size_t slot, int64_t rank) const {
    return size_t((table[slot][size_t(rank / kPage)] * kPage + rank % kPage) * columns);
  }
  double value(size_t slot, int64_t rank, int64_t c) const {
    return to_float(pages[at(slot, rank) + size_t(c)]);
  }
};

template <class X, class P>
struct Check {
  Isa isa;
  int64_t columns;
  uint32_t threshold;
  Random random{};
  Pool<P> pool;
  Rows<X> x;
  std::vector<int32_t> slots, tokens, rows;
  std::vector<std::vector<int32_t>> entries;
  std::vector<int64_t> seeds{7, -9, 11};
  std::vector<int32_t> thresholds;
  std::vector<SlotGroup> groups;
  std::vector<float> sums, factor;

  Check(Isa i, int64_t n, uint32_t t)
      : isa(i), columns(n), threshold(t), pool({17, 5, 40}, n, random), x(kTokens, n, random) {
    thresholds = {int32_t(t), 0, int32_t(t / 2)};
    entries.resize(3);
    for (int32_t e = 0; e < kTokens; ++e) {
      slots.push_back(e < 3 ? e : e % 7 == 0 ? 1 : 2);  // groups of one, a few, and many
      entries[size_t(slots.back())].push_back(e);
      tokens.push_back((e * 5 + 3) % int32_t(kTokens));
      rows.push_back(1000 - e);
      factor.push_back(random.uniform());
    }
    for (int64_t s = 0; s < 3; ++s)
      groups.push_back({entries[size_t(s)].data(), int64_t(entries[size_t(s)].size()),
                        pool.ranks[size_t(s)], pool.table[size_t(s)].data(), s});
    sums = nans<float>(kTokens * pool.width);
  }

  GatherPass pass(void* pages) {
    return {pages,
            type_of(P{}),
            type_of(X{}),
            columns,
            groups.data(),
            3,
            false,
            tokens.data(),
            sums.data(),
            pool.width,
            {threshold > 0 ? seeds.data() : nullptr, thresholds.data(), rows.data(), 2}};
  }

  // What dropout multiplies an entry's column with.
  double kept(size_t e, int64_t c) const {
    const auto slot = size_t(slots[e]);
    const auto t = uint32_t(thresholds[slot]);
    if (threshold == 0 || t == 0) return 1.0;
    const uint32_t bits =
        keep_bits8({uint64_t(seeds[slot]), 2, t}, uint32_t(rows[e]), uint32_t(c / 8));
    return bits >> (c % 8) & 1 ? 1.0 / (1.0 - t / 65536.0) : 0.0;
  }

  void near(const char* what, double got, double want, double bound, int64_t i, int64_t j) const {
    CHECK(std::fabs(got - want) <= bound, "%s, %s[%ld, %ld] of %ld columns: %.9g, expected %.9g",
          isa_name(isa), what, long(i), long(j), long(columns), got, want);
  }

  void shrink() {
    const double one = roundoff(type_of(X{}));
    using Kept = std::conditional_t<std::is_same_v<X, Half>, float, X>;  // rank_dtype
    std::vector<Kept> s = nans<Kept>(kTokens * (pool.width + 1));
    CHECK(gather_table().shrink(pass(pool.pages.data()), x.view(), s.data(), pool.width + 1,
                                pieces(3)),
          "out of memory");
    std::vector<float> again = sums;
    gather_table().shrink(pass(pool.pages.data()), x.view(), nullptr, 0, serial());
    for (size_t e = 0; e < size_t(kTokens); ++e) {
      const auto slot = size_t(slots[e]);
      for (int64_t j = 0; j < pool.width; ++j) {
        const float got = sums[e * size_t(pool.width) + size_t(j)];
        const float rounded = to_float(s[e * size_t(pool.width + 1) + size_t(j)]);
        if (j >= pool.ranks[slot]) {
          CHECK(got != got && rounded != rounded, "%s wrote past a rank", isa_name(isa));
          continue;
        }
        double want = 0.0, size = 0.0;
        for (int64_t c = 0; c < columns; ++c) {
          const double product = kept(e, c) * x.at(tokens[e], c) * pool.value(slot, j, c);
          want += product;
          size += std::fabs(product);
        }
        near("sums", got, want, (double(columns) + 3) * 0x1p-24 * size, int64_t(e), j);
        CHECK(std::fabs(rounded - got) <= one * std::fabs(got) + 0x1p-25, "%s: s is not the sum",
              isa_name(isa));
        CHECK(got == again[e * size_t(pool.width) + size_t(j)], "%s: threads make a difference",
              isa_name(isa));
      }
    }
  }

  void expand(bool overwrite) {
    for (size_t e = 0; e < size_t(kTokens); ++e)
      for (int64_t j = 0; j < pool.ranks[size_t(slots[e])]; ++j)
        sums[e * size_t(pool.width) + size_t(j)] = random.uniform();
    Rows<X> out(kTokens, columns, random);
    const Rows<X> before = out;
    if (overwrite)
      for (X& v : out.values) store(&v, kNan);
    CHECK(gather_table().expand(pass(pool.pages.data()), factor.data(), overwrite, out.view(),
                                pieces(3)),
          "out of memory");
    const double one = roundoff(type_of(X{}));
    for (size_t e = 0; e < size_t(kTokens); ++e) {
      const auto slot = size_t(slots[e]);
      for (int64_t c = 0; c < columns; ++c) {
        double want = 0.0, size = 0.0;
        for (int64_t j = 0; j < pool.ranks[slot]; ++j) {
          const double product = sums[e * size_t(pool.width) + size_t(j)] * factor[e] * kept(e, c) *
                                 pool.value(slot, j, c);
          want += product;
          size += std::fabs(product);
        }
        const double own = overwrite ? 0.0 : before.at(tokens[e], c);
        near("out", out.at(tokens[e], c), want + own,
             (one + double(pool.width) * 0x1p-24) * size + one * std::fabs(want + own) + 0x1p-25,
             tokens[e], c);
      }
    }
    for (int64_t i = 0; i + 1 < kTokens; ++i)
      for (int64_t c = columns; c < out.stride; ++c)
        CHECK(out.at(i, c) != out.at(i, c), "%s wrote between the rows", isa_name(isa));
  }

  void wgrad() {
    for (size_t e = 0; e < size_t(kTokens); ++e)
      for (int64_t j = 0; j < pool.ranks[size_t(slots[e])]; ++j)
        sums[e * size_t(pool.width) + size_t(j)] = random.uniform();
    std::vector<P> grad = nans<P>(int64_t(pool.pages.size()));
    CHECK(gather_table().wgrad(pass(grad.data()), x.view(), pieces(3)), "out of memory");
    const double one = roundoff(type_of(P{}));
    for (size_t slot = 0; slot < 3; ++slot)
      for (int64_t j = 0; j < int64_t(pool.table[slot].size()) * kPage; ++j)
        for (int64_t c = 0; c < columns; ++c) {
          double want = 0.0, size = 0.0;
          for (const int32_t e : entries[slot]) {
            if (j >= pool.ranks[slot]) continue;
            const double product = sums[size_t(e) * size_t(pool.width) + size_t(j)] *
                                   kept(size_t(e), c) * x.at(tokens[size_t(e)], c);
            want += product;
            size += std::fabs(product);
          }
          near("grad", to_float(grad[pool.at(slot, j) + size_t(c)]), want,
               (one + (kTokens + 3) * 0x1p-24) * size + one * std::fabs(want) + 0x1p-25, j, c);
        }
  }

  void run() {
    shrink();
    expand(false);
    expand(true);
    wgrad();
  }
};

void check_add(Isa isa) {
  Random random;
  Rows<BFloat16> out(5, 37, random);
  const Rows<BFloat16> before = out;
  std::vector<float> sums(5 * 37, 0.5f);
  const uint8_t touched[] = {1, 0, 1, 0, 0};
  store(&out.values[size_t(out.stride)], -0.0f);
  gather_table().add(sums.data(), touched, false, out.view(), pieces(2));
  CHECK(std::signbit(out.at(1, 0)), "%s: a row that nobody touched has changed", isa_name(isa));
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t c = 1; c < 37; ++c) {
      const double want = before.at(i, c) + (touched[i] ? 0.5 : 0.0);
      CHECK(out.at(i, c) == to_float(to_bfloat16(float(want))), "%s: add", isa_name(isa));
    }
}

}  // namespace

int main() {
  for (const Isa isa : usable_isas()) {
    set_for_testing(isa);
    check_add(isa);
    for (const int64_t columns : {1, 7, 31, 32, 33, 64, 65, 129, 600, 1100})
      for (const uint32_t threshold : {0u, 20000u}) {
        Check<float, float>(isa, columns, threshold).run();
        Check<Half, Half>(isa, columns, threshold).run();
        Check<BFloat16, BFloat16>(isa, columns, threshold).run();
        Check<BFloat16, float>(isa, columns, threshold).run();
      }
  }
  return 0;
}
