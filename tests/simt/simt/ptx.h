// The functions of cuda/ptx/ptx.cuh on the emulated machine, one each, under the same names and with the same
// parameters; the last one, which callers leave out, is the place of the call.
//
// Sections are those of the PTX ISA 9.0.
#pragma once
#include <type_traits>

#include "simt/machine.h"
#include "simt/numbers.h"
#include "simt/types.h"

#define SK_PLACE ::simt::Place place = ::simt::Place::here()

namespace sk::ptx {

struct F16 {};
struct BF16 {};

namespace detail {

using simt::Fault;
using simt::GlobalMemory;
using simt::kLanes;
using simt::Machine;
using simt::Op;
using simt::Place;
using simt::Space;
using simt::Thread;
using simt::Warp;

inline Machine& machine() { return Machine::instance(); }
inline GlobalMemory& global() { return GlobalMemory::instance(); }
inline uint64_t number(const void* address) { return reinterpret_cast<uint64_t>(address); }

// ld and st take 1, 2, 4, 8 or 16 bytes.
template <class T>
constexpr bool is_access =
    std::is_trivially_copyable_v<T> &&
    (sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

template <class T>
T load_global(const T* address, GlobalMemory::Load load, Place place) {
  static_assert(is_access<T>);
  Thread& thread = machine().begin(Op::kLoadGlobal, place);
  T value;
  std::memcpy(&value, global().read(thread, address, sizeof(T), sizeof(T), load), sizeof(T));
  machine().log(thread, Space::kGlobal, number(address), sizeof(T));
  machine().may_switch(thread);
  return value;
}

// Two 16-bit elements as numbers.
template <class T>
float element(uint32_t bits) {
  return std::is_same_v<T, F16> ? simt::from_f16(uint16_t(bits)) : simt::from_bf16(uint16_t(bits));
}

inline uint32_t shuffle(uint32_t value, int from, Place place) {
  struct Operands {
    uint32_t value;
    int from;
  } operands{value, from};
  Thread& thread = machine().begin(Op::kShuffle, place);
  machine().collective(thread, operands, [&](Operands** lanes, Warp&) {
    uint32_t values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = lanes[lane]->value;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane]->value = values[lanes[lane]->from];
    machine().count_collective(thread);
  });
  return operands.value;
}

// Four 8x8 matrices; row r of matrix i lies at the address of lane 8 i + r.
inline void ldmatrix_x4(uint32_t (&to)[4], uint32_t address, Place place) {
  struct Operands {
    uint32_t* to;
    uint32_t address;
  } operands{to, address};
  Thread& thread = machine().begin(Op::kLdmatrix, place);
  machine().collective(thread, operands, [&](Operands** lanes, Warp& warp) {
    int conflicts = 0;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint64_t rows[kLanes] = {};
      for (int row = 0; row < 8; ++row) {
        const int giver = matrix * 8 + row;
        rows[row] = lanes[giver]->address;
        warp.block->shared.check(warp.lane(giver), lanes[giver]->address, 16);
        // The lane that receives the four bytes reads them.
        for (int quad = 0; quad < 4; ++quad) {
          const int receiver = row * 4 + quad;
          warp.block->shared.read(warp.lane(receiver), uint32_t(rows[row]) + uint32_t(quad) * 4,
                                  &lanes[receiver]->to[matrix], 4);
        }
      }
      conflicts += simt::bank_conflicts(0xff, rows, 16);
    }
    machine().count_collective(thread, conflicts);
  });
}

// Replaces what is there by change(it); returns what was there.
template <class T, class Change>
T atomic(Op op, T* address, Change change, Place place) {
  Thread& thread = machine().begin(op, place);
  machine().log(thread, Space::kNone, 0, 0);
  T old;
  std::memcpy(&old,
              global().read(thread, address, sizeof(T), sizeof(T), GlobalMemory::Load::kAtomic),
              sizeof(T));
  machine().atomic(thread, address);
  const T changed = change(old);
  std::memcpy(global().write(thread, address, sizeof(T), GlobalMemory::Store::kAtomic), &changed,
              sizeof(T));
  machine().may_switch(thread);
  return old;
}

}  // namespace detail

// ---- who am I ------------------------------------------------------------------------------------

SK_DEVICE int thread_index() { return detail::machine().current().index; }
SK_DEVICE int block_index() { return detail::machine().current().block->index; }
SK_DEVICE int block_count() { return detail::machine().launch().grid; }

// ---- synchronisation -----------------------------------------------------------------------------

