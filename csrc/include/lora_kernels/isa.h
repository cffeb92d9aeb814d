// Instruction-set tiers of the CPU kernels, and the choice between them at run time.
//
// Every csrc/cpu/<family>.cpp is compiled once per tier; the table of functions it exports is
// picked by current(). A tier promises all the extensions listed with it in tier_features().
#pragma once

#include "lora_kernels/macros.h"
#include "lora_kernels/tiers.h"  // written by CMake: LK_FOR_EACH_TIER, the tiers in this build

namespace lora_kernels {

// In rising order of preference on one architecture.
enum class Isa : int { scalar = 0, neon, avx2, avx512, avx512_bf16, amx };
constexpr int kIsaCount = 6;

const char* isa_name(Isa isa);
// The extensions a tier needs, for messages: "avx2 fma f16c bmi2".
const char* tier_features(Isa isa);
bool parse_isa(const char* name, Isa* isa);

// Part of this build.
bool isa_compiled(Isa isa);
// Offered by the processor and enabled by the operating system. For amx this asks Linux for
// permission to use the tile registers, once per process.
bool isa_supported(Isa isa);
inline bool isa_usable(Isa isa) { return isa_compiled(isa) && isa_supported(isa); }

// The best usable tier of this machine.
Isa detect();
// The tier in use: detect(), or what a test set.
Isa current();
// Returns false and changes nothing if the tier is not usable. Not to be called while kernels run.
bool set_for_testing(Isa isa);

}  // namespace lora_kernels

// LK_DECLARE_FAMILY(Table, family), in include/lora_kernels/<family>.h, inside the namespace:
// declares the table of each tier and `const Table& <family>_kernels()`, the one in use.
#define LK_EXTERN_TABLE_(tier, Table, family) extern const Table family##_table_##tier;
#define LK_TABLE_CASE_(tier, Table, family) \
  case Isa::tier:                           \
    return family##_table_##tier;
#define LK_DECLARE_FAMILY(Table, family)              \
  LK_FOR_EACH_TIER(LK_EXTERN_TABLE_, Table, family)   \
  LK_INLINE const Table& family##_table() {           \
    switch (current()) {                              \
      LK_FOR_EACH_TIER(LK_TABLE_CASE_, Table, family) \
      default:                                        \
        return family##_table_scalar;                 \
    }                                                 \
  }

// LK_TABLE(Table, family) = {...}; at the end of csrc/cpu/<family>.cpp, inside the namespace.
// LK_TIER is the tier the file is being compiled for.
#define LK_CAT2_(a, b) a##b
#define LK_CAT_(a, b) LK_CAT2_(a, b)
#define LK_TABLE(Table, family) const Table LK_CAT_(family##_table_, LK_TIER)
