// The C interface: every function catches what the library throws and keeps its message.
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "core/cpu_info.h"
#include "core/cuda_info.h"
#include "core/dtype.h"
#include "core/error.h"
#include "dispatch/pack_cuda.h"
#include "dispatch/preferences.h"
#include "dispatch/registry.h"
#include "layout/format.h"
#include "sparsekit/sparsekit.h"

namespace {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

template <class F>
sk_status guard(F f) noexcept {
  try {
    f();
    return SK_OK;
  } catch (const sk::Error& e) {
    last_error() = e.what();
    return e.status();
  } catch (const std::bad_alloc&) {
    last_error() = "out of memory";
  } catch (const std::exception& e) {
    last_error() = e.what();
  } catch (...) {
    last_error() = "unknown failure";
  }
  return SK_RUNTIME_ERROR;
}

void copy_text(char* to, size_t size, const std::string& from) {
  std::strncpy(to, from.c_str(), size - 1);
  to[size - 1] = '\0';
}

template <class T>
T& deref(T* pointer, const char* name) {
  SK_REQUIRE(pointer, name, " is NULL");
  return *pointer;
}

// A problem of m=1 without its GPU; `what` begins the message about the device.
sk::Problem make_problem(const char* what, int32_t device_type, const char* op, const char* format,
                         const sk_pattern& pattern, int32_t dtype, int64_t n, int64_t k,
                         int32_t num_threads) {
  SK_REQUIRE(device_type == SK_CPU || device_type == SK_CUDA, what,
             ": expected device_type cpu (0) or cuda (1), got ", device_type);
  sk::Problem problem;
  problem.op = op;
  problem.format = sk::find_format(format);
  problem.pattern = pattern;
  problem.dtype = dtype;
  problem.n = n, problem.k = k;
  problem.threads = num_threads > 0 ? num_threads : sk::cpu_info().cores;
  problem.device_type = device_type;
  sk::geometry(pattern, dtype, n, k);
  return problem;
}

}  // namespace

const char* sk_last_error(void) { return last_error().c_str(); }
const char* sk_version(void) { return SPARSEKIT_VERSION; }

sk_status sk_weight_sizes(const sk_pattern* pattern, int32_t dtype, int64_t n, int64_t k,
                          int64_t nnzb, int64_t* values_bytes, int64_t* indices_bytes,
                          int64_t* crow_indices_bytes) {
  return guard([&] {
    const sk::WeightSizes s = sk::weight_sizes(deref(pattern, "pattern"), dtype, n, k, nnzb);
    deref(values_bytes, "values_bytes") = s.values;
    deref(indices_bytes, "indices_bytes") = s.indices;
    deref(crow_indices_bytes, "crow_indices_bytes") = s.crow_indices;
  });
}

sk_status sk_count_blocks(const sk_pattern* pattern, const uint8_t* mask, int64_t n, int64_t k,
                          int64_t* nnzb) {
  return guard([&] {
    deref(nnzb, "nnzb") = sk::count_blocks(deref(pattern, "pattern"), &deref(mask, "mask"), n, k);
  });
}

sk_status sk_compress(const void* dense, int64_t row_stride, const uint8_t* mask, sk_weight* out) {
  return guard([&] { sk::compress(dense, row_stride, mask, deref(out, "out")); });
}

sk_status sk_decompress(const sk_weight* weight, void* dense, int64_t row_stride) {
  return guard([&] { sk::decompress(deref(weight, "weight"), dense, row_stride); });
}

sk_status sk_validate(const sk_weight* weight) {
  return guard([&] { sk::validate(deref(weight, "weight")); });
}

sk_status sk_default_format(const sk_pattern* pattern, int32_t dtype, const char* target,
                            char format[32]) {
  return guard([&] {
    const sk_pattern& p = deref(pattern, "pattern");
    sk::geometry(p, dtype, 1, 1);
    const int id = sk::default_format(p, dtype, &deref(target, "target"));
    copy_text(&deref(format, "format"), 32, sk::format(id).name);
  });
}

