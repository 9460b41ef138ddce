// Built without any ISA flag: this file runs before anything is known about the CPU.
#include "core/cpu_info.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <thread>

#include "core/error.h"
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sk {
namespace {

#if defined(__aarch64__)
constexpr const char* kIsaNames[] = {"scalar", "neon", "neon_bf16"};
#else
constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "avx512bf16"};
#endif

#if defined(__x86_64__)
struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}
bool bit(uint32_t word, int index) { return word >> index & 1; }

void detect_isa(CpuInfo& info) {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  uint64_t xcr0 = 0;
  if (bit(one.c, 27)) {  // OSXSAVE: which registers the system saves decides, not the CPU alone
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    xcr0 = uint64_t(high) << 32 | low;
  }
  const bool os_avx = (xcr0 & 6) == 6, os_avx512 = (xcr0 & 0xe6) == 0xe6;
  struct Feature {
    const char* name;
    bool present;
  };
  const bool fma = bit(one.c, 12), f16c = bit(one.c, 29), avx2 = bit(seven.b, 5);
  const bool bmi2 = bit(seven.b, 8), avx512f = bit(seven.b, 16), avx512dq = bit(seven.b, 17);
  const bool avx512bw = bit(seven.b, 30), avx512vl = bit(seven.b, 31);
  const bool avx512bf16 = bit(seven_one.a, 5);
  for (const Feature& f : {Feature{"avx2", avx2},
                           {"fma", fma},
                           {"f16c", f16c},
                           {"bmi2", bmi2},
                           {"avx512f", avx512f},
                           {"avx512bw", avx512bw},
                           {"avx512dq", avx512dq},
                           {"avx512vl", avx512vl},
                           {"avx512bf16", avx512bf16},
                           {"avx512vnni", bit(seven.c, 11)},
                           {"amx_tile", bit(seven.d, 24)}}) {
    if (f.present) info.features += std::string(info.features.empty() ? "" : " ") + f.name;
  }
  if (os_avx && avx2 && fma && f16c && bmi2) info.detected = Isa::kAvx2;
  if (info.detected == Isa::kAvx2 && os_avx512 && avx512f && avx512bw && avx512dq && avx512vl) {
    info.detected = avx512bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  char brand[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i, 0);
    std::memcpy(brand + 16 * i, &r, 16);
  }
  info.model = brand;
  while (!info.model.empty() && info.model.back() == ' ') info.model.pop_back();
}
#elif defined(__aarch64__)
#if defined(__linux__)
// The first value of `key` in a file of "key : value" lines.
std::string find_line(const char* path, const char* key) {
  std::string found;
  if (std::FILE* file = std::fopen(path, "r")) {
    char line[256];
    while (found.empty() && std::fgets(line, sizeof line, file)) {
      const char* colon = std::strchr(line, ':');
      if (!colon || std::strncmp(line, key, std::strlen(key)) != 0) continue;
      found = colon + 1;
    }
    std::fclose(file);
  }
  const size_t begin = found.find_first_not_of(" \t");
  if (begin == std::string::npos) return "";
  return found.substr(begin, found.find_last_not_of(" \t\n") + 1 - begin);
}

// Arm's part numbers of the cores this is meant for; kernels before 6.x and containers give no name.
std::string arm_core(const std::string& implementer, const std::string& part) {
  struct Core {
    const char *part, *name;
  };
  if (implementer == "0x41") {
    for (const Core& core : {Core{"0xd42", "Arm Cortex-A78AE"},
                             {"0xd0b", "Arm Cortex-A76"},
                             {"0xd0c", "Arm Neoverse-N1"},
                             {"0xd40", "Arm Neoverse-V1"},
                             {"0xd49", "Arm Neoverse-N2"},
                             {"0xd4f", "Arm Neoverse-V2"},
                             {"0xd83", "Arm Neoverse-V3AE"},
                             {"0xd84", "Arm Neoverse-V3"}}) {
      if (part == core.part) return core.name;
    }
  }
  return part.empty() ? "unknown" : "implementer " + implementer + " part " + part;
}

