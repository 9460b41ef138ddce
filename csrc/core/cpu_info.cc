// Built without any ISA flag: this file runs before anything is known about the CPU.
#include "core/cpu_info.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "core/error.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sk {
namespace {

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

struct State {
  CpuInfo info = detect();
  std::string kernel;

  State() { read_environment(); }

  void read_environment() {
    info.isa = info.detected;
    const char* cap = std::getenv("SPARSEKIT_ISA");
    if (cap && *cap) {
      Isa wanted = info.detected;
      bool known = false;
      for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
        if (std::strcmp(cap, isa_name(isa)) == 0) wanted = isa, known = true;
      }
      SK_REQUIRE(known, "SPARSEKIT_ISA: expected scalar, avx2, avx512 or avx512bf16, got '", cap,
                 "'");
      if (wanted < info.isa) info.isa = wanted;
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

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    default:
      return "scalar";
  }
}

const CpuInfo& cpu_info() { return state().info; }
const std::string& forced_kernel() { return state().kernel; }
void reload_environment() { state().read_environment(); }

}  // namespace sk
