#pragma once
#include <string>

// Runs the kernel with this mangled name on the emulator; false: it is none of the library's.
bool run_emulated(const std::string& kernel, int grid, int threads, int shared_bytes,
                  void** arguments);
