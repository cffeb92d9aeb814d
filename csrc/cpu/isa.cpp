#include "lora_kernels/isa.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lora_kernels {

namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "neon",        "avx2",
                                           "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
struct CpuFeatures {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
};

uint64_t enabled_register_state() {  // XCR0
  uint32_t eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return uint64_t(edx) << 32 | eax;
}

// Linux gives a process the 8 KiB of tile registers only on request (arch_prctl(2)).
bool request_tile_registers() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

CpuFeatures read_features() {
  const auto has = [](uint32_t word, uint32_t bits) { return (word & bits) == bits; };
  CpuFeatures f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  constexpr uint32_t kFma = 1u << 12, kOsxsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  if (!has(c, kFma | kOsxsave | kAvx | kF16c)) return f;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  uint32_t a1 = 0, b1, c1, d1;
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);

  const uint64_t state = enabled_register_state();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe0, kTiles = 0x60000;
  constexpr uint32_t kBmi1 = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8;
  f.avx2 = (state & kYmm) == kYmm && has(b, kBmi1 | kAvx2 | kBmi2);
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  f.avx512 = f.avx2 && (state & kZmm) == kZmm && has(b, kF | kDq | kBw | kVl);
  constexpr uint32_t kVbmi = 1u << 1, kVbmi2 = 1u << 6;  // ecx
  constexpr uint32_t kAmxBf16 = 1u << 22, kFp16 = 1u << 23, kTile = 1u << 24,
                     kInt8 = 1u << 25;       // edx
  constexpr uint32_t kAvx512Bf16 = 1u << 5;  // 7.1 eax
  f.avx512_bf16 = f.avx512 && has(a1, kAvx512Bf16);
  f.amx = f.avx512_bf16 && (state & kTiles) == kTiles && has(c, kVbmi | kVbmi2) &&
          has(d, kAmxBf16 | kFp16 | kTile | kInt8) && request_tile_registers();
  return f;
}

const CpuFeatures& features() {
  static const CpuFeatures f = read_features();
  return f;
}
#endif

std::atomic<int> chosen{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const char* tier_features(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "the architecture's baseline";
    case Isa::neon:
      return "neon";
    case Isa::avx2:
      return "avx2 fma f16c bmi1 bmi2";
    case Isa::avx512:
      return "avx2's, avx512f avx512bw avx512vl avx512dq";
    case Isa::avx512_bf16:
      return "avx512's, avx512_bf16";
    case Isa::amx:
      return "avx512_bf16's, avx512_vbmi avx512_vbmi2 avx512_fp16 amx_tile amx_bf16 amx_int8";
  }
  return "";
}

bool parse_isa(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

bool isa_compiled(Isa isa) {
#define LK_COMPILED_(tier, ...) \
  if (isa == Isa::tier) return true;
  LK_FOR_EACH_TIER(LK_COMPILED_, 0)
#undef LK_COMPILED_
  return false;
}

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
#if defined(__aarch64__)
    case Isa::neon:
      return true;
#endif
#if defined(__x86_64__)
    case Isa::avx2:
      return features().avx2;
    case Isa::avx512:
      return features().avx512;
    case Isa::avx512_bf16:
      return features().avx512_bf16;
    case Isa::amx:
      return features().amx;
#endif
    default:
      return false;
  }
}

Isa detect() {
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_usable(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::scalar;
}

Isa current() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(detect());
    int expected = -1;
    if (!chosen.compare_exchange_strong(expected, isa)) isa = expected;
  }
  return static_cast<Isa>(isa);
}

bool set_for_testing(Isa isa) {
  if (!isa_usable(isa)) return false;
  chosen.store(static_cast<int>(isa));
  return true;
}

}  // namespace lora_kernels
