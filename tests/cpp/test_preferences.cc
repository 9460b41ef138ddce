// Kernels that were measured to be the fastest run where they can, for exactly the problems that were
// meant; everywhere else the cost model decides as before.
#include <atomic>
#include <set>
#include <thread>

#include "core/cuda_info.h"
#include "dispatch/preferences.h"
#include "support.h"

using namespace test;

namespace {

constexpr sk_status kInvalid = SK_INVALID_ARGUMENT;
constexpr int64_t kMaxM = (int64_t{1} << 31) - 1;

struct Choice {
  std::string kernel, reason;
};

std::vector<sk_candidate> explain(const sk_preference& p, int64_t m) {
  std::vector<sk_candidate> answers(static_cast<size_t>(sk_kernel_count()));
  CHECK_OK(sk_explain_on(p.device_type, p.device_index, p.op, p.format, &p.pattern, p.dtype, m, p.n,
                         p.k, p.num_threads, answers.data()));
  return answers;
}

Choice choice(const sk_preference& p, int64_t m) {
  for (const sk_candidate& c : explain(p, m)) {
    if (c.chosen) return {c.name, c.reason};
  }
  return {};
}

bool is_measured(const Choice& c) { return c.reason.rfind("chosen: measured; ", 0) == 0; }
bool is_estimated(const Choice& c) { return c.reason.rfind("chosen: estimated; ", 0) == 0; }

int64_t count() {
  int64_t number = -1;
  CHECK_OK(sk_preference_count(&number));
  return number;
}

void set_environment(const char* name, const char* value) {
  if (value) {
    setenv(name, value, 1);
  } else {
    unsetenv(name);
  }
  CHECK_OK(sk_reload_environment());
}

// A problem of this machine, and its preference still without a kernel.
struct Setup {
  char format[32];
  sk_preference preference{};

