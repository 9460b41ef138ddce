// mma, mma.sp and ldmatrix against the fragment tables of the PTX ISA: matrices are built as plain arrays, their
// elements put where the tables say, and the result compared with a plain product. Small integers: exact in any order.
#include <array>
#include <limits>
#include <random>

#include "check.h"
#include "cuda/ptx/ptx.cuh"

namespace ptx = sk::ptx;

namespace {

std::mt19937 engine(1);
int random_below(int n) { return int(engine() % unsigned(n)); }

// Of small integers.
template <class T>
uint16_t bits_of(float value) {
  return uint16_t(ptx::pack2<T>(value, 0));
}

template <size_t kRows, size_t kColumns>
using Matrix = std::array<std::array<float, kColumns>, kRows>;

template <size_t kRows, size_t kColumns>
Matrix<kRows, kColumns> random_matrix() {
  Matrix<kRows, kColumns> m;
  for (auto& row : m) {
    for (float& value : row) value = float(random_below(9) - 4);
  }
  return m;
}

template <size_t kDepth>
Matrix<16, 8> product(const Matrix<16, kDepth>& a, const Matrix<kDepth, 8>& b,
                      const Matrix<16, 8>& c) {
  Matrix<16, 8> d = c;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (size_t k = 0; k < kDepth; ++k) d[i][j] += a[i][k] * b[k][j];
    }
  }
  return d;
}

// What each lane holds. Elements a0 to a7 are two in a register, the first in the low half; so are those of b.
struct Fragments {
  std::vector<uint4> a = std::vector<uint4>(32);
  std::vector<uint32_t> b = std::vector<uint32_t>(32 * 4), metadata = std::vector<uint32_t>(32);
  std::vector<float4> d = std::vector<float4>(32);

  void set_a(int lane, int i, uint16_t bits) {
    uint32_t registers[4];
    std::memcpy(registers, &a[lane], 16);
    registers[i / 2] |= uint32_t(bits) << (i % 2 * 16);
    std::memcpy(&a[lane], registers, 16);
  }
  void set_b(int lane, int i, uint16_t bits) {
    b[lane * 4 + i / 2] |= uint32_t(bits) << (i % 2 * 16);
  }
};

// 9.7.14.5.8, figure of the accumulators of m16n8k16: c0 and c1 lie in row groupID, c2 and c3 eight rows below;
// the column is threadID_in_group * 2 + (i & 1).
template <class Visit>
void for_accumulators(const Visit& visit) {
  for (int lane = 0; lane < 32; ++lane) {
    const int group_id = lane >> 2, thread_in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      visit(lane, i, i < 2 ? group_id : group_id + 8, thread_in_group * 2 + (i & 1));
    }
  }
}

void put_d(Fragments& f, const Matrix<16, 8>& d) {
  for_accumulators(
      [&](int lane, int i, int row, int column) { (&f.d[lane].x)[i] = d[row][column]; });
}

bool equals(const std::vector<float4>& fragments, const Matrix<16, 8>& d) {
  bool equal = true;
  for_accumulators([&](int lane, int i, int row, int column) {
    equal = equal && (&fragments[lane].x)[i] == d[row][column];
  });
  return equal;
}

// 9.7.14.5.8, figure of matrix A of m16n8k16: row groupID for a0, a1, a4, a5 and groupID + 8 for the others,
// column threadID_in_group * 2 + (i & 1), and 8 more from a4 on.
template <class Visit>
void for_a(const Visit& visit) {
  for (int lane = 0; lane < 32; ++lane) {
    const int group_id = lane >> 2, thread_in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
      visit(lane, i, upper ? group_id : group_id + 8,
            thread_in_group * 2 + (i & 1) + (i < 4 ? 0 : 8));
    }
  }
}

// The same section's figure of matrix B, and 9.7.14.6.2.2's of the sparse m16n8k32, which goes on in the same way:
// row threadID_in_group * 2 + (i & 1), 8 more with every register; column groupID.
template <class T, size_t kDepth>
void put_b(Fragments& f, const Matrix<kDepth, 8>& b) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < int(kDepth) / 4; ++i) {
      f.set_b(lane, i, bits_of<T>(b[lane % 4 * 2 + (i & 1) + i / 2 * 8][lane >> 2]));
    }
  }
}

template <class T>
__global__ void dense(const uint4* a, const uint32_t* b, float4* d) {
  const int lane = ptx::thread_index();
  const float4 c = ptx::load_global(d + lane);
  float sums[4] = {c.x, c.y, c.z, c.w};
  ptx::mma_m16n8k16<T>(sums, ptx::load_global(a + lane), ptx::load_global(b + lane * 4),
                       ptx::load_global(b + lane * 4 + 1));
  ptx::store_global(d + lane, float4{sums[0], sums[1], sums[2], sums[3]});
}