sk_status sk_packed_bytes(const sk_weight* weight, const char* format, int64_t* bytes) {
  return guard([&] {
    deref(bytes, "bytes") = sk::make_header(deref(weight, "weight"), sk::find_format(format)).bytes;
  });
}

sk_status sk_format_bytes(const sk_pattern* pattern, int32_t dtype, int64_t n, int64_t k,
                          int64_t nnzb, const char* format, int64_t* bytes) {
  return guard([&] {
    deref(bytes, "bytes") =
        sk::make_header(deref(pattern, "pattern"), dtype, n, k, nnzb, sk::find_format(format))
            .bytes;
  });
}

sk_status sk_pack(const sk_weight* weight, const char* format, void* packed, int64_t bytes) {
  return guard([&] { sk::pack(deref(weight, "weight"), sk::find_format(format), packed, bytes); });
}

sk_status sk_read_packed_info(const void* packed, int64_t bytes, sk_packed_info* info) {
  return guard([&] {
    const sk::PackedHeader& h = *sk::open_packed(packed, bytes).header;
    sk_packed_info& out = deref(info, "info");
    out = {};
    copy_text(out.format, sizeof out.format, sk::format(h.format).name);
    out.pattern = h.pattern;
    out.dtype = h.dtype;
    out.n = h.n;
    out.k = h.k;
    out.nnzb = h.nnzb;
    out.bytes = h.bytes;
  });
}

sk_status sk_unpack(const void* packed, int64_t bytes, sk_weight* out) {
  return guard([&] { sk::unpack(sk::open_packed(packed, bytes), deref(out, "out")); });
}

sk_status sk_pack_cuda(const sk_pack_cuda_args* args) {
  return guard([&] { sk::pack_on_gpu(deref(args, "args")); });
}

sk_status sk_unpack_cuda(const sk_unpack_cuda_args* args) {
  return guard([&] { sk::unpack_on_gpu(deref(args, "args")); });
}

sk_status sk_matmul(const sk_matmul_args* args, const char* kernel) {
  return guard([&] { sk::matmul(deref(args, "args"), kernel); });
}

sk_status sk_conv2d(const sk_matmul_args* args, const sk_conv2d_shape* shape, const char* kernel) {
  return guard([&] { sk::conv2d(deref(args, "args"), deref(shape, "shape"), kernel); });
}

int32_t sk_kernel_count(void) { return int32_t(sk::kernels().size()); }

sk_status sk_get_kernel(int32_t index, sk_kernel_info* info) {
  return guard([&] {
    SK_REQUIRE(index >= 0 && index < sk_kernel_count(), "kernel: expected an index from 0 to ",
               sk_kernel_count() - 1, ", got ", index);
    const sk::Kernel& k = sk::kernels()[size_t(index)];
    thread_local std::string reason;  // valid until the thread's next call
    reason = k.available() ? k.functions->about : k.unavailable_reason();
    deref(info, "info") = {k.name,        k.op,           k.format,
                           k.dtype,       k.arch,         k.variant,
                           k.available(), reason.c_str(), k.where.device_type};
  });
}

sk_status sk_explain(const char* op, const char* format, const sk_pattern* pattern, int32_t dtype,
                     int64_t m, int64_t n, int64_t k, int32_t num_threads, sk_candidate* out) {
  return sk_explain_on(SK_CPU, 0, op, format, pattern, dtype, m, n, k, num_threads, out);
}

sk_status sk_explain_on(int32_t device_type, int32_t device_index, const char* op,
                        const char* format, const sk_pattern* pattern, int32_t dtype, int64_t m,
                        int64_t n, int64_t k, int32_t num_threads, sk_candidate* out) {
  return guard([&] {
    sk::Problem problem = make_problem("explain", device_type, &deref(op, "op"), format,
                                       deref(pattern, "pattern"), dtype, n, k, num_threads);
    SK_REQUIRE(m >= 0, "explain: expected m >= 0, got ", m);
    problem.m = m;
    // Without any GPU, that is each kernel's reason.
    if (device_type == SK_CUDA && !sk::cuda_devices().empty())
      problem.gpu = &sk::cuda_device(device_index);
    const auto answers = sk::explain(problem);
    std::copy(answers.begin(), answers.end(), &deref(out, "out"));
  });
}

