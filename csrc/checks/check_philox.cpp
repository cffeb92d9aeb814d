// Philox against the known answers of Random123, and every tier's mask against the definition.
#include <cstdint>

#include "check.h"
#include "lora_kernels/dropout.h"

using namespace lora_kernels;

namespace {

void check_known_answer(PhiloxBlock counter, uint32_t key0, uint32_t key1, PhiloxBlock expected) {
  const PhiloxBlock got = philox4x32(counter, key0, key1, 10);
  for (int i = 0; i < 4; ++i)
    CHECK(got.word[i] == expected.word[i], "word %d: %08x, expected %08x", i, got.word[i],
          expected.word[i]);
}

}  // namespace

int main() {
  check_known_answer({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
  check_known_answer({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u,
                     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
  check_known_answer({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0,
                     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});

  CHECK(dropout_threshold(0.0) == 0 && dropout_threshold(1.0) == 65536, "ends");
  CHECK(dropout_threshold(0.5 / 65536) == 0 && dropout_threshold(1.5 / 65536) == 2, "ties to even");

  const uint64_t seed = 0xfedcba9876543210u;
  const int64_t shapes[][2] = {{1, 1},  {3, 8},    {5, 63}, {2, 64},
                               {4, 65}, {3, 1000}, {0, 7},  {7, 0}};
  for (const double p : {0.0, 0.05, 0.5, 0.9999, 1.0}) {
    for (const auto& shape : shapes) {
      const int64_t rows = shape[0], cols = shape[1];
      const Dropout d{seed, 2, dropout_threshold(p)};
      for (const Isa isa : usable_isas()) {
        set_for_testing(isa);
        std::vector<uint8_t> keep(rows * cols + 1, 0xa5);
        dropout_table().mask(d, rows, cols, keep.data(), serial());
        CHECK(keep.back() == 0xa5, "%s wrote past the end", isa_name(isa));
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t k = 0; k < cols; ++k) {
            const PhiloxBlock r = philox4x32({{uint32_t(k / 8), uint32_t(m), 2, 0}}, uint32_t(seed),
                                             uint32_t(seed >> 32), 7);
            const uint32_t half = (r.word[k % 8 / 2] >> (16 * (k % 2))) & 0xffff;
            CHECK(keep[m * cols + k] == (half >= d.threshold), "%s, p = %g, element %ld, %ld",
                  isa_name(isa), p, long(m), long(k));
          }
        }
      }
    }
  }
  return 0;
}