template <class T, int kSelector>
__global__ void sparse(const uint4* a, const uint32_t* b, const uint32_t* metadata, float4* d) {
  const int lane = ptx::thread_index();
  const float4 c = ptx::load_global(d + lane);
  float sums[4] = {c.x, c.y, c.z, c.w};
  uint32_t b_registers[4];
  for (int i = 0; i < 4; ++i) b_registers[i] = ptx::load_global(b + lane * 4 + i);
  ptx::mma_sp_m16n8k32<T, kSelector>(sums, ptx::load_global(a + lane), b_registers,
                                     ptx::load_global(metadata + lane));
  ptx::store_global(d + lane, float4{sums[0], sums[1], sums[2], sums[3]});
}

template <class T>
void test_dense() {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    const auto a = random_matrix<16, 16>();
    const auto b = random_matrix<16, 8>();
    const auto c = random_matrix<16, 8>();
    Fragments f;
    for_a([&](int lane, int i, int row, int column) {
      f.set_a(lane, i, bits_of<T>(a[row][column]));
    });
    put_b<T>(f, b);
    put_d(f, c);
    const auto a_buffer = simt::Buffer<uint4>::input("a", f.a);
    const auto b_buffer = simt::Buffer<uint32_t>::input("b", f.b);
    auto d_buffer = simt::Buffer<float4>::in_out("d", f.d);
    simt::launch(launch_of(1, 32, 0, seed), dense<T>, a_buffer.data(), b_buffer.data(),
                 d_buffer.data());
    CHECK(equals(d_buffer.values(), product(a, b, c)));
  }
}

// A 16x32 matrix with two of every four columns kept: the kept values, and their positions.
struct Sparse {
  Matrix<16, 16> kept;
  std::array<std::array<int, 16>, 16> position;  // 0 to 3, in the group of four

  Matrix<16, 32> dense() const {
    Matrix<16, 32> m{};
    for (int row = 0; row < 16; ++row) {
      for (int i = 0; i < 16; ++i) m[row][i / 2 * 4 + position[row][i]] = kept[row][i];
    }
    return m;
  }
};

constexpr int kPairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};

// 9.7.14.6.2.2, figures of matrix A and of the metadata of the sparse m16n8k32 with .f16 and .bf16, and 9.7.14.6.1:
// a_i and its neighbour are the kept two of columns threadID_in_group * 4 to + 3 (from a4 on: 16 more), that is, the
// kept values lie as a dense m16n8k16 has its columns. The metadata come from a pair of lanes of each four, T0 and T1
// for selector 0, T2 and T3 for 1: columns 0 to 15 from the first, 16 to 31 from the second; row groupID in bits
// 0 to 15 and row groupID + 8 in bits 16 to 31; four bits for each four columns, two for each position.
template <class T>
Fragments fragments_of(const Sparse& a, int selector) {
  Fragments f;
  for_a([&](int lane, int i, int row, int column) {
    const int chunk = lane % 4 * 4 + (i < 4 ? 0 : 16);
    CHECK(column / 2 * 4 == chunk);
    f.set_a(lane, i, bits_of<T>(a.kept[row][column]));
  });
  for (int lane = 0; lane < 32; ++lane)
    f.metadata[lane] = 0xffffffffu;  // of the other pair: not looked at
  for (int row = 0; row < 16; ++row) {
    for (int half = 0; half < 2; ++half) {
      uint32_t bits = 0;
      for (int i = 0; i < 8; ++i) bits |= uint32_t(a.position[row][half * 8 + i]) << (i * 2);
      uint32_t& metadata = f.metadata[row % 8 * 4 + selector * 2 + half];
      metadata = row < 8 ? (metadata & 0xffff0000u) | bits : (metadata & 0xffffu) | bits << 16;
    }
  }
  return f;
}

template <class T, int kSelector>
std::vector<float4> run_sparse(const Fragments& f, uint64_t seed = 1) {
  const auto a = simt::Buffer<uint4>::input("a", f.a);
  const auto b = simt::Buffer<uint32_t>::input("b", f.b);
  const auto metadata = simt::Buffer<uint32_t>::input("metadata", f.metadata);
  auto d = simt::Buffer<float4>::in_out("d", f.d);
  simt::launch(launch_of(1, 32, 0, seed), sparse<T, kSelector>, a.data(), b.data(), metadata.data(),
               d.data());
  return d.values();
}

template <class T, int kSelector>
void test_sparse() {
  // pair 0 to 5: everywhere the same; then random ones.
  for (int pair = 0; pair < 26; ++pair) {
    Sparse a{random_matrix<16, 16>(), {}};
    for (auto& row : a.position) {
      for (int i = 0; i < 16; i += 2) {
        const int* positions = kPairs[pair < 6 ? pair : random_below(6)];
        row[i] = positions[0];
        row[i + 1] = positions[1];
      }
    }
    const auto b = random_matrix<32, 8>();
    const auto c = random_matrix<16, 8>();
    Fragments f = fragments_of<T>(a, kSelector);
    put_b<T>(f, b);
    put_d(f, c);
    CHECK(equals(run_sparse<T, kSelector>(f, uint64_t(pair)), product(a.dense(), b, c)));
  }
}

