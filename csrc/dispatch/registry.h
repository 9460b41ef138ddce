// The kernels: one line each in kernels.inc, one table here, and the choice among them.
#pragma once
#include <string>
#include <vector>

#include "core/cpu_info.h"
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

  double kept_share() const;
  std::string describe() const;
};

// A checked call: addresses, and the opened weight.
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
  int activation;
  int threads;
};

// What a kernel's file provides.
struct KernelFunctions {
  std::string (*refusal)(
      const Problem&);  // "" when it can run the problem (format and dtype match already)
  double (*cost_us)(const Problem&);  // estimate of the cost model
  void (*run)(const MatmulCall&);     // m >= 1
  const char* about;
};

struct Kernel {
  const char *name, *op, *format, *dtype, *arch, *variant;
  Isa isa;
  const KernelFunctions* functions;

  bool available() const { return isa <= cpu_info().isa; }
  std::string unavailable_reason() const;
};

const std::vector<Kernel>& kernels();

// The kernel named by `force`, by SPARSEKIT_KERNEL, or the cheapest that can run the problem.
const Kernel& select(const Problem& problem, const char* force);

// The format whose best kernel is the cheapest on this machine for many rows.
int default_format(const sk_pattern& pattern, int dtype, const std::string& target);

void matmul(const sk_matmul_args& args, const char* force);
std::vector<sk_candidate> explain(const Problem& problem);

}  // namespace sk
