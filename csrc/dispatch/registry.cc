#include "dispatch/registry.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dtype.h"

namespace sk {

#define SK_ENTRY(id, op, format, dtype, arch, variant) extern const KernelFunctions id;
#include "dispatch/kernels.inc"

namespace {

bool reads(const Kernel& kernel, int format_id) {
  const Format& f = format(format_id);
  return std::strcmp(f.name, kernel.format) == 0 || std::strcmp(f.extends, kernel.format) == 0;
}

// Does the kernel's line in the registry fit? Its own refusal comes after. No text: every call asks
// this.
bool line_fits(const Kernel& kernel, const Problem& p) {
  return kernel.available() && p.op == kernel.op && reads(kernel, p.format) &&
         std::strcmp(dtype_name(p.dtype), kernel.dtype) == 0;
}

// Why the kernel cannot take the problem, or "".
std::string why_not(const Kernel& kernel, const Problem& p) {
  if (!kernel.available()) return kernel.unavailable_reason();
  if (p.op != kernel.op) return concat("does ", kernel.op, ", not ", p.op);
  if (!reads(kernel, p.format)) {
    return concat("reads format ", kernel.format, ", the weight is packed as ",
                  format(p.format).name);
  }
  if (std::strcmp(dtype_name(p.dtype), kernel.dtype) != 0) {
    return concat("computes ", kernel.dtype, ", the problem is ", dtype_name(p.dtype));
  }
  return kernel.functions->refusal(p);
}

const Kernel* cheapest(const Problem& problem) {
  const Kernel* best = nullptr;
  double best_cost = HUGE_VAL;
  for (const Kernel& kernel : kernels()) {
    if (!line_fits(kernel, problem) || !kernel.functions->refusal(problem).empty()) continue;
    if (const double cost = kernel.functions->cost_us(problem); cost < best_cost)
      best = &kernel, best_cost = cost;
  }
  return best;
}

}  // namespace

double Problem::kept_share() const {
  if (density > 0) return density;
  return pattern.family == SK_FAMILY_NM ? double(pattern.kept) / pattern.group : 0.25;
}

std::string Problem::describe() const {
  return concat(op, " ", pattern_name(pattern), " ", dtype_name(dtype), " m=", m, " n=", n,
                " k=", k, " packed as ", sk::format(format).name);
}

std::string Kernel::unavailable_reason() const {
  if (available()) return "";
  const CpuInfo& cpu = cpu_info();
  if (isa <= cpu.detected)
    return concat("needs ", arch, ", SPARSEKIT_ISA allows ", isa_name(cpu.isa));
  return concat("needs ", arch, ", this CPU has ", isa_name(cpu.detected));
}

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> table = [] {
    std::vector<Kernel> list;
#define SK_ENTRY(id, op, format, dtype, arch, variant) \
  list.push_back({ #id, op, format, dtype, arch, variant, find_isa(arch).value(), &id });
#include "dispatch/kernels.inc"
    return list;
  }();
  return table;
}

const Kernel& select(const Problem& problem, const char* force) {
  const std::string forced = force && *force ? force : forced_kernel();
  if (!forced.empty()) {
    for (const Kernel& kernel : kernels()) {
      if (forced != kernel.name) continue;
      const std::string refusal = why_not(kernel, problem);
      SK_CHECK(refusal.empty(), SK_UNSUPPORTED, "kernel ", forced, " cannot run ",
               problem.describe(), ": ", refusal);
      return kernel;
    }
    throw Error(SK_INVALID_ARGUMENT,
                concat("kernel: no kernel is called '", forced, "'; sparsekit kernels lists them"));
  }
  const Kernel* best = cheapest(problem);
  if (best) return *best;
  std::string refusals;
  for (const Kernel& kernel : kernels())
    refusals += concat("\n  ", kernel.name, ": ", why_not(kernel, problem));
  throw Error(SK_UNSUPPORTED, concat("no kernel can run ", problem.describe(), " here:", refusals));
}

int default_format(const sk_pattern& pattern, int dtype, const std::string& target) {
  SK_REQUIRE(target == "auto" || target == "cpu" || target == "reference",
             "target: expected 'auto', 'cpu' or 'reference', got '", target, "'");
  const int canonical = pattern.family == SK_FAMILY_NM ? kNm : kBsr;
  if (target == "reference") return canonical;
  Problem problem;
  problem.pattern = pattern;
  problem.dtype = dtype;
  problem.m = 256, problem.n = problem.k = 1024;  // any size that fills a machine will do
  int best = canonical;
  double best_cost = HUGE_VAL;
  for (int id = 0; id < kFormatCount; ++id) {
    if (!format(id).fits(pattern, dtype)) continue;
    problem.format = id;
    const Kernel* kernel = cheapest(problem);
    if (!kernel) continue;
    if (const double cost = kernel->functions->cost_us(problem); cost < best_cost)
      best = id, best_cost = cost;
  }
  return best;
}

void matmul(const sk_matmul_args& a, const char* force) {
  const PackedWeight weight = open_packed(a.weight, a.weight_bytes);
  const PackedHeader& h = *weight.header;
  SK_REQUIRE(a.n == h.n, "matmul: y has n=", a.n, ", the packed weight has n=", h.n);
  SK_REQUIRE(a.k == h.k, "matmul: x has k=", a.k, ", the packed weight has k=", h.k,
             "; pass x[..., :", h.k, "] or repack");
  SK_REQUIRE(a.dtype == h.dtype, "matmul: x is ", dtype_name(a.dtype), ", the packed weight is ",
             dtype_name(h.dtype), "; cast x or repack");
  SK_REQUIRE(a.m >= 0 && a.m < int64_t{1} << 31, "matmul: expected m from 0 to 2^31 - 1, got ",
             a.m);
  SK_REQUIRE(a.activation >= SK_ACTIVATION_NONE && a.activation <= SK_ACTIVATION_SILU,
             "matmul: unknown activation ", a.activation);
  if (a.m == 0) return;
  SK_REQUIRE(a.x && a.y, "matmul: x or y is NULL");
  const auto check_stride = [&](const char* name, int64_t stride, int64_t width) {
    SK_REQUIRE(stride >= width, "matmul: ", name, " has a row stride of ", stride,
               ", less than its width ", width);
  };
  if (a.m > 1) {  // one row has no next one
    check_stride("x", a.x_row_stride, a.k);
    check_stride("y", a.y_row_stride, a.n);
    if (a.residual) check_stride("residual", a.residual_row_stride, a.n);
  }
  Problem problem;
  problem.format = h.format;
  problem.pattern = h.pattern;
  problem.dtype = h.dtype;
  problem.m = a.m, problem.n = a.n, problem.k = a.k;
  problem.threads = a.num_threads > 0 ? a.num_threads : cpu_info().cores;
  if (h.pattern.family == SK_FAMILY_BSR) {
    problem.density =
        double(h.nnzb) * h.pattern.block_rows * h.pattern.block_cols / (double(h.n) * double(h.k)) +
        1e-9;
  }
  select(problem, force)
      .functions->run({weight, a.m, a.n, a.k, a.dtype, a.x, a.x_row_stride, a.y, a.y_row_stride,
                       a.bias, a.residual, a.residual_row_stride, a.activation, problem.threads});
}

std::vector<sk_candidate> explain(const Problem& problem) {
  std::vector<sk_candidate> answers;
  int best = -1;
  for (const Kernel& kernel : kernels()) {
    sk_candidate c{};
    c.name = kernel.name;
    const std::string refusal = why_not(kernel, problem);
    c.ok = refusal.empty();
    c.cost_us = c.ok ? kernel.functions->cost_us(problem) : 0;
    const std::string reason = c.ok ? std::string(kernel.functions->about) : refusal;
    std::strncpy(c.reason, reason.c_str(), sizeof c.reason - 1);
    answers.push_back(c);
    if (c.ok && (best < 0 || c.cost_us < answers[size_t(best)].cost_us))
      best = int(answers.size()) - 1;
  }
  if (best >= 0) answers[size_t(best)].chosen = 1;
  return answers;
}

}  // namespace sk
