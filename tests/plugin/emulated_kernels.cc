// The kernels of tiles.inc, compiled for the emulator and found by the names that nvcc gives them.
#include "emulated_kernels.h"

#include <functional>
#include <map>

#include "cuda/pixels.cuh"
#include "cuda/rows.cuh"
#include "cuda/weights_bsr.cuh"
#include "cuda/weights_nm.cuh"
#include "simt/simt.h"

namespace {

using namespace sk;
using Run = std::function<void(const simt::Launch&, void**)>;

template <class Tile, template <class> class Weights, template <class> class Copier>
void run(const simt::Launch& launch, void** arguments) {
  simt::launch(launch, cuda::matmul_mma<Tile, Weights, Copier>,
               *static_cast<const cuda::MatmulParams*>(arguments[0]),
               *static_cast<const typename Copier<Tile>::Params*>(arguments[1]));
}

// As they stand in the mangled name of matmul_mma<Tile<...>, Weights, Copier>.
struct Key {
  std::string tile, weights, copier;
};

std::string tile_name(const char* dtype, std::initializer_list<int> numbers) {
  std::string name = "4TileINS_3ptx" + std::to_string(std::string(dtype).size()) + dtype;
  for (int number : numbers) name += "ELi" + std::to_string(number);
  return name + "EE";
}

struct Entry {
  Key key;
  Run run;
};

#define SK_ENTRY(T, Weights, Copier, rows, tokens, wr, wt, stages, blocks)                     \
  list.push_back({{tile_name(#T, {rows, tokens, wr, wt, stages, blocks}), #Weights, #Copier},  \
                  run<cuda::Tile<ptx::T, rows, tokens, wr, wt, stages, blocks>, cuda::Weights, \
                      cuda::Copier>});
#define SK_BOTH(Weights, Copier, rows, tokens, wr, wt, stages, blocks) \
  SK_ENTRY(F16, Weights, Copier, rows, tokens, wr, wt, stages, blocks) \
  SK_ENTRY(BF16, Weights, Copier, rows, tokens, wr, wt, stages, blocks)
#define SK_NM_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(NmWeights, RowCopier, rows, tokens, wr, wt, stages, blocks)
#define SK_BSR_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(BsrWeights, RowCopier, rows, tokens, wr, wt, stages, blocks)
#define SK_CONV_NM_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(NmWeights, PixelCopier, rows, tokens, wr, wt, stages, blocks)
#define SK_CONV_BSR_TILE(rows, tokens, wr, wt, stages, blocks, about) \
  SK_BOTH(BsrWeights, PixelCopier, rows, tokens, wr, wt, stages, blocks)

const std::vector<Entry>& entries() {
  static const std::vector<Entry> all = [] {
    std::vector<Entry> list;
#include "cuda/tiles.inc"
    return list;
  }();
  return all;
}

}  // namespace

bool run_emulated(const std::string& kernel, int grid, int threads, int shared_bytes,
                  void** arguments) {
  const auto has = [&](const std::string& part) { return kernel.find(part) != std::string::npos; };
  for (const Entry& entry : entries()) {
    if (!has(entry.key.tile) || !has(entry.key.weights) || !has(entry.key.copier)) continue;
    simt::Launch launch;
    launch.grid = grid;
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    launch.kernel = kernel;
    entry.run(launch, arguments);
    return true;
  }
  return false;
}
