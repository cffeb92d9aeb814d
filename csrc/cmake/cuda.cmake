# lora_kernels_cuda: the CUDA kernels with their launchers on plain pointers. Needs nvcc, neither
# torch nor a GPU. The extension links it only where torch has CUDA. LK_CUDA_WHY_NOT: why there is no
# such target.
set(LK_CUDA_WHY_NOT "")
if(LORA_KERNELS_CUDA STREQUAL "OFF")
  set(LK_CUDA_WHY_NOT "the build was told LORA_KERNELS_CUDA=OFF")
else()
  # Where torch looks for it too, and with the compiler that the rest is built with.
  if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
    find_program(LK_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
      PATH_SUFFIXES bin NO_CACHE)
    if(LK_NVCC)
      set(ENV{CUDACXX} ${LK_NVCC})
    endif()
  endif()
  if(NOT DEFINED ENV{CUDAHOSTCXX})
    set(ENV{CUDAHOSTCXX} ${CMAKE_CXX_COMPILER})
  endif()
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # not found by an earlier run
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    if(DEFINED ENV{CUDACXX})
      set(LK_CUDA_WHY_NOT "$ENV{CUDACXX} did not compile a test with $ENV{CUDAHOSTCXX} (set CUDACXX and CUDAHOSTCXX to a pair that works)")
    else()
      set(LK_CUDA_WHY_NOT "nvcc was not found (put it on PATH or set CUDACXX)")
    endif()
  endif()
endif()

set(cuda_sources "")
foreach(family ${LK_CUDA_FAMILIES})
  if(EXISTS ${PROJECT_SOURCE_DIR}/csrc/cuda/${family}.cu)
    list(APPEND cuda_sources csrc/cuda/${family}.cu)
  endif()
endforeach()

if(NOT LK_CUDA_WHY_NOT)
  set(archs "${LORA_KERNELS_CUDA_ARCHS}")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${archs})
  endif()
  enable_language(CUDA)
  add_library(lora_kernels_cuda STATIC ${cuda_sources})
  set_target_properties(lora_kernels_cuda PROPERTIES
    CUDA_ARCHITECTURES "${archs}" CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Static)
  target_include_directories(lora_kernels_cuda PUBLIC csrc/include ${LK_GENERATED})
  target_compile_options(lora_kernels_cuda PRIVATE -Xcompiler=-Wall -Xptxas=-warn-spills
    --fmad=false)
elseif(LORA_KERNELS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "LORA_KERNELS_CUDA=ON, but ${LK_CUDA_WHY_NOT}")
endif()