void detect_isa(CpuInfo& info) {
  const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
  struct Feature {
    const char* name;
    bool present;
  };
  const bool bf16 = two & HWCAP2_BF16;
  for (const Feature& f : {Feature{"asimd", (one & HWCAP_ASIMD) != 0},
                           {"fphp", (one & HWCAP_FPHP) != 0},
                           {"asimdhp", (one & HWCAP_ASIMDHP) != 0},
                           {"asimddp", (one & HWCAP_ASIMDDP) != 0},
                           {"asimdfhm", (one & HWCAP_ASIMDFHM) != 0},
                           {"sve", (one & HWCAP_SVE) != 0},
                           {"sve2", (two & HWCAP2_SVE2) != 0},
                           {"i8mm", (two & HWCAP2_I8MM) != 0},
                           {"bf16", bf16}}) {
    if (f.present) info.features += std::string(info.features.empty() ? "" : " ") + f.name;
  }
  // ASIMD is part of the architecture; BF16 comes after ARMv8.2, whose additions it therefore has.
  info.detected = bf16 ? Isa::kNeonBf16 : Isa::kNeon;
  info.model = find_line("/proc/cpuinfo", "model name");
  if (info.model.empty())
    info.model = arm_core(find_line("/proc/cpuinfo", "CPU implementer"),
                          find_line("/proc/cpuinfo", "CPU part"));
}
#else
void detect_isa(CpuInfo& info) {
  info.model = "unknown";
  info.features = "asimd";
  info.detected = Isa::kNeon;
}
#endif
#else
void detect_isa(CpuInfo& info) { info.model = "unknown"; }
#endif

CpuInfo detect() {
  CpuInfo info;
  detect_isa(info);
  info.cores = int(std::max(1u, std::thread::hardware_concurrency()));
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const auto size = [](int name, int64_t fallback) {
    const long value = sysconf(name);
    return value > 0 ? int64_t(value) : fallback;
  };
  info.l1d_bytes = size(_SC_LEVEL1_DCACHE_SIZE, info.l1d_bytes);
  info.l2_bytes = size(_SC_LEVEL2_CACHE_SIZE, info.l2_bytes);
  info.l3_bytes = size(_SC_LEVEL3_CACHE_SIZE, info.l3_bytes);
#endif
  // sysconf reports the last level of the whole machine; what one core sees stands in sysfs.
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    long kilobytes = 0;
    if (std::fscanf(file, "%ldK", &kilobytes) == 1 && kilobytes > 0)
      info.l3_bytes = int64_t(kilobytes) << 10;
    std::fclose(file);
  }
  return info;
}

std::string isa_names() {
  std::string names;
  for (const char* name : kIsaNames) {
    if (!names.empty()) names += name == *std::rbegin(kIsaNames) ? " or " : ", ";
    names += name;
  }
  return names;
}

struct State {
  CpuInfo info = detect();
  std::string kernel;

  State() { read_environment(); }

  void read_environment() {
    info.isa = info.detected;
    const char* cap = std::getenv("SPARSEKIT_ISA");
    if (cap && *cap) {
      const std::optional<Isa> wanted = find_isa(cap);
      SK_REQUIRE(wanted, "SPARSEKIT_ISA: expected ", isa_names(), ", got '", cap, "'");
      info.isa = std::min(*wanted, info.detected);
    }
    const char* name = std::getenv("SPARSEKIT_KERNEL");
    kernel = name ? name : "";
  }
};

State& state() {
  static State instance;
  return instance;
}

}  // namespace

const char* isa_name(Isa isa) { return kIsaNames[size_t(isa)]; }
std::optional<Isa> find_isa(const char* name) {
  for (size_t i = 0; i < std::size(kIsaNames); ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) return Isa(i);
  }
  return std::nullopt;
}

const CpuInfo& cpu_info() { return state().info; }
const std::string& forced_kernel() { return state().kernel; }
void reload_environment() { state().read_environment(); }

}  // namespace sk
