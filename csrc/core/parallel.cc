#include "core/parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace sk {
namespace {

// The work of one parallel_for; every thread of the team runs it.
struct Job {
  const std::function<void(int)>& body;
  int tasks;
  std::atomic<int> next{0};
  std::once_flag failed;
  std::exception_ptr error;

  void run() {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        body(i);
      } catch (...) {
        std::call_once(failed, [&] { error = std::current_exception(); });
      }
    }
  }
};

void run_job(void* job) { static_cast<Job*>(job)->run(); }

// GOMP_parallel is libgomp's entry point for a parallel region (libomp has it too).
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
  // Looked up again until it is there: PyTorch may be imported after the first call.
  static std::atomic<GompParallel> found{nullptr};
  GompParallel entry = found.load(std::memory_order_acquire);
  if (!entry) {
    entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(entry, std::memory_order_release);
  }
  return entry;
}

class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return job.run();  // another caller has the pool: do it alone
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (int(workers_.size()) < threads - 1) {
        workers_.emplace_back([this, id = int(workers_.size())] { work(id); });
      }
      job_ = &job;
      team_ = running_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    job_ = nullptr;
  }

 private:
  void work(int id) {
    long seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      if (id >= team_) continue;
      Job* job = job_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int team_ = 0, running_ = 0;
  long round_ = 0;
  bool stop_ = false;
};

// A forked child has none of its parent's threads: it gets a pool of its own, and the parent's is
// left alone (its threads cannot be joined there).
Pool& pool() {
  static std::mutex mutex;
  static std::unique_ptr<Pool> instance;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    (void)instance.release();
    instance = std::make_unique<Pool>();
    owner = getpid();
  }
  return *instance;
}

}  // namespace

void parallel_for(int tasks, int threads, const std::function<void(int)>& body) {
  if (threads > tasks) threads = tasks;
  Job job{body, tasks, {}, {}, nullptr};
  if (threads <= 1) {
    job.run();
  } else if (GompParallel gomp = find_gomp()) {
    gomp(run_job, &job, unsigned(threads), 0);
  } else {
    pool().run(job, threads);
  }
  if (job.error) std::rethrow_exception(job.error);
}

const char* parallel_backend() { return find_gomp() ? "openmp" : "threads"; }

}  // namespace sk
