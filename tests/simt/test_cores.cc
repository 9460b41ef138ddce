// The kernels on CUDA cores, in every dtype: exact sums of small integers for patterns of every kind, at the edges
// of tiles, stages and chunks, all epilogues; and how often they touch memory.
#include "conv_case.h"
#include "cores_case.h"
#include "cuda/plan.h"
#include "cuda/quick/sparse_linear.cuh"

namespace {

sk_pattern nm(int kept, int group, int vector = 1) {
  return {SK_FAMILY_NM, kept, group, vector, 0, 0};
}
sk_pattern bsr(int rows, int columns) { return {SK_FAMILY_BSR, 0, 0, 0, rows, columns}; }

template <class Kernel, class... Params>
simt::Statistics launch(const char* name, int grid, int threads, int shared, unsigned seed,
                        Kernel kernel, const Params&... params) {
  simt::Launch l = launch_of(grid, threads, shared, seed);
  l.kernel = name;
  return simt::launch(l, kernel, params...);
}

// ---- the launches ----------------------------------------------------------------------------------

template <class Tile, template <class> class WeightsOf>
struct Tiles {
  using T = typename Tile::T;
  using Params = typename WeightsOf<Tile>::Params;
  static constexpr int64_t kRows = Tile::kRows, kTokens = Tile::kTokens, kColumns = Tile::kDepth;
  template <class Source>
  static simt::Statistics run(const Case& c, const Params& w, const typename Source::Params& x,
                              const cuda::OutputParams& out) {
    return launch("cores", c.blocks, Tile::kThreads, Tile::kSharedBytes, c.order,
                  cuda::cores<Tile, WeightsOf<Tile>, Source>, w, x, out);
  }
};

// kPerWarp rows; 4: those of a vector.
template <class T_, int kTokens_, int kPerWarp = kTokens_ == 8 ? 2 : 1>
struct NmFew {
  using T = T_;
  using Params = cuda::NmParams;
  static constexpr bool kVector = kPerWarp == 4;
  static constexpr int64_t kRows = cuda::NmDecode<T, kTokens_, kPerWarp, kVector>::kBlockRows,
                           kTokens = kTokens_, kColumns = 256;
  template <class Source>
  static simt::Statistics run(const Case& c, const Params& w, const cuda::MatrixParams& x,
                              const cuda::OutputParams& out) {
    return launch("nm_decode", c.blocks, cuda::kDecodeThreads, cuda::kDecodeSharedBytes, c.order,
                  cuda::nm_decode<T, kTokens_, kPerWarp, kVector>, w, cuda::NmChunks(w, kTokens_),
                  x, out);
  }
};

template <class T_, int kTokens_>
struct BsrFew {
  using T = T_;
  using Params = cuda::BsrParams;
  static constexpr int64_t kRows = cuda::kBsrDecodeWarps * cuda::kBsrDecodeRows, kTokens = kTokens_,
                           kColumns = 128;
  template <class Source>
  static simt::Statistics run(const Case& c, const Params& w, const cuda::MatrixParams& x,
                              const cuda::OutputParams& out) {
    return launch("bsr_decode", c.blocks, 32 * cuda::kBsrDecodeWarps, 0, c.order,
                  cuda::bsr_decode<T, kTokens_>, w, x, out);
  }
};

// Returns the bits of y, for comparing runs.
template <class Kernel>
std::vector<Bits<typename Kernel::T>> run(const sk_pattern& pattern, const Case& c,
                                          simt::Statistics* statistics = nullptr) {
  using T = typename Kernel::T;
  std::mt19937 random(c.seed);
  const Weight w = make_weight<T>(pattern, c, random);
  const Rows x = make_rows<T>(c, random);
  const Outcome<T> outcome(c, random);
  const auto x_buffer = simt::Buffer<Bits<T>>::input("x", to_elements<T>(x.memory));
  const cuda::MatrixParams params{x_buffer.data(), x.stride, int(c.k), true};
  const simt::Statistics all = Kernel::template run<cuda::MatrixX<T>>(
      c, weight_params<typename Kernel::Params, T>(pattern, w, c.k), params,
      outcome.params(0, c.m));
  if (statistics) *statistics = all;
  if (!c.fractions) outcome.check(x.dense, w.dense);
  return outcome.y();
}

// ---- the cases -------------------------------------------------------------------------------------

template <class Kernel>
void test_kernel(const sk_pattern& pattern) {
  const int64_t rows = Kernel::kRows, tokens = Kernel::kTokens, columns = Kernel::kColumns;
  const auto check = [&](const Case& c) { return run<Kernel>(pattern, c); };
  check({0, rows, 64});  // no token: nothing is read or written
  for (const int64_t n : {int64_t{1}, rows - 1, rows}) {
    for (const int64_t k : {int64_t{1}, int64_t{7}, columns - 1, columns})
      check({std::min<int64_t>(tokens, 5), n, k});
  }
  for (const int64_t m : {int64_t{1}, tokens - 1, tokens, tokens + 1})
    check({m, rows + 1, columns + 1, 2});
  check({3, rows + 5, 3 * columns + 9});
  check({2 * tokens + 1, 2 * rows, 2 * columns});
  Case empty{3, rows + 1, 2 * columns};
  empty.density = 0;
  check(empty);
  // The same bits in every order.
  Case parts{tokens + 1, rows + 3, 5 * columns + 3};
  parts.fractions = true;
  const auto bits = check(parts);
  parts.order = 2, parts.blocks = 1;
  CHECK(check(parts) == bits);
}

template <class Kernel>
void test_epilogues(const sk_pattern& pattern) {
  for (const int activation :
       {cuda::kNone, cuda::kRelu, cuda::kGelu, cuda::kGeluTanh, cuda::kSilu, cuda::kRelu6}) {
    Case c{5, Kernel::kRows, 64, 3, activation, true, true};
    run<Kernel>(pattern, c);
    c.n = Kernel::kRows - 3, c.y_pad = 2, c.residual_first = true;
    run<Kernel>(pattern, c);
  }
  Case alone{5, 33, 40};
  alone.residual = true;
  run<Kernel>(pattern, alone);
}

template <class T>
using NmLarge = Tiles<cuda::NmLarge<T>, cuda::NmCores>;
template <class T>
using NmSmall = Tiles<cuda::NmSmall<T>, cuda::NmCores>;
template <class T>
using BsrLarge = Tiles<cuda::BsrLarge<T>, cuda::BsrCores>;
template <class T>
using BsrSmall = Tiles<cuda::BsrSmall<T>, cuda::BsrCores>;

template <class T>
void test_nm() {
  for (const sk_pattern& p : {nm(2, 4), nm(1, 4), nm(3, 4), nm(4, 8), nm(1, 16)}) {
    test_kernel<NmLarge<T>>(p);
    test_kernel<NmSmall<T>>(p);
    test_kernel<NmFew<T, 1>>(p);
    test_kernel<NmFew<T, 4>>(p);
    test_kernel<NmFew<T, 8>>(p);
  }
  for (const sk_pattern& p : {nm(2, 4, 4), nm(4, 8, 16), nm(3, 4, 8)})
    test_kernel<NmFew<T, 8, 4>>(p);
  // Every N:M once, and vectors.
  for (const int group : {2, 4, 8, 16}) {
    for (int kept = 1; kept < group; ++kept) {
      const sk_pattern p = nm(kept, group, kept % 4 == 1 ? 4 : kept % 4 == 2 ? 16 : 1);
      const Case c{9, 41, 3 * group + 70};
      run<NmSmall<T>>(p, c);
      run<NmFew<T, 8>>(p, c);
      if (p.vector >= 4) run<NmFew<T, 8, 4>>(p, c);
      run<NmFew<T, 1>>(p, {1, 41, 64 * group});
    }
  }
  test_epilogues<NmLarge<T>>(nm(2, 4));
  test_epilogues<NmFew<T, 4>>(nm(2, 4));
}

template <class T>
void test_bsr() {
  for (const sk_pattern& p : {bsr(16, 16), bsr(64, 64), bsr(1, 1), bsr(4, 6), bsr(17, 3)}) {
    test_kernel<BsrSmall<T>>(p);
    test_kernel<BsrFew<T, 4>>(p);
  }
  for (const sk_pattern& p : {bsr(64, 32), bsr(128, 20), bsr(100, 5)}) test_kernel<BsrLarge<T>>(p);
  for (const sk_pattern& p : {bsr(1, 4), bsr(4, 1), bsr(16, 1), bsr(128, 128), bsr(5, 12)}) {
    const Case c{9, 141, 200};
    run<BsrSmall<T>>(p, c);
    run<BsrFew<T, 8>>(p, c);
    run<BsrFew<T, 1>>(p, {1, 141, 200});
  }
  test_epilogues<BsrLarge<T>>(bsr(64, 16));
  test_epilogues<BsrSmall<T>>(bsr(16, 16));
  test_epilogues<BsrFew<T, 4>>(bsr(8, 8));
}

// ---- convolutions ----------------------------------------------------------------------------------

template <class Kernel>
void check_images(const sk_pattern& pattern, const Geometry& g, Case c, int64_t cut = 0) {
  using T = typename Kernel::T;
  constexpr int kElements = 16 / int(sizeof(Bits<T>));
  const sk_conv2d_shape s = g.shape();
  c.m = s.batch * s.out_height * s.out_width;
  c.k = s.kernel_height * s.kernel_width * g.tap;
  std::mt19937 random(c.seed);
  const Weight w = make_weight<T>(pattern, c, random);
  const Images x = make_numbers(s, c.m, c.k, [&] { return c.number(random); });
  const Outcome<T> outcome(c, random);
  const auto x_buffer = simt::Buffer<Bits<T>>::input("x", to_elements<T>(x.memory));
  const auto run = [&](int64_t from, int64_t to) {
    const cuda::PixelRange range = cuda::pixels_from(s, from, kElements);
    typename cuda::PixelX<T>::Params params{cuda::PixelParams(s, c.k, kElements), int(c.k)};
    params.pixels.x = reinterpret_cast<const uint4*>(x_buffer.data() + range.offset);
    params.pixels.first_pixel = range.first_pixel;
    Kernel::template run<cuda::PixelX<T>>(
        c, weight_params<typename Kernel::Params, T>(pattern, w, c.k), params,
        outcome.params(from, to));
  };
  if (cut > 0) run(0, cut);
  run(cut, c.m);
  outcome.check(x.dense, w.dense);
}

template <class Kernel>
void test_images(const sk_pattern& pattern) {
  const int64_t rows = Kernel::kRows;
  const auto check = [&](const Geometry& g, int64_t n, int64_t cut = 0) {
    check_images<Kernel>(pattern, g, {0, n, 0}, cut);
  };
  Geometry same{2, 5, 7, 16, 16, 3, 3};
  same.top = same.left = same.bottom = same.right = 1;
  check(same, rows);
  check(same, 9, 35 + 9);  // a launch that starts in the middle of the second image
  check({3, 5, 6, 13, 13, 1, 1, 2, 2}, rows - 1);  // one tap, whose channels are no multiple of 4
  Geometry uneven{1, 7, 5, 11, 16, 5, 2};
  uneven.top = 2, uneven.bottom = 1, uneven.right = 1;
  check(uneven, 3);
  Geometry stem{1, 16, 14, 3, 8, 7, 7, 2, 2};  // the first layer of many networks
  stem.top = stem.left = stem.bottom = stem.right = 3;
  check(stem, rows + 1);
  check({2, 9, 8, 20, 24, 3, 3, 1, 2, 2, 3, 2, 3, 2, 3, 16, 8, 40}, rows);
  check({2, 3, 2, 8, 8, 2, 2, 1, 1, 1, 1, 4, 3, 2, 4}, 9);  // windows without a pixel
  // 12 channels: pixels of f32 that are no multiple of 32 bytes apart.
  Geometry twelve{2, 4, 5, 12, 16, 3, 3};
  twelve.tight = sizeof(Bits<typename Kernel::T>) == 4;
  check(twelve, 9);
  Case c{0, rows - 3, 0, 3, cuda::kSilu, true, true, false, 5};
  check_images<Kernel>(pattern, same, c);
}

// ---- the kernels of quick plugins ------------------------------------------------------------------

SK_QUICK_decode(f32) SK_QUICK_decode(f16) SK_QUICK_decode(bf16) SK_QUICK_tiles(f32)
    SK_QUICK_tiles(f16) SK_QUICK_tiles(bf16)

