// Packing and unpacking on the device: every byte is the one that sk_pack writes.
#include "../cpp/support.h"
#include "cuda/pack_nm_mma_sp.cuh"
#include "simt/simt.h"

using namespace test;

namespace {

constexpr int64_t kSectionStart = 128;  // of the values of nm_mma_sp in a packed buffer
constexpr uint16_t kGap = 0x5555;       // between the rows

struct Shape {
  int64_t n, k;
};
// One unit, its edges, several blocks down and across, and groups that k cuts at each place.
constexpr Shape kShapes[] = {{16, 64}, {1, 1},   {5, 3},    {17, 66},  {33, 127},
                             {8, 512}, {40, 65}, {20, 583}, {16, 1032}};

// Where rows start: from 16-byte loads everywhere to none. In elements, and for masks in bytes.
struct Place {
  int64_t offset, gap;
};
constexpr Place kPlaces[] = {{0, 0}, {0, 5}, {3, 0}, {8, 8}};

// A matrix of bits somewhere in a larger array, on the host.
template <class T>
struct Strided {
  int64_t n, k, offset, stride;
  std::vector<T> all;

  Strided(int64_t n_, int64_t k_, Place place, T gap)
      : n(n_),
        k(k_),
        offset(place.offset),
        // Whole vectors a row where the place is meant for them.
        stride(place.offset % 8 || place.gap % 8 ? k_ + place.gap : (k_ + 7) / 8 * 8 + place.gap),
        all(size_t(offset + (n_ - 1) * stride + k_), gap) {}
  T& at(int64_t row, int64_t col) { return all[size_t(offset + row * stride + col)]; }
  const T& at(int64_t row, int64_t col) const { return all[size_t(offset + row * stride + col)]; }
};

struct Problem {
  sk_pattern pattern;
  int32_t dtype;
  Strided<uint16_t> weight;
  Strided<uint8_t> mask;

