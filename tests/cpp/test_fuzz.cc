// Damaged input, seeded: nothing may crash, read outside a buffer (the sanitizers watch) or be
// believed.
#include <climits>

#include "support.h"

using namespace test;

namespace {

constexpr int kHeader = 104;     // bytes of the header's fields; the sections start at 128
constexpr int kRoundsEach = 60;  // of each pattern, dtype and format

// A number that is likely to hurt.
int64_t nasty(Random& random) {
  const int64_t numbers[] = {0,         1,         -1,      2,       3,         4,
                             15,        16,        17,      64,      127,       128,
                             129,       255,       65535,   INT_MAX, INT_MIN,   INT64_MAX,
                             INT64_MIN, 1LL << 31, 1 << 24, 1 << 30, 1LL << 48, 1LL << 62};
  return numbers[random.integer(0, int64_t(std::size(numbers)) - 1)];
}

// Overwrites a field, a byte or a bit of the first `bytes` bytes.
void damage(uint8_t* data, int64_t bytes, Random& random) {
  for (int64_t times = random.integer(1, 3); times > 0; --times) {
    const int64_t number = nasty(random);
    switch (random.integer(0, 3)) {
      case 0: {
        const int64_t at = random.integer(0, bytes / 4 - 1) * 4;
        const int32_t narrow = int32_t(number);
        std::memcpy(data + at, &narrow, 4);
        break;
      }
      case 1:
        if (bytes >= 8) std::memcpy(data + random.integer(0, bytes / 8 - 1) * 8, &number, 8);
        break;
      case 2:
        data[random.integer(0, bytes - 1)] = uint8_t(random.bits());
        break;
      default:
        data[random.integer(0, bytes - 1)] ^= uint8_t(1 << random.integer(0, 7));
    }
  }
}

void seal(Buffer& buffer) {  // the header's checksum, see layout/README.md
  uint64_t sum = 0xcbf29ce484222325;
  for (int at = 0; at < kHeader - 8; at += 8) {
    uint64_t word;
    std::memcpy(&word, buffer.data() + at, 8);
    sum = (sum ^ word) * 0x100000001b3;
  }
  std::memcpy(buffer.data() + kHeader - 8, &sum, 8);
}

// A header with any change is refused by every call that takes one.
void test_headers() {
  Random random(1);
  int damaged = 0;
  for (const sk_pattern& pattern : all_patterns()) {
    for (int32_t dtype : kDtypes) {
      const Weight w(pattern, dtype, random.integer(1, 40), random.integer(1, 70), Fill::kIntegers,
                     random);
      const Canonical canonical = compress(w.dense, w.mask, pattern, dtype);
      const Inputs in(w, 3, Fill::kIntegers, random);
      Matrix y(dtype, 3, w.n);
      const Matrix before(dtype, 3, w.n);
      const bool is_nm = pattern.family == SK_FAMILY_NM;
      for (const char* format : kFormats) {
        if (!holds(format, pattern, dtype)) continue;
        const Buffer good = pack(canonical, format);
        for (int round = 0; round < kRoundsEach; ++round) {
          context = name(pattern) + " " + format + " round " + std::to_string(round);
          Buffer bad(good.bytes());
          std::memcpy(bad.data(), good.data(), size_t(good.bytes()));
          damage(bad.data(), kHeader, random);
          if (!std::memcmp(bad.data(), good.data(), kHeader)) continue;  // the same number again
          ++damaged;
          // A forged checksum: what remains may be a header of another weight, and then says so;
          // its sections do not lie outside the buffer, or the next line would be an error.
          const bool forged = round % 3 == 0;
          if (forged) seal(bad);
          sk_packed_info info;
          if (sk_read_packed_info(bad.data(), bad.bytes(), &info) == SK_OK) {
            CHECK(forged);
            CHECK(info.n >= 1 && info.k >= 1 && info.nnzb >= 0 && info.bytes <= bad.bytes());
            int64_t values, indices, crow;
            CHECK_OK(sk_weight_sizes(&info.pattern, info.dtype, info.n, info.k, info.nnzb, &values,
                                     &indices, &crow));
            CHECK(values >= 0 && indices >= 0 && crow >= 0 &&
                  values + indices + crow <= 2 * bad.bytes());
            continue;  // its sections are those of another weight: not for kernels
          }
          CHECK(sk_last_error()[0]);
          Canonical out(pattern, dtype, w.n, w.k, is_nm ? 0 : canonical.weight.indices_bytes / 4);
          CHECK(sk_unpack(bad.data(), bad.bytes(), &out.weight) == SK_INVALID_ARGUMENT);
          sk_matmul_args args = arguments(w, bad, in, {}, y.data(), w.n, 1);
          CHECK(sk_matmul(&args, nullptr) == SK_INVALID_ARGUMENT);
          CHECK(y.same_bytes(before));
        }
      }
    }
  }
  CHECK(damaged > 8000);
}

// Descriptions with impossible numbers: refused before an address is read (they are none).
void test_descriptions() {
  Random random(2);
  for (int round = 0; round < 20000; ++round) {
    context = "description " + std::to_string(round);
    sk_weight w{};
    w.pattern = random.chance(0.5) ? nm(2, 4, 4) : bsr(16, 16);
    w.n = 64;
    w.k = 128;
    w.values = w.indices = w.crow_indices = reinterpret_cast<void*>(uintptr_t{64});
    int64_t sizes[3] = {-1, -1, -1};
    const sk_pattern sane = w.pattern;
    if (random.chance(0.7)) {
      damage(reinterpret_cast<uint8_t*>(&w.pattern), sizeof w.pattern, random);
      if (!std::memcmp(&w.pattern, &sane, sizeof sane)) continue;
    }
    w.dtype = random.chance(0.8) ? SK_F32 : int32_t(nasty(random));
    if (random.chance(0.6)) w.n = nasty(random);
    if (random.chance(0.6)) w.k = nasty(random);
    const int64_t nnzb = random.chance(0.5) ? 4 : nasty(random);
    if (sk_weight_sizes(&w.pattern, w.dtype, w.n, w.k, nnzb, &sizes[0], &sizes[1], &sizes[2]) ==
        SK_OK) {
      for (int64_t bytes : sizes) CHECK(bytes >= 0 && bytes <= int64_t{1} << 52);
    } else {
      for (int64_t bytes : sizes) CHECK(bytes == -1);
    }
    // Sizes that fit nothing: odd and negative ones.
    w.values_bytes = random.chance(0.5) ? -8 : 7;
    w.indices_bytes = nasty(random);
    w.crow_indices_bytes = nasty(random);
    CHECK(sk_validate(&w) == SK_INVALID_ARGUMENT);
    int64_t bytes = -1;
    for (const char* format : {"nm", "bsr_rows"}) {
      CHECK(sk_packed_bytes(&w, format, &bytes) == SK_INVALID_ARGUMENT);
      CHECK(sk_pack(&w, format, nullptr, 0) == SK_INVALID_ARGUMENT);
    }
    CHECK(bytes == -1);
  }
}

// Canonical arrays as a hostile file has them: what validate lets through is a weight like any
// other, for every kernel the same; the rest is refused by everything that would read it.
void test_canonical() {
  Random random(3);
  const std::vector<sk_kernel_info> kernels = available_kernels();
  int accepted = 0, refused = 0;
  for (const sk_pattern& pattern : all_patterns()) {
    for (int32_t dtype : {SK_F32, SK_BF16}) {
      const Weight w(pattern, dtype, random.integer(1, 40), random.integer(1, 70), Fill::kIntegers,
                     random);
      for (int round = 0; round < 30; ++round) {
        context = "canonical " + name(pattern) + " round " + std::to_string(round);
        Canonical bad = compress(w.dense, w.mask, pattern, dtype);
        const bool rows = bad.weight.crow_indices_bytes > 0 && random.chance(0.5);
        const int64_t bytes = rows ? bad.weight.crow_indices_bytes : bad.weight.indices_bytes;
        if (bytes < 4) break;
        damage((rows ? bad.crow : bad.indices).get(), bytes, random);
        Matrix dense(dtype, w.n, w.k);
        int64_t size = 0;
        const bool is_nm = pattern.family == SK_FAMILY_NM;
        CHECK_OK(sk_packed_bytes(&bad.weight, is_nm ? "nm" : "bsr", &size));
        if (sk_validate(&bad.weight) != SK_OK) {
          ++refused;
          Buffer packed(size);
          CHECK(sk_decompress(&bad.weight, dense.data(), w.k) == SK_INVALID_ARGUMENT);
          CHECK(sk_pack(&bad.weight, is_nm ? "nm" : "bsr", packed.data(), size) ==
                SK_INVALID_ARGUMENT);
          continue;
        }
        ++accepted;
        Weight other(pattern, dtype, w.n, w.k, Fill::kIntegers, random);
        CHECK_OK(sk_decompress(&bad.weight, other.dense.data(), w.k));
        const int64_t m = random.integer(1, 20);
        const Inputs in(other, m, Fill::kIntegers, random);
        const Sums sums(other, in.x);
        for (const sk_kernel_info& kernel : kernels) {
          if (!reads(kernel, other) || !accepts(kernel, other, m)) continue;
          context =
              std::string(kernel.name) + " " + name(pattern) + " round " + std::to_string(round);
          const Buffer packed = pack(bad, kernel.format);
          Matrix y(dtype, m, w.n);
          const sk_matmul_args args = arguments(other, packed, in, {}, y.data(), w.n, 1);
          CHECK_OK(sk_matmul(&args, kernel.name));
          for (int64_t i = 0; i < m * w.n; ++i) {
            CHECK(y.get(i / w.n, i % w.n) == round_to(dtype, sums.value[size_t(i)]));
          }
        }
      }
    }
  }
  CHECK(accepted > 100 && refused > 100);
}

}  // namespace

int main() {
  test_headers();
  test_descriptions();
  test_canonical();
}
