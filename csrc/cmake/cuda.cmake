# lora_kernels_cuda: the CUDA kernels with their launchers on plain pointers. Needs nvcc, neither
# torch nor a GPU. The extension links it only where torch has CUDA.
set(LK_CUDA_FOUND OFF)
if(NOT LORA_KERNELS_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(LK_CUDA_FOUND ON)
  elseif(LORA_KERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "LORA_KERNELS_CUDA=ON, but nvcc was not found: put it on PATH or set CUDACXX")
  endif()
endif()

set(cuda_sources "")
foreach(family ${LK_CUDA_FAMILIES})
  if(EXISTS ${PROJECT_SOURCE_DIR}/csrc/cuda/${family}.cu)
    list(APPEND cuda_sources csrc/cuda/${family}.cu)
  endif()
endforeach()

if(LK_CUDA_FOUND AND cuda_sources)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${LORA_KERNELS_CUDA_ARCHS})
  endif()
  enable_language(CUDA)
  add_library(lora_kernels_cuda STATIC ${cuda_sources})
  set_target_properties(lora_kernels_cuda PROPERTIES
    CUDA_ARCHITECTURES "${LORA_KERNELS_CUDA_ARCHS}" CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Static)
  target_include_directories(lora_kernels_cuda PUBLIC csrc/include ${LK_GENERATED})
  target_compile_options(lora_kernels_cuda PRIVATE -Xcompiler=-Wall -Xptxas=-warn-spills
    --fmad=false)
endif()
message(STATUS "lora_kernels: tiers ${LK_TIERS}; CUDA kernels: ${LK_CUDA_FOUND}")
