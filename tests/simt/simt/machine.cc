#include "simt/machine.h"

#include <algorithm>

namespace simt {
namespace {

constexpr uint32_t kMaxEpoch = (1 << 20) - 1;  // as SharedMemory keeps them

std::string at(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("simt::launch: " + message);
}

}  // namespace

const char* name(Fault fault) {
  switch (fault) {
    case Fault::kOutOfBounds:
      return "out of bounds";
    case Fault::kMisaligned:
      return "misaligned";
    case Fault::kReadOnly:
      return "read only";
    case Fault::kUninitialised:
      return "uninitialised";
    case Fault::kNonCoherent:
      return "not coherent";
    case Fault::kPendingCopy:
      return "copy under way";
    case Fault::kRace:
      return "race";
    case Fault::kDivergence:
      return "divergence";
    case Fault::kBadOperand:
      return "bad operand";
    case Fault::kNoProgress:
      return "no progress";
    case Fault::kBypassedMemory:
      return "bypassed memory";
  }
  return "";
}

void Thread::fail(Fault fault, const std::string& message) const {
  throw Error(fault,
              at(place) + ": " + Machine::instance().launch().kernel + ", block " +
                  std::to_string(block->index) + ", thread " + std::to_string(index) + " (warp " +
                  std::to_string(warp->index) + ", lane " + std::to_string(lane()) + "), " +
                  name(op) + ": " + name(fault) + ": " + message,
              place, block->index, index);
}

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

// ---- a launch ----------------------------------------------------------------------------------

Statistics Machine::run(const Launch& launch, const std::function<void()>& kernel) {
  require(!current_, "called from a kernel");
  require(launch.grid >= 1, "grid is " + std::to_string(launch.grid) + "; at least 1 is needed");
  require(
      launch.threads >= kLanes && launch.threads <= 1024 && launch.threads % kLanes == 0,
      "threads is " + std::to_string(launch.threads) + "; a multiple of 32 up to 1024 is needed");
  require(launch.shared_bytes >= 0 && launch.shared_bytes <= 227 * 1024,
          "shared_bytes is " + std::to_string(launch.shared_bytes) + "; 0 to 232448 are possible");
  require(
      launch.resident_blocks >= 1,
      "resident_blocks is " + std::to_string(launch.resident_blocks) + "; at least 1 is needed");
  launch_ = launch;
  random_ = Random(launch.seed);
  kernel_ = &kernel;
  places_ = PlaceTable();
  order_.reset(launch.grid);
  instructions_ = 0;
  active_.clear();
  last_warp_ = nullptr;
  error_ = nullptr;
  // How long one warp runs before another gets its turn: from no longer than one switch to far ahead of the others.
  constexpr int kStickiness[] = {1, 2, 16, 256};
  stickiness_ = kStickiness[random_.below(4)];

  to_start_.resize(size_t(launch.grid));
  for (int i = 0; i < launch.grid; ++i) to_start_[size_t(i)] = i;
  for (int i = launch.grid - 1; i > 0; --i) {
    std::swap(to_start_[size_t(i)], to_start_[size_t(random_.below(i + 1))]);
  }
  GlobalMemory::instance().begin_launch();
  for (const auto& block : blocks_) block->running = false;
  const int resident = std::min(launch.resident_blocks, launch.grid);
  while (int(blocks_.size()) < resident) blocks_.push_back(std::make_unique<Block>());
  for (int i = 0; i < resident; ++i) start_block(*blocks_[size_t(i)]);

  schedule();
  current_ = nullptr;
  kernel_ = nullptr;
  if (error_) std::rethrow_exception(error_);
  GlobalMemory::instance().end_launch(launch.kernel);
  Statistics statistics;
  statistics.places = places_.take();
  return statistics;
}

void Machine::start_block(Block& block) {
  block.index = to_start_.back();
  to_start_.pop_back();
  // Any multiple of 1024; that it is not 0 shows who takes an offset for an address.
  block.shared.reset(1024 * uint32_t(1 + random_.below(4)), launch_.shared_bytes);
  block.arrived = 0;
  block.exited = 0;
  block.running = true;
  block.epoch = 1;
  while (int(block.threads.size()) < launch_.threads)
    block.threads.push_back(std::make_unique<Thread>());
  block.warps.clear();
  block.warps.resize(size_t(launch_.threads / kLanes));
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.index = int(w);
    warp.block = &block;
    for (int lane = 0; lane < kLanes; ++lane) {
      Thread& thread = warp.lane(lane);
      thread.index = int(w) * kLanes + lane;
      thread.warp = &warp;
      thread.block = &block;
      thread.released.reset();
      thread.uncommitted.clear();
      thread.groups.clear();
      thread.fiber.start(thread_main, &thread);
    }
    wake(warp, kAllLanes);
  }
}

