// Every tier of the NF4/FP4 kernels against the scalar tier, bit for bit, and the scalar tier
// against the format's definition.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>

#include "check.h"
#include "lora_kernels/nf4.h"

using namespace lora_kernels;

namespace {

constexpr size_t kSize[kDtypes] = {4, 2, 2};
constexpr uint8_t kGuard = 0xa5;

void store_as(Dtype dtype, uint8_t* data, int64_t i, float value) {
  switch (dtype) {
    case Dtype::f32:
      return store(reinterpret_cast<float*>(data) + i, value);
    case Dtype::f16:
      return store(reinterpret_cast<Half*>(data) + i, value);
    case Dtype::bf16:
      return store(reinterpret_cast<BFloat16*>(data) + i, value);
  }
}

float load_as(Dtype dtype, const uint8_t* data, int64_t i) {
  switch (dtype) {
    case Dtype::f16:
      return to_float(reinterpret_cast<const Half*>(data)[i]);
    case Dtype::bf16:
      return to_float(reinterpret_cast<const BFloat16*>(data)[i]);
    default:
      return reinterpret_cast<const float*>(data)[i];
  }
}

// Four pieces in reverse order, on threads.
void run_threads(int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) {
  std::vector<std::thread> threads;
  const int64_t piece = (end - begin + 3) / 4;
  for (int64_t b = begin + 3 * piece; b >= begin; b -= piece)
    if (b < end) threads.emplace_back(body, b, b + piece < end ? b + piece : end, context);
  for (std::thread& t : threads) t.join();
}
const Parallel kThreads{4, run_threads};

struct Quantised {
  std::vector<uint8_t> packed;
  std::vector<float> absmax;
  int64_t bad;
};

Quantised quantize(Isa isa, const std::vector<uint8_t>& x, Dtype dtype, int64_t n, int64_t block,
                   int type, const Parallel& parallel) {
  set_for_testing(isa);
  Quantised q{std::vector<uint8_t>((n + 1) / 2 + 1, kGuard),
              std::vector<float>((n + block - 1) / block + 1, -7.0f), 0};
  q.bad = nf4_table().quantize[static_cast<int>(dtype)](x.data(), n, block, type, q.packed.data(),
                                                        q.absmax.data(), parallel);
  CHECK(q.packed.back() == kGuard && q.absmax.back() == -7.0f, "%s wrote past the end",
        isa_name(isa));
  return q;
}

// Also past the caches, with the same result.
std::vector<uint8_t> dequantize(Isa isa, const QuantView& q, Dtype dtype,
                                const Parallel& parallel) {
  set_for_testing(isa);
  const size_t bytes = q.n * kSize[static_cast<int>(dtype)];
  std::vector<uint8_t> out(bytes + 1, kGuard), room(bytes + 65, kGuard);
  uint8_t* aligned = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
  const auto kernel = nf4_table().dequantize[static_cast<int>(dtype)];
  kernel(q, out.data(), false, parallel);
  kernel(q, aligned, true, parallel);
  CHECK(out.back() == kGuard && aligned[bytes] == kGuard, "%s wrote past the end", isa_name(isa));
  CHECK(std::memcmp(out.data(), aligned, bytes) == 0, "%s past the caches", isa_name(isa));
  return out;
}

// The nearest table value of x / absmax, by search; ties go down, as the format says.
int nearest_code(float scaled, int type) {
  int rank = 0;
  while (rank < 15 && scaled > code_threshold(type, rank)) ++rank;
  return kCodeOrder[type][rank];
}

void check_definition(const std::vector<uint8_t>& x, Dtype dtype, int64_t n, int64_t block,
                      int type, const Quantised& q) {
  for (int64_t b = 0; b * block < n; ++b) {
    const int64_t end = (b + 1) * block < n ? (b + 1) * block : n;
    float absmax = 0;
    for (int64_t i = b * block; i < end; ++i)
      absmax = std::fmax(absmax, std::fabs(load_as(dtype, x.data(), i)));
    CHECK(q.absmax[b] == absmax, "block %ld: absmax %g, expected %g", long(b), q.absmax[b], absmax);
    const float inverse = 1.0f / std::fmax(absmax, kMinAbsmax);
    for (int64_t i = b * block; i < end; ++i) {
      const int got = (i & 1) ? q.packed[i / 2] & 15 : q.packed[i / 2] >> 4;
      const int expected = nearest_code(load_as(dtype, x.data(), i) * inverse, type);
      CHECK(got == expected, "element %ld: code %d, expected %d", long(i), got, expected);
    }
  }
  if (n & 1) CHECK((q.packed[n / 2] & 15) == nearest_code(0.0f, type), "pad nibble");
}

void check_round_trip(Dtype dtype, int64_t n, int64_t block, int type, Random& random) {
  std::vector<uint8_t> x(n * kSize[static_cast<int>(dtype)]);
  for (int64_t i = 0; i < n; ++i) {
    float v = random.uniform();
    if (i / block == 1) v = 0.0f;           // a block of zeros
    if (i / block == 2) v *= 0x1p-130f;     // a subnormal absmax
    if (i / block == 3) v = i % 3 ? v : 1;  // many exact thresholds and ends
    store_as(dtype, x.data(), i, v);
  }
  const Quantised expected = quantize(Isa::scalar, x, dtype, n, block, type, serial());
  CHECK(expected.bad == -1, "element %ld is finite", long(expected.bad));
  check_definition(x, dtype, n, block, type, expected);

  const int64_t blocks = (n + block - 1) / block;
  std::vector<uint8_t> absmax8(blocks);
  for (uint8_t& a : absmax8) a = static_cast<uint8_t>(random.next());
  std::vector<float> map(256), nested_absmax(blocks / 4 + 1);
  for (float& f : map) f = random.uniform();
  for (float& f : nested_absmax) f = random.uniform() * 1e-4f;
  // Scales whose product with +-1 is halfway between two bfloat16 or two fp16 numbers.
  std::vector<float> scales(blocks);
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t bits = float_bits(random.uniform());
    scales[b] = bits_float(b % 2 ? (bits & 0xffff0000u) | 0x8000u : (bits & 0xffffe000u) | 0x1000u);
  }
  const QuantView plain{
      expected.packed.data(), scales.data(), nullptr, nullptr, nullptr, 0.0f, n, block, 0, type};
  const QuantView nested{expected.packed.data(),
                         nullptr,
                         absmax8.data(),
                         nested_absmax.data(),
                         map.data(),
                         0.01f,
                         n,
                         block,
                         4,
                         type};