SK_DEVICE void sync_block(SK_PLACE) {
  detail::machine().sync_block(detail::machine().begin(simt::Op::kSyncBlock, place));
}
SK_DEVICE void sync_warp(SK_PLACE) {
  simt::Thread& thread = detail::machine().begin(simt::Op::kSyncWarp, place);
  int no_operands = 0;
  detail::machine().collective(thread, no_operands, [&](int**, simt::Warp& warp) {
    detail::machine().sync_warp(warp);
    detail::machine().count_collective(thread);
  });
}
SK_DEVICE void fence_gpu(SK_PLACE) {
  simt::Thread& thread = detail::machine().begin(simt::Op::kFence, place);
  detail::machine().log(thread, simt::Space::kNone, 0, 0);
  detail::machine().fence(thread);
}
SK_DEVICE int atomic_add(int* address, int value, SK_PLACE) {
  return detail::atomic(
      simt::Op::kAtomicAdd, address, [&](int old) { return int(unsigned(old) + unsigned(value)); },
      place);
}
SK_DEVICE uint64_t atomic_min(uint64_t* address, uint64_t value, SK_PLACE) {
  return detail::atomic(
      simt::Op::kAtomicMin, address, [&](uint64_t old) { return value < old ? value : old; },
      place);
}
SK_DEVICE uint32_t shuffle_xor(uint32_t value, int lane_mask, SK_PLACE) {
  return detail::shuffle(value, (thread_index() ^ lane_mask) & (simt::kLanes - 1), place);
}
SK_DEVICE uint32_t shuffle(uint32_t value, int lane, SK_PLACE) {
  return detail::shuffle(value, lane & (simt::kLanes - 1), place);
}

// ---- memory --------------------------------------------------------------------------------------

template <class T>
SK_DEVICE T load_global(const T* address, SK_PLACE) {
  return detail::load_global(address, simt::GlobalMemory::Load::kPlain, place);
}
template <class T>
SK_DEVICE T load_global_nc(const T* address, SK_PLACE) {
  return detail::load_global(address, simt::GlobalMemory::Load::kNonCoherent, place);
}
template <class T>
SK_DEVICE T load_global_cg(const T* address, SK_PLACE) {
  return detail::load_global(address, simt::GlobalMemory::Load::kFromL2, place);
}
template <class T>
SK_DEVICE void store_global(T* address, T value, SK_PLACE) {
  static_assert(detail::is_access<T>);
  simt::Thread& thread = detail::machine().begin(simt::Op::kStoreGlobal, place);
  std::memcpy(detail::global().write(thread, address, sizeof(T), simt::GlobalMemory::Store::kPlain),
              &value, sizeof(T));
  detail::machine().log(thread, simt::Space::kGlobal, detail::number(address), sizeof(T));
  detail::machine().may_switch(thread);
}

SK_DEVICE uint32_t shared_base() { return detail::machine().current().block->shared.base(); }
template <class T>
SK_DEVICE T load_shared(uint32_t address, SK_PLACE) {
  static_assert(detail::is_access<T>);
  simt::Thread& thread = detail::machine().begin(simt::Op::kLoadShared, place);
  T value;
  thread.block->shared.read(thread, address, &value, sizeof(T));
  detail::machine().log(thread, simt::Space::kShared, address, sizeof(T));
  detail::machine().may_switch(thread);
  return value;
}
template <class T>
SK_DEVICE void store_shared(uint32_t address, T value, SK_PLACE) {
  static_assert(detail::is_access<T>);
  simt::Thread& thread = detail::machine().begin(simt::Op::kStoreShared, place);
  thread.block->shared.write(thread, address, &value, sizeof(T));
  detail::machine().log(thread, simt::Space::kShared, address, sizeof(T));
  detail::machine().may_switch(thread);
}

SK_DEVICE void cp_async_16(uint32_t to, const void* from, int bytes, SK_PLACE) {
  simt::Thread& thread = detail::machine().begin(simt::Op::kCpAsync, place);
  if (bytes < 0 || bytes > 16) {
    thread.fail(simt::Fault::kBadOperand, "reads 0 to 16 bytes, not " + std::to_string(bytes));
  }
  if (detail::number(from) % 16 != 0) {
    thread.fail(simt::Fault::kMisaligned, "needs a global address that is a multiple of 16, got " +
                                              detail::global().describe(from));
  }
  simt::Copy copy{to, nullptr, bytes, detail::machine().random().one_in(2), {}};
  if (bytes > 0) {
    copy.from = detail::global().read(thread, from, bytes, 16, simt::GlobalMemory::Load::kFromL2);
    detail::machine().log(thread, simt::Space::kGlobal, detail::number(from), bytes);
    if (copy.read_early) std::memcpy(copy.data, copy.from, size_t(bytes));
  }
  thread.block->shared.issue_copy(thread, to, 16);
  detail::machine().log(thread, simt::Space::kShared, to, 16);
  thread.uncommitted.push_back(copy);
  detail::machine().may_switch(thread);
}
SK_DEVICE void cp_async_16(uint32_t to, const void* from, SK_PLACE) {
  cp_async_16(to, from, 16, place);
}
SK_DEVICE void cp_async_commit(SK_PLACE) {
  simt::Thread& thread = detail::machine().begin(simt::Op::kCpAsyncCommit, place);
  detail::machine().log(thread, simt::Space::kNone, 0, 0);
  thread.groups.push_back(std::move(thread.uncommitted));
  thread.uncommitted.clear();
}
template <int kPending>
SK_DEVICE void cp_async_wait(SK_PLACE) {
  static_assert(kPending >= 0);
  simt::Thread& thread = detail::machine().begin(simt::Op::kCpAsyncWait, place);
  detail::machine().log(thread, simt::Space::kNone, 0, 0);
  while (int(thread.groups.size()) > kPending) {
    for (simt::Copy& copy : thread.groups.front()) {
      if (copy.bytes > 0 && !copy.read_early) std::memcpy(copy.data, copy.from, size_t(copy.bytes));
      thread.block->shared.land_copy(thread, copy.to, copy.data, 16);
    }
    thread.groups.pop_front();
  }
  detail::machine().may_switch(thread);
}

