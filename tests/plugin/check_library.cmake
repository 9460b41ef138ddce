# Fails when the library of plugins exports more than its three functions, needs a library of NVIDIA's, or has a symbol
# of which a process may hold only one.
#
#   cmake -DNM=nm -DREADELF=readelf -DLIBRARY=libsparsekit_tensorrt.so -P check_library.cmake

execute_process(COMMAND ${NM} -D --defined-only --format=posix ${LIBRARY}
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX REPLACE " [^\n]*" "" names "${symbols}")
string(STRIP "${names}" names)
string(REPLACE "\n" ";" names "${names}")
list(SORT names)
if(NOT names STREQUAL "getCreators;setLoggerFinder;sparsekit_tensorrt_version")
  message(FATAL_ERROR "exported: ${names}")
endif()

execute_process(COMMAND ${READELF} -dW --dyn-syms ${LIBRARY} OUTPUT_VARIABLE dynamic COMMAND_ERROR_IS_FATAL ANY)
if(dynamic MATCHES "UNIQUE")
  message(FATAL_ERROR "a unique symbol")
endif()
string(REGEX MATCHALL "NEEDED[^\n]*\\[[^]]*\\]" needed "${dynamic}")
string(REGEX REPLACE "NEEDED[^;]*\\[([^]]*)\\]" "\\1" needed "${needed}")
foreach(library IN LISTS needed)
  if(NOT library MATCHES "^(libstdc\\+\\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux[-a-z0-9_]*)\\.so")
    message(FATAL_ERROR "needs ${library}")
  endif()
endforeach()
message(STATUS "exports ${names}; needs ${needed}")
