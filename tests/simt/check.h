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

inline simt::Launch launch_of(int grid, int threads, int shared_bytes, uint64_t seed = 1) {
  simt::Launch launch;
  launch.grid = grid;
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  launch.seed = seed;
  return launch;
}

// What does not depend on the schedule must hold under each of these.
constexpr uint64_t kSeeds = 20;
