# Fails when an object compiled for one instruction set offers the linker a weak symbol: an inline function
# or a template of a header. The linker keeps one copy of such a function for the whole program, and if it
# took this one, code that runs on every machine would contain instructions that some do not have.
#
#   cmake -DNM=nm "-DOBJECTS=a.o;b.o" -P check_isa_objects.cmake

set(bad "")
foreach(object IN LISTS OBJECTS)
  if(NOT object MATCHES "_(avx2|avx512|avx512bf16|neon|neon_bf16)\\.cc\\.o(bj)?$")
    continue()
  endif()
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* W [^\n]*" weak "${symbols}")
  if(weak)
    list(JOIN weak "\n  " weak)
    string(APPEND bad "${object}\n  ${weak}\n")
  endif()
endforeach()
if(bad)
  message(FATAL_ERROR "Weak symbols in objects of one instruction set (move the code to a file without "
                      "such a suffix, or into an anonymous namespace):\n${bad}")
endif()
