# The CUDA kernels: whether they are built, and for which GPUs. Sets SPARSEKIT_HAVE_CUDA and
# SPARSEKIT_CUDA_CODE, e.g. "80 90a ptx80": machine code for 8.0 and 9.0a, PTX for 8.0.
#
# SPARSEKIT_CUDA_ARCHITECTURES is "all", "native" (the GPUs of this machine) or a list such as "80;90".

set(SPARSEKIT_CUDA_ARCHITECTURES all CACHE STRING "GPUs to compile for: all, native, or a list such as 80;90")
# "all": machine code runs on its own GPU and on later ones of the same major version, so 8.6 serves 8.9
# (ptxas makes the same instructions for both), 10.0 serves 10.3 and 12.0 serves 12.1. 9.0a runs on 9.0
# alone, which has no successor, and is what wgmma needs. Jetsons are Arm: only there are 8.7 (Orin) and
# 11.0 (Thor) in the list, and 8.9, which would otherwise be given the code of 8.7, not meant for it.
# Each architecture costs half a minute of one core and 0.3 MB of the library, see docs/building.md.
set(SPARSEKIT_CUDA_ALL 80 86 90a 100 120)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  set(SPARSEKIT_CUDA_ALL 80 86 87 89 90a 100 110 120)
endif()
set(SPARSEKIT_CUDA_MINIMUM 12.6)

set(SPARSEKIT_HAVE_CUDA OFF)
set(SPARSEKIT_CUDA_CODE "")
set(SPARSEKIT_CUDA_SUMMARY "cuda=off")

# Sets `reason` when there can be no CUDA kernels; empty when the language CUDA can be enabled.
function(sparsekit_find_cuda reason)
  set(${reason} "" PARENT_SCOPE)
  if(SPARSEKIT_CUDA STREQUAL "OFF")
    set(${reason} "SPARSEKIT_CUDA=OFF" PARENT_SCOPE)
  elseif(CMAKE_CROSSCOMPILING AND NOT CMAKE_CUDA_COMPILER)
    set(${reason} "a cross build takes its CUDA compiler from CMAKE_CUDA_COMPILER" PARENT_SCOPE)
  elseif(SPARSEKIT_SANITIZE)
    set(${reason} "not together with SPARSEKIT_SANITIZE" PARENT_SCOPE)
  else()
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(${reason} "no CUDA compiler that works; install nvcc ${SPARSEKIT_CUDA_MINIMUM} or later, or name it \
with CUDACXX=/path/to/nvcc" PARENT_SCOPE)
    endif()
  endif()
endfunction()

# The list of architectures, each one known to this nvcc.
function(sparsekit_cuda_architectures list)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9]+[a-z]?" known "${known}")
  set(wanted ${SPARSEKIT_CUDA_ARCHITECTURES})
  if(wanted STREQUAL "all")
    set(wanted "")
    foreach(architecture IN LISTS SPARSEKIT_CUDA_ALL)
      string(REGEX REPLACE "a$" "" number ${architecture})
      if(number IN_LIST known)
        list(APPEND wanted ${architecture})
      endif()
    endforeach()
  elseif(wanted STREQUAL "native")
    cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH bin)
    find_program(SPARSEKIT_DEVICE_QUERY __nvcc_device_query HINTS ${bin} ${CUDAToolkit_BIN_DIR} REQUIRED)
    execute_process(COMMAND ${SPARSEKIT_DEVICE_QUERY} OUTPUT_VARIABLE wanted RESULT_VARIABLE failed)
    string(REGEX MATCHALL "[0-9]+" wanted "${wanted}")
    list(REMOVE_DUPLICATES wanted)
    if(failed OR NOT wanted)
      message(FATAL_ERROR "SPARSEKIT_CUDA_ARCHITECTURES=native: this machine has no GPU; name one, such as 80.")
    endif()
  endif()
  foreach(architecture IN LISTS wanted)
    string(REGEX REPLACE "a$" "" number "${architecture}")
    if(NOT number IN_LIST known OR number LESS 80)
      list(JOIN known " " known)
      message(FATAL_ERROR "SPARSEKIT_CUDA_ARCHITECTURES has '${architecture}'; expected all, native, or a list of "
                          "80 and later that nvcc ${CMAKE_CUDA_COMPILER_VERSION} knows: ${known}")
    endif()
  endforeach()
  set(${list} ${wanted} PARENT_SCOPE)
endfunction()

sparsekit_find_cuda(reason)
if(NOT reason)
  # CMake 3.25 does not know the newest architectures: the flags below name them.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS SPARSEKIT_CUDA_MINIMUM)
    set(reason "${CMAKE_CUDA_COMPILER} is version ${CMAKE_CUDA_COMPILER_VERSION}, ${SPARSEKIT_CUDA_MINIMUM} or \
later is needed")
  endif()
endif()
if(reason AND SPARSEKIT_CUDA STREQUAL "ON")
  message(FATAL_ERROR "SPARSEKIT_CUDA=ON: ${reason}")
elseif(reason)
  message(STATUS "sparsekit: no CUDA kernels: ${reason}")
  return()
endif()

find_package(CUDAToolkit REQUIRED)
sparsekit_cuda_architectures(architectures)
set(SPARSEKIT_CUDA_FLAGS --threads=2 -Xcompiler=-Wall)
if(SPARSEKIT_WERROR)
  list(APPEND SPARSEKIT_CUDA_FLAGS --Werror=all-warnings)
endif()
# A quarter of the bytes; every driver for CUDA 13 can read it, those for CUDA 12.0 to 12.3 could not.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
  list(APPEND SPARSEKIT_CUDA_FLAGS --compress-mode=size)
endif()
# The oldest one is also kept as PTX, which the driver compiles for a GPU that has no machine code here: any
# later one. PTX of a newer one would serve fewer GPUs and say nothing more; "9.0a" makes none that others run.
set(oldest "")
foreach(architecture IN LISTS architectures)
  list(APPEND SPARSEKIT_CUDA_FLAGS -gencode=arch=compute_${architecture},code=sm_${architecture})
  if(architecture MATCHES "^[0-9]+$" AND (NOT oldest OR architecture LESS oldest))
    set(oldest ${architecture})
  endif()
endforeach()
list(JOIN architectures " " SPARSEKIT_CUDA_CODE)
if(oldest)
  list(APPEND SPARSEKIT_CUDA_FLAGS -gencode=arch=compute_${oldest},code=compute_${oldest})
  string(APPEND SPARSEKIT_CUDA_CODE " ptx${oldest}")
endif()

set(SPARSEKIT_HAVE_CUDA ON)
list(TRANSFORM architectures PREPEND "sm_" OUTPUT_VARIABLE names)
list(JOIN names " " names)
set(SPARSEKIT_CUDA_SUMMARY "cuda=${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR} ${names}")
message(STATUS "sparsekit: ${SPARSEKIT_CUDA_SUMMARY}")

# Adds the CUDA sources, and the runtime, inside the library: programs need no libcudart.so.
function(sparsekit_add_cuda target)
  file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
  target_sources(${target} PRIVATE ${sources})
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${SPARSEKIT_CUDA_FLAGS}>")
  target_compile_definitions(${target} PUBLIC SK_HAVE_CUDA=1 PRIVATE SPARSEKIT_CUDA_CODE="${SPARSEKIT_CUDA_CODE}")
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()
