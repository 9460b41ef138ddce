// The kernels: one line each in kernels.inc, one table here, and the choice among them.
#pragma once
#include <string>
#include <vector>

#include "core/cpu_info.h"
#include "core/cuda_info.h"
#include "layout/format.h"
#include "sparsekit/sparsekit.h"

namespace sk {

// What select() decides on: everything but the addresses.
struct Problem {
  std::string op = "matmul";
  int format = kNm;
  sk_pattern pattern{};
  int dtype = SK_F32;
  int64_t m = 1, n = 1, k = 1;
  int threads = 1;
  double density = 0;  // kept share of W; 0: what the pattern says (N:M), or a quarter (blocks)
  int device_type = SK_CPU;
  const CudaDevice* gpu = nullptr;  // SK_CUDA; null: there is none, and no kernel is asked

  double kept_share() const;
  std::string describe() const;
};

// A checked call: addresses, and the opened weight. On a GPU every address but the header's is the
// device's.
struct MatmulCall {
  PackedWeight weight;
  int64_t m, n, k;
  int dtype;
  const void* x;
  int64_t x_row_stride;
  void* y;
  int64_t y_row_stride;
  const void* bias;
  const void* residual;
  int64_t residual_row_stride;
  bool residual_first;  // before the activation
  int activation;
  const sk_conv2d_shape* conv;  // where the rows of x are gathered from; null: x is a matrix
  int threads;
  const CudaDevice* gpu;  // null: on the CPU
  void* stream;           // cudaStream_t
  void* counters;         // kCudaCounterBytes: zero, and zero again when the work is done
  void* workspace;        // at least cuda_workspace_bytes(gpu->sm_count)
  int64_t workspace_bytes;
};

// What a kernel's file provides.
struct KernelFunctions {
  std::string (*refusal)(
      const Problem&);  // "" when it can run the problem (format and dtype match already)
  double (*cost_us)(const Problem&);  // estimate of the cost model
  void (*run)(const MatmulCall&);     // m >= 1
  const char* about;
};

// Where a kernel runs, from the last part of its name: an instruction set of this CPU, or "sm80", any
// GPU of compute capability 8.0 or later; "sm90a" is 9.0 and no other.
struct Arch {
  int device_type = SK_CPU;
  Isa isa = Isa::kScalar;
  int compute_capability = 0;
  bool exact = false;

  explicit Arch(const char* name);
  bool runs_on(const CudaDevice& gpu) const;
  std::string why_not_on(const CudaDevice& gpu) const;
};

struct Kernel {
  const char *name, *op, *format, *dtype, *arch, *variant;
  const KernelFunctions* functions;
  Arch where;
  int dtype_code;
  uint32_t formats;  // bit per FormatId that it reads: its own, and those that extend it

  Kernel(const char* name, const char* op, const char* format, const char* dtype, const char* arch,
         const char* variant, const KernelFunctions* functions);
  bool reads(int format_id) const { return formats >> format_id & 1; }
  // On this machine: the CPU, or any of its GPUs.
  bool available() const;
  std::string unavailable_reason() const;
};

const std::vector<Kernel>& kernels();

const Kernel& kernel_named(const char* name);  // throws ValueError when there is none

// Why the kernel's line in the registry takes no such problem on any machine, or "".
std::string why_never(const Kernel& kernel, const Problem& problem);

// The kernel named by `force`, by SPARSEKIT_KERNEL, the preferred one (preferences.h) where it can
// run the problem, or the cheapest that can.
const Kernel& select(const Problem& problem, const char* force);

// The format whose best kernel is the cheapest on this machine for many rows. "cuda" on a machine
// without a GPU decides for nominal_cuda_device().
int default_format(const sk_pattern& pattern, int dtype, const std::string& target);

void matmul(const sk_matmul_args& args, const char* force);
void conv2d(const sk_matmul_args& args, const sk_conv2d_shape& shape, const char* force);
std::vector<sk_candidate> explain(const Problem& problem);

}  // namespace sk
