// What is decided and checked about a GPU without having one: facts of GPUs are structs, so refusals
// and choices are tested with made-up ones. Where there is a GPU, also that it takes no host memory.
#include "core/cuda_info.h"
#include "cuda/plan.h"
#include "dispatch/matmul_cuda.h"
#include "dispatch/registry.h"
#include "support.h"

using namespace test;

namespace {

constexpr sk_status kInvalid = SK_INVALID_ARGUMENT;

sk::CudaDevice gpu(int compute_capability) {
  sk::CudaDevice d = sk::nominal_cuda_device();
  d.index = 0;
  d.name = "Fake GPU";
  d.compute_capability = compute_capability;
  return d;
}

// The message that `call` throws; its status is `status`.
template <class F>
std::string message_of(sk_status status, F call) {
  try {
    call();
  } catch (const sk::Error& error) {
    CHECK(error.status() == status);
    return error.what();
  }
  fail(__FILE__, __LINE__, "nothing was thrown");
}

void test_reasons() {
  context = "reasons";
  CHECK(sk::explain_no_device(35, "insufficient", 0, 13000) == "no CUDA driver is installed");
  CHECK(sk::explain_no_device(35, "insufficient", 12040, 13010) ==
        "the CUDA driver is for CUDA 12.4, this build needs one for CUDA 13.0 or later; update the "
        "driver, or rebuild with an older nvcc");
  const std::string hidden = "the CUDA driver finds no GPU; is CUDA_VISIBLE_DEVICES set?";
  CHECK(sk::explain_no_device(100, "no device", 13000, 13010) == hidden);
  CHECK(sk::explain_no_device(0, "no error", 12040, 12080) == hidden);
  CHECK(sk::explain_no_device(999, "unknown error", 13000, 13000) ==
        "the CUDA driver reports no GPU: unknown error");
  CHECK(sk::capability_name(90) == "9.0" && sk::capability_name(121) == "12.1");
}

void test_code() {
  context = "code";
  struct Case {
    const char* built;
    int capability;
    bool runs;
  };
  for (const Case& c : {Case{"80 ptx80", 75, false},
                        {"80 ptx80", 80, true},
                        {"80", 86, true},
                        {"80", 90, false},
                        {"87", 80, false},
                        {"80 ptx80", 120, true},
                        {"80 90 120 ptx120", 100, false},
                        {"80 100 120 ptx120", 103, true},
                        {"80 120 ptx120", 121, true},
                        {"90a", 90, true},
                        {"90a", 91, false},
                        {"90a ptx90a", 100, false},
                        // PTX of the oldest: what machine code leaves out, now and later.
                        {"80 86 90a 100 120 ptx80", 75, false},
                        {"80 86 90a 100 120 ptx80", 110, true},
                        {"80 86 90a 100 120 ptx80", 130, true},
                        {"87 ptx87", 86, false},
                        {"87 ptx87", 110, true},
                        {"", 80, false}}) {
    context = std::string("'") + c.built + "' on " + std::to_string(c.capability);
    CHECK(sk::runs_code(c.built, c.capability) == c.runs);
  }
}

void test_arch() {
  context = "arch";
  const sk::Arch sm80("sm80"), sm90a("sm90a"), scalar("scalar");
  CHECK(scalar.device_type == SK_CPU && sm80.device_type == SK_CUDA);
  CHECK(sm80.runs_on(gpu(80)) && sm80.runs_on(gpu(121)) && !sm80.runs_on(gpu(75)));
  CHECK(sm90a.runs_on(gpu(90)) && !sm90a.runs_on(gpu(89)) && !sm90a.runs_on(gpu(100)));
  CHECK(sm80.why_not_on(gpu(80)).empty());
  CHECK(sm80.why_not_on(gpu(75)) ==
        "needs a GPU of compute capability 8.0 or later, device 0 (Fake GPU) has compute "
        "capability 7.5");
  CHECK(sm90a.why_not_on(gpu(100)) ==
        "needs a GPU of compute capability 9.0, device 0 (Fake GPU) has compute capability 10.0");
  sk::CudaDevice without = gpu(90);
  without.has_code = false;
  CHECK(!sm80.runs_on(without));
  CHECK(sm80.why_not_on(without) ==
        "this build has no code for compute capability 9.0; rebuild with "
        "SPARSEKIT_CUDA_ARCHITECTURES=90");
}

// The choice for a GPU that is not there.
void test_choice() {
  context = "choice";
  const sk::CudaDevice present = gpu(80), old = gpu(75);
  sk::Problem problem;
  problem.pattern = nm(2, 4);
  problem.m = problem.n = problem.k = 64;
  problem.device_type = SK_CUDA;
  for (const sk::CudaDevice* device : {static_cast<const sk::CudaDevice*>(nullptr), &old}) {
    problem.gpu = device;
    for (const sk_candidate& c : sk::explain(problem)) CHECK(!c.ok && !c.chosen && c.reason[0]);
    const std::string text =
        message_of(SK_UNSUPPORTED, [&] { sk::select(problem, "matmul_nm_f32_scalar"); });
    CHECK(text.find("runs on the CPU, the problem is on a GPU") != std::string::npos);
  }
  problem.gpu = &present;
  problem.format = sk::kNmRows16;  // which no kernel on a GPU reads
  const std::string text = message_of(SK_UNSUPPORTED, [&] { sk::select(problem, nullptr); });
  for (const sk::Kernel& kernel : sk::kernels()) {
    const bool on_gpu = kernel.where.device_type == SK_CUDA;
    CHECK((text.find(std::string("\n  ") + kernel.name + ": ") != std::string::npos) == on_gpu);
    if (!on_gpu) continue;
    sk::Problem on_cpu = problem;
    on_cpu.device_type = SK_CPU, on_cpu.gpu = nullptr;
    CHECK(message_of(SK_UNSUPPORTED, [&] {
            sk::select(on_cpu, kernel.name);
          }).find("runs on a GPU, the problem is on the CPU") != std::string::npos);
  }
}

#if SK_HAVE_CUDA
// Which tile the cost model takes, and what tiles refuse.
void test_tiles() {
  context = "tiles";
  const auto problem = [](const sk::CudaDevice& on, int format, const sk_pattern& pattern,
                          int64_t m, int64_t n, int64_t k) {
    sk::Problem p;
    p.device_type = SK_CUDA, p.gpu = &on;
    p.format = format, p.pattern = pattern, p.dtype = SK_F16;
    p.m = m, p.n = n, p.k = k;
    return p;
  };
  const auto chosen = [](const sk::Problem& p) { return std::string(sk::select(p, nullptr).name); };
  const auto refusal = [](const sk::Problem& p, const std::string& kernel) {
    for (const sk_candidate& c : sk::explain(p)) {
      if (c.name == kernel) return std::string(c.ok ? "" : c.reason);
    }
    fail(__FILE__, __LINE__, "no kernel " + kernel);
  };
  const std::string sp = "matmul_nm_mma_sp_f16_sm80_", bsr_mma = "matmul_bsr_mma_f16_sm80_";
  const sk::CudaDevice big = gpu(80);
  const auto sparse = [&](const sk::CudaDevice& on, int64_t m) {
    return problem(on, sk::kNmMmaSp, nm(2, 4), m, 8192, 8192);
  };
  CHECK(chosen(sparse(big, 1)) == sp + "64x8");
  CHECK(chosen(sparse(big, 16)) == sp + "64x16");
  CHECK(chosen(sparse(big, 4096)) == sp + "256x128");
  const auto blocks = [&](int64_t m, int rows) {
    return problem(big, sk::kBsrMma, bsr(rows, 64), m, 8192, 8192);
  };
  CHECK(chosen(blocks(8, 64)) == bsr_mma + "64x16");
  CHECK(chosen(blocks(8192, 64)) == bsr_mma + "64x256");
  CHECK(chosen(blocks(8192, 32)) == bsr_mma + "32x128");
  CHECK(refusal(blocks(8, 32), bsr_mma + "64x16") == "computes blocks of 64 rows, these have 32");

  const auto convolution = [&](const sk::CudaDevice& on, int64_t m, int64_t n) {
    sk::Problem p = problem(on, sk::kNmMmaSp, nm(2, 4), m, n, 9 * n);
    p.op = "conv2d";
    return p;
  };
  const std::string conv = "conv2d_nm_mma_sp_f16_sm80_";
  CHECK(chosen(convolution(big, 7 * 7, 512)) == conv + "64x32");
  CHECK(chosen(convolution(big, 32 * 56 * 56, 64)) == conv + "64x128");
  CHECK(chosen(convolution(big, 32 * 28 * 28, 512)) == conv + "256x128");
  sk::Problem conv_blocks = blocks(8, 64);
  conv_blocks.op = "conv2d";
  CHECK(chosen(conv_blocks) == "conv2d_bsr_mma_f16_sm80_64x128");
  CHECK(refusal(conv_blocks, "conv2d_bsr_mma_f16_sm80_32x128") ==
        "computes blocks of 32 rows, these have 64");

  // CUDA cores: what the tensor cores do not take, and never what they do.
  const auto cores = [&](const sk_pattern& pattern, int dtype, int64_t m) {
    const int format = pattern.family == SK_FAMILY_NM ? sk::kNm : sk::kBsr;
    sk::Problem p = problem(big, format, pattern, m, 4096, 4096);
    p.dtype = dtype;
    return p;
  };
  CHECK(chosen(cores(nm(2, 4), SK_F32, 1)) == "matmul_nm_f32_sm80_decode");
  CHECK(chosen(cores(nm(2, 4), SK_F32, 8)) == "matmul_nm_f32_sm80_decode");
  CHECK(chosen(cores(nm(2, 4), SK_F32, 2048)) == "matmul_nm_f32_sm80_cores");
  CHECK(chosen(cores(nm(7, 8), SK_BF16, 1024)) == "matmul_nm_bf16_sm80_cores");
  CHECK(chosen(cores(bsr(5, 3), SK_F16, 1)) == "matmul_bsr_f16_sm80_decode");
  CHECK(chosen(cores(bsr(16, 16), SK_F32, 1024)) == "matmul_bsr_f32_sm80_cores");
  sk::Problem wide = cores(nm(2, 4), SK_F32, 1);
  wide.n = 1, wide.k = (int64_t{1} << 31) - 256;
  for (const char* variant : {"cores", "decode"}) {
    CHECK(refusal(wide, std::string("matmul_nm_f32_sm80_") + variant) ==
          "k is 2^31 - 256 or more; split the weight along k");
  }
  wide.k -= 1;
  CHECK(refusal(wide, "matmul_nm_f32_sm80_cores").empty());
  for (const int dtype : {SK_F16, SK_BF16}) {
    CHECK(sk::default_format(nm(2, 4), dtype, "cuda") == sk::kNmMmaSp);
    CHECK(sk::default_format(nm(2, 4, 4), dtype, "cuda") == sk::kNmMmaSp);
    CHECK(sk::default_format(nm(1, 4), dtype, "cuda") == sk::kNm);
    CHECK(sk::default_format(bsr(8, 8), dtype, "cuda") == sk::kBsr);
    for (const int rows : {16, 32, 64, 128}) {
      for (const int columns : {16, 32, 64, 128})
        CHECK(sk::default_format(bsr(rows, columns), dtype, "cuda") == sk::kBsrMma);
    }
  }
  CHECK(sk::default_format(nm(2, 4), SK_F32, "cuda") == sk::kNm);
  CHECK(sk::default_format(bsr(16, 16), SK_F32, "cuda") == sk::kBsr);

  sk::CudaDevice small = gpu(89);  // GeForce and its kin
  small.shared_per_block = 99 << 10, small.shared_per_sm = 100 << 10;
  CHECK(chosen(sparse(small, 4096)) == sp + "128x128");
  CHECK(refusal(sparse(small, 4096), sp + "256x128") ==
        "needs 136 KiB of shared memory for a block, the GPU has 99");
  CHECK(chosen(convolution(small, 32 * 28 * 28, 512)) == conv + "128x128");
  CHECK(refusal(convolution(small, 32 * 28 * 28, 512), conv + "256x128") ==
        "needs 138 KiB of shared memory for a block, the GPU has 99");

  const sk::Problem huge =
      problem(big, sk::kNmMmaSp, nm(2, 4), 1, int64_t{1} << 24, int64_t{1} << 24);
  CHECK(refusal(huge, sp + "64x8") == "the weight has 2^31 stages or more; split it along n");
}
#endif

bool has_cuda_kernels() {
  for (const sk_kernel_info& kernel : kernels()) {
    if (kernel.device_type == SK_CUDA) return true;
  }
  return false;
}

void test_target() {
  context = "target";
  char format[32] = "untouched";
  const auto ask = [&](const sk_pattern& p, int32_t dtype, const char* target) {
    return sk_default_format(&p, dtype, target, format);
  };
  for (const char* wrong :
       {"cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:99999", "cudas", "gpu"}) {
    CHECK_FAILS(ask(nm(2, 4), SK_BF16, wrong), kInvalid,
                std::string("target: expected 'auto', 'cpu', 'cuda', 'cuda:<device>' or "
                            "'reference', got '") +
                    wrong + "'");
  }
  if (sk::cuda_devices().empty()) {
    CHECK_FAILS(ask(nm(2, 4), SK_BF16, "cuda:0"), SK_UNSUPPORTED,
                "CUDA: " + sk::cuda_unavailable_reason());
  } else {
    CHECK_FAILS(ask(nm(2, 4), SK_BF16, "cuda:999"), kInvalid, "CUDA: expected a device from 0 to ");
  }
  // Kernels for GPUs take every pattern in every dtype. Where none can run, every one says why.
  if (!has_cuda_kernels()) {
    CHECK_FAILS(
        ask(nm(3, 4), SK_F32, "cuda"), SK_UNSUPPORTED,
        "pack: no kernel on a GPU takes 3:4 in f32: this build has no CUDA kernels; rebuild "
        "with nvcc and SPARSEKIT_CUDA=ON");
    CHECK(!std::strcmp(format, "untouched"));
    return;
  }
  // A format for a GPU is one that a kernel there reads, and that holds the pattern.
  for (const sk_pattern& pattern : all_patterns()) {
    for (int32_t dtype : kDtypes) {
      context = "target cuda " + name(pattern) + " " + dtype_name(dtype);
      CHECK_OK(ask(pattern, dtype, "cuda"));
      bool read = false;
      for (const sk_kernel_info& kernel : kernels()) {
        read = read || (kernel.device_type == SK_CUDA && !std::strcmp(kernel.format, format) &&
                        !std::strcmp(kernel.dtype, dtype_name(dtype)));
      }
      CHECK(read);
      Random random(1);
      const Weight w(pattern, dtype, 33, 70, Fill::kIntegers, random);
      const Canonical canonical = compress(w.dense, w.mask, pattern, dtype);
      CHECK(unpack(pack(canonical, format)) == canonical);
    }
  }
}

void test_machine() {
  context = "machine";
  int32_t count = -1;
  CHECK_FAILS(sk_cuda_device_count(nullptr), kInvalid, "count is NULL");
  CHECK_OK(sk_cuda_device_count(&count));
  CHECK(count >= 0 && (count == 0) == !sk::cuda_unavailable_reason().empty());
  sk_cuda_info info;
  std::memset(&info, 0x5a, sizeof info);
  const sk_cuda_info before = info;
  CHECK_FAILS(sk_get_cuda_info(0, nullptr), kInvalid, "info is NULL");
  for (int32_t index : {-1, count, INT32_MAX}) {
    if (count == 0) {
      CHECK_FAILS(sk_get_cuda_info(index, &info), SK_UNSUPPORTED,
                  "CUDA: " + sk::cuda_unavailable_reason());
    } else {
      CHECK_FAILS(sk_get_cuda_info(index, &info), kInvalid,
                  "CUDA: expected a device from 0 to " + std::to_string(count - 1) + ", got " +
                      std::to_string(index));
    }
  }
  CHECK(!std::memcmp(&info, &before, sizeof info));
  for (int32_t i = 0; i < count; ++i) {
    CHECK_OK(sk_get_cuda_info(i, &info));
    CHECK(info.name[0] && info.major >= 3 && info.sm_count > 0 && info.memory_bytes > 0);
    CHECK(info.shared_bytes_per_sm >= info.shared_bytes_per_block);
    CHECK(info.driver_version >= info.runtime_version / 1000 * 1000);
    CHECK(info.workspace_bytes == (16 << 10) + info.sm_count * int64_t{2} * (128 << 10));
  }
  for (const sk_kernel_info& kernel : kernels()) {
    CHECK((kernel.device_type == SK_CUDA) == !std::strncmp(kernel.arch, "sm", 2));
    if (kernel.device_type == SK_CUDA && count == 0) CHECK(!kernel.available);
  }
}

void test_explain() {
  context = "explain";
  const sk_pattern p = nm(2, 4);
  std::vector<sk_candidate> out(static_cast<size_t>(sk_kernel_count()));
  const auto explain = [&](int32_t type, int32_t index) {
    return sk_explain_on(type, index, "matmul", "nm", &p, SK_F32, 1, 64, 64, 1, out.data());
  };
  CHECK_FAILS(explain(2, 0), kInvalid, "explain: expected device_type cpu (0) or cuda (1), got 2");
  CHECK_OK(explain(SK_CPU, 0));
  CHECK(std::any_of(out.begin(), out.end(), [](const sk_candidate& c) { return c.chosen; }));
  if (!sk::cuda_devices().empty()) {
    CHECK_FAILS(explain(SK_CUDA, 999), kInvalid, "CUDA: expected a device from 0 to ");
  }
  CHECK_OK(explain(SK_CUDA, 0));
  for (size_t i = 0; i < out.size(); ++i) {
    CHECK(!out[i].ok && out[i].reason[0]);
    const bool on_gpu = kernels()[i].device_type == SK_CUDA;
    if (!on_gpu) CHECK(std::string(out[i].reason) == "runs on the CPU, the problem is on a GPU");
    if (on_gpu && sk::cuda_devices().empty())
      CHECK(std::string(out[i].reason) == sk::cuda_unavailable_reason());
  }
}

// Addresses are checked before a GPU is asked for, so host memory serves here.
void test_arguments() {
  context = "arguments";
  Random random(1);
  const int64_t m = 3, n = 24, k = 64, x_stride = 72;
  const Weight w(nm(2, 4), SK_BF16, n, k, Fill::kIntegers, random);
  const Buffer packed = pack(compress(w.dense, w.mask, w.pattern, w.dtype), "nm");
  Buffer weight(128 + packed.bytes()), memory(1 << 16);
  const auto up = [](uint8_t* p) { return p + (128 - reinterpret_cast<uintptr_t>(p) % 128) % 128; };
  uint8_t* const at = up(memory.data());
  sk_matmul_args good{};
  good.m = m, good.n = n, good.k = k;
  good.dtype = SK_BF16;
  good.x = at, good.x_row_stride = x_stride;
  good.y = at + 4096, good.y_row_stride = n;
  good.bias = at + 8192;
  good.residual = at + 12288, good.residual_row_stride = n + 1;
  good.weight = up(weight.data()), good.weight_bytes = packed.bytes();
  good.device_type = SK_CUDA;
  good.weight_header = packed.data();
  // What is left to refuse when everything up to the GPU is right.
  const bool none = sk::cuda_devices().empty();
  const sk_status last = none ? SK_UNSUPPORTED : kInvalid;
  const std::string text =
      none ? "CUDA: " + sk::cuda_unavailable_reason() : "matmul: expected a workspace of ";
  CHECK_FAILS(sk_matmul(&good, nullptr), last, text);

  const auto refuse = [&](auto change, const std::string& expected) {
    sk_matmul_args bad = good;
    change(bad);
    CHECK_FAILS(sk_matmul(&bad, nullptr), kInvalid, expected);
  };
  const auto pass = [&](auto change) {
    sk_matmul_args fine = good;
    change(fine);
    CHECK_FAILS(sk_matmul(&fine, nullptr), last, text);
  };
  using Args = sk_matmul_args&;
  refuse([](Args a) { a.device_type = 2; },
         "matmul: expected device_type cpu (0) or cuda (1), got 2");
  refuse([](Args a) { a.weight_header = nullptr; },
         "matmul: weight_header is NULL; pass a host copy of the first 128 bytes");
  Buffer damaged(packed.bytes());
  std::memcpy(damaged.data(), packed.data(), size_t(packed.bytes()));
  damaged.data()[40] ^= 1;
  refuse([&](Args a) { a.weight_header = damaged.data(); }, "packed weight: the header is damaged");
  refuse([](Args a) { a.weight_bytes -= 1; }, "packed weight: the header's sizes do not belong");
  refuse([](Args a) { a.k = 65; }, "matmul: x has k=65, the packed weight has k=64");
  refuse([](Args a) { a.dtype = SK_F16; }, "matmul: x is f16, the packed weight is bf16");
  refuse([](Args a) { a.x = nullptr; }, "matmul: x or y is NULL");
  refuse([](Args a) { a.weight = nullptr; },
         "matmul: expected a packed weight aligned to 128 bytes");
  refuse([&](Args a) { a.weight = static_cast<const char*>(good.weight) + 64; },
         "matmul: expected a packed weight aligned to 128 bytes");
  refuse([&](Args a) { a.x = at + 8; },
         "matmul: expected the rows of x on multiples of 16 bytes, the first is 8 past one and "
         "they are 144 apart; copy x to an aligned buffer");
  refuse([](Args a) { a.x_row_stride = 70; },
         "matmul: expected the rows of x on multiples of 16 bytes, the first is 0 past one and "
         "they are 140 apart; copy x to an aligned buffer");
  pass([](Args a) { a.m = 1, a.x_row_stride = 70; });  // no next row
  refuse([&](Args a) { a.y = at + 4097; }, "matmul: expected y aligned to 2 bytes");
  refuse([&](Args a) { a.bias = at + 8193; }, "matmul: expected bias aligned to 2 bytes");
  refuse([&](Args a) { a.residual = at + 12289; }, "matmul: expected residual aligned to 2 bytes");
  refuse([](Args a) { a.x_row_stride = INT64_MAX / 8 * 8; },
         "matmul: x has a row stride of 9223372036854775800, too large for 3 rows");

  refuse([&](Args a) { a.y = at; }, "matmul: y overlaps x; pass a y of its own");
  refuse([&](Args a) { a.x = at + 4096 + 32, a.m = 1; }, "matmul: y overlaps x");
  refuse([&](Args a) { a.y = at + 12288, a.y_row_stride = n + 1; }, "matmul: y overlaps residual");
  refuse([&](Args a) { a.bias = at + 4096 + 2 * n * m - 2; }, "matmul: y overlaps bias");
  pass([&](Args a) { a.bias = at + 4096 + 2 * n * m; });  // just behind it
  pass([](Args a) { a.bias = nullptr, a.residual = nullptr; });
  // x and y as columns of one matrix of 96: 0 to 63 and 64 to 87, or one too early.
  const auto columns = [&](Args a, int64_t first) {
    a.x_row_stride = a.y_row_stride = 96;
    a.y = at + 2 * first;
  };
  pass([&](Args a) { columns(a, 64); });
  refuse([&](Args a) { columns(a, 63); }, "matmul: y overlaps x");
  refuse([&](Args a) { columns(a, 73); }, "matmul: y overlaps x");  // reaches into the next row
  pass([&](Args a) { columns(a, 72); });

  sk_matmul_args none_at_all = good;
  none_at_all.m = 0;
  CHECK_OK(sk_matmul(&none_at_all, nullptr));
}

// The same for a convolution: 32 pixels of two images, 3x3 taps of 16 columns for 11 channels.
void test_convolution_arguments() {
  context = "convolution arguments";
  Random random(1);
  const int64_t n = 24, k = 9 * 16;
  const Weight w(nm(2, 4), SK_BF16, n, k, Fill::kIntegers, random);
  const Buffer packed = pack(compress(w.dense, w.mask, w.pattern, w.dtype), "nm");
  Buffer weight(128 + packed.bytes()), memory(1 << 16);
  const auto up = [](uint8_t* p) { return p + (128 - reinterpret_cast<uintptr_t>(p) % 128) % 128; };
  uint8_t* const at = up(memory.data());
  sk_matmul_args good{};
  good.m = 32, good.n = n, good.k = k;
  good.dtype = SK_BF16;
  good.x = at + 8192;
  good.y = at, good.y_row_stride = n;
  good.weight = up(weight.data()), good.weight_bytes = packed.bytes();
  good.device_type = SK_CUDA;
  good.weight_header = packed.data();
  sk_conv2d_shape shape{};
  shape.batch = 2, shape.in_height = shape.in_width = 4, shape.in_channels = 11;
  shape.x_pixel_stride = 16, shape.x_line_stride = 64, shape.x_image_stride = 256;
  shape.kernel_height = shape.kernel_width = 3;
  shape.stride_height = shape.stride_width = 1;
  shape.dilation_height = shape.dilation_width = 1;
  shape.padding_top = shape.padding_left = 1;
  shape.out_height = shape.out_width = 4;
  const bool none = sk::cuda_devices().empty();
  const sk_status last = none ? SK_UNSUPPORTED : kInvalid;
  const std::string text =
      none ? "CUDA: " + sk::cuda_unavailable_reason() : "conv2d: expected a workspace of ";

  const auto refuse = [&](auto change, const std::string& expected) {
    sk_matmul_args args = good;
    sk_conv2d_shape s = shape;
    change(args, s);
    CHECK_FAILS(sk_conv2d(&args, &s, nullptr), kInvalid, expected);
  };
  const auto pass = [&](auto change) {
    sk_matmul_args args = good;
    sk_conv2d_shape s = shape;
    change(args, s);
    CHECK_FAILS(sk_conv2d(&args, &s, nullptr), last, text);
  };
  using Args = sk_matmul_args&;
  using Shape = sk_conv2d_shape&;
  const std::string pixels =
      "conv2d: expected the pixels of x on multiples of 16 bytes; copy x to an aligned buffer";
  pass([](Args, Shape) {});
  refuse([&](Args a, Shape) { a.x = at + 8192 + 8; }, pixels);
  refuse([](Args, Shape s) { s.x_pixel_stride = 12; }, pixels);
  refuse([](Args, Shape s) { s.x_line_stride = 68, s.x_image_stride = 272; }, pixels);
  refuse([](Args, Shape s) { s.x_image_stride = 260; }, pixels);
  pass([](Args a, Shape s) { a.m = 16, s.batch = 1, s.x_image_stride = 1; });  // no next image
  pass([](Args, Shape s) { s.in_height = 1, s.x_line_stride = 1; });
  pass([](Args, Shape s) { s.in_width = 1, s.x_pixel_stride = 1; });
  refuse([&](Args a, Shape) { a.x = at + 8193; }, "conv2d: expected x aligned to 2 bytes");
  refuse([](Args, Shape s) { s.kernel_width = 4; },
         "conv2d: a tap has 12 channels, expected a multiple of 8; repack");
  // 3 lines, 3 pixels and 11 channels to the image's end.
  const auto image_of = [](Shape s, int64_t line) {
    s.x_line_stride = line, s.x_image_stride = 4 * line;
  };
  const int64_t longest = ((int64_t{1} << 31) - 3 * 16 - 11) / 3 / 8 * 8;
  pass([&](Args, Shape s) { image_of(s, longest); });
  refuse([&](Args, Shape s) { image_of(s, longest + 8); },
         "conv2d: an image of x takes " + std::to_string((3 * (longest + 8) + 59) * 2) +
             " bytes, expected less than 2^32; cut it into parts");
  pass([](Args, Shape s) { s.stride_height = 715827881, s.dilation_width = 1073741822; });
  refuse([](Args, Shape s) { s.stride_height = 715827882; },
         "conv2d: the kernel's last position is 2147483648 lines and 5 pixels from its first, "
         "expected less than 2^31; check the strides and dilations");
  refuse([](Args, Shape s) { s.dilation_width = 1073741823; },
         "conv2d: the kernel's last position is 5 lines and 2147483649 pixels from its first");
  // y in the second image; behind the last channel of all; just before that.
  refuse([&](Args a, Shape) { a.y = at + 8192 + 512; },
         "conv2d: y overlaps x; pass a y of its own");
  pass([&](Args a, Shape) { a.y = at + 8192 + 2 * 507; });
  refuse([&](Args a, Shape) { a.y = at + 8192 + 2 * 506; }, "conv2d: y overlaps x");
}

// Where the launches of a convolution start.
void test_launches() {
  context = "launches";
  sk_conv2d_shape s{};
  s.batch = 10, s.out_height = 3, s.out_width = 5;
  const auto range_is = [&](int64_t token, int64_t image, int first_pixel, int64_t tokens) {
    const sk::cuda::PixelRange range = sk::cuda::pixels_from(s, token, 8);
    CHECK(range.offset == image * s.x_image_stride && range.first_pixel == first_pixel &&
          range.tokens == tokens);
  };
  s.x_image_stride = 4096;
  range_is(0, 0, 0, 150), range_is(149, 9, 14, 1);
  s.x_image_stride = int64_t{1} << 33;  // four of them are 2^32 chunks of 8
  range_is(0, 0, 0, 60), range_is(17, 1, 2, 58), range_is(60, 4, 0, 60), range_is(149, 9, 14, 1);
  s.x_image_stride += 8;
  range_is(0, 0, 0, 45);
  s.x_image_stride = int64_t{1} << 40;
  range_is(31, 2, 1, 14);
  s.batch = 1, s.x_image_stride = 0;
  range_is(7, 0, 7, 8);

  // A line of stages shorter than 2^31 is cut where it falls in an image.
  s.batch = 1000, s.x_image_stride = int64_t{1} << 28;
  const sk::cuda::TileShape tile{128, 128, 1, 1 << 15, 1 << 17, 1024};
  const sk::cuda::Stages stages{4096, int64_t{1} << 26, true};
  int64_t token = 0, inside = 0;
  while (token < 15000) {
    const sk::cuda::PixelRange range = sk::cuda::pixels_from(s, token, 8);
    const sk::cuda::Plan plan = sk::cuda::plan(tile, stages, range.tokens, gpu(80));
    CHECK(plan.tokens > 0 && plan.tokens <= range.tokens && plan.token_tiles < 32);
    CHECK(range.offset == token / 15 * s.x_image_stride && range.first_pixel == token % 15);
    const int64_t last = (range.first_pixel + plan.tokens - 1) / 15;  // image, from the first on
    CHECK((last + 1) * s.x_image_stride <= int64_t{8} << 32);
    inside += range.first_pixel > 0;
    token += plan.tokens;
  }
  CHECK(token == 15000 && inside == 0);  // 128 images are fewer tokens than a line of stages
  s.x_image_stride = int64_t{1} << 20;
  for (token = 0; token < 15000;
       token += sk::cuda::plan(tile, stages, 15000 - token, gpu(80)).tokens)
    inside += sk::cuda::pixels_from(s, token, 8).first_pixel > 0;
  CHECK(inside > 0);
}

void test_workspace() {
  context = "workspace";
  const sk::CudaDevice device = gpu(80);
  const int64_t bytes = sk::cuda_workspace_bytes(device.sm_count);
  CHECK(bytes == 16384 + 108 * 2 * 131072);
  Buffer memory(256);  // its size is never looked at
  sk_matmul_args args{};
  uint8_t* const up =
      memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  args.workspace = up;
  args.workspace_bytes = bytes;
  sk::check_workspace("matmul", args, device);
  const std::string expected = "matmul: expected a workspace of " + std::to_string(bytes) +
                               " bytes for device 0 (Fake GPU), got ";
  const auto refusal = [&] {
    return message_of(kInvalid, [&] { sk::check_workspace("matmul", args, device); });
  };
  args.workspace_bytes = bytes - 1;
  CHECK(refusal() == expected + std::to_string(bytes - 1));
  args.workspace_bytes = bytes;
  args.workspace = static_cast<char*>(args.workspace) + 64;
  CHECK(refusal() == "matmul: expected a workspace aligned to 128 bytes");
  args.workspace = nullptr;
  CHECK(refusal() == expected + "0");
  args.workspace = up, args.counters = up + 64;
  CHECK(refusal() == "matmul: expected counters aligned to 128 bytes");
  args.counters = up + 128;
  sk::check_workspace("matmul", args, device);
}

// Where there is a GPU: its kernels read no host memory.
void test_host_memory() {
  context = "host memory";
  sk_cuda_info info;
  if (sk_get_cuda_info(0, &info) != SK_OK) return;
  Random random(2);
  Buffer workspace(info.workspace_bytes + 128), memory(1 << 16);
  const auto up = [](uint8_t* p) { return p + (128 - reinterpret_cast<uintptr_t>(p) % 128) % 128; };
  for (const sk_pattern& pattern : all_patterns()) {
    char format[32];
    if (sk_default_format(&pattern, SK_BF16, "cuda", format) != SK_OK) continue;
    context = "host memory " + name(pattern);
    const Weight w(pattern, SK_BF16, 64, 64, Fill::kIntegers, random);
    const Buffer packed = pack(compress(w.dense, w.mask, pattern, SK_BF16), format);
    Buffer weight(packed.bytes() + 128);
    sk_matmul_args args{};
    args.m = 16, args.n = args.k = 64;
    args.dtype = SK_BF16;
    args.x = up(memory.data()), args.x_row_stride = 64;
    args.y = up(memory.data()) + 4096, args.y_row_stride = 64;
    args.weight = up(weight.data()), args.weight_bytes = packed.bytes();
    args.device_type = SK_CUDA;
    args.weight_header = packed.data();
    args.workspace = up(workspace.data()), args.workspace_bytes = info.workspace_bytes;
    CHECK_FAILS(sk_matmul(&args, nullptr), kInvalid,
                "matmul: expected x in the memory of device 0, got host memory; copy it there");
  }
}

}  // namespace

int main() {
  test_reasons();
  test_code();
  test_arch();
  test_choice();
#if SK_HAVE_CUDA
  test_tiles();
#endif
  test_target();
  test_machine();
  test_explain();
  test_arguments();
  test_convolution_arguments();
  test_launches();
  test_workspace();
  test_host_memory();
}
