#include "dispatch/preferences.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>

namespace sk {
namespace {

struct Key {
  std::string_view op;  // in the table: the kernel's
  std::array<int64_t, 13> numbers;

  Key(const Problem& p, std::string_view op_)
      : op(op_),
        numbers{p.device_type,
                p.gpu ? p.gpu->index : 0,
                p.gpu ? 0 : p.threads,
                p.format,
                p.pattern.family,
                p.pattern.kept,
                p.pattern.group,
                p.pattern.vector,
                p.pattern.block_rows,
                p.pattern.block_cols,
                p.dtype,
                p.n,
                p.k} {}
  bool operator==(const Key& other) const { return numbers == other.numbers && op == other.op; }
};

struct HashKey {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325;
    for (const int64_t number : key.numbers) hash = (hash ^ uint64_t(number)) * 0x100000001b3;
    return size_t(hash ^ hash >> 32);
  }
};

struct Range {
  int64_t from, to;
  const Kernel* kernel;
};

using Table = std::unordered_map<Key, std::vector<Range>, HashKey>;

// A table never changes: a writer publishes another one. `current` is the address of `table`, null
// while that is empty, so that whoever has nothing to look up reads one word.
std::mutex mutex;  // of `table`
std::shared_ptr<const Table> table;
std::atomic<const Table*> current{nullptr};

void publish(std::shared_ptr<const Table> next) {  // with the mutex held
  table = std::move(next);
  current.store(table.get(), std::memory_order_release);
}

void put(std::vector<Range>& ranges, const Range& added) {
  std::vector<Range> kept;
  for (const Range& r : ranges) {
    if (r.from < added.from) kept.push_back({r.from, std::min(r.to, added.from - 1), r.kernel});
    if (r.to > added.to) kept.push_back({std::max(r.from, added.to + 1), r.to, r.kernel});
  }
  kept.push_back(added);
  ranges = std::move(kept);
}

}  // namespace

const Kernel* preferred(const Problem& problem) {
  const Table* const newest = current.load(std::memory_order_acquire);
  if (!newest || (problem.device_type == SK_CUDA && !problem.gpu)) return nullptr;
  // Each thread holds the table that it used last, and locks only when there is a newer one. What a
  // thread holds is alive: an equal address is the same table.
  thread_local std::shared_ptr<const Table> mine;
  if (mine.get() != newest) {
    const std::lock_guard<std::mutex> lock(mutex);
    mine = table;
  }
  if (!mine) return nullptr;  // cleared meanwhile
  const auto found = mine->find(Key(problem, problem.op));
  if (found == mine->end()) return nullptr;
  for (const Range& r : found->second) {
    if (r.from <= problem.m && problem.m <= r.to) return r.kernel;
  }
  return nullptr;
}

void prefer(const std::vector<Preference>& preferences) {
  if (preferences.empty()) return;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto next = table ? std::make_shared<Table>(*table) : std::make_shared<Table>();
  for (const Preference& p : preferences)
    put((*next)[Key(p.problem, p.kernel->op)], {p.m_from, p.m_to, p.kernel});
  publish(next);
}

void clear_preferences() {
  const std::lock_guard<std::mutex> lock(mutex);
  publish(nullptr);
}

int64_t preference_count() {
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t count = 0;
  if (table) {
    for (const auto& entry : *table) count += int64_t(entry.second.size());
  }
  return count;
}

}  // namespace sk
