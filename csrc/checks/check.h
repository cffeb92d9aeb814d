// A check that fails prints where and stops the program with status 1.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "lora_kernels/isa.h"

#define CHECK(condition, ...)                                                        \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: failed: %s\n  ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                             \
      std::fprintf(stderr, "\n");                                                    \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)

inline std::vector<lora_kernels::Isa> usable_isas() {
  std::vector<lora_kernels::Isa> isas;
  for (int i = 0; i < lora_kernels::kIsaCount; ++i) {
    const auto isa = static_cast<lora_kernels::Isa>(i);
    if (lora_kernels::isa_usable(isa)) isas.push_back(isa);
  }
  return isas;
}

// xorshift64*, the same numbers everywhere.
struct Random {
  uint64_t state = 0x9E3779B97F4A7C15u;
  uint32_t next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>((state * 0x2545F4914F6CDD1Du) >> 32);
  }
  float uniform() { return float(next() >> 8) * 0x1p-23f - 1.0f; }  // [-1, 1)
};