void Machine::thread_main(void* argument) {
  Thread& thread = *static_cast<Thread*>(argument);
  Machine& machine = instance();
  try {
    (*machine.kernel_)();
    machine.thread_exits(thread);
  } catch (...) {
    machine.error_ = std::current_exception();
  }
  thread.fiber.finish();
}

void Machine::thread_exits(Thread& thread) {
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  size_t copies = thread.uncommitted.size();
  for (const auto& group : thread.groups) copies += group.size();
  if (copies > 0) {
    thread.fail(Fault::kPendingCopy, "the thread returns with " + std::to_string(copies) +
                                         " copies under way; commit and wait for them");
  }
  warp.exited |= 1u << thread.lane();
  if (warp.exited == kAllLanes) warp.log.flush(places_);
  ++block.exited;
}

// ---- the scheduler -----------------------------------------------------------------------------

void Machine::schedule() {
  while (!error_) {
    if (active_.empty()) return report_deadlock();
    Thread& thread = pick();
    Block& block = *thread.block;
    current_ = &thread;
    thread.fiber.resume();
    if (block.exited == launch_.threads) {
      block.running = false;
      if (!to_start_.empty()) start_block(block);
    }
  }
}

Thread& Machine::pick() {
  if (!last_warp_ || random_.one_in(stickiness_)) {
    last_warp_ = active_[size_t(random_.below(int(active_.size())))];
  }
  Warp& warp = *last_warp_;
  // The first lane that can run, counted round from a random one.
  const uint32_t from = random_() % kLanes;
  const uint32_t turned = from ? warp.ready >> from | warp.ready << (kLanes - from) : warp.ready;
  const uint32_t lane = (from + uint32_t(__builtin_ctz(turned))) % kLanes;
  warp.ready &= ~(1u << lane);
  if (!warp.ready) {
    Warp* moved = active_.back();
    active_[size_t(warp.active_index)] = moved;
    moved->active_index = warp.active_index;
    active_.pop_back();
    warp.active_index = -1;
    last_warp_ = nullptr;
  }
  return warp.lane(int(lane));
}

void Machine::wake(Warp& warp, uint32_t lanes) {
  if (warp.active_index < 0) {
    warp.active_index = int(active_.size());
    active_.push_back(&warp);
  }
  warp.ready |= lanes;
}

// What threads do that cannot run: "threads 0-31 wait in sync_block at ...; threads 32-63 have returned".
std::string Machine::waiting_text(const Block& block) const {
  std::vector<std::pair<std::string, std::string>> groups;  // what they do, which threads
  const auto what = [&](int i) {
    const Thread& thread = *block.threads[size_t(i)];
    if (thread.warp->exited >> thread.lane() & 1) return std::string("have returned");
    return std::string("wait in ") + name(thread.op) + " at " + at(thread.place);
  };
  for (int first = 0, end; first < launch_.threads; first = end) {
    const std::string doing = what(first);
    for (end = first + 1; end < launch_.threads && what(end) == doing;) ++end;
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const auto& known) { return known.first == doing; });
    if (group == groups.end()) group = groups.insert(group, {doing, ""});
    group->second += (group->second.empty() ? " " : ", ") + std::to_string(first) +
                     (end > first + 1 ? "-" + std::to_string(end - 1) : "");
  }
  std::string text;
  for (const auto& group : groups) {
    text += (text.empty() ? "" : "; ") + ("threads" + group.second) + " " + group.first;
  }
  return text;
}

