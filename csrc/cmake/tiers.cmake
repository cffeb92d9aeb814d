# LK_TIERS: the instruction-set tiers this compiler can build, and LK_FLAGS_<tier>. Which one runs is
# decided at run time (csrc/cpu/isa.cpp), so no flag here may follow the machine of the build.
include(CheckCXXCompilerFlag)

# The scalar tier is the plain baseline of the architecture.
set(LK_FLAGS_scalar "")
set(LK_FLAGS_neon "")
set(LK_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2)
set(LK_FLAGS_avx512 ${LK_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq
    -mprefer-vector-width=512)
set(LK_FLAGS_avx512_bf16 ${LK_FLAGS_avx512} -mavx512bf16)
# Every processor with AMX has these; asking for all keeps the tier one thing.
set(LK_FLAGS_amx ${LK_FLAGS_avx512_bf16} -mavx512vbmi -mavx512vbmi2 -mavx512fp16 -mamx-tile -mamx-bf16
    -mamx-int8)

set(LK_TIERS scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  foreach(tier avx2 avx512 avx512_bf16 amx)
    string(REPLACE ";" " " flags "${LK_FLAGS_${tier}}")
    check_cxx_compiler_flag("${flags}" LK_COMPILER_HAS_${tier})
    if(LK_COMPILER_HAS_${tier})
      list(APPEND LK_TIERS ${tier})
    endif()
  endforeach()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  list(APPEND LK_TIERS neon)
endif()
if(LORA_KERNELS_TIERS)
  foreach(tier ${LORA_KERNELS_TIERS})
    if(NOT tier IN_LIST LK_TIERS)
      message(FATAL_ERROR "LORA_KERNELS_TIERS: got ${tier}, expected some of ${LK_TIERS}")
    endif()
  endforeach()
  if(NOT scalar IN_LIST LORA_KERNELS_TIERS)
    message(FATAL_ERROR "LORA_KERNELS_TIERS: got ${LORA_KERNELS_TIERS}, expected scalar among them: it runs where no other does")
  endif()
  set(LK_TIERS ${LORA_KERNELS_TIERS})
endif()

set(LK_GENERATED ${CMAKE_CURRENT_BINARY_DIR}/generated)
set(tiers_list "")
foreach(tier ${LK_TIERS})
  string(APPEND tiers_list " X(${tier}, __VA_ARGS__)")
endforeach()
file(CONFIGURE OUTPUT ${LK_GENERATED}/lora_kernels/tiers.h
  CONTENT "#pragma once\n\n#define LK_FOR_EACH_TIER(X, ...)@tiers_list@\n" @ONLY)