  for (const QuantView& view : {plain, nested}) {
    const auto reference = dequantize(Isa::scalar, view, dtype, serial());
    for (int64_t i = 0; i < n; ++i) {
      uint8_t value[4];
      store_as(dtype, value, 0, kCodeTable[type][view.code(i)] * view.block_scale(i / block));
      const size_t size = kSize[static_cast<int>(dtype)];
      CHECK(std::memcmp(value, reference.data() + i * size, size) == 0, "element %ld", long(i));
    }
    for (const Isa isa : usable_isas()) {
      CHECK(dequantize(isa, view, dtype, serial()) == reference, "%s dequantises otherwise",
            isa_name(isa));
      CHECK(dequantize(isa, view, dtype, kThreads) == reference, "%s depends on threads",
            isa_name(isa));
    }
  }
  for (const Isa isa : usable_isas()) {
    for (const Parallel& parallel : {serial(), kThreads}) {
      const Quantised got = quantize(isa, x, dtype, n, block, type, parallel);
      CHECK(got.packed == expected.packed && got.absmax == expected.absmax,
            "%s quantises otherwise: dtype %d, n = %ld, block = %ld, type %d", isa_name(isa),
            static_cast<int>(dtype), long(n), long(block), type);
    }
  }
  if (n < 3) return;
  // The lowest of several bad elements is named, whichever thread meets one first.
  const int64_t bad = n / 3;
  store_as(dtype, x.data(), n - 1, std::numeric_limits<float>::infinity());
  store_as(dtype, x.data(), bad, std::numeric_limits<float>::quiet_NaN());
  for (const Isa isa : usable_isas())
    for (const Parallel& parallel : {serial(), kThreads})
      CHECK(quantize(isa, x, dtype, n, block, type, parallel).bad == bad, "%s", isa_name(isa));
}