// Rows of b that nothing kept meets are not multiplied, not even by zero.
void test_dropped_columns_do_not_count() {
  Sparse a{random_matrix<16, 16>(), {}};
  for (auto& row : a.position) {
    for (int i = 0; i < 16; ++i) row[i] = i % 2;
  }
  auto b = random_matrix<32, 8>();
  Matrix<32, 8> hostile = b;
  for (int k = 0; k < 32; ++k) {
    if (k % 4 >= 2) hostile[k].fill(std::numeric_limits<float>::infinity());
  }
  Fragments f = fragments_of<ptx::F16>(a, 0);
  put_b<ptx::F16>(f, hostile);
  CHECK(equals(run_sparse<ptx::F16, 0>(f), product(a.dense(), b, Matrix<16, 8>{})));
}

template <int kSelector>
void test_illegal_metadata() {
  for (int nibble = 0; nibble < 16; ++nibble) {
    const int first = nibble & 3, second = nibble >> 2;
    Sparse a{random_matrix<16, 16>(), {}};
    for (auto& row : a.position) {
      for (int i = 0; i < 16; ++i) row[i] = i % 2;
    }
    const int row = random_below(16), group = random_below(8);
    a.position[row][group * 2] = first;
    a.position[row][group * 2 + 1] = second;
    const Fragments f = fragments_of<ptx::BF16>(a, kSelector);
    if (first < second) {
      run_sparse<ptx::BF16, kSelector>(f);
      continue;
    }
    const std::string text = "positions " + std::to_string(first) + " and " +
                             std::to_string(second) + " of row " + std::to_string(row) +
                             ", columns " + std::to_string(group * 4) + " to ";
    CHECK_FAULT((run_sparse<ptx::BF16, kSelector>(f)), simt::Fault::kBadOperand, text);
  }
}

// Products of two 11-bit numbers have 22 bits, more than a 16-bit element and less than a float.
void test_products_are_exact() {
  Fragments f;
  const float value = 1 + 0x1p-10f;
  for_a([&](int lane, int i, int, int column) {
    f.set_a(lane, i, column == 3 ? bits_of<ptx::F16>(value) : 0);
  });
  Matrix<16, 8> b{};
  b[3].fill(value);
  put_b<ptx::F16>(f, b);
  const auto a_buffer = simt::Buffer<uint4>::input("a", f.a);
  const auto b_buffer = simt::Buffer<uint32_t>::input("b", f.b);
  auto d_buffer = simt::Buffer<float4>::in_out("d", f.d);
  simt::launch(launch_of(1, 32, 0), dense<ptx::F16>, a_buffer.data(), b_buffer.data(),
               d_buffer.data());
  for (const float4& d : d_buffer.values()) CHECK(d.x == value * value && d.w == value * value);
}

// 9.7.14.5.15, figure of the fragment of one 8x8 matrix: lane l holds elements 2 (l % 4) and the next of row l / 4.
// Its rows lie anywhere: row r of matrix i at the address that lane 8 i + r gives.
__global__ void load_matrices(const uint16_t* elements, const int* row_at, uint4* four) {
  const int lane = ptx::thread_index();
  const uint32_t base = ptx::shared_base();
  for (int i = lane; i < 32 * 8; i += 32)
    ptx::store_shared(base + uint32_t(i) * 2, ptx::load_global(elements + i));
  ptx::sync_warp();
  const uint32_t address = base + uint32_t(ptx::load_global(row_at + lane)) * 16;
  uint32_t to[4];
  ptx::ldmatrix_x4(to, address);
  ptx::store_global(four + lane, uint4{to[0], to[1], to[2], to[3]});
}

void test_ldmatrix() {
  std::vector<uint16_t> elements(32 * 8);
  for (size_t i = 0; i < elements.size(); ++i) elements[i] = uint16_t(i * 257);
  std::vector<int> row_at(32);
  for (int i = 0; i < 32; ++i) row_at[i] = i * 11 % 32;
  const auto element_buffer = simt::Buffer<uint16_t>::input("elements", elements);
  const auto row_buffer = simt::Buffer<int>::input("row_at", row_at);
  auto four = simt::Buffer<uint4>::output("four", 32);
  simt::launch(launch_of(1, 32, 512), load_matrices, element_buffer.data(), row_buffer.data(),
               four.data());
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint16_t* row = &elements[size_t(row_at[matrix * 8 + lane / 4] * 8)];
      const uint32_t expected = row[lane % 4 * 2] | uint32_t(row[lane % 4 * 2 + 1]) << 16;
      CHECK((&four[lane].x)[matrix] == expected);
    }
  }
}

}  // namespace

int main() {
  test_dense<ptx::F16>();
  test_dense<ptx::BF16>();
  test_sparse<ptx::F16, 0>();
  test_sparse<ptx::F16, 1>();
  test_sparse<ptx::BF16, 0>();
  test_sparse<ptx::BF16, 1>();
  test_dropped_columns_do_not_count();
  test_illegal_metadata<0>();
  test_illegal_metadata<1>();
  test_products_are_exact();
  test_ldmatrix();
}