sk_status sk_prefer_kernel(const sk_preference* preferences, int32_t count) {
  return guard([&] {
    SK_REQUIRE(count >= 0, "prefer: expected count >= 0, got ", count);
    std::vector<sk::Preference> list;
    for (int32_t i = 0; i < count; ++i) {
      const sk_preference& p = (&deref(preferences, "preferences"))[i];
      sk::Problem problem = make_problem("prefer", p.device_type, &deref(p.op, "op"), p.format,
                                         p.pattern, p.dtype, p.n, p.k, p.num_threads);
      SK_REQUIRE(sk::format(problem.format).fits(p.pattern, p.dtype), "prefer: format ", p.format,
                 " does not hold the pattern ", sk::pattern_name(p.pattern), " in ",
                 sk::dtype_name(p.dtype));
      if (p.device_type == SK_CUDA) problem.gpu = &sk::cuda_device(p.device_index);
      SK_REQUIRE(p.m_from >= 1 && p.m_from <= p.m_to && p.m_to < int64_t{1} << 31,
                 "prefer: expected 1 <= m_from <= m_to < 2^31, got ", p.m_from, " and ", p.m_to);
      const sk::Kernel& kernel = sk::kernel_named(&deref(p.kernel, "kernel"));
      const std::string reason = sk::why_never(kernel, problem);
      SK_REQUIRE(reason.empty(), "prefer: kernel ", kernel.name, " ", reason);
      list.push_back({problem, p.m_from, p.m_to, &kernel});
    }
    sk::prefer(list);
  });
}

sk_status sk_clear_preferences(void) {
  return guard([] { sk::clear_preferences(); });
}

sk_status sk_preference_count(int64_t* count) {
  return guard([&] { deref(count, "count") = sk::preference_count(); });
}

sk_status sk_get_cpu_info(sk_cpu_info* info) {
  return guard([&] {
    const sk::CpuInfo& cpu = sk::cpu_info();
    sk_cpu_info& out = deref(info, "info");
    out = {};
    copy_text(out.model, sizeof out.model, cpu.model);
    copy_text(out.isa, sizeof out.isa, sk::isa_name(cpu.isa));
    copy_text(out.isa_detected, sizeof out.isa_detected, sk::isa_name(cpu.detected));
    copy_text(out.features, sizeof out.features, cpu.features);
    out.cores = cpu.cores;
    out.l1d_bytes = cpu.l1d_bytes;
    out.l2_bytes = cpu.l2_bytes;
    out.l3_bytes = cpu.l3_bytes;
  });
}

sk_status sk_cuda_device_count(int32_t* count) {
  return guard([&] { deref(count, "count") = int32_t(sk::cuda_devices().size()); });
}

sk_status sk_get_cuda_info(int32_t device, sk_cuda_info* info) {
  return guard([&] {
    sk_cuda_info& out = deref(info, "info");
    const sk::CudaDevice& gpu = sk::cuda_device(device);
    out = {};
    copy_text(out.name, sizeof out.name, gpu.name);
    out.major = gpu.compute_capability / 10;
    out.minor = gpu.compute_capability % 10;
    out.sm_count = gpu.sm_count;
    out.shared_bytes_per_block = gpu.shared_per_block;
    out.shared_bytes_per_sm = gpu.shared_per_sm;
    out.l2_bytes = gpu.l2_bytes;
    out.memory_bytes = gpu.memory_bytes;
    out.bandwidth = gpu.bandwidth;
    out.driver_version = sk::cuda_driver_version();
    out.runtime_version = sk::cuda_runtime_version();
    out.workspace_bytes = sk::cuda_workspace_bytes(gpu.sm_count);
  });
}

sk_status sk_reload_environment(void) {
  return guard([] { sk::reload_environment(); });
}