// Scales that some paths would round in another way: subnormal products, infinities and NaN, among
// ordinary ones.
void check_special_scales(Dtype dtype, int64_t block, int type, Random& random) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kSpecial[] = {0.0f,      -0.0f,         0x1p-149f, 0x1.8p-133f, 0x1p-126f,
                                0x1p-119f, -0x1.fep-119f, 0x1p-110f, 0x1p-111f,   0x1.fffffep127f,
                                kInfinity, -kInfinity,    kNan,      -kNan};
  constexpr int64_t kBlocks = 301;  // an odd number, and more than are taken at a time
  const int64_t n = kBlocks * block - 3;
  std::vector<uint8_t> packed((n + 1) / 2);
  for (int64_t i = 0; i < int64_t(packed.size()); ++i)
    packed[i] = static_cast<uint8_t>(i < 8 * block ? 17 * i + i / 16 : random.next());

  const size_t size = kSize[static_cast<int>(dtype)];
  std::vector<float> scales(kBlocks);
  const auto check = [&](const char* what) {
    const QuantView view{packed.data(), scales.data(), nullptr, nullptr, nullptr, 0.0f, n, block, 0,
                         type};
    std::vector<uint8_t> expected(n * size + 1, kGuard);
    for (int64_t i = 0; i < n; ++i) {
      const volatile float code = kCodeTable[type][view.code(i)];
      store_as(dtype, expected.data(), i, code * scales[i / block]);
    }
    for (const Isa isa : usable_isas())
      for (const Parallel& parallel : {serial(), kThreads})
        CHECK(dequantize(isa, view, dtype, parallel) == expected,
              "%s, %s: dtype %d, block = %ld, type %d", isa_name(isa), what,
              static_cast<int>(dtype), long(block), type);
  };

  for (float& s : scales) s = random.uniform();
  check("plain scales");
  for (const float special : kSpecial) {
    const int64_t at = int64_t(random.next() % uint64_t(kBlocks));
    const float before = scales[at];
    scales[at] = special;
    check("one special scale");
    scales[at] = before;
  }
  for (float& s : scales) s = bits_float(uint32_t(random.next()));
  check("scales of any bits");
  for (float& s : scales) s = bits_float(uint32_t(random.next()) & 0x88ffffffu);
  check("small scales");
}

// Conversions against their definition, over every 16-bit pattern and the halfway points between.
void check_conversions() {
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const Half h{static_cast<uint16_t>(i)};
    const BFloat16 b{static_cast<uint16_t>(i)};
    const float f = to_float(h), g = to_float(b);
    if (f == f) CHECK(to_half(f).bits == i, "half %04x", i);
    if (g == g) CHECK(to_bfloat16(g).bits == i, "bfloat16 %04x", i);
    if (f != f || g != g || (i & 0x7fff) >= 0x7bff) continue;
    const uint32_t even = i + (i & 1);
    const float middle = (f + to_float(Half{static_cast<uint16_t>(i + 1)})) / 2;
    CHECK(to_half(middle).bits == even, "half above %04x", i);
    if ((i & 0x7fff) < 0x80) continue;  // the middle of bfloat16 subnormals is not a float
    const float middle_b = g + (to_float(BFloat16{static_cast<uint16_t>(i + 1)}) - g) / 2;
    CHECK(to_bfloat16(middle_b).bits == even, "bfloat16 above %04x", i);
  }
  CHECK(to_half(65519.996f).bits == 0x7bff && to_half(65520.0f).bits == 0x7c00, "largest half");
  CHECK(to_half(0x1p-25f).bits == 0 && to_half(0x1.8p-25f).bits == 1, "smallest half");
}

}  // namespace

int main() {
  check_conversions();
  Random random;
  for (const Dtype dtype : {Dtype::f32, Dtype::f16, Dtype::bf16}) {
    for (const int type : {kNf4, kFp4}) {
      for (const int64_t block : {32, 64, 256, 4096}) {
        for (const int64_t n : {int64_t(0), int64_t(1), int64_t(31), int64_t(33), block - 1, block,
                                block + 1, 5 * block, 9 * block + 17, int64_t(4100)})
          check_round_trip(dtype, n, block, type, random);
      }
      for (const int64_t block : {32, 64, 128}) check_special_scales(dtype, block, type, random);
    }
  }
  return 0;
}
