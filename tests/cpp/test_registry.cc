// kernels.inc and what the environment makes of it.
#include <iterator>
#include <map>
#include <set>

#include "support.h"

using namespace test;

namespace {

// The chain of this architecture, and how a refusal lists it.
#if defined(__aarch64__)
const char* const kLevels[] = {"scalar", "neon", "neon_bf16"};
const char* const kLevelsListed = "scalar, neon or neon_bf16";
#else
const char* const kLevels[] = {"scalar", "avx2", "avx512", "avx512bf16"};
const char* const kLevelsListed = "scalar, avx2, avx512 or avx512bf16";
#endif
constexpr int kLevelCount = int(std::size(kLevels));

int level(const std::string& isa) {
  for (int i = 0; i < kLevelCount; ++i) {
    if (isa == kLevels[i]) return i;
  }
  fail(__FILE__, __LINE__, "unknown instruction set " + isa);
}

sk_cpu_info cpu() {
  sk_cpu_info info;
  CHECK_OK(sk_get_cpu_info(&info));
  return info;
}

void set_environment(const char* name, const char* value) {
  if (value) {
    setenv(name, value, 1);
  } else {
    unsetenv(name);
  }
  CHECK_OK(sk_reload_environment());
}

// Each line of the table says one thing once.
void test_names() {
  context = "names";
  CHECK(sk_kernel_count() > 0);
  std::set<std::string> names;
  for (int32_t i = 0; i < sk_kernel_count(); ++i) {
    sk_kernel_info info;
    CHECK_OK(sk_get_kernel(i, &info));
    context = info.name;
    std::string joined =
        std::string(info.op) + "_" + info.format + "_" + info.dtype + "_" + info.arch;
    if (*info.variant) joined += std::string("_") + info.variant;
    CHECK(joined == info.name);
    CHECK(names.insert(joined).second);
    CHECK(std::string(info.op) == "matmul" || std::string(info.op) == "conv2d");
    CHECK(info.reason && *info.reason);
    if (info.device_type == SK_CPU) level(info.arch);
    const sk_pattern p = !std::strncmp(info.format, "nm", 2) ? nm(2, 4) : bsr(16, 16);
    std::vector<sk_candidate> answers(static_cast<size_t>(sk_kernel_count()));
    CHECK_OK(sk_explain(info.op, info.format, &p, SK_F32, 4, 64, 64, 1,
                        answers.data()));  // the format exists
  }
  // A kernel for any CPU for each family and dtype.
  for (const char* format : {"nm", "bsr"}) {
    for (int32_t dtype : kDtypes) {
      for (const char* op : {"matmul_", "conv2d_"})
        CHECK(names.count(op + std::string(format) + "_" + dtype_name(dtype) + "_scalar"));
    }
  }
}

void test_machine() {
  context = "machine";
  const sk_cpu_info info = cpu();
  CHECK(info.cores >= 1);
  CHECK(info.l1d_bytes > 0 && info.l2_bytes >= info.l1d_bytes && info.l3_bytes > 0);
  CHECK(level(info.isa) <= level(info.isa_detected));
  CHECK(std::string(sk_version()).find('.') != std::string::npos);
  // A detected level means that its features are there.
  const std::string features = std::string(" ") + info.features + " ";
  const auto has = [&](const char* feature) {
    return features.find(std::string(" ") + feature + " ") != std::string::npos;
  };
  const int detected = level(info.isa_detected);
#if defined(__aarch64__)
  CHECK(detected >= 1 && has("asimd"));
  if (detected >= 2) CHECK(has("bf16"));
#else
  if (detected >= 1) CHECK(has("avx2") && has("fma") && has("f16c") && has("bmi2"));
  if (detected >= 2) CHECK(has("avx512f") && has("avx512bw") && has("avx512dq") && has("avx512vl"));
  if (detected >= 3) CHECK(has("avx512bf16"));
#endif
}

// The choice for a problem: one that can run it, and the cheapest of those.
void test_explain() {
  std::vector<sk_candidate> answers(static_cast<size_t>(sk_kernel_count()));
  for (const sk_pattern& pattern : all_patterns()) {
    for (int32_t dtype : kDtypes) {
      for (const char* target : {"auto", "cpu", "reference"}) {
        char format[32];
        CHECK_OK(sk_default_format(&pattern, dtype, target, format));
        for (int64_t m : {0, 1, 8, 9, 256}) {
          context =
              name(pattern) + " " + dtype_name(dtype) + " " + format + " m=" + std::to_string(m);
          CHECK_OK(sk_explain("matmul", format, &pattern, dtype, m, 64, 128, 2, answers.data()));
          const sk_candidate* chosen = nullptr;
          for (const sk_candidate& c : answers) {
            CHECK(c.reason[0]);
            CHECK(c.ok ? c.cost_us >= 0 && std::isfinite(c.cost_us) : c.cost_us == 0);
            if (!c.chosen) continue;
            CHECK(c.ok && !chosen);
            chosen = &c;
          }
          CHECK(chosen);
          for (const sk_candidate& c : answers) CHECK(!c.ok || c.cost_us >= chosen->cost_us);
        }
      }
    }
  }
}

// SPARSEKIT_ISA takes kernels away and gives them back; results do not depend on it.
void test_isa_levels() {
  Random random(1);
  const int detected = level(cpu().isa_detected);
  for (int cap = 0; cap < kLevelCount; ++cap) {
    context = std::string("SPARSEKIT_ISA=") + kLevels[cap];
    set_environment("SPARSEKIT_ISA", kLevels[cap]);
    const int in_use = std::min(cap, detected);
    CHECK(level(cpu().isa) == in_use && level(cpu().isa_detected) == detected);
    for (int32_t i = 0; i < sk_kernel_count(); ++i) {
      sk_kernel_info info;
      CHECK_OK(sk_get_kernel(i, &info));
      if (info.device_type != SK_CPU) continue;
      const int needed = level(info.arch);
      CHECK(bool(info.available) == (needed <= in_use));
      if (info.available) continue;
      const std::string expected =
          std::string("needs ") + info.arch +
          (needed <= detected ? std::string(", SPARSEKIT_ISA allows ") + kLevels[in_use]
                              : std::string(", this CPU has ") + kLevels[detected]);
      CHECK(expected == info.reason);
    }
    for (const sk_pattern& pattern : {nm(2, 4), nm(2, 4, 4), bsr(16, 16)}) {
      for (int32_t dtype : kDtypes) {
        const Weight w(pattern, dtype, 33, 70, Fill::kIntegers, random);
        const Canonical canonical = compress(w.dense, w.mask, pattern, dtype);
        char format[32];
        CHECK_OK(sk_default_format(&pattern, dtype, "auto", format));
        if (in_use == 0)
          CHECK(std::string(format) == (pattern.family == SK_FAMILY_NM ? "nm" : "bsr"));
        const Buffer packed = pack(canonical, format);
        const Inputs in(w, 11, Fill::kIntegers, random);
        const Sums sums(w, in.x);
        Matrix y(dtype, 11, w.n);
        const sk_matmul_args args = arguments(w, packed, in, {}, y.data(), w.n, 2);
        CHECK_OK(sk_matmul(&args, nullptr));
        for (int64_t i = 0; i < 11 * w.n; ++i) {
          CHECK(y.get(i / w.n, i % w.n) == round_to(dtype, sums.value[size_t(i)]));
        }
        for (const sk_kernel_info& kernel : kernels()) {  // by name it is refused as well
          if (kernel.available || kernel.device_type != SK_CPU || !reads(kernel, w)) continue;
          const Buffer its = pack(canonical, kernel.format);
          const Matrix before(dtype, 11, w.n);
          Matrix untouched(dtype, 11, w.n);
          const sk_matmul_args its_args = arguments(w, its, in, {}, untouched.data(), w.n, 2);
          CHECK_FAILS(sk_matmul(&its_args, kernel.name), SK_UNSUPPORTED,
                      std::string("needs ") + kernel.arch);
          CHECK(untouched.same_bytes(before));
        }
      }
    }
  }
  context = "SPARSEKIT_ISA=sse9";
  setenv("SPARSEKIT_ISA", "sse9", 1);
  CHECK_FAILS(sk_reload_environment(), SK_INVALID_ARGUMENT,
              std::string("SPARSEKIT_ISA: expected ") + kLevelsListed + ", got 'sse9'");
  set_environment("SPARSEKIT_ISA", "");
  CHECK(level(cpu().isa) == detected);
  set_environment("SPARSEKIT_ISA", nullptr);
  CHECK(level(cpu().isa) == detected);
}

// SPARSEKIT_KERNEL names the kernel of every call that names none itself.
void test_forced_kernel() {
  context = "SPARSEKIT_KERNEL";
  Random random(2);
  const Weight w(nm(2, 4), SK_F32, 33, 70, Fill::kIntegers, random);
  const Buffer packed = pack(compress(w.dense, w.mask, w.pattern, w.dtype), "nm");
  const Inputs in(w, 3, Fill::kIntegers, random);
  Matrix y(SK_F32, 3, w.n);
  const sk_matmul_args args = arguments(w, packed, in, {}, y.data(), w.n, 1);
  set_environment("SPARSEKIT_KERNEL", "matmul_nm_f32_scalar");
  CHECK_OK(sk_matmul(&args, nullptr));
  set_environment("SPARSEKIT_KERNEL", "matmul_bsr_f32_scalar");
  CHECK_FAILS(sk_matmul(&args, nullptr), SK_UNSUPPORTED, "kernel matmul_bsr_f32_scalar cannot run");
  CHECK_OK(sk_matmul(&args, "matmul_nm_f32_scalar"));  // the argument wins
  set_environment("SPARSEKIT_KERNEL", "fastest");
  CHECK_FAILS(sk_matmul(&args, nullptr), SK_INVALID_ARGUMENT,
              "kernel: no kernel is called 'fastest'");
  set_environment("SPARSEKIT_KERNEL", nullptr);
  CHECK_OK(sk_matmul(&args, nullptr));
}

}  // namespace

int main() {
  unsetenv("SPARSEKIT_ISA");
  unsetenv("SPARSEKIT_KERNEL");
  test_names();
  test_machine();
  test_explain();
  test_isa_levels();
  test_forced_kernel();
}