// ---- matrices of a warp --------------------------------------------------------------------------

SK_DEVICE void ldmatrix_x4(uint32_t (&to)[4], uint32_t address, SK_PLACE) {
  detail::ldmatrix_x4(to, address, place);
}

template <class T>
SK_DEVICE void mma_m16n8k16(float (&d)[4], const uint4& a, uint32_t b0, uint32_t b1, SK_PLACE) {
  struct Operands {
    float* d;
    uint32_t a[4], b[2];
  } operands{d, {a.x, a.y, a.z, a.w}, {b0, b1}};
  simt::Thread& thread = detail::machine().begin(simt::Op::kMma, place);
  detail::machine().collective(thread, operands, [&](Operands** lanes, simt::Warp&) {
    simt::WarpMatrices<16> m;
    for (int lane = 0; lane < simt::kLanes; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int r = 0; r < 8; ++r) {
        m.a[g + r / 2 % 2 * 8][q * 2 + r / 4 * 8 + r % 2] =
            detail::element<T>(lanes[lane]->a[r / 2] >> (r % 2 * 16));
      }
      for (int r = 0; r < 4; ++r) {
        m.b[q * 2 + r / 2 * 8 + r % 2][g] =
            detail::element<T>(lanes[lane]->b[r / 2] >> (r % 2 * 16));
      }
      m.load_d(lane, lanes[lane]->d);
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) m.add(row, m.a[row][k], k);
    }
    for (int lane = 0; lane < simt::kLanes; ++lane) m.store_d(lane, lanes[lane]->d);
    detail::machine().count_collective(thread);
  });
}

template <class T, int kSelector>
SK_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint4& a, const uint32_t (&b)[4],
                               uint32_t metadata, SK_PLACE) {
  static_assert(kSelector == 0 || kSelector == 1);
  struct Operands {
    float* d;
    uint32_t a[4], b[4], metadata;
  } operands{d, {a.x, a.y, a.z, a.w}, {b[0], b[1], b[2], b[3]}, metadata};
  simt::Thread& thread = detail::machine().begin(simt::Op::kMmaSp, place);
  detail::machine().collective(thread, operands, [&](Operands** lanes, simt::Warp& warp) {
    simt::WarpMatrices<32> m;
    for (int lane = 0; lane < simt::kLanes; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int r = 0; r < 8; ++r) {
        m.a[g + r / 2 % 2 * 8][q * 2 + r / 4 * 8 + r % 2] =
            detail::element<T>(lanes[lane]->a[r / 2] >> (r % 2 * 16));
        m.b[q * 2 + r / 2 * 8 + r % 2][g] =
            detail::element<T>(lanes[lane]->b[r / 2] >> (r % 2 * 16));
      }
      m.load_d(lane, lanes[lane]->d);
    }
    for (int row = 0; row < 16; ++row) {
      for (int group = 0; group < 8; ++group) {  // of four columns, two of them kept
        const int giver = row % 8 * 4 + kSelector * 2 + group / 4;
        const uint32_t half = lanes[giver]->metadata >> (row / 8 * 16);
        const uint32_t nibble = half >> (group % 4 * 4) & 15;
        const int first = int(nibble & 3), second = int(nibble >> 2);
        if (first >= second) {
          warp.lane(giver).fail(simt::Fault::kBadOperand,
                                "metadata keeps positions " + std::to_string(first) + " and " +
                                    std::to_string(second) + " of row " + std::to_string(row) +
                                    ", columns " + std::to_string(group * 4) + " to " +
                                    std::to_string(group * 4 + 3) + "; the second must be greater");
        }
        m.add(row, m.a[row][group * 2], group * 4 + first);
        m.add(row, m.a[row][group * 2 + 1], group * 4 + second);
      }
    }
    for (int lane = 0; lane < simt::kLanes; ++lane) m.store_d(lane, lanes[lane]->d);
    detail::machine().count_collective(thread);
  });
}

// ---- numbers -------------------------------------------------------------------------------------

template <class T>
SK_DEVICE uint32_t pack2(float first, float second) {
  if constexpr (std::is_same_v<T, F16>) {
    return simt::to_f16(first) | uint32_t(simt::to_f16(second)) << 16;
  } else {
    return simt::to_bf16(first) | uint32_t(simt::to_bf16(second)) << 16;
  }
}
template <class T>
SK_DEVICE float2 unpack2(uint32_t bits) {
  return {detail::element<T>(bits), detail::element<T>(bits >> 16)};
}

}  // namespace sk::ptx

#undef SK_PLACE
