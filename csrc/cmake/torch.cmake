# _C: the Python extension lora_kernels._C, where Python_EXECUTABLE has torch. Only headers of the
# stable ABI are used, so one build serves every torch from TORCH_TARGET_VERSION on.
set(LK_TORCH_FOUND OFF)
if(NOT LORA_KERNELS_TORCH STREQUAL "OFF")
  find_package(Python 3.10 COMPONENTS Interpreter Development.Module QUIET)
  if(Python_Development.Module_FOUND)
    # Located, not imported: importing torch takes seconds.
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "
import importlib.util as u, pathlib, re
torch = u.find_spec('torch')
root = pathlib.Path(torch.submodule_search_locations[0]) if torch else None
pybind = u.find_spec('pybind11')
include = (pathlib.Path(pybind.submodule_search_locations[0]) if pybind else root) / 'include'
version = re.search(r'__version__ = [\"\\'](.+?)[\"\\']', (root / 'version.py').read_text())[1]
print(root, version, include, sep=';', end='')
"
      OUTPUT_VARIABLE found RESULT_VARIABLE failed ERROR_QUIET)
    if(NOT failed)
      list(GET found 0 LK_TORCH_ROOT)
      list(GET found 1 LK_TORCH_VERSION)
      list(GET found 2 LK_PYBIND_INCLUDE)
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
else()
  return()
endif()

set(binding_sources csrc/bindings/module.cpp csrc/bindings/common.cpp)
foreach(family ${LK_BINDINGS})
  if(EXISTS ${PROJECT_SOURCE_DIR}/csrc/bindings/${family}.cpp)
    list(APPEND binding_sources csrc/bindings/${family}.cpp)
  endif()
endforeach()
set(with_cuda OFF)
if(TARGET lora_kernels_cuda AND EXISTS ${LK_TORCH_ROOT}/lib/libtorch_cuda.so)
  set(with_cuda ON)
  foreach(family ${LK_CUDA_FAMILIES})
    if(EXISTS ${PROJECT_SOURCE_DIR}/csrc/bindings/${family}_cuda.cpp)
      list(APPEND binding_sources csrc/bindings/${family}_cuda.cpp)
    endif()
  endforeach()
endif()

Python_add_library(_C MODULE WITH_SOABI ${binding_sources})
target_include_directories(_C PRIVATE csrc)
target_include_directories(_C SYSTEM PRIVATE ${LK_TORCH_ROOT}/include ${LK_PYBIND_INCLUDE})
string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
target_compile_definitions(_C PRIVATE
  TORCH_TARGET_VERSION=0x020a000000000000  # 2.10
  LK_BUILD_TORCH="${LK_TORCH_VERSION}"
  LK_BUILD_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
  LK_BUILD_FLAGS="${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}")
target_link_libraries(_C PRIVATE lora_kernels_cpu)
find_library(LK_TORCH_CPU torch_cpu PATHS ${LK_TORCH_ROOT}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
target_link_libraries(_C PRIVATE ${LK_TORCH_CPU})
if(with_cuda)
  find_library(LK_TORCH_CUDA torch_cuda PATHS ${LK_TORCH_ROOT}/lib NO_DEFAULT_PATH NO_CACHE REQUIRED)
  target_compile_definitions(_C PRIVATE USE_CUDA LK_BUILD_CUDA_ARCHS="${LORA_KERNELS_CUDA_ARCHS}")
  target_link_libraries(_C PRIVATE lora_kernels_cuda ${LK_TORCH_CUDA})
endif()
# torch is in the process before _C is imported, so its libraries are found without a path.
set_target_properties(_C PROPERTIES SKIP_BUILD_RPATH ON INTERPROCEDURAL_OPTIMIZATION OFF)
