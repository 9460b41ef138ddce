// Checks of the emulator's tests: the first failure ends the program.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <string>

#include "simt/simt.h"

[[noreturn]] inline void fail(const char* file, int line, const std::string& message) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, message.c_str());
  std::exit(1);
}

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) fail(__FILE__, __LINE__, "not so: " #condition); \
  } while (false)

// The call throws a simt::Error of this fault whose message contains `text`.
#define CHECK_FAULT(call, expected, text)                                            \
  do {                                                                               \
    try {                                                                            \
      (void)(call);                                                                  \
    } catch (const simt::Error& error) {                                             \
      if (error.fault != (expected) ||                                               \
          std::string(error.what()).find(text) == std::string::npos) {               \
        fail(__FILE__, __LINE__, std::string(#call " says '") + error.what() + "'"); \
      }                                                                              \
      break;                                                                         \
    }                                                                                \
    fail(__FILE__, __LINE__, #call " did not fail");                                 \
  } while (false)
