// The library's kernels, compiled for the emulator and found by the names that nvcc gives them.
#include "emulated_kernels.h"

#include <cxxabi.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <typeinfo>

#include "cuda/cores_bsr.cuh"
#include "cuda/pixels.cuh"
#include "cuda/rows.cuh"
#include "cuda/weights_bsr.cuh"
#include "cuda/weights_nm.cuh"
#include "simt/simt.h"

namespace {

using namespace sk;
using Run = std::function<void(const simt::Launch&, void**)>;

template <class... Params, size_t... kIndices>
Run run_of(void (*kernel)(Params...), std::index_sequence<kIndices...>) {
  return [kernel](const simt::Launch& launch, void** arguments) {
    simt::launch(launch, kernel, *static_cast<std::decay_t<Params>*>(arguments[kIndices])...);
  };
}
template <class... Params>
Run run_of(void (*kernel)(Params...)) {
  return run_of(kernel, std::index_sequence_for<Params...>());
}

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), &std::free);
  return text ? text.get() : name;
}

// Types with the same arguments as the kernels: what stands between < and > is the same text.
template <class Tile, template <class> class Weights, template <class> class Copier>
struct LikeTiles;
template <class Tile, class Weights, class Source>
struct LikeCores;
template <class T, int kTokens, int kRows, bool kVector>
struct LikeNmDecode;
template <class T, int kTokens>
struct LikeBsrDecode;

// "name<arguments>", as it stands in the kernel's demangled name.
template <class Like>
std::string name_of(const std::string& kernel) {
  const std::string like = demangled(typeid(Like*).name());  // "…::Like<arguments>*"
  const size_t from = like.find('<');
  return "sk::cuda::" + kernel + like.substr(from, like.size() - from - 1);
}

class Kernels {
 public:
  Kernels() {
#define SK_BOTH(Weights, Copier, ...)                                         \
  add_tile<cuda::Tile<ptx::F16, __VA_ARGS__>, cuda::Weights, cuda::Copier>(); \
  add_tile<cuda::Tile<ptx::BF16, __VA_ARGS__>, cuda::Weights, cuda::Copier>();
#define SK_NM_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(NmWeights, RowCopier, rows, tokens, wr, wt, stages, blocks)
#define SK_BSR_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(BsrWeights, RowCopier, rows, tokens, wr, wt, stages, blocks)
#define SK_CONV_NM_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(NmWeights, PixelCopier, rows, tokens, wr, wt, stages, blocks)
#define SK_CONV_BSR_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(BsrWeights, PixelCopier, rows, tokens, wr, wt, stages, blocks)
#include "cuda/tiles.inc"
    add_cores<cuda::F32>();
    add_cores<ptx::F16>();
    add_cores<ptx::BF16>();
  }

  const Run* find(const std::string& mangled) const {
    const std::string whole = demangled(mangled.c_str());  // "void name<arguments>(parameters)"
    const size_t from = whole.find("sk::cuda::"), to = whole.find('(');
    if (from >= to) return nullptr;
    const auto found = runs_.find(whole.substr(from, to - from));
    return found == runs_.end() ? nullptr : &found->second;
  }

 private:
  template <class Tile, template <class> class Weights, template <class> class Copier>
  void add_tile() {
    runs_[name_of<LikeTiles<Tile, Weights, Copier>>("matmul_mma")] =
        run_of(cuda::matmul_mma<Tile, Weights, Copier>);
  }

  template <class Tile, template <class> class Weights>
  void add_cores_tile() {
    using T = typename Tile::T;
    add_cores_kernel<Tile, Weights<Tile>, cuda::MatrixX<T>>();
    add_cores_kernel<Tile, Weights<Tile>, cuda::PixelX<T>>();
  }
  template <class Tile, class Weights, class Source>
  void add_cores_kernel() {
    runs_[name_of<LikeCores<Tile, Weights, Source>>("cores")] =
        run_of(cuda::cores<Tile, Weights, Source>);
  }
  template <class T, int kTokens, int kRows, bool kVector>
  void add_nm_decode() {
    runs_[name_of<LikeNmDecode<T, kTokens, kRows, kVector>>("nm_decode")] =
        run_of(cuda::nm_decode<T, kTokens, kRows, kVector>);
  }
  template <class T, int kTokens>
  void add_bsr_decode() {
    runs_[name_of<LikeBsrDecode<T, kTokens>>("bsr_decode")] = run_of(cuda::bsr_decode<T, kTokens>);
  }

  // Those that cuda/cores_launch.cuh launches.
  template <class T>
  void add_cores() {
    add_cores_tile<cuda::NmLarge<T>, cuda::NmCores>();
    add_cores_tile<cuda::NmSmall<T>, cuda::NmCores>();
    add_cores_tile<cuda::BsrLarge<T>, cuda::BsrCores>();
    add_cores_tile<cuda::BsrSmall<T>, cuda::BsrCores>();
    add_nm_decode<T, 1, 1, false>();
    add_nm_decode<T, 4, 1, false>();
    add_nm_decode<T, 8, 2, false>();
    add_nm_decode<T, 8, 4, true>();
    add_bsr_decode<T, 1>();
    add_bsr_decode<T, 4>();
    add_bsr_decode<T, 8>();
  }

  std::map<std::string, Run> runs_;
};

}  // namespace

bool run_emulated(const std::string& kernel, int grid, int threads, int shared_bytes,
                  void** arguments) {
  static const Kernels kernels;
  const Run* run = kernels.find(kernel);
  if (!run) return false;
  simt::Launch launch;
  launch.grid = grid;
  launch.threads = threads;
  launch.shared_bytes = shared_bytes;
  launch.kernel = kernel;
  (*run)(launch, arguments);
  return true;
}
