# Options, compiler defaults, and the facts `sparsekit doctor` reports about the build.

set(built_by_pip OFF)
if(SKBUILD)
  set(built_by_pip ON)
endif()
option(SPARSEKIT_BUILD_PYTHON "Build the Python module _C" ${built_by_pip})
option(SPARSEKIT_BUILD_TESTS "Build the C++ tests" OFF)
option(SPARSEKIT_WERROR "Treat warnings as errors" OFF)
set(SPARSEKIT_CUDA AUTO CACHE STRING "CUDA kernels: AUTO, ON or OFF")
set(SPARSEKIT_TENSORRT OFF CACHE STRING "TensorRT plugins: AUTO, ON or OFF")
set(SPARSEKIT_SANITIZE "" CACHE STRING "Sanitizers of the C++ tests: address, undefined, thread (;-list)")

foreach(part CUDA TENSORRT)
  set(value ${SPARSEKIT_${part}})
  set_property(CACHE SPARSEKIT_${part} PROPERTY STRINGS AUTO ON OFF)
  if(NOT value MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "SPARSEKIT_${part} is '${value}'; expected AUTO, ON or OFF.")
  endif()
  if(value STREQUAL "ON")
    message(FATAL_ERROR "SPARSEKIT_${part}=ON: version ${PROJECT_VERSION} has CPU kernels only and no "
                        "${part} sources to build; use AUTO or OFF.")
  endif()
  message(STATUS "sparsekit: ${part} ${value}: not part of version ${PROJECT_VERSION}, building for the CPU only")
endforeach()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

add_compile_options(-Wall -Wextra)
if(SPARSEKIT_WERROR)
  add_compile_options(-Werror)
endif()
if(SPARSEKIT_SANITIZE)
  list(JOIN SPARSEKIT_SANITIZE "," sanitizers)
  add_compile_options(-fsanitize=${sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  add_link_options(-fsanitize=${sanitizers})
endif()

set(SPARSEKIT_BUILD_INFO
    SPARSEKIT_VERSION="${PROJECT_VERSION}"
    SPARSEKIT_COMPILER="${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
    SPARSEKIT_BUILD_TYPE="${CMAKE_BUILD_TYPE}"
    SPARSEKIT_BUILD_OPTIONS="cuda=off tensorrt=off")
