// A program that uses the library as any C or C++ program would: only sparsekit.h, no Python. It
// prunes a small weight to 2:4, packs it for this machine, multiplies and compares with the dense
// sum.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sparsekit/sparsekit.h"

static void require(sk_status status) {
  if (status == SK_OK) return;
  std::fprintf(stderr, "sparsekit: %s\n", sk_last_error());
  std::exit(1);
}

int main() {
  const int64_t m = 3, n = 48, k = 64;
  std::vector<float> weight(n * k), x(m * k), bias(n), y(m * n);
  for (int64_t i = 0; i < n * k; ++i) weight[i] = std::sin(float(7 * i));
  for (int64_t i = 0; i < m * k; ++i) x[i] = std::cos(float(3 * i));
  for (int64_t i = 0; i < n; ++i) bias[i] = float(i) / 8;

  // Keep the two largest of every four consecutive weights.
  std::vector<uint8_t> mask(n * k);
  for (int64_t i = 0; i < n * k; ++i) {
    int larger = 0;
    for (int64_t j = i / 4 * 4; j < i / 4 * 4 + 4; ++j)
      larger += std::fabs(weight[j]) > std::fabs(weight[i]);
    mask[i] = larger < 2;
  }

  // Dense to canonical: the caller owns the arrays.
  sk_weight canonical{};
  canonical.pattern = {SK_FAMILY_NM, 2, 4, 1, 0, 0};
  canonical.dtype = SK_F32;
  canonical.n = n;
  canonical.k = k;
  require(sk_weight_sizes(&canonical.pattern, SK_F32, n, k, 0, &canonical.values_bytes,
                          &canonical.indices_bytes, &canonical.crow_indices_bytes));
  std::vector<float> values(canonical.values_bytes / sizeof(float));
  std::vector<uint8_t> indices(canonical.indices_bytes);
  canonical.values = values.data();
  canonical.indices = indices.data();
  require(sk_compress(weight.data(), k, mask.data(), &canonical));

  // Canonical to what this machine's best kernel reads.
  char format[32];
  int64_t bytes = 0;
  require(sk_default_format(&canonical.pattern, SK_F32, "auto", format));
  require(sk_packed_bytes(&canonical, format, &bytes));
  void* packed = std::aligned_alloc(64, bytes);
  require(sk_pack(&canonical, format, packed, bytes));

  sk_matmul_args args{};
  args.m = m, args.n = n, args.k = k;
  args.dtype = SK_F32;
  args.x = x.data();
  args.x_row_stride = k;
  args.weight = packed;
  args.weight_bytes = bytes;
  args.y = y.data();
  args.y_row_stride = n;
  args.bias = bias.data();
  args.activation = SK_ACTIVATION_RELU;
  require(sk_matmul(&args, nullptr));
  std::free(packed);

  double largest = 0;
  for (int64_t i = 0; i < m * n; ++i) {
    double sum = bias[i % n];
    for (int64_t c = 0; c < k; ++c) {
      if (mask[i % n * k + c]) sum += double(x[i / n * k + c]) * double(weight[i % n * k + c]);
    }
    largest = std::fmax(largest, std::fabs(y[i] - std::fmax(sum, 0)));
  }
  std::printf("%s: packed as %s in %lld bytes (dense: %lld), largest error %.1e\n", sk_version(),
              format, static_cast<long long>(bytes), static_cast<long long>(4 * n * k), largest);
  // The bound of a sum of k products of at most 1 and a bias below 6, in f32.
  return largest <= double(k + 2) * double(k + 6) * 0x1p-24 ? 0 : 1;
}
