// What this CPU can do, read at run time; SPARSEKIT_ISA caps it.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

namespace sk {

// Levels in the order of what they add; a level includes those before it. Each architecture has a
// chain of its own, so that any two levels of a build can be compared.
#if defined(__aarch64__)
enum class Isa { kScalar, kNeon, kNeonBf16 };
#else
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };
#endif

const char* isa_name(Isa isa);
// Nothing when no level of this architecture has the name.
std::optional<Isa> find_isa(const char* name);

struct CpuInfo {
  std::string model;
  std::string features;
  Isa detected = Isa::kScalar;
  Isa isa = Isa::kScalar;  // min(detected, SPARSEKIT_ISA)
  int cores = 1;
  int64_t l1d_bytes = 32 << 10, l2_bytes = 512 << 10, l3_bytes = 8 << 20;
};

const CpuInfo& cpu_info();

// SPARSEKIT_KERNEL, or "".
const std::string& forced_kernel();

// Reads the environment again. Not to be called while another thread runs a kernel.
void reload_environment();

}  // namespace sk
