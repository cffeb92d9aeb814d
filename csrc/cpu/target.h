// What the tier being compiled may use. Kernel files keep everything but their table in an
// anonymous namespace: the linker keeps only one copy of a function with external linkage, which
// could be that of a tier that the running machine cannot execute. For the same reason kernels use
// no containers or algorithms of the standard library.
#pragma once

#if defined(LK_TIER_amx)
#define LK_AMX 1
#else
#define LK_AMX 0
#endif

#if LK_AMX || defined(LK_TIER_avx512_bf16)  // bf16 products, and bf16 tiles made of them
#define LK_BF16 1
#else
#define LK_BF16 0
#endif

#if LK_BF16 || defined(LK_TIER_avx512)
#define LK_AVX512 1
#else
#define LK_AVX512 0
#endif

#if LK_AVX512 || defined(LK_TIER_avx2)
#define LK_AVX2 1
#include <immintrin.h>
#else
#define LK_AVX2 0
#endif

#if defined(LK_TIER_neon)
#define LK_NEON 1
#include <arm_neon.h>
#else
#define LK_NEON 0
#endif
