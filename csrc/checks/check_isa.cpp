// Detection and choice of the instruction-set tier.
#include <cstring>

#include "check.h"

using namespace lora_kernels;

int main() {
  CHECK(isa_usable(Isa::scalar), "scalar must always run");
  CHECK(isa_usable(detect()), "%s", isa_name(detect()));
  CHECK(current() == detect(), "%s is used, %s is best", isa_name(current()), isa_name(detect()));
  for (int i = static_cast<int>(detect()) + 1; i < kIsaCount; ++i)
    CHECK(!isa_usable(static_cast<Isa>(i)), "a better tier is usable");

  for (int i = 0; i < kIsaCount; ++i) {
    const auto isa = static_cast<Isa>(i);
    Isa parsed;
    CHECK(parse_isa(isa_name(isa), &parsed) && parsed == isa, "%s", isa_name(isa));
    CHECK(set_for_testing(isa) == isa_usable(isa), "%s", isa_name(isa));
    if (isa_usable(isa)) CHECK(current() == isa, "%s", isa_name(isa));
  }
  Isa parsed;
  CHECK(!parse_isa("avx1024", &parsed), "parsed a tier that does not exist");

#if defined(__x86_64__)
  // The compiler's own detection knows nothing of our cpuid reading.
  __builtin_cpu_init();
  CHECK(isa_supported(Isa::avx2) ==
            (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")),
        "avx2");
  CHECK(isa_supported(Isa::avx512) ==
            (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             isa_supported(Isa::avx2)),
        "avx512");
  CHECK(isa_supported(Isa::avx512_bf16) ==
            (isa_supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16")),
        "avx512_bf16");
  CHECK(!isa_supported(Isa::amx) || isa_supported(Isa::avx512_bf16), "amx without avx512_bf16");
#endif
  for (const Isa isa : usable_isas()) std::printf("%s ", isa_name(isa));
  std::printf("usable\n");
  return 0;
}