  Problem(const sk_pattern& pattern_, int32_t dtype_, Shape shape, Place place)
      : pattern(pattern_),
        dtype(dtype_),
        weight(shape.n, shape.k, place, kGap),
        mask(shape.n, shape.k, place, 1) {}
  int64_t n() const { return weight.n; }
  int64_t k() const { return weight.k; }
  void name_context(const char* test, int seed) const {
    context = std::string(test) + " " + name(pattern) + " " + dtype_name(dtype) +
              " n=" + std::to_string(n()) + " k=" + std::to_string(k()) +
              " stride=" + std::to_string(weight.stride) +
              " offset=" + std::to_string(weight.offset) + " seed=" + std::to_string(seed);
  }
};

Canonical canonical_of(const Problem& p) {
  std::vector<uint8_t> mask;
  for (int64_t i = 0; i < p.n() * p.k(); ++i) mask.push_back(p.mask.at(i / p.k(), i % p.k()));
  Canonical canonical(p.pattern, p.dtype, p.n(), p.k(), 0);
  CHECK_OK(sk_compress(&p.weight.at(0, 0), p.weight.stride, mask.data(), &canonical.weight));
  return canonical;
}

simt::Launch launch_of(const Problem& p, const char* kernel, int seed) {
  simt::Launch launch;
  launch.grid = int(sk::sp_grid(p.n(), p.k()));
  launch.threads = sk::kSpThreads;
  launch.seed = uint64_t(seed);
  launch.kernel = kernel;
  return launch;
}

struct Packed {
  simt::Buffer<uint8_t> units;
  uint64_t misfit;
  simt::Statistics statistics;
};

template <sk::SpMask kMask>
Packed pack_on_device(const Problem& p, int seed) {
  const int64_t bytes = (p.n() + 15) / 16 * ((p.k() + 63) / 64) * 1152;
  Packed packed{simt::Buffer<uint8_t>::output("units", size_t(bytes)), 0, {}};
  const auto weight = simt::Buffer<uint16_t>::input("weight", p.weight.all);
  const auto mask = simt::Buffer<uint8_t>::input("mask", p.mask.all);
  auto misfit = simt::Buffer<uint64_t>::in_out("misfit", {sk::kSpFits});
  sk::SpPackArgs args{};
  args.weight = weight.data() + p.weight.offset;
  args.weight_stride = p.weight.stride;
  if (kMask == sk::SpMask::kGiven) {
    args.mask = mask.data() + p.mask.offset;
    args.mask_stride = p.mask.stride;
  }
  args.n = p.n(), args.k = p.k();
  args.vector = p.pattern.vector;
  args.units = packed.units.data();
  if (kMask != sk::SpMask::kMagnitude) args.misfit = misfit.data();
  packed.statistics =
      simt::launch(launch_of(p, "sp_pack_kernel", seed), sk::sp_pack_kernel<kMask>, args);
  packed.misfit = misfit[0];
  return packed;
}

// Packs p by its mask in the way kMask says, which comes to the same, and back. Returns what the
// packing and the unpacking did.
template <sk::SpMask kMask>
std::pair<simt::Statistics, simt::Statistics> check_pack(const Problem& p, int seed) {
  const Canonical canonical = canonical_of(p);
  const Buffer expected = pack(canonical, "nm_mma_sp");
  const Packed packed = pack_on_device<kMask>(p, seed);
  CHECK(packed.misfit == sk::kSpFits);
  CHECK(int64_t(packed.units.size()) == expected.bytes() - kSectionStart);
  for (size_t i = 0; i < packed.units.size(); ++i) {
    if (packed.units[i] != expected.data()[kSectionStart + int64_t(i)]) {
      fail(__FILE__, __LINE__, "byte " + std::to_string(i) + " of the units is another");
    }
  }

  Strided<uint16_t> back(p.n(), p.k(), {p.weight.offset, p.weight.stride - p.k()}, kGap);
  const auto units = simt::Buffer<uint8_t>::input("units", packed.units.values());
  auto weight = simt::Buffer<uint16_t>::in_out("weight", back.all);
  const sk::SpUnpackArgs args{units.data(), p.n(), p.k(), weight.data() + back.offset, back.stride};
  const simt::Statistics unpacking =
      simt::launch(launch_of(p, "sp_unpack_kernel", seed), sk::sp_unpack_kernel, args);
  CHECK_OK(sk_decompress(&canonical.weight, &back.at(0, 0), back.stride));
  CHECK(weight.values() == back.all);  // nothing between the rows was touched
  return {packed.statistics, unpacking};
}

void fill_bits(Problem& p, Random& random) {
  for (int64_t i = 0; i < p.n() * p.k(); ++i) {
    p.weight.at(i / p.k(), i % p.k()) = uint16_t(random.bits());
  }
}

void test_given_masks() {
  Random random(1);
  int seed = 0;
  for (int vector : {1, 4, 8, 16}) {
    for (const Shape& shape : kShapes) {
      for (const Place& place : kPlaces) {
        Problem p(nm(2, 4, vector), seed % 2 ? SK_F16 : SK_BF16, shape, place);
        p.name_context("given", ++seed);
        fill_bits(p, random);
        const std::vector<uint8_t> mask = random_mask(p.pattern, p.n(), p.k(), random);
        for (int64_t i = 0; i < p.n() * p.k(); ++i) {  // any byte that is not zero keeps
          p.mask.at(i / p.k(), i % p.k()) =
              mask[size_t(i)] ? uint8_t(random.integer(0, 7) ? 1 : random.integer(1, 255)) : 0;
        }
        check_pack<sk::SpMask::kGiven>(p, seed);
      }
    }
  }
}

// What is pruned packs without change, and -0.0 is pruned.
void test_pruned_weights() {
  Random random(2);
  int seed = 0;
  for (int vector : {1, 4, 8, 16}) {
    for (const Shape& shape : kShapes) {
      const Place& place = kPlaces[seed % int(std::size(kPlaces))];
      Problem p(nm(2, 4, vector), seed % 2 ? SK_F16 : SK_BF16, shape, place);
      p.name_context("pruned", ++seed);
      fill_bits(p, random);
      const std::vector<uint8_t> mask = random_mask(p.pattern, p.n(), p.k(), random);
      for (int64_t i = 0; i < p.n() * p.k(); ++i) {
        uint16_t& bits = p.weight.at(i / p.k(), i % p.k());
        if (!mask[size_t(i)]) bits = random.chance(0.5) ? 0x8000 : 0;
        p.mask.at(i / p.k(), i % p.k()) = (bits & 0x7fff) != 0;
      }
      check_pack<sk::SpMask::kNonZero>(p, seed);
    }
  }
}

double size_of(const Problem& p, int64_t row, int64_t col) {
  return std::fabs(decode(p.dtype, p.weight.at(row, col)));
}

// The two largest of each group, of equals the first.
void test_magnitudes() {
  Random random(3);
  int seed = 0;
  for (const Shape& shape : kShapes) {
    for (const Place& place : kPlaces) {
      for (bool ties : {false, true}) {
        Problem p(nm(2, 4), seed % 2 ? SK_F16 : SK_BF16, shape, place);
        p.name_context(ties ? "ties" : "magnitudes", ++seed);
        for (int64_t i = 0; i < p.n() * p.k(); ++i) {
          uint16_t& bits = p.weight.at(i / p.k(), i % p.k());
          do {
            bits = ties ? uint16_t(encode(p.dtype, double(random.integer(0, 2))) |
                                   (random.chance(0.5) ? 0x8000 : 0))
                        : uint16_t(random.bits());
          } while (!std::isfinite(decode(p.dtype, bits)));
        }
        for (int64_t row = 0; row < p.n(); ++row) {
          for (int64_t col0 = 0; col0 < p.k(); col0 += 4) {
            std::vector<int64_t> order;
            for (int64_t c = col0; c < std::min(p.k(), col0 + 4); ++c) order.push_back(c);
            std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
              return size_of(p, row, a) > size_of(p, row, b);
            });
            for (size_t i = 0; i < order.size(); ++i) p.mask.at(row, order[i]) = i < 2;
          }
        }
        check_pack<sk::SpMask::kMagnitude>(p, seed);
      }
    }
  }
}

