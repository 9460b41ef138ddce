# Instruction sets are a property of a file, given by its name: `*_avx2.cc` is compiled with AVX2, and
# so on; every other file is compiled for the baseline, so that the library starts on any machine and
# chooses at run time. For each set that is built, SK_HAVE_<SET> guards the lines of kernels.inc.

include(CheckCXXCompilerFlag)

set(SPARSEKIT_FLAGS_AVX2 -mavx2 -mfma -mf16c -mbmi2)
set(SPARSEKIT_FLAGS_AVX512 ${SPARSEKIT_FLAGS_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512)
# GCC 12 and 13 warn about their own header.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND SPARSEKIT_FLAGS_AVX512 -Wno-maybe-uninitialized -Wno-uninitialized)
endif()
set(SPARSEKIT_FLAGS_AVX512BF16 ${SPARSEKIT_FLAGS_AVX512} -mavx512bf16)

# NEON belongs to the baseline of aarch64. GCC's first scheduling pass moves loads up until sums are
# spilled from the inner loops; these CPUs reorder by themselves.
set(SPARSEKIT_FLAGS_NEON "")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(SPARSEKIT_FLAGS_NEON -fno-schedule-insns)
endif()
set(SPARSEKIT_FLAGS_NEON_BF16 ${SPARSEKIT_FLAGS_NEON} -march=armv8.2-a+bf16)

if(CMAKE_OSX_ARCHITECTURES MATCHES "arm64" OR CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(SPARSEKIT_ISA_KNOWN NEON NEON_BF16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(SPARSEKIT_ISA_KNOWN AVX2 AVX512 AVX512BF16)
endif()
set(SPARSEKIT_ISA_DEFINITIONS "")
set(SPARSEKIT_ISA_BUILT "")
foreach(isa IN LISTS SPARSEKIT_ISA_KNOWN)
  list(JOIN SPARSEKIT_FLAGS_${isa} " " flags)
  set(CMAKE_REQUIRED_FLAGS "${flags}")
  check_cxx_compiler_flag("-O2" SPARSEKIT_COMPILER_HAS_${isa})
  unset(CMAKE_REQUIRED_FLAGS)
  if(SPARSEKIT_COMPILER_HAS_${isa})
    list(APPEND SPARSEKIT_ISA_DEFINITIONS SK_HAVE_${isa}=1)
    list(APPEND SPARSEKIT_ISA_BUILT ${isa})
  endif()
endforeach()
message(STATUS "sparsekit: instruction sets besides the baseline: ${SPARSEKIT_ISA_BUILT}")

# Gives each *_<isa>.cc of the list its flags, and drops the files whose set is not built.
function(sparsekit_select_isa_sources list_name)
  set(kept "")
  foreach(source IN LISTS ${list_name})
    if(source MATCHES "_(avx2|avx512|avx512bf16|neon|neon_bf16)\\.cc$")
      string(TOUPPER ${CMAKE_MATCH_1} isa)
      if(NOT isa IN_LIST SPARSEKIT_ISA_BUILT)
        continue()
      endif()
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${SPARSEKIT_FLAGS_${isa}}")
    endif()
    list(APPEND kept ${source})
  endforeach()
  set(${list_name} "${kept}" PARENT_SCOPE)
endfunction()
