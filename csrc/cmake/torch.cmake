# _C: the Python extension lora_kernels._C, where Python_EXECUTABLE has torch. Only headers of the
# stable ABI are used, so one build serves every torch from TORCH_TARGET_VERSION on.
set(LK_TORCH_FOUND OFF)
if(LORA_KERNELS_TORCH STREQUAL "OFF")
  return()
endif()
find_package(Python 3.10 COMPONENTS Interpreter Development.Module QUIET)
if(Python_Development.Module_FOUND)
  # Located, not imported: importing torch takes seconds, and a CUDA torch needs more than its wheel.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "
import importlib.util as u, pathlib, re, sys
torch = u.find_spec('torch')
root = pathlib.Path(sys.argv[1] or torch.submodule_search_locations[0])
pybind = u.find_spec('pybind11')
include = pathlib.Path(pybind.submodule_search_locations[0] if pybind else root) / 'include'
text = (root / 'version.py').read_text()
cuda = re.search(r'^cuda\\b.*= [\"\\'](.+?)[\"\\']', text, re.M)
version = re.search(r'__version__ = [\"\\'](.+?)[\"\\']', text)[1]
print(root, version, cuda[1] if cuda else 'none', include, sep=';', end='')
" "${LORA_KERNELS_TORCH_ROOT}"
    OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)
    list(GET found 0 LK_TORCH_ROOT)
    list(GET found 1 LK_TORCH_VERSION)
    list(GET found 2 LK_TORCH_CUDA_VERSION)
    list(GET found 3 LK_PYBIND_INCLUDE)
    if(LK_TORCH_VERSION VERSION_GREATER_EQUAL 2.10)
      set(LK_TORCH_FOUND ON)
    else()
      message(STATUS "lora_kernels: torch ${LK_TORCH_VERSION} is older than 2.10")
    endif()
  endif()
endif()
if(NOT LK_TORCH_FOUND)
  if(LORA_KERNELS_TORCH STREQUAL "ON")
    message(FATAL_ERROR "LORA_KERNELS_TORCH=ON, but ${Python_EXECUTABLE} has no torch >= 2.10 or "
      "no development headers (Python.h)")
  endif()
  message(STATUS "lora_kernels: no torch >= 2.10 and Python.h for ${Python_EXECUTABLE}: "
    "lora_kernels._C is not built")
  return()
endif()

# Why _C has no CUDA kernels; empty where it has.
set(without_cuda "")
if(LORA_KERNELS_WITHOUT_CUDA)
  set(without_cuda "${LORA_KERNELS_WITHOUT_CUDA}")
elseif(NOT EXISTS ${LK_TORCH_ROOT}/lib/libtorch_cuda.so)
  set(without_cuda "torch ${LK_TORCH_VERSION} is not built for CUDA")
elseif(NOT TARGET lora_kernels_cuda)
  set(without_cuda "${LK_CUDA_WHY_NOT}")
else()
  # Any CUDA runtime works beside torch's, being linked statically, but one of a newer major version
  # asks for a newer driver than torch does.
  string(REGEX MATCH "^[0-9]+" torch_major ${LK_TORCH_CUDA_VERSION})
  string(REGEX MATCH "^[0-9]+" nvcc_major ${CMAKE_CUDA_COMPILER_VERSION})
  if(nvcc_major GREATER torch_major AND NOT LORA_KERNELS_CUDA_NEWER_THAN_TORCH)
    set(without_cuda "nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}, torch ${LK_TORCH_VERSION} of CUDA ${LK_TORCH_CUDA_VERSION}: its kernels would need a newer driver than torch does. Set CUDACXX to an nvcc of CUDA ${torch_major}, or install a torch for CUDA ${nvcc_major}, or pass -DLORA_KERNELS_CUDA_NEWER_THAN_TORCH=ON where the driver is of CUDA ${nvcc_major}")
  endif()
endif()
if(without_cuda AND LORA_KERNELS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "LORA_KERNELS_CUDA=ON, but ${without_cuda}")
endif()

set(binding_sources csrc/bindings/module.cpp csrc/bindings/common.cpp)
foreach(family ${LK_BINDINGS})
  if(EXISTS ${PROJECT_SOURCE_DIR}/csrc/bindings/${family}.cpp)
    list(APPEND binding_sources csrc/bindings/${family}.cpp)
  endif()
endforeach()
if(NOT without_cuda)
  foreach(family ${LK_CUDA_FAMILIES})
    if(EXISTS ${PROJECT_SOURCE_DIR}/csrc/bindings/${family}_cuda.cpp)
      list(APPEND binding_sources csrc/bindings/${family}_cuda.cpp)
    endif()
  endforeach()
endif()

Python_add_library(_C MODULE WITH_SOABI ${binding_sources})
target_include_directories(_C PRIVATE csrc)
# pybind11 first: torch brings another, which serves where there is none (and refuses
# TORCH_TARGET_VERSION since 2.11).
target_include_directories(_C SYSTEM PRIVATE ${LK_PYBIND_INCLUDE} ${LK_TORCH_ROOT}/include)
target_compile_definitions(_C PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)  # 2.10
# The one file with pybind11 calls nothing of torch.
set_source_files_properties(csrc/bindings/module.cpp PROPERTIES COMPILE_OPTIONS
  -UTORCH_TARGET_VERSION)
target_link_libraries(_C PRIVATE lora_kernels_cpu)
find_library(LK_TORCH_CPU torch_cpu PATHS ${LK_TORCH_ROOT}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
target_link_libraries(_C PRIVATE ${LK_TORCH_CPU})
set(cuda_archs "")
set(cuda_version "")
if(NOT without_cuda)
  # The toolkit of nvcc itself. Its runtime is linked statically, so that _C loads wherever torch
  # does; torch's headers and ours need its headers.
  find_package(CUDAToolkit REQUIRED)
  find_library(LK_TORCH_CUDA torch_cuda PATHS ${LK_TORCH_ROOT}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
  target_compile_definitions(_C PRIVATE USE_CUDA)
  target_link_libraries(_C PRIVATE lora_kernels_cuda ${LK_TORCH_CUDA} CUDA::cudart_static)
  set(cuda_archs "${LK_CUDA_ARCHS}")
  set(cuda_version "${CMAKE_CUDA_COMPILER_VERSION}")
endif()

# What build_info() says: a header, as semicolons and quotes would split a compile definition.
string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
set(cxx_flags "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}")
configure_file(csrc/bindings/build_facts.h.in ${LK_GENERATED}/lora_kernels/build_facts.h @ONLY)
# torch is in the process before _C is imported, so its libraries are found without a path.
set_target_properties(_C PROPERTIES SKIP_BUILD_RPATH ON INTERPROCEDURAL_OPTIMIZATION OFF)
message(STATUS "lora_kernels: _C for torch ${LK_TORCH_VERSION}, CUDA kernels: ${cuda_archs}${without_cuda}")