// The lowest vector and group that keep too much are named, whoever finds them first.
void test_misfits() {
  Random random(4);
  int seed = 0, several = 0;
  for (int vector : {1, 4, 8, 16}) {
    for (const Shape& shape : {Shape{33, 127}, {20, 583}, {70, 64}}) {
      for (int round = 0; round < 6; ++round) {
        Problem p(nm(2, 4, vector), SK_BF16, shape, {0, 1});
        p.name_context("misfits", ++seed);
        const std::vector<uint8_t> mask = random_mask(p.pattern, p.n(), p.k(), random);
        for (int64_t i = 0; i < p.n() * p.k(); ++i) {
          p.mask.at(i / p.k(), i % p.k()) = mask[size_t(i)];
        }
        if (round == 1) std::fill(p.mask.all.begin(), p.mask.all.end(), uint8_t(1));
        for (int64_t times = round ? random.integer(1, 40) : 0; times > 0; --times) {
          p.mask.at(random.integer(0, p.n() - 1), random.integer(0, p.k() - 1)) = 1;
        }
        uint64_t expected = sk::kSpFits;
        int found = 0;
        for (int64_t row0 = 0; row0 < p.n(); row0 += vector) {
          for (int64_t col0 = 0; col0 < p.k(); col0 += 4) {
            int columns = 0;
            for (int64_t col = col0; col < std::min(p.k(), col0 + 4); ++col) {
              bool any = false;
              for (int64_t row = row0; row < std::min(p.n(), row0 + vector); ++row) {
                any |= p.mask.at(row, col) != 0;
              }
              columns += any;
            }
            if (columns <= 2) continue;
            ++found;
            expected = std::min(expected, uint64_t(row0) << 32 | uint64_t(col0 / 4));
          }
        }
        several += found > 1;
        CHECK(pack_on_device<sk::SpMask::kGiven>(p, seed).misfit == expected);
        for (int64_t i = 0; i < p.n() * p.k(); ++i) {  // the same as zeros of the weight
          const int64_t row = i / p.k(), col = i % p.k();
          p.weight.at(row, col) = p.mask.at(row, col) ? 0x3f80 : 0x8000;
        }
        CHECK(pack_on_device<sk::SpMask::kNonZero>(p, seed).misfit == expected);
      }
    }
  }
  CHECK(several > 20);
}

// Where rows are aligned, loads and stores are as wide as can be and no sector moves twice.
void test_transfers() {
  Random random(5);
  Problem p(nm(2, 4), SK_BF16, {64, 1024}, {0, 0});
  p.name_context("transfers", 1);
  fill_bits(p, random);
  const std::vector<uint8_t> mask = random_mask(p.pattern, p.n(), p.k(), random);
  std::copy(mask.begin(), mask.end(), p.mask.all.begin());
  const auto [packing, unpacking] = check_pack<sk::SpMask::kGiven>(p, 1);
  const uint64_t units = 4 * 16, dense = 64 * 1024;
  using simt::Op;
  // A lane's part of a unit: 4 times 8 elements, 4 times 8 bytes of the mask; 2 registers, metadata.
  CHECK(packing.instructions(Op::kLoadGlobal) == units * 8);
  CHECK(packing.sectors(Op::kLoadGlobal) == (2 * dense + dense) / 32);
  CHECK(packing.instructions(Op::kStoreGlobal) == units * 3);
  CHECK(packing.sectors(Op::kStoreGlobal) == units * 1152 / 32);
  CHECK(unpacking.instructions(Op::kLoadGlobal) == units * 3);
  CHECK(unpacking.sectors(Op::kLoadGlobal) == units * 1152 / 32);
  CHECK(unpacking.instructions(Op::kStoreGlobal) == units * 4);
  CHECK(unpacking.sectors(Op::kStoreGlobal) == 2 * dense / 32);
}

}  // namespace

int main() {
  test_given_masks();
  test_pruned_weights();
  test_magnitudes();
  test_misfits();
  test_transfers();
}
