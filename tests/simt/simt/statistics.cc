#include "simt/statistics.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {
namespace {

bool has(uint32_t lanes, int lane) { return lanes >> lane & 1; }

int count(uint32_t lanes) { return __builtin_popcount(lanes); }

template <class Get>
uint64_t sum(const std::vector<PlaceStatistics>& places, Get get) {
  uint64_t total = 0;
  for (const PlaceStatistics& place : places) total += get(place);
  return total;
}

}  // namespace

const char* name(Op op) {
  switch (op) {
    case Op::kSyncBlock:
      return "sync_block";
    case Op::kSyncWarp:
      return "sync_warp";
    case Op::kFence:
      return "fence_gpu";
    case Op::kAtomicAdd:
      return "atomic_add";
    case Op::kAtomicMin:
      return "atomic_min";
    case Op::kShuffle:
      return "shuffle";
    case Op::kLoadGlobal:
      return "load_global";
    case Op::kStoreGlobal:
      return "store_global";
    case Op::kLoadShared:
      return "load_shared";
    case Op::kStoreShared:
      return "store_shared";
    case Op::kCpAsync:
      return "cp_async_16";
    case Op::kCpAsyncCommit:
      return "cp_async_commit";
    case Op::kCpAsyncWait:
      return "cp_async_wait";
    case Op::kLdmatrix:
      return "ldmatrix";
    case Op::kMma:
      return "mma_m16n8k16";
    case Op::kMmaSp:
      return "mma_sp_m16n8k32";
  }
  return "";
}

uint64_t Statistics::instructions() const {
  return sum(places, [](const auto& p) { return p.instructions; });
}
uint64_t Statistics::instructions(Op op) const {
  return sum(places, [op](const auto& p) { return p.op == op ? p.instructions : 0; });
}
uint64_t Statistics::bank_conflicts() const {
  return sum(places, [](const auto& p) { return p.bank_conflicts; });
}
uint64_t Statistics::bank_conflicts(Op op) const {
  return sum(places, [op](const auto& p) { return p.op == op ? p.bank_conflicts : 0; });
}
uint64_t Statistics::global_bytes_read() const {
  return sum(places, [](const auto& p) { return p.op == Op::kStoreGlobal ? 0 : p.global_bytes; });
}
uint64_t Statistics::global_bytes_written() const {
  return sum(places, [](const auto& p) { return p.op == Op::kStoreGlobal ? p.global_bytes : 0; });
}
uint64_t Statistics::sectors(Op op) const {
  return sum(places, [op](const auto& p) { return p.op == op ? p.sectors : 0; });
}

std::string Statistics::report() const {
  std::vector<PlaceStatistics> sorted = places;
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return a.bank_conflicts > b.bank_conflicts;
  });
  std::string text = "  instructions  conflicts  global bytes  bytes/sector\n";
  for (const PlaceStatistics& p : sorted) {
    const char* slash = std::strrchr(p.place.file, '/');
    char line[256];
    std::snprintf(line, sizeof line, "%14llu %10llu %13llu %13.1f  %s %s:%d\n",
                  static_cast<unsigned long long>(p.instructions),
                  static_cast<unsigned long long>(p.bank_conflicts),
                  static_cast<unsigned long long>(p.global_bytes),
                  p.sectors ? double(p.global_bytes) / double(p.sectors) : 0.0, name(p.op),
                  slash ? slash + 1 : p.place.file, p.place.line);
    text += line;
  }
  return text;
}

// ---- places ------------------------------------------------------------------------------------

PlaceTable::PlaceTable() : slots_(64, Slot{nullptr, 0, Op::kSyncBlock, -1}) {}

int PlaceTable::find(Place place, Op op) {
  const size_t mask = slots_.size() - 1;
  size_t i =
      (reinterpret_cast<size_t>(place.file) ^ size_t(place.line) * 0x9e3779b1u ^ size_t(op) * 97) &
      mask;
  for (;; i = (i + 1) & mask) {
    const Slot& slot = slots_[i];
    if (slot.id < 0) break;
    if (slot.line == place.line && slot.file == place.file && slot.op == op) return slot.id;
  }
  const int id = int(places_.size());
  slots_[i] = {place.file, place.line, op, id};
  places_.emplace_back();
  places_.back().place = place;
  places_.back().op = op;
  if (places_.size() * 2 > slots_.size()) grow();
  return id;
}