  explicit Setup(const sk_pattern& pattern, int32_t dtype = SK_F32) {
    CHECK_OK(sk_default_format(&pattern, dtype, "auto", format));
    preference = {"matmul", format, pattern, dtype, 96, 160, 2, SK_CPU, 0, 1, kMaxM, nullptr};
  }
  // Matmuls that read the format and compute the dtype, on this machine or not.
  std::vector<const char*> kernels() const {
    std::vector<const char*> names;
    for (const sk::Kernel& kernel : sk::kernels()) {
      if (kernel.where.device_type == SK_CPU && kernel.reads(sk::find_format(format)) &&
          kernel.dtype_code == preference.dtype && !std::strcmp(kernel.op, preference.op))
        names.push_back(kernel.name);
    }
    return names;
  }
  void prefer(const char* kernel, int64_t from, int64_t to) {
    sk_preference p = preference;
    p.kernel = kernel, p.m_from = from, p.m_to = to;
    CHECK_OK(sk_prefer_kernel(&p, 1));
  }
};

const sk_pattern kPatterns[] = {nm(2, 4), nm(2, 4, 4), bsr(16, 16)};

// A preferred kernel is chosen where it can run, at every instruction set that can be asked for.
void test_choice() {
  const std::vector<std::string> levels = [] {
    std::set<std::string> isas{"scalar"};
    for (const sk_kernel_info& kernel : kernels()) {
      if (kernel.device_type == SK_CPU) isas.insert(kernel.arch);
    }
    return std::vector<std::string>(isas.begin(), isas.end());
  }();
  for (const sk_pattern& pattern : kPatterns) {
    for (int32_t dtype : kDtypes) {
      set_environment("SPARSEKIT_ISA", nullptr);
      Setup setup(pattern, dtype);
      for (const char* kernel : setup.kernels()) {
        for (const std::string& level : levels) {
          set_environment("SPARSEKIT_ISA", level.c_str());
          for (int64_t m : {1, 8, 9, 256}) {
            context = std::string(kernel) + " " + name(pattern) + " m=" + std::to_string(m) +
                      " SPARSEKIT_ISA=" + level;
            CHECK_OK(sk_clear_preferences());
            const Choice before = choice(setup.preference, m);
            CHECK(before.kernel.empty() || is_estimated(before));
            setup.prefer(kernel, 1, kMaxM);
            const Choice after = choice(setup.preference, m);
            bool can_run = false;
            for (const sk_candidate& c : explain(setup.preference, m))
              can_run |= c.ok && c.name == std::string(kernel);
            if (can_run) {
              CHECK(after.kernel == kernel && is_measured(after));
            } else {
              CHECK(after.kernel == before.kernel && after.reason == before.reason);
            }
          }
        }
      }
    }
  }
  set_environment("SPARSEKIT_ISA", nullptr);
  CHECK_OK(sk_clear_preferences());
}

// Each part of a problem counts, and m by its range.
void test_key() {
  context = "key";
  Setup setup(nm(2, 4));
  const char* kernel = setup.kernels().front();
  for (const char* candidate :
       setup.kernels()) {  // one that can run, and is not chosen if possible
    for (const sk_candidate& c : explain(setup.preference, 4)) {
      if (c.ok && !c.chosen && c.name == std::string(candidate)) kernel = candidate;
    }
  }
  setup.prefer(kernel, 3, 5);
  CHECK(count() == 1);
  for (int64_t m : {3, 4, 5}) CHECK(is_measured(choice(setup.preference, m)));
  for (int64_t m : {0, 1, 2, 6, 256}) CHECK(is_estimated(choice(setup.preference, m)));

  const sk_pattern other_pattern = nm(2, 4, 4);
  for (int changed = 0; changed < 4; ++changed) {
    context = "key " + std::to_string(changed);
    sk_preference p = setup.preference;
    if (changed == 0) p.n += 1;
    if (changed == 1) p.k += 1;
    if (changed == 2) p.num_threads += 1;
    if (changed == 3) p.pattern = other_pattern;
    CHECK(!is_measured(choice(p, 4)));
  }
  Setup bf16(nm(2, 4), SK_BF16), reference(nm(2, 4));
  CHECK(!is_measured(choice(bf16.preference, 4)));
  if (std::string(setup.format) != "nm") {
    reference.preference.format = "nm";
    CHECK(!is_measured(choice(reference.preference, 4)));
  }
  // 0 threads are as many as there are cores, here as in a call.
  sk_cpu_info cpu;
  CHECK_OK(sk_get_cpu_info(&cpu));
  CHECK_OK(sk_clear_preferences());
  setup.preference.num_threads = 0;
  setup.prefer(kernel, 1, kMaxM);
  setup.preference.num_threads = cpu.cores;
  CHECK(is_measured(choice(setup.preference, 4)));
  CHECK_OK(sk_clear_preferences());
  CHECK(count() == 0 && is_estimated(choice(setup.preference, 4)));
}

// What a later preference covers, it takes.
void test_ranges() {
  context = "ranges";
  Setup setup(nm(2, 4));
  sk::Problem problem;
  problem.pattern = nm(2, 4);
  problem.format = sk::find_format(setup.format);
  problem.n = setup.preference.n, problem.k = setup.preference.k;
  problem.threads = setup.preference.num_threads;
  const std::vector<const char*> names = setup.kernels();
  Random random(3);
  std::vector<const char*> expected(41, nullptr);
  for (int round = 0; round < 200; ++round) {
    if (round % 40 == 0) {
      CHECK_OK(sk_clear_preferences());
      expected.assign(expected.size(), nullptr);
    }
    const int64_t from = random.integer(1, 40), to = random.integer(from, 40);
    const char* kernel = names[size_t(random.integer(0, int64_t(names.size()) - 1))];
    setup.prefer(kernel, from, to);
    for (int64_t m = from; m <= to; ++m) expected[size_t(m)] = kernel;
    for (problem.m = 1; problem.m <= 40; ++problem.m) {
      const sk::Kernel* found = sk::preferred(problem);
      CHECK(expected[size_t(problem.m)] ? found && found->name == expected[size_t(problem.m)]
                                        : !found);
    }
  }
  CHECK_OK(sk_clear_preferences());
  setup.prefer(names.front(), 1, 10);
  setup.prefer(names.back(), 1, 10);
  CHECK(count() == 1);
  setup.prefer(names.front(), 4, 5);
  CHECK(count() == 3);
  setup.prefer(names.back(), 1, kMaxM);
  CHECK(count() == 1);
  CHECK_OK(sk_clear_preferences());
}

// One call, and what each kernel that can run it makes of it.
struct Job {
  Weight weight;
  Buffer packed;
  Inputs inputs;
  std::vector<const char*> names;
  std::vector<Matrix> results;

