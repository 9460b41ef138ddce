// Runs the CUDA kernels of csrc/cuda/ on the CPU, and stops at whatever a GPU would let pass.
//
//   #include "simt/simt.h"
//   #include "cuda/matmul_nm.cuh"         // the kernel's own source; SPARSEKIT_SIMT is defined
//
//   auto x = simt::Buffer<uint16_t>::input("x", values);       // the kernel may only read it
//   auto y = simt::Buffer<float>::output("y", m * n);          // uninitialised: NaN, and reading it is an error
//   auto locks = simt::Buffer<int>::in_out("locks", zeros);    // initialised, read and written
//
//   simt::Launch launch;
//   launch.grid = 8, launch.threads = 256, launch.shared_bytes = 48 << 10, launch.seed = 7;
//   launch.kernel = "matmul_nm";                               // for messages
//   simt::Statistics s = simt::launch(launch, matmul_nm<Config>, x.data(), y.data(), locks.data(), m, n, k);
//
//   y[i], y.values(), y.written(i)                             // what came out
//   s.bank_conflicts(), s.instructions(simt::Op::kMmaSp), s.sectors(simt::Op::kLoadGlobal), s.report()
//
// launch() throws simt::Error when the kernel breaks a rule (error.h lists the faults): `fault`, `place` (the line
// of the kernel), `block`, `thread`, and what() with all of it. The order of blocks, warps and lanes comes from
// `seed`: run a kernel under several. A grid is one-dimensional, as are blocks; `threads` is a multiple of 32.
//
// Kernels touch memory only through the functions of cuda/ptx/ptx.cuh (ptx.h here). Direct accesses compile, and
// are not checked.
#pragma once
#include <tuple>

#include "simt/error.h"
#include "simt/global_memory.h"
#include "simt/machine.h"
#include "simt/statistics.h"

namespace simt {

template <class... Parameters, class... Arguments>
Statistics launch(const Launch& launch, void (*kernel)(Parameters...),
                  const Arguments&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> parameters(arguments...);
  return Machine::instance().run(launch, [&] { std::apply(kernel, parameters); });
}

}  // namespace simt