void PlaceTable::grow() {
  std::vector<Slot> old(slots_.size() * 2, Slot{nullptr, 0, Op::kSyncBlock, -1});
  old.swap(slots_);
  const size_t mask = slots_.size() - 1;
  for (const Slot& slot : old) {
    if (slot.id < 0) continue;
    size_t i = (reinterpret_cast<size_t>(slot.file) ^ size_t(slot.line) * 0x9e3779b1u ^
                size_t(slot.op) * 97) &
               mask;
    while (slots_[i].id >= 0) i = (i + 1) & mask;
    slots_[i] = slot;
  }
}

std::vector<PlaceStatistics> PlaceTable::take() const { return {places_.begin(), places_.end()}; }

// ---- a warp's accesses -------------------------------------------------------------------------

int bank_conflicts(uint32_t lanes, const uint64_t (&address)[32], int bytes) {
  // 32 banks of 4 bytes serve 128 bytes a cycle: 8-byte accesses go by half warps, 16-byte ones by quarters.
  const int words = std::max(1, bytes / 4), lanes_a_cycle = 32 / words;
  int extra = 0;
  for (int first = 0; first < 32; first += lanes_a_cycle) {
    uint64_t in_bank[32][32];
    int used[32] = {}, worst = 1;
    for (int lane = first; lane < first + lanes_a_cycle; ++lane) {
      if (!has(lanes, lane)) continue;
      for (int i = 0; i < words; ++i) {
        const uint64_t word = address[lane] / 4 + uint64_t(i);
        const size_t bank = word % 32;
        uint64_t* const end = in_bank[bank] + used[bank];
        if (std::find(in_bank[bank], end, word) != end)
          continue;  // one read serves all who want the word
        *end = word;
        worst = std::max(worst, ++used[bank]);
      }
    }
    extra += worst - 1;
  }
  return extra;
}

void AccessLog::add(PlaceTable& places, int id, Space space, int lane, uint64_t address,
                    int bytes) {
  const size_t index = size_t(id) * 2 + (space == Space::kGlobal);
  if (per_place_.size() <= index) per_place_.resize(index + 8);
  PerPlace& log = per_place_[index];
  if (!log.dirty) {
    log.dirty = true;
    dirty_.push_back(int(index));
  }
  const size_t position = log.count[lane]++ - log.done;
  if (position >= log.groups.size()) log.groups.resize(position + 1);
  Group& group = log.groups[position];
  group.lanes |= 1u << lane;
  group.address[lane] = address;
  group.bytes = bytes;
  group.total_bytes += uint64_t(bytes);
  while (!log.groups.empty() && log.groups.front().lanes == ~0u) {
    account(places[id], space, log.groups.front());
    log.groups.pop_front();
    ++log.done;
  }
}

void AccessLog::flush(PlaceTable& places) {
  for (int index : dirty_) {
    PerPlace& log = per_place_[size_t(index)];
    for (const Group& group : log.groups) {
      account(places[index / 2], index % 2 ? Space::kGlobal : Space::kShared, group);
    }
    log.groups.clear();
    std::fill(std::begin(log.count), std::end(log.count), 0u);
    log.done = 0;
    log.dirty = false;
  }
  dirty_.clear();
}

void AccessLog::account(PlaceStatistics& place, Space space, const Group& group) {
  if (space == Space::kGlobal) {
    uint64_t sectors[32];
    int n = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (has(group.lanes, lane)) sectors[n++] = group.address[lane] / 32;
    }
    std::sort(sectors, sectors + n);
    place.sectors += uint64_t(std::unique(sectors, sectors + n) - sectors);
    place.global_bytes += group.total_bytes;
    if (place.op == Op::kCpAsync) return;  // counted by its side in shared memory
  } else if (group.bytes > 0) {
    place.bank_conflicts += uint64_t(bank_conflicts(group.lanes, group.address, group.bytes));
  }
  ++place.instructions;
  place.lanes += uint64_t(count(group.lanes));
}

}  // namespace simt
