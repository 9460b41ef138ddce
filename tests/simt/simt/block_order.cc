#include "simt/block_order.h"

#include <algorithm>

namespace simt {
namespace {

void join(Clocks& to, const Clocks& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

}  // namespace

void BlockOrder::reset(int blocks) {
  blocks_.assign(size_t(blocks), BlockClocks());
  atomics_.clear();
}

std::shared_ptr<const Clocks> BlockOrder::fence(int block) {
  BlockClocks& self = blocks_[size_t(block)];
  join(self.fenced, self.heard);
  if (self.released && !self.wrote) return self.released;
  Clocks passed = self.heard;
  if (passed.size() <= size_t(block)) passed.resize(size_t(block) + 1);
  passed[size_t(block)] = self.now++;
  self.wrote = false;
  return self.released = std::make_shared<const Clocks>(std::move(passed));
}

void BlockOrder::atomic(int block, const void* address, const Clocks* release) {
  Clocks& passed_on = atomics_[address];
  hear(block, address);
  if (release) join(passed_on, *release);
}

void BlockOrder::hear(int block, const void* address) {
  const auto atomic = atomics_.find(address);
  if (atomic == atomics_.end()) return;
  BlockClocks& self = blocks_[size_t(block)];
  join(self.heard, atomic->second);
  self.wrote = true;  // what it heard is to be passed on too
}

bool BlockOrder::ordered(int writer, uint32_t clock, int block, bool from_l2) const {
  if (writer == block) return true;
  const Clocks& known = from_l2 ? blocks_[size_t(block)].heard : blocks_[size_t(block)].fenced;
  return size_t(writer) < known.size() && known[size_t(writer)] >= clock;
}

}  // namespace simt