  Job(Setup& setup, int64_t m, Random& random)
      : weight(setup.preference.pattern, setup.preference.dtype, setup.preference.n,
               setup.preference.k, Fill::kReals, random),
        packed(
            pack(compress(weight.dense, weight.mask, weight.pattern, weight.dtype), setup.format)),
        inputs(weight, m, Fill::kReals, random) {
    for (const sk_candidate& c : explain(setup.preference, m)) {
      if (!c.ok) continue;
      names.push_back(c.name);
      results.push_back(run(c.name));
    }
  }
  Matrix run(const char* kernel) const {
    Matrix y(weight.dtype, inputs.x.rows(), weight.n);
    const sk_matmul_args args =
        arguments(weight, packed, inputs, {true, true, SK_ACTIVATION_GELU}, y.data(), weight.n, 2);
    CHECK_OK(sk_matmul(&args, kernel));
    return y;
  }
};

// What is preferred is what runs: its bits, call after call; a kernel named by the caller or by
// SPARSEKIT_KERNEL comes first.
void test_calls() {
  Random random(4);
  for (const sk_pattern& pattern : kPatterns) {
    for (int32_t dtype : kDtypes) {
      Setup setup(pattern, dtype);
      for (int64_t m : {1, 33}) {
        const Job job(setup, m, random);
        for (size_t i = 0; i < job.names.size(); ++i) {
          context = std::string(job.names[i]) + " m=" + std::to_string(m);
          setup.prefer(job.names[i], m, m);
          for (int call = 0; call < 3; ++call) CHECK(job.run(nullptr).same_bytes(job.results[i]));
          const size_t other = (i + 1) % job.names.size();
          CHECK(job.run(job.names[other]).same_bytes(job.results[other]));
          set_environment("SPARSEKIT_KERNEL", job.names[other]);
          CHECK(job.run(nullptr).same_bytes(job.results[other]));
          const Choice forced = choice(setup.preference, m);
          CHECK(forced.kernel == job.names[other] &&
                forced.reason.rfind("chosen: forced by SPARSEKIT_KERNEL; ", 0) == 0);
          set_environment("SPARSEKIT_KERNEL", nullptr);
        }
      }
    }
  }
  CHECK_OK(sk_clear_preferences());
  context = "SPARSEKIT_KERNEL that cannot run";
  set_environment("SPARSEKIT_KERNEL", "matmul_bsr_f16_scalar");
  CHECK(choice(Setup(nm(2, 4)).preference, 4).kernel.empty());
  set_environment("SPARSEKIT_KERNEL", nullptr);
}

// Callers see the table before or after a change: the bits are those of a kernel that was preferred or
// of the estimate, never a mixture.
void test_concurrent_changes() {
  Random random(5);
  Setup setup(nm(2, 4));
  const Job job(setup, 7, random);
  CHECK_OK(sk_clear_preferences());
  std::vector<Matrix> allowed;
  allowed.push_back(job.run(nullptr));
  allowed.push_back(job.run(job.names.front()));
  allowed.push_back(job.run(job.names.back()));
  std::atomic<bool> done{false};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      context = "concurrent changes";
      while (!done) {
        const Matrix y = job.run(nullptr);
        CHECK(std::any_of(allowed.begin(), allowed.end(),
                          [&](const Matrix& m) { return m.same_bytes(y); }));
      }
    });
  }
  std::thread second_writer([&] {
    for (int i = 0; i < 300; ++i)
      setup.prefer(job.names[size_t(i) % 2 ? 0 : job.names.size() - 1], 7, 7);
  });
  for (int i = 0; i < 300; ++i) {
    if (i % 3 == 0) CHECK_OK(sk_clear_preferences());
    count();
  }
  second_writer.join();
  done = true;
  for (std::thread& caller : callers) caller.join();
  CHECK_OK(sk_clear_preferences());
}