    // x dense, whatever k is; the weight as a node of docs/onnx.md holds it.
    template <class T, class Kernel>
    void check_quick(Kernel kernel, int threads, int shared, const sk_pattern& pattern,
                     const Case& c) {
  std::mt19937 random(c.seed);
  const Weight w = make_weight<T>(pattern, c, random);
  const std::vector<float> x = [&] {
    std::vector<float> numbers(size_t(c.m * c.k));
    for (float& number : numbers) number = c.number(random);
    return numbers;
  }();
  const Outcome<T> outcome(c, random);
  std::vector<uint8_t> bytes;
  const auto section = [&bytes](const uint8_t* from, size_t size) {
    const size_t at = (bytes.size() + 15) / 16 * 16;
    bytes.resize(at + size);
    std::copy(from, from + size, bytes.begin() + std::ptrdiff_t(at));
    return int(at / 16);
  };
  section(w.values.data(), w.values.size());
  const int indices = section(w.indices.data(), w.indices.size());
  const cuda::OutputParams out = outcome.params(0, c.m);
  const int bias =
      out.bias ? section(static_cast<const uint8_t*>(out.bias), size_t(c.n) * sizeof(Bits<T>)) : 0;
  const auto weight = simt::Buffer<uint8_t>::input("weight", bytes);
  const auto x_buffer = simt::Buffer<Bits<T>>::input("x", to_elements<T>(x));
  const auto launch_quick = [&](const void* from, const void* packed, void* to) {
    launch("quick", c.blocks, threads, shared, c.order, kernel, from, packed, int(c.m), int(c.n),
           int(c.k), pattern.kept, pattern.group, pattern.vector, indices, bias, c.activation, to);
  };
  launch_quick(x_buffer.data(), weight.data(), out.y);
  outcome.check(x, w.dense);
}

template <class T, class Decode, class Tiles>
void test_quick(Decode decode, Tiles tiles) {
  for (const sk_pattern& p : {nm(2, 4), nm(1, 4, 4), nm(4, 8), nm(3, 4)}) {
    for (const Case& c : {Case{1, 64, 256}, Case{9, 33, 131}, Case{37, 70, 42}, Case{0, 5, 64}}) {
      for (const int activation : {cuda::kNone, cuda::kGelu}) {
        Case epilogue = c;
        epilogue.bias = activation != cuda::kNone;
        epilogue.activation = activation;
        check_quick<T>(decode, cuda::kDecodeThreads, cuda::kDecodeSharedBytes, p, epilogue);
        check_quick<T>(tiles, cuda::NmSmall<T>::kThreads, cuda::NmSmall<T>::kSharedBytes, p,
                       epilogue);
      }
    }
  }
}

// ---- how often memory is touched -------------------------------------------------------------------

void test_accesses() {
  using T = cuda::F32;
  // Few tokens: values and positions of 2:4 as whole sectors, once each; of x half a sector a load, the other half
  // with the next. Shared memory without a conflict.
  simt::Statistics few;
  run<NmFew<T, 4>>(nm(2, 4), {4, 8, 4096, 1}, &few);
  const uint64_t values = 8 * 2048 * 4, positions = 8 * 512, x = 4 * 4096 * 4;
  CHECK(few.global_bytes_read() == values + positions + x);
  CHECK(few.sectors(simt::Op::kLoadGlobal) == (values + positions + 2 * x) / 32);
  CHECK(few.bank_conflicts(simt::Op::kLoadShared) == 0);
  // Many tokens: no conflict in the loop.
  for (const sk_pattern& p : {nm(2, 4), bsr(64, 16)}) {
    simt::Statistics many;
    Case c{128, 128, 256, 1};
    if (p.family == SK_FAMILY_NM) {
      run<NmLarge<T>>(p, c, &many);
    } else {
      run<BsrLarge<T>>(p, c, &many);
    }
    if (many.bank_conflicts() != 0) fail(__FILE__, __LINE__, many.report());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  const auto wanted = [&](const std::string& name) {
    return only.empty() || name.find(only) != std::string::npos;
  };
  if (wanted("nm f32")) test_nm<cuda::F32>();
  if (wanted("nm f16")) test_nm<ptx::F16>();
  if (wanted("nm bf16")) test_nm<ptx::BF16>();
  if (wanted("bsr f32")) test_bsr<cuda::F32>();
  if (wanted("bsr f16")) test_bsr<ptx::F16>();
  if (wanted("bsr bf16")) test_bsr<ptx::BF16>();
  if (wanted("conv")) {
    test_images<NmSmall<cuda::F32>>(nm(2, 4));
    test_images<NmLarge<cuda::F32>>(nm(1, 4));
    test_images<NmSmall<ptx::F16>>(nm(4, 8));
    test_images<BsrSmall<cuda::F32>>(bsr(16, 8));
    test_images<BsrLarge<ptx::BF16>>(bsr(64, 4));
    test_images<BsrSmall<cuda::F32>>(bsr(4, 1));
  }
  if (wanted("quick")) {
    test_quick<cuda::F32>(sparsekit_linear_nm_f32_decode, sparsekit_linear_nm_f32_tiles);
    test_quick<ptx::F16>(sparsekit_linear_nm_f16_decode, sparsekit_linear_nm_f16_tiles);
    test_quick<ptx::BF16>(sparsekit_linear_nm_bf16_decode, sparsekit_linear_nm_bf16_tiles);
  }
  if (wanted("accesses")) test_accesses();
  return 0;
}
