// The same input gives the same bits, whatever the number of threads and whoever else is calling.
#include <atomic>
#include <thread>

#include "support.h"

using namespace test;

namespace {

const sk_pattern kPatterns[] = {nm(2, 4),    nm(2, 4, 16), nm(3, 4), nm(4, 8, 8),
                                bsr(16, 16), bsr(64, 64),  bsr(6, 3)};

// One matmul and the bytes it must give.
struct Job {
  sk_kernel_info kernel;
  Weight weight;
  Buffer packed;
  Inputs inputs;
  Matrix expected;

  Job(const sk_kernel_info& kernel_, Weight weight_, int64_t m, Random& random)
      : kernel(kernel_),
        weight(std::move(weight_)),
        packed(
            pack(compress(weight.dense, weight.mask, weight.pattern, weight.dtype), kernel.format)),
        inputs(weight, m, Fill::kReals, random),
        expected(weight.dtype, m, weight.n) {
    run(expected, 1);
  }

  void run(Matrix& y, int threads) const {
    const Epilogue epilogue{true, true, SK_ACTIVATION_GELU};
    const sk_matmul_args args =
        arguments(weight, packed, inputs, epilogue, y.data(), weight.n, threads);
    CHECK_OK(sk_matmul(&args, kernel.name));
  }
  void check(int threads) const {
    context = std::string(kernel.name) + " " + name(weight.pattern) +
              " m=" + std::to_string(inputs.x.rows()) + " threads=" + std::to_string(threads);
    Matrix y(weight.dtype, inputs.x.rows(), weight.n);
    run(y, threads);
    CHECK(y.same_bytes(expected));
  }
};

std::vector<Job> make_jobs() {
  Random random(1);
  std::vector<Job> jobs;
  for (const sk_kernel_info& kernel : available_kernels()) {
    for (const sk_pattern& pattern : kPatterns) {
      for (int32_t dtype : kDtypes) {
        for (int64_t m : {1, 5, 40, 131}) {
          Weight weight(pattern, dtype, 97, 203, Fill::kReals, random);
          if (!reads(kernel, weight) || !accepts(kernel, weight, m)) continue;
          jobs.emplace_back(kernel, std::move(weight), m, random);
        }
      }
    }
  }
  return jobs;
}

void test_thread_counts(const std::vector<Job>& jobs) {
  for (const Job& job : jobs) {
    for (int threads : {1, 2, 5, 64}) job.check(threads);
  }
}

// Several callers at once, each with its own number of threads; then more callers come and go, so
// that threads die and new ones begin while others work.
void test_concurrent_callers(const std::vector<Job>& jobs) {
  std::atomic<size_t> next{0};
  const auto work = [&](int caller) {
    for (size_t i; (i = next++) < jobs.size();) jobs[i].check(caller % 3 + 1);
  };
  for (int round = 0; round < 2; ++round) {
    next = 0;
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 5; ++caller) callers.emplace_back(work, caller + round);
    for (std::thread& caller : callers) caller.join();
  }
}

// One weight, one input, many callers; and each caller's last error is its own.
void test_shared_job(const Job& job) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&job, caller] {
      for (int i = 0; i < 50; ++i) {
        job.check(2);
        const std::string name = "nobody" + std::to_string(caller);
        const sk_matmul_args args{};
        CHECK_FAILS(sk_matmul(&args, name.c_str()), SK_INVALID_ARGUMENT, "packed weight: ");
        int64_t bytes;
        CHECK_FAILS(sk_packed_bytes(nullptr, name.c_str(), &bytes), SK_INVALID_ARGUMENT, "");
        CHECK_FAILS(sk_default_format(&job.weight.pattern, SK_F32, name.c_str(), nullptr),
                    SK_INVALID_ARGUMENT, name);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
  const std::vector<Job> jobs = make_jobs();
  test_thread_counts(jobs);
  test_concurrent_callers(jobs);
  test_shared_job(jobs.back());
  std::printf("%zu problems\n", jobs.size());
}
