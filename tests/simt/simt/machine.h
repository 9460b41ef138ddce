// The emulated GPU while a kernel runs: threads, warps, blocks, the scheduler. Instructions (ptx.h) are written
// against this file.
#pragma once
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/block_order.h"
#include "simt/error.h"
#include "simt/fiber.h"
#include "simt/global_memory.h"
#include "simt/shared_memory.h"
#include "simt/statistics.h"

namespace simt {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Launch {
  int grid = 1;      // blocks
  int threads = 32;  // of a block
  int shared_bytes = 0;
  uint64_t seed = 1;
  std::string kernel = "kernel";  // for messages
  // Blocks that are under way at once, switching at random; another one starts where one ends.
  int resident_blocks = 2;
  // Of threads. A kernel that spins on something that never comes is stopped here.
  uint64_t max_instructions = 100'000'000;
};

// Small and fast, for decisions of the scheduler.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t operator()() {  // a linear congruential generator's high bits, shifted by its top ones
    const uint64_t old = state_;
    state_ = old * 6364136223846793005u + 1442695040888963407u;
    const uint32_t mixed = uint32_t(((old >> 18) ^ old) >> 27), turn = uint32_t(old >> 59);
    return mixed >> turn | mixed << (-turn & 31);
  }
  int below(int n) { return int(uint64_t((*this)()) * uint64_t(n) >> 32); }
  bool one_in(int n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

struct Block;
struct Warp;

// A cp.async that has not landed.
struct Copy {
  uint32_t to;
  const uint8_t* from;
  int bytes;        // the rest of 16 is zero
  bool read_early;  // `data` was read from global memory when the copy was issued
  uint8_t data[16];
};

struct Thread {
  int index = 0;  // in its block
  Warp* warp = nullptr;
  Block* block = nullptr;
  Fiber fiber;

  // What it executes, for messages and statistics.
  Op op{};
  Place place;
  int place_id = 0;
  void* operands = nullptr;  // of the collective it waits in

  std::shared_ptr<const Clocks> released;  // what its fences pass on

  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;

  int lane() const { return index % kLanes; }
  [[noreturn]] void fail(Fault fault, const std::string& message) const;
};

struct Warp {
  int index = 0;  // in its block
  Block* block = nullptr;
  uint32_t ready = 0;    // lanes that can run
  uint32_t waiting = 0;  // lanes in a collective
  uint32_t exited = 0;
  uint32_t epoch = 1;     // grows with every sync_warp and sync_block
  int active_index = -1;  // in the scheduler's list
  AccessLog log;
  std::shared_ptr<const Clocks> released;  // what fences before its last barrier pass on

  Thread& lane(int lane) const;
};

struct Block {
  int index = 0;  // in the grid
  SharedMemory shared;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  bool running = false;
  int arrived = 0;  // threads in sync_block
  Place barrier_place;
  int exited = 0;
  uint32_t epoch = 1;  // grows with every sync_block
};

inline Thread& Warp::lane(int lane) const { return *block->threads[size_t(index * kLanes + lane)]; }

class Machine {
 public:
  static Machine& instance();

  Statistics run(const Launch& launch, const std::function<void()>& kernel);

  // ---- for instructions ----
  const Launch& launch() const { return launch_; }
  Random& random() { return random_; }
  PlaceTable& places() { return places_; }
  BlockOrder& order() { return order_; }

  Thread& current() {
    if (!current_) throw std::logic_error("an instruction outside of simt::launch");
    return *current_;
  }
  // The calling thread starts an instruction: every one begins so.
  Thread& begin(Op op, Place place);
  // One of a thread's own: counted here; `address` is what it touches, if anything.
  void log(Thread& thread, Space space, uint64_t address, int bytes) {
    thread.warp->log.add(places_, thread.place_id, space, thread.lane(), address, bytes);
  }
  // After an instruction that touches memory: perhaps another thread comes first with its next one.
  void may_switch(Thread& thread);
  // One that all lanes of the warp execute together: the last to come does it, by execute(lanes' operands).
  template <class Operands, class Execute>
  void collective(Thread& thread, Operands& operands, Execute execute);
  void sync_block(Thread& thread);
  void count_collective(Thread& thread, int bank_conflicts = 0);
  // Each warp's part of it too.
  void sync_warp(Warp& warp);
  void fence(Thread& thread);
  void atomic(Thread& thread, const void* address);

 private:
  void start_block(Block& block);
  void schedule();
  Thread& pick();
  static void thread_main(void* thread);
  void thread_exits(Thread& thread);
  bool join_collective(Thread& thread);
  void wake(Warp& warp, uint32_t lanes);
  static void advance(const Thread& thread, uint32_t& epoch);
  std::string waiting_text(const Block& block) const;
  void report_deadlock();

  Launch launch_;
  Random random_{1};
  const std::function<void()>* kernel_ = nullptr;
  PlaceTable places_;
  BlockOrder order_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<int> to_start_;  // indices of blocks, in random order
  std::vector<Warp*> active_;  // warps with lanes that can run
  Warp* last_warp_ = nullptr;
  int stickiness_ = 1;
  uint64_t instructions_ = 0;
  Thread* current_ = nullptr;
  std::exception_ptr error_;
};

template <class Operands, class Execute>
void Machine::collective(Thread& thread, Operands& operands, Execute execute) {
  thread.operands = &operands;
  Warp& warp = *thread.warp;
  if (join_collective(thread)) {
    Operands* all[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      all[lane] = static_cast<Operands*>(warp.lane(lane).operands);
    }
    execute(all, warp);
    warp.waiting = 0;
    wake(warp, kAllLanes);
  }
  thread.fiber.suspend();
}

}  // namespace simt
