#include "dispatch/registry.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/dtype.h"
#include "dispatch/gpu_arguments.h"
#include "dispatch/matmul_cuda.h"
#include "dispatch/preferences.h"

namespace sk {

#define SK_ENTRY(id, op, format, dtype, arch, variant) extern const KernelFunctions id;
#include "dispatch/kernels.inc"

namespace {

// Does the kernel's line in the registry fit? Its own refusal comes after. No text: every call asks
// this of every kernel.
bool line_fits(const Kernel& kernel, const Problem& p) {
  if (kernel.where.device_type != p.device_type || kernel.dtype_code != p.dtype ||
      !kernel.reads(p.format))
    return false;
  const bool runs = p.device_type == SK_CPU ? kernel.where.isa <= cpu_info().isa
                                            : p.gpu && kernel.where.runs_on(*p.gpu);
  return runs && p.op == kernel.op;
}

std::string wrong_device(const Kernel& kernel, const Problem& p) {
  if (kernel.where.device_type == p.device_type) return "";
  return p.device_type == SK_CPU ? "runs on a GPU, the problem is on the CPU"
                                 : "runs on the CPU, the problem is on a GPU";
}

std::string wrong_line(const Kernel& kernel, const Problem& p) {
  if (p.op != kernel.op) return concat("does ", kernel.op, ", not ", p.op);
  if (!kernel.reads(p.format)) {
    return concat("reads format ", kernel.format, ", the weight is packed as ",
                  format(p.format).name);
  }
  if (kernel.dtype_code != p.dtype) {
    return concat("computes ", kernel.dtype, ", the problem is ", dtype_name(p.dtype));
  }
  return "";
}

// Why the kernel cannot take the problem, or "".
std::string why_not(const Kernel& kernel, const Problem& p) {
  if (std::string reason = wrong_device(kernel, p); !reason.empty()) return reason;
  if (p.device_type == SK_CPU) {
    if (!kernel.available()) return kernel.unavailable_reason();
  } else if (!p.gpu) {
    return cuda_unavailable_reason();
  } else if (!kernel.where.runs_on(*p.gpu)) {
    return kernel.where.why_not_on(*p.gpu);
  }
  if (std::string reason = wrong_line(kernel, p); !reason.empty()) return reason;
  return kernel.functions->refusal(p);
}

bool can_run(const Kernel& kernel, const Problem& problem) {
  return line_fits(kernel, problem) && kernel.functions->refusal(problem).empty();
}

// What was measured to be the fastest, where it can run; null: nothing was.
const Kernel* measured(const Problem& problem) {
  const Kernel* kernel = preferred(problem);
  return kernel && can_run(*kernel, problem) ? kernel : nullptr;
}

const Kernel* cheapest(const Problem& problem) {
  const Kernel* best = nullptr;
  double best_cost = HUGE_VAL;
  for (const Kernel& kernel : kernels()) {
    if (!can_run(kernel, problem)) continue;
    if (const double cost = kernel.functions->cost_us(problem); cost < best_cost)
      best = &kernel, best_cost = cost;
  }
  return best;
}

// "cuda" or "cuda:<index>" to the GPU to decide for; null for another target.
const CudaDevice* gpu_of_target(const std::string& target) {
  if (target == "cuda")
    return cuda_devices().empty() ? &nominal_cuda_device() : &cuda_devices().front();
  const bool numbered = target.size() > 5 && target.size() < 10 && target.rfind("cuda:", 0) == 0 &&
                        target.find_first_not_of("0123456789", 5) == std::string::npos;
  return numbered ? &cuda_device(std::atoi(target.c_str() + 5)) : nullptr;
}

// Why no kernel on a GPU takes the pattern in any format: one line for each kernel.
std::string refusals_of_pattern(Problem problem) {
  std::string text;
  for (const Kernel& kernel : kernels()) {
    if (kernel.where.device_type != SK_CUDA) continue;
    problem.format = find_format(kernel.format);
    const bool computes = kernel.dtype_code == problem.dtype;
    const bool holds = format(problem.format).fits(problem.pattern, problem.dtype);
    text +=
        concat("\n  ", kernel.name, ": ",
               computes && !holds ? concat("format ", kernel.format, " does not hold the pattern")
                                  : why_not(kernel, problem));
  }
  return text.empty() ? " this build has no CUDA kernels; rebuild with nvcc and SPARSEKIT_CUDA=ON"
                      : text;
}

// What must fit the packed weight, whatever the device. `op` begins the messages.
void check_arguments(const char* op, const sk_matmul_args& a, const PackedHeader& h) {
  SK_REQUIRE(a.n == h.n, op, ": y has n=", a.n, ", the packed weight has n=", h.n);
  SK_REQUIRE(a.k == h.k, op, ": x has k=", a.k, ", the packed weight has k=", h.k,
             "; pass x[..., :", h.k, "] or repack");
  SK_REQUIRE(a.dtype == h.dtype, op, ": x is ", dtype_name(a.dtype), ", the packed weight is ",
             dtype_name(h.dtype), "; cast x or repack");
  SK_REQUIRE(a.m >= 0 && a.m < int64_t{1} << 31, op, ": expected m from 0 to 2^31 - 1, got ", a.m);
  SK_REQUIRE(a.activation >= SK_ACTIVATION_NONE && a.activation <= SK_ACTIVATION_RELU6, op,
             ": unknown activation ", a.activation);
  SK_REQUIRE(a.residual_order == SK_RESIDUAL_LAST || a.residual_order == SK_RESIDUAL_FIRST, op,
             ": unknown residual_order ", a.residual_order);
}

// x is null for a convolution, whose rows are not those of a matrix.
void check_rows(const char* op, const sk_matmul_args& a, const void* x) {
  SK_REQUIRE(a.x && a.y, op, ": x or y is NULL");
  const auto check_stride = [&](const char* name, int64_t stride, int64_t width) {
    SK_REQUIRE(stride >= width, op, ": ", name, " has a row stride of ", stride,
               ", less than its width ", width);
  };
  if (a.m == 1) return;  // one row has no next one
  if (x) check_stride("x", a.x_row_stride, a.k);
  check_stride("y", a.y_row_stride, a.n);
  if (a.residual) check_stride("residual", a.residual_row_stride, a.n);
}

// A convolution's geometry fits the packed weight and itself, and its offsets can be computed.
void check_shape(const sk_matmul_args& a, const sk_conv2d_shape& s) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const auto check = [&](const char* name, int64_t value, int64_t least) {
    SK_REQUIRE(value >= least && value < kLimit, "conv2d: expected ", name, " from ", least,
               " to 2^31 - 1, got ", value);
  };
  check("batch", s.batch, 0);
  check("in_height", s.in_height, 1), check("in_width", s.in_width, 1);
  check("in_channels", s.in_channels, 1);
  check("kernel_height", s.kernel_height, 1), check("kernel_width", s.kernel_width, 1);
  check("stride_height", s.stride_height, 1), check("stride_width", s.stride_width, 1);
  check("dilation_height", s.dilation_height, 1), check("dilation_width", s.dilation_width, 1);
  check("padding_top", s.padding_top, 0), check("padding_left", s.padding_left, 0);
  check("out_height", s.out_height, 1), check("out_width", s.out_width, 1);
  SK_REQUIRE(s.out_height * s.out_width < kLimit && s.batch * s.out_height * s.out_width == a.m,
             "conv2d: y has m=", a.m, " rows, expected ", s.batch, " images of ", s.out_height, "x",
             s.out_width, " pixels");
  const int64_t taps = s.kernel_height * s.kernel_width;
  SK_REQUIRE(taps <= a.k && a.k % taps == 0 && a.k / taps >= s.in_channels,
             "conv2d: the packed weight has k=", a.k, ", which is not ", s.kernel_height, "x",
             s.kernel_width, " taps of ", s.in_channels, " channels or more; repack");
  if (a.m == 0) return;
  const auto check_stride = [](const char* name, int64_t stride, int64_t count, int64_t within) {
    SK_REQUIRE(count == 1 || (stride >= within && stride < int64_t{1} << 60), "conv2d: ", name,
               " is ", stride, ", less than the ", within, " elements it steps over");
    return count == 1 ? within : stride;
  };
  const int64_t pixel = check_stride("x_pixel_stride", s.x_pixel_stride, s.in_width, s.in_channels);
  SK_REQUIRE(pixel < (int64_t{1} << 60) / s.in_width, "conv2d: x is larger than the address space");
  const int64_t line = check_stride("x_line_stride", s.x_line_stride, s.in_height,
                                    (s.in_width - 1) * pixel + s.in_channels);
  SK_REQUIRE(line < (int64_t{1} << 60) / s.in_height, "conv2d: x is larger than the address space");
  const int64_t image =
      check_stride("x_image_stride", s.x_image_stride, s.batch,
                   (s.in_height - 1) * line + (s.in_width - 1) * pixel + s.in_channels);
  SK_REQUIRE(image < (int64_t{1} << 60) / s.batch, "conv2d: x is larger than the address space");
}

// The pixels are the rows of a matrix, one after the other.
bool is_matmul(const sk_matmul_args& a, const sk_conv2d_shape& s) {
  const bool one_tap = s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 &&
                       s.stride_width == 1 && s.padding_top == 0 && s.padding_left == 0;
  return one_tap && a.k == s.in_channels && s.out_height == s.in_height &&
         s.out_width == s.in_width &&
         (s.in_height == 1 || s.x_line_stride == s.in_width * s.x_pixel_stride) &&
         (s.batch == 1 || s.x_image_stride == s.in_height * s.in_width * s.x_pixel_stride);
}

bool forces_conv2d(const char* force) {
  const char* forced = force && *force ? force : forced_kernel().c_str();
  return *forced && !std::strcmp(kernel_named(forced).op, "conv2d");
}

void run(const char* op, const sk_matmul_args& a, const sk_conv2d_shape* conv, const char* force) {
  SK_REQUIRE(a.device_type == SK_CPU || a.device_type == SK_CUDA, op,
             ": expected device_type cpu (0) or cuda (1), got ", a.device_type);
  const bool on_gpu = a.device_type == SK_CUDA;
  PackedHeader copy;  // of a weight on a GPU
  const PackedWeight weight =
      on_gpu ? open_on_gpu(op, a.weight, a.weight_bytes, "weight_header", a.weight_header, copy)
             : open_packed(a.weight, a.weight_bytes);
  const PackedHeader& h = *weight.header;
  check_arguments(op, a, h);
  if (conv) check_shape(a, *conv);
  if (a.m == 0) return;
  check_rows(op, a, conv ? nullptr : a.x);
  if (conv && is_matmul(a, *conv) && !forces_conv2d(force)) {
    sk_matmul_args rows = a;
    rows.x_row_stride = conv->x_pixel_stride;
    return run("matmul", rows, nullptr, force);
  }
  Problem problem;
  problem.op = op;
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
  if (on_gpu) {
    check_addresses(op, a, conv);
    problem.device_type = SK_CUDA;
    problem.gpu = &cuda_device(a.device_index);
    check_workspace(op, a, *problem.gpu);
  }
  const Kernel& kernel = select(problem, force);
  const MatmulCall call{weight,
                        a.m,
                        a.n,
                        a.k,
                        a.dtype,
                        a.x,
                        a.x_row_stride,
                        a.y,
                        a.y_row_stride,
                        a.bias,
                        a.residual,
                        a.residual_row_stride,
                        a.residual_order == SK_RESIDUAL_FIRST,
                        a.activation,
                        conv,
                        problem.threads,
                        problem.gpu,
                        a.stream,
                        a.counters ? a.counters : a.workspace,
                        a.workspace,
                        a.workspace_bytes};
  if (on_gpu) {
    run_on_gpu(kernel, call);
  } else {
    kernel.functions->run(call);
  }
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

Arch::Arch(const char* name) {
  if (std::strncmp(name, "sm", 2) != 0) {
    isa = find_isa(name).value();
    return;
  }
  device_type = SK_CUDA;
  compute_capability = std::atoi(name + 2);
  exact = name[std::strlen(name) - 1] == 'a';
}

bool Arch::runs_on(const CudaDevice& gpu) const {
  return gpu.has_code && (exact ? gpu.compute_capability == compute_capability
                                : gpu.compute_capability >= compute_capability);
}

std::string Arch::why_not_on(const CudaDevice& gpu) const {
  if (runs_on(gpu)) return "";
  const std::string has = concat("device ", gpu.index, " (", gpu.name, ") has compute capability ",
                                 capability_name(gpu.compute_capability));
  if (exact ? gpu.compute_capability != compute_capability
            : gpu.compute_capability < compute_capability) {
    return concat("needs a GPU of compute capability ", capability_name(compute_capability),
                  exact ? "" : " or later", ", ", has);
  }
  return concat("this build has no code for compute capability ",
                capability_name(gpu.compute_capability),
                "; rebuild with SPARSEKIT_CUDA_ARCHITECTURES=", gpu.compute_capability);
}

Kernel::Kernel(const char* name_, const char* op_, const char* format_, const char* dtype_,
               const char* arch_, const char* variant_, const KernelFunctions* functions_)
    : name(name_),
      op(op_),
      format(format_),
      dtype(dtype_),
      arch(arch_),
      variant(variant_),
      functions(functions_),
      where(arch_),
      dtype_code(-1),
      formats(0) {
  for (int code : {SK_F32, SK_BF16, SK_F16}) {
    if (std::strcmp(dtype_name(code), dtype) == 0) dtype_code = code;
  }
  for (int id = 0; id < kFormatCount; ++id) {
    const Format& f = sk::format(id);
    if (std::strcmp(f.name, format) == 0 || std::strcmp(f.extends, format) == 0)
      formats |= 1u << id;
  }
}

bool Kernel::available() const {
  if (where.device_type == SK_CPU) return where.isa <= cpu_info().isa;
  const std::vector<CudaDevice>& gpus = cuda_devices();
  return std::any_of(gpus.begin(), gpus.end(),
                     [&](const CudaDevice& gpu) { return where.runs_on(gpu); });
}

std::string Kernel::unavailable_reason() const {
  if (available()) return "";
  if (where.device_type == SK_CUDA) {
    return cuda_devices().empty() ? cuda_unavailable_reason()
                                  : where.why_not_on(cuda_devices().front());
  }
  const CpuInfo& cpu = cpu_info();
  if (where.isa <= cpu.detected)
    return concat("needs ", arch, ", SPARSEKIT_ISA allows ", isa_name(cpu.isa));
  return concat("needs ", arch, ", this CPU has ", isa_name(cpu.detected));
}

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> table = [] {
    std::vector<Kernel> list;
#define SK_ENTRY(id, op, format, dtype, arch, variant) \
  list.emplace_back(#id, op, format, dtype, arch, variant, &id);
#include "dispatch/kernels.inc"
    return list;
  }();
  return table;
}

const Kernel& kernel_named(const char* name) {
  for (const Kernel& kernel : kernels()) {
    if (std::strcmp(name, kernel.name) == 0) return kernel;
  }
  throw Error(SK_INVALID_ARGUMENT,
              concat("kernel: no kernel is called '", name, "'; sparsekit kernels lists them"));
}

std::string why_never(const Kernel& kernel, const Problem& problem) {
  const std::string reason = wrong_device(kernel, problem);
  return reason.empty() ? wrong_line(kernel, problem) : reason;
}

const Kernel& select(const Problem& problem, const char* force) {
  const char* forced = force && *force ? force : forced_kernel().c_str();
  if (*forced) {
    const Kernel& kernel = kernel_named(forced);
    const std::string refusal = why_not(kernel, problem);
    SK_CHECK(refusal.empty(), SK_UNSUPPORTED, "kernel ", forced, " cannot run ", problem.describe(),
             ": ", refusal);
    return kernel;
  }
  if (const Kernel* kernel = measured(problem)) return *kernel;
  if (const Kernel* kernel = cheapest(problem)) return *kernel;
  std::string refusals;
  bool readable = false;
  for (const Kernel& kernel : kernels()) {
    if (kernel.where.device_type != problem.device_type) continue;
    readable |= kernel.reads(problem.format);
    refusals += concat("\n  ", kernel.name, ": ", why_not(kernel, problem));
  }
  const std::string where = problem.device_type == SK_CPU ? "CPUs" : "GPUs";
  const std::string advice =
      readable ? "" : concat(" (the format is not for ", where, "; pack the weight again)");
  throw Error(SK_UNSUPPORTED,
              concat("no kernel can run ", problem.describe(), " here", advice, ":", refusals));
}

int default_format(const sk_pattern& pattern, int dtype, const std::string& target) {
  Problem problem;
  problem.gpu = gpu_of_target(target);
  SK_REQUIRE(problem.gpu || target == "auto" || target == "cpu" || target == "reference",
             "target: expected 'auto', 'cpu', 'cuda', 'cuda:<device>' or 'reference', got '",
             target, "'");
  const int canonical = pattern.family == SK_FAMILY_NM ? kNm : kBsr;
  if (target == "reference") return canonical;
  problem.pattern = pattern;
  problem.dtype = dtype;
  problem.m = 256, problem.n = problem.k = 1024;  // any size that fills a machine will do
  problem.device_type = problem.gpu ? SK_CUDA : SK_CPU;
  int best = -1;
  double best_cost = HUGE_VAL;
  for (int id = 0; id < kFormatCount; ++id) {
    if (!format(id).fits(pattern, dtype)) continue;
    problem.format = id;
    const Kernel* kernel = cheapest(problem);
    if (!kernel) continue;
    if (const double cost = kernel->functions->cost_us(problem); cost < best_cost)
      best = id, best_cost = cost;
  }
  if (best >= 0) return best;
  SK_CHECK(!problem.gpu, SK_UNSUPPORTED, "pack: no kernel on a GPU takes ", pattern_name(pattern),
           " in ", dtype_name(dtype), ":", refusals_of_pattern(problem));
  return canonical;
}

void matmul(const sk_matmul_args& args, const char* force) { run("matmul", args, nullptr, force); }

void conv2d(const sk_matmul_args& args, const sk_conv2d_shape& shape, const char* force) {
  run("conv2d", args, &shape, force);
}

std::vector<sk_candidate> explain(const Problem& problem) {
  const char* how = "forced by SPARSEKIT_KERNEL";
  const Kernel* choice = nullptr;
  if (forced_kernel().empty()) {
    choice = measured(problem);
    how = choice ? "measured" : "estimated";
    if (!choice) choice = cheapest(problem);
  }
  std::vector<sk_candidate> answers;
  for (const Kernel& kernel : kernels()) {
    sk_candidate c{};
    c.name = kernel.name;
    c.device_type = kernel.where.device_type;
    std::string reason = why_not(kernel, problem);
    c.ok = reason.empty();
    c.chosen = c.ok && (&kernel == choice || forced_kernel() == kernel.name);
    c.cost_us = c.ok ? kernel.functions->cost_us(problem) : 0;
    if (c.chosen) reason = concat("chosen: ", how, "; ");
    if (c.ok) reason += kernel.functions->about;
    std::strncpy(c.reason, reason.c_str(), sizeof c.reason - 1);
    answers.push_back(c);
  }
  return answers;
}

}  // namespace sk