void test_errors() {
  context = "errors";
  Setup setup(nm(2, 4));
  sk_preference good = setup.preference;
  good.kernel = setup.kernels().front();
  CHECK_OK(sk_prefer_kernel(&good, 1));
  CHECK_OK(sk_prefer_kernel(nullptr, 0));
  const auto refuses = [&](sk_status status, const std::string& text, auto change) {
    sk_preference bad = good;
    change(bad);
    // The good one before it is not added either.
    sk_preference both[] = {good, bad};
    both[0].n += 1;
    CHECK_FAILS(sk_prefer_kernel(both, 2), status, text);
    CHECK(count() == 1);
  };
  const sk_pattern bad_pattern = nm(4, 4);
  refuses(kInvalid, "op is NULL", [](auto& p) { p.op = nullptr; });
  refuses(kInvalid, "format: expected one of nm, bsr", [](auto& p) { p.format = "csr"; });
  refuses(kInvalid, "format: expected one of nm, bsr", [](auto& p) { p.format = nullptr; });
  refuses(kInvalid, "expected 1 <= N < M, got 4:4", [&](auto& p) { p.pattern = bad_pattern; });
  refuses(kInvalid, "dtype: expected f32 (0), bf16 (1) or f16 (2), got 9",
          [](auto& p) { p.dtype = 9; });
  refuses(kInvalid, "expected n and k from 1", [](auto& p) { p.n = 0; });
  refuses(kInvalid, "expected n and k from 1", [](auto& p) { p.k = kMaxM + 1; });
  for (auto [from, to] : {std::pair<int64_t, int64_t>{0, 4}, {5, 4}, {1, kMaxM + 1}, {-3, -2}}) {
    refuses(kInvalid,
            "prefer: expected 1 <= m_from <= m_to < 2^31, got " + std::to_string(from) + " and " +
                std::to_string(to),
            [from = from, to = to](auto& p) { p.m_from = from, p.m_to = to; });
  }
  refuses(kInvalid, "kernel is NULL", [](auto& p) { p.kernel = nullptr; });
  refuses(kInvalid, "kernel: no kernel is called 'fastest'", [](auto& p) { p.kernel = "fastest"; });
  refuses(kInvalid, "prefer: expected device_type cpu (0) or cuda (1), got 2",
          [](auto& p) { p.device_type = 2; });
  refuses(kInvalid,
          "prefer: kernel matmul_bsr_f32_scalar reads format bsr, the weight is packed as ",
          [](auto& p) { p.kernel = "matmul_bsr_f32_scalar"; });
  refuses(kInvalid, "prefer: format bsr does not hold the pattern 2:4 in f32",
          [](auto& p) { p.format = "bsr", p.kernel = "matmul_bsr_f32_scalar"; });
  refuses(kInvalid, "prefer: kernel matmul_nm_bf16_scalar computes bf16, the problem is f32",
          [](auto& p) { p.format = "nm", p.kernel = "matmul_nm_bf16_scalar"; });
  refuses(kInvalid, " does matmul, not conv2d", [](auto& p) { p.op = "conv2d"; });
  if (sk::cuda_devices().empty()) {
    refuses(SK_UNSUPPORTED, "CUDA: ", [](auto& p) { p.device_type = SK_CUDA; });
  } else {
    refuses(kInvalid, "CUDA: expected a device from 0 to ",
            [](auto& p) { p.device_type = SK_CUDA, p.device_index = 999; });
    refuses(kInvalid, "runs on the CPU, the problem is on a GPU",
            [](auto& p) { p.device_type = SK_CUDA; });
  }
  CHECK_FAILS(sk_prefer_kernel(&good, -1), kInvalid, "prefer: expected count >= 0, got -1");
  CHECK_FAILS(sk_prefer_kernel(nullptr, 1), kInvalid, "preferences is NULL");
  CHECK_FAILS(sk_preference_count(nullptr), kInvalid, "count is NULL");
  CHECK(is_measured(choice(good, 4)));
  CHECK_OK(sk_clear_preferences());
}

// GPUs are told apart by their index, not by threads; one that is not there needs no table.
void test_gpus() {
  context = "GPUs";
  sk::CudaDevice first = sk::nominal_cuda_device(), second = first;
  first.index = 0, second.index = 1;
  sk::Problem problem;
  problem.pattern = nm(2, 4);
  problem.format = sk::find_format("nm_mma_sp");
  problem.dtype = SK_F16;
  problem.m = problem.n = problem.k = 256;
  problem.device_type = SK_CUDA;
  for (const sk::Kernel& kernel : sk::kernels()) {
    const bool on_gpu = kernel.where.device_type == SK_CUDA;
    problem.gpu = &first;
    if (!on_gpu)
      CHECK(sk::why_never(kernel, problem) == "runs on the CPU, the problem is on a GPU");
    if (!on_gpu || !sk::why_never(kernel, problem).empty()) continue;
    context = kernel.name;
    const sk::Kernel& estimated = sk::select(problem, nullptr);
    sk::prefer({{problem, 1, kMaxM, &kernel}});
    problem.threads = 77;
    const bool can_run = kernel.functions->refusal(problem).empty();
    CHECK(&sk::select(problem, nullptr) == (can_run ? &kernel : &estimated));
    problem.gpu = &second;
    CHECK(&sk::select(problem, nullptr) == &estimated);
    problem.gpu = nullptr;
    CHECK(!sk::preferred(problem));
    CHECK_OK(sk_clear_preferences());
  }
}

}  // namespace

int main() {
  unsetenv("SPARSEKIT_ISA");
  unsetenv("SPARSEKIT_KERNEL");
  CHECK_OK(sk_reload_environment());
  CHECK(count() == 0);
  test_choice();
  test_key();
  test_ranges();
  test_calls();
  test_concurrent_changes();
  test_errors();
  test_gpus();
}