// No thread can run: either all blocks are done, or one waits for what never comes.
void Machine::report_deadlock() {
  current_ = nullptr;
  for (const auto& block : blocks_) {
    if (!block->running) continue;
    const auto waits = [](const auto& thread) {
      return !(thread->warp->exited >> thread->lane() & 1);
    };
    const Thread& first = **std::find_if(block->threads.begin(), block->threads.end(), waits);
    error_ = std::make_exception_ptr(Error(
        Fault::kDivergence,
        at(first.place) + ": " + launch_.kernel + ", block " + std::to_string(block->index) + ": " +
            name(Fault::kDivergence) + ": no thread can go on: " + waiting_text(*block),
        first.place, block->index, first.index));
    return;
  }
}

// ---- for instructions --------------------------------------------------------------------------

Thread& Machine::begin(Op op, Place place) {
  Thread& thread = current();
  thread.op = op;
  thread.place = place;
  thread.place_id = places_.find(place, op);
  if (++instructions_ > launch_.max_instructions) {
    thread.fail(Fault::kNoProgress,
                "more than " + std::to_string(launch_.max_instructions) +
                    " instructions; does the kernel wait for something that never comes?");
  }
  return thread;
}

void Machine::may_switch(Thread& thread) {
  if (!random_.one_in(16)) return;
  wake(*thread.warp, 1u << thread.lane());
  thread.fiber.suspend();
}

bool Machine::join_collective(Thread& thread) {
  Warp& warp = *thread.warp;
  if (warp.waiting) {
    const Thread& other = warp.lane(__builtin_ctz(warp.waiting));
    if (other.op != thread.op || !(other.place == thread.place)) {
      thread.fail(Fault::kDivergence,
                  "lane " + std::to_string(other.lane()) + " of the warp is in " + name(other.op) +
                      " at " + at(other.place) + "; all lanes must come to the same place");
    }
  }
  warp.waiting |= 1u << thread.lane();
  return warp.waiting == kAllLanes;
}

void Machine::count_collective(Thread& thread, int bank_conflicts) {
  PlaceStatistics& place = places_[thread.place_id];
  ++place.instructions;
  place.lanes += kLanes;
  place.bank_conflicts += uint64_t(bank_conflicts);
  thread.warp->log.flush(places_);
}

void Machine::sync_block(Thread& thread) {
  Block& block = *thread.block;
  log(thread, Space::kNone, 0, 0);
  if (block.arrived > 0 && !(block.barrier_place == thread.place)) {
    thread.fail(Fault::kDivergence,
                "others wait at another sync_block, " + at(block.barrier_place));
  }
  block.barrier_place = thread.place;
  if (++block.arrived == launch_.threads) {
    block.arrived = 0;
    advance(thread, block.epoch);
    for (Warp& warp : block.warps) {
      sync_warp(warp);
      warp.log.flush(places_);
      wake(warp, kAllLanes);
    }
  }
  thread.fiber.suspend();
}

void Machine::sync_warp(Warp& warp) {
  advance(warp.lane(0), warp.epoch);
  warp.released = order_.released(warp.block->index);
}

void Machine::advance(const Thread& thread, uint32_t& epoch) {
  if (epoch == kMaxEpoch) thread.fail(Fault::kNoProgress, "more than a million barriers");
  ++epoch;
}

void Machine::fence(Thread& thread) { thread.released = order_.fence(thread.block->index); }

void Machine::atomic(Thread& thread, const void* address) {
  // The thread's own fence or one before its last barrier, whichever is later: that one holds the other too.
  const int block = thread.block->index;
  const Clocks *own = thread.released.get(), *others = thread.warp->released.get();
  const bool own_is_later = own && (!others || (*own)[size_t(block)] >= (*others)[size_t(block)]);
  order_.atomic(block, address, own_is_later ? own : others);
}

}  // namespace simt
