// The Python module _C: integers (addresses, sizes) in, nothing of PyTorch. _native.py is its only
// caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/parallel.h"
#include "sparsekit/sparsekit.h"

namespace py = pybind11;

namespace {

// (family, kept, group, vector, block_rows, block_cols)
using PatternTuple = std::tuple<int, int, int, int, int, int>;

sk_pattern to_pattern(const PatternTuple& t) {
  sk_pattern p{};
  std::tie(p.family, p.kept, p.group, p.vector, p.block_rows, p.block_cols) = t;
  return p;
}
PatternTuple from_pattern(const sk_pattern& p) {
  return {p.family, p.kept, p.group, p.vector, p.block_rows, p.block_cols};
}

void check(sk_status status) {
  if (status == SK_OK) return;
  const std::string message = sk_last_error();
  if (status == SK_INVALID_ARGUMENT) throw py::value_error(message);
  if (status == SK_UNSUPPORTED) {
    PyErr_SetString(PyExc_NotImplementedError, message.c_str());
    throw py::error_already_set();
  }
  throw std::runtime_error(message);
}

template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const char* device_name(int device_type) { return device_type == SK_CUDA ? "cuda" : "cpu"; }

// A canonical weight as Python passes it: addresses and sizes in bytes.
struct Weight {
  PatternTuple pattern;
  int dtype;
  int64_t n, k;
  uintptr_t values;
  int64_t values_bytes;
  uintptr_t indices;
  int64_t indices_bytes;
  uintptr_t crow_indices;
  int64_t crow_indices_bytes;

  sk_weight get() const {
    return {to_pattern(pattern),
            dtype,
            n,
            k,
            at(values),
            values_bytes,
            at(indices),
            indices_bytes,
            at(crow_indices),
            crow_indices_bytes};
  }
};

// The header of a packed buffer as the integers that a graph can hold; the rest of SK_HEADER_BYTES
// is zero.
using Header = std::array<int64_t, 13>;

std::array<char, SK_HEADER_BYTES> header_bytes(const Header& header) {
  std::array<char, SK_HEADER_BYTES> bytes{};
  std::memcpy(bytes.data(), header.data(), sizeof header);
  return bytes;
}

// What a call on a GPU takes beside the rest: device, stream, the packed weight's header, workspace and
// its bytes.
using Gpu = std::tuple<int, uintptr_t, Header, uintptr_t, int64_t>;

// The fields of sk_conv2d_shape in their order.
using Shape = std::array<int64_t, sizeof(sk_conv2d_shape) / sizeof(int64_t)>;

// A matmul's operands; threads counts on the CPU only.
sk_matmul_args matmul_args(int64_t rows, int64_t n, int64_t k, int dtype, uintptr_t x,
                           int64_t x_row_stride, uintptr_t weight, int64_t weight_bytes,
                           uintptr_t y, int64_t y_row_stride, uintptr_t bias, uintptr_t residual,
                           int64_t residual_row_stride, bool residual_first, int activation,
                           int threads) {
  sk_matmul_args args{};
  args.m = rows;
  args.n = n;
  args.k = k;
  args.dtype = dtype;
  args.x = at(x);
  args.x_row_stride = x_row_stride;
  args.weight = at(weight);
  args.weight_bytes = weight_bytes;
  args.y = at(y);
  args.y_row_stride = y_row_stride;
  args.bias = at(bias);
  args.residual = at(residual);
  args.residual_row_stride = residual_row_stride;
  args.residual_order = residual_first ? SK_RESIDUAL_FIRST : SK_RESIDUAL_LAST;
  args.activation = activation;
  args.num_threads = threads;
  return args;
}

// `conv` null: a matmul.
void run(sk_matmul_args args, const Shape* conv, const std::optional<Gpu>& gpu,
         const char* kernel) {
  std::array<char, SK_HEADER_BYTES> header;
  if (gpu) {
    header = header_bytes(std::get<2>(*gpu));
    args.device_type = SK_CUDA;
    args.device_index = std::get<0>(*gpu);
    args.stream = at(std::get<1>(*gpu));
    args.weight_header = header.data();
    args.workspace = at(std::get<3>(*gpu));
    args.workspace_bytes = std::get<4>(*gpu);
  }
  sk_status status;
  {
    py::gil_scoped_release release;
    if (conv) {
      sk_conv2d_shape shape;
      std::memcpy(&shape, conv->data(), sizeof shape);
      status = sk_conv2d(&args, &shape, kernel);
    } else {
      status = sk_matmul(&args, kernel);
    }
  }
  check(status);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sparsekit's native kernels; call them through sparsekit._native";

  py::class_<Weight>(m, "Weight")
      .def(py::init([](PatternTuple pattern, int dtype, int64_t n, int64_t k, uintptr_t values,
                       int64_t values_bytes, uintptr_t indices, int64_t indices_bytes,
                       uintptr_t crow, int64_t crow_bytes) {
        return Weight{pattern, dtype,         n,    k,         values, values_bytes,
                      indices, indices_bytes, crow, crow_bytes};
      }));

  m.def("weight_sizes", [](PatternTuple pattern, int dtype, int64_t n, int64_t k, int64_t nnzb) {
    const sk_pattern p = to_pattern(pattern);
    int64_t values, indices, crow;
    check(sk_weight_sizes(&p, dtype, n, k, nnzb, &values, &indices, &crow));
    return std::make_tuple(values, indices, crow);
  });
  m.def("count_blocks", [](PatternTuple pattern, uintptr_t mask, int64_t n, int64_t k) {
    const sk_pattern p = to_pattern(pattern);
    int64_t nnzb;
    check(sk_count_blocks(&p, at<const uint8_t>(mask), n, k, &nnzb));
    return nnzb;
  });
  m.def("compress", [](uintptr_t dense, int64_t row_stride, uintptr_t mask, const Weight& out) {
    sk_weight w = out.get();
    py::gil_scoped_release release;
    const sk_status status = sk_compress(at(dense), row_stride, at<const uint8_t>(mask), &w);
    py::gil_scoped_acquire acquire;
    check(status);
  });
  m.def("decompress", [](const Weight& weight, uintptr_t dense, int64_t row_stride) {
    const sk_weight w = weight.get();
    check(sk_decompress(&w, at(dense), row_stride));
  });
  m.def("validate", [](const Weight& weight) {
    const sk_weight w = weight.get();
    check(sk_validate(&w));
  });

  m.def("default_format", [](PatternTuple pattern, int dtype, const std::string& target) {
    const sk_pattern p = to_pattern(pattern);
    char format[32];
    check(sk_default_format(&p, dtype, target.c_str(), format));
    return std::string(format);
  });
  m.def("packed_bytes", [](const Weight& weight, const std::string& format) {
    const sk_weight w = weight.get();
    int64_t bytes;
    check(sk_packed_bytes(&w, format.c_str(), &bytes));
    return bytes;
  });
  m.def("format_bytes", [](PatternTuple pattern, int dtype, int64_t n, int64_t k, int64_t nnzb,
                           const std::string& format) {
    const sk_pattern p = to_pattern(pattern);
    int64_t bytes;
    check(sk_format_bytes(&p, dtype, n, k, nnzb, format.c_str(), &bytes));
    return bytes;
  });
  m.def("pack",
        [](const Weight& weight, const std::string& format, uintptr_t packed, int64_t bytes) {
          const sk_weight w = weight.get();
          check(sk_pack(&w, format.c_str(), at(packed), bytes));
        });
  m.def("packed_info", [](uintptr_t packed, int64_t bytes) {
    sk_packed_info info;
    check(sk_read_packed_info(at(packed), bytes, &info));
    return std::make_tuple(std::string(info.format), from_pattern(info.pattern), info.dtype, info.n,
                           info.k, info.nnzb, info.bytes);
  });
  m.def("packed_header", [](uintptr_t packed, int64_t bytes) {
    sk_packed_info info;
    check(sk_read_packed_info(at(packed), bytes, &info));
    Header header;
    std::memcpy(header.data(), at(packed), sizeof header);
    return header;
  });
  m.def("header_format", [](const Header& header, int64_t bytes) {
    alignas(64) const auto start = header_bytes(header);
    sk_packed_info info;
    check(sk_read_packed_info(start.data(), bytes, &info));
    return std::string(info.format);
  });
  m.def("unpack", [](uintptr_t packed, int64_t bytes, const Weight& out) {
    sk_weight w = out.get();
    check(sk_unpack(at(packed), bytes, &w));
  });

  m.def("pack_cuda",
        [](PatternTuple pattern, int dtype, int64_t n, int64_t k, uintptr_t weight,
           int64_t weight_row_stride, int keep, uintptr_t mask, int64_t mask_row_stride,
           uintptr_t packed, int64_t packed_bytes, uintptr_t misfit, int device, uintptr_t stream) {
          std::array<char, SK_HEADER_BYTES> start;
          sk_pack_cuda_args args{};
          args.pattern = to_pattern(pattern);
          args.dtype = dtype;
          args.n = n;
          args.k = k;
          args.weight = at(weight);
          args.weight_row_stride = weight_row_stride;
          args.keep = keep;
          args.mask = at<const uint8_t>(mask);
          args.mask_row_stride = mask_row_stride;
          args.packed = at(packed);
          args.packed_bytes = packed_bytes;
          args.header = start.data();
          args.misfit = at(misfit);
          args.device_index = device;
          args.stream = at(stream);
          sk_status status;
          {
            py::gil_scoped_release release;
            status = sk_pack_cuda(&args);
          }
          check(status);
          Header header;
          std::memcpy(header.data(), start.data(), sizeof header);
          return header;
        });
  m.def("unpack_cuda",
        [](uintptr_t packed, int64_t packed_bytes, const Header& header, int64_t n, int64_t k,
           int dtype, uintptr_t dense, int64_t dense_row_stride, int device, uintptr_t stream) {
          const auto start = header_bytes(header);
          sk_unpack_cuda_args args{};
          args.packed = at(packed);
          args.packed_bytes = packed_bytes;
          args.header = start.data();
          args.n = n;
          args.k = k;
          args.dtype = dtype;
          args.dense = at(dense);
          args.dense_row_stride = dense_row_stride;
          args.device_index = device;
          args.stream = at(stream);
          check(sk_unpack_cuda(&args));
        });

  m.def("matmul",
        [](int64_t rows, int64_t n, int64_t k, int dtype, uintptr_t x, int64_t x_row_stride,
           uintptr_t weight, int64_t weight_bytes, uintptr_t y, int64_t y_row_stride,
           uintptr_t bias, uintptr_t residual, int64_t residual_row_stride, bool residual_first,
           int activation, int threads, const char* kernel, const std::optional<Gpu>& gpu) {
          run(matmul_args(rows, n, k, dtype, x, x_row_stride, weight, weight_bytes, y, y_row_stride,
                          bias, residual, residual_row_stride, residual_first, activation, threads),
              nullptr, gpu, kernel);
        });
  m.def("conv2d",
        [](int64_t rows, int64_t n, int64_t k, int dtype, uintptr_t x, const Shape& shape,
           uintptr_t weight, int64_t weight_bytes, uintptr_t y, int64_t y_row_stride,
           uintptr_t bias, uintptr_t residual, int64_t residual_row_stride, bool residual_first,
           int activation, int threads, const char* kernel, const std::optional<Gpu>& gpu) {
          run(matmul_args(rows, n, k, dtype, x, 0, weight, weight_bytes, y, y_row_stride, bias,
                          residual, residual_row_stride, residual_first, activation, threads),
              &shape, gpu, kernel);
        });

  m.def("kernels", [] {
    std::vector<std::tuple<std::string, std::string, std::string, std::string, std::string,
                           std::string, bool, std::string, std::string>>
        list;
    for (int i = 0; i < sk_kernel_count(); ++i) {
      sk_kernel_info k;
      check(sk_get_kernel(i, &k));
      list.emplace_back(k.name, k.op, k.format, k.dtype, k.arch, k.variant, k.available != 0,
                        k.reason, device_name(k.device_type));
    }
    return list;
  });
  m.def("explain",
        [](const std::string& op, const std::string& format, PatternTuple pattern, int dtype,
           int64_t rows, int64_t n, int64_t k, int threads, int device_type, int device_index) {
          const sk_pattern p = to_pattern(pattern);
          std::vector<sk_candidate> answers(static_cast<size_t>(sk_kernel_count()));
          check(sk_explain_on(device_type, device_index, op.c_str(), format.c_str(), &p, dtype,
                              rows, n, k, threads, answers.data()));
          std::vector<std::tuple<std::string, bool, bool, double, std::string, std::string>> list;
          for (const sk_candidate& c : answers)
            list.emplace_back(c.name, c.ok != 0, c.chosen != 0, c.cost_us, c.reason,
                              device_name(c.device_type));
          return list;
        });
  // (format, pattern, dtype, n, k, threads, device type, device index, m from, m to, kernel)
  using PreferenceTuple = std::tuple<std::string, PatternTuple, int, int64_t, int64_t, int, int,
                                     int, int64_t, int64_t, std::string>;
  m.def("prefer_kernel", [](const std::string& op, const std::vector<PreferenceTuple>& list) {
    std::vector<sk_preference> preferences;
    for (const PreferenceTuple& t : list) {
      const auto& [format, pattern, dtype, n, k, threads, type, index, from, to, kernel] = t;
      preferences.push_back({op.c_str(), format.c_str(), to_pattern(pattern), dtype, n, k, threads,
                             type, index, from, to, kernel.c_str()});
    }
    check(sk_prefer_kernel(preferences.data(), int32_t(preferences.size())));
  });
  m.def("clear_preferences", [] { check(sk_clear_preferences()); });
  m.def("preference_count", [] {
    int64_t count;
    check(sk_preference_count(&count));
    return count;
  });

  m.def("cpu_info", [] {
    sk_cpu_info info;
    check(sk_get_cpu_info(&info));
    py::dict d;
    d["model"] = info.model;
    d["isa"] = info.isa;
    d["isa_detected"] = info.isa_detected;
    d["features"] = info.features;
    d["cores"] = info.cores;
    d["l1d_bytes"] = info.l1d_bytes;
    d["l2_bytes"] = info.l2_bytes;
    d["l3_bytes"] = info.l3_bytes;
    d["threading"] = sk::parallel_backend();
    return d;
  });
  m.attr("CUDA_COUNTER_BYTES") = SK_CUDA_COUNTER_BYTES;
  m.def("cuda_device_count", [] {
    int32_t count;
    check(sk_cuda_device_count(&count));
    return count;
  });
  m.def("cuda_info", [](int device) {
    sk_cuda_info info;
    check(sk_get_cuda_info(device, &info));
    py::dict d;
    d["name"] = info.name;
    d["capability"] = std::make_pair(info.major, info.minor);
    d["sm_count"] = info.sm_count;
    d["shared_bytes_per_block"] = info.shared_bytes_per_block;
    d["shared_bytes_per_sm"] = info.shared_bytes_per_sm;
    d["l2_bytes"] = info.l2_bytes;
    d["memory_bytes"] = info.memory_bytes;
    d["bandwidth"] = info.bandwidth;
    d["driver_version"] = info.driver_version;
    d["runtime_version"] = info.runtime_version;
    d["workspace_bytes"] = info.workspace_bytes;
    return d;
  });
  m.def("build_info", [] {
    py::dict d;
    d["version"] = SPARSEKIT_VERSION;
    d["compiler"] = SPARSEKIT_COMPILER;
    d["build_type"] = SPARSEKIT_BUILD_TYPE;
    d["options"] = SPARSEKIT_BUILD_OPTIONS;
    return d;
  });
  m.def("reload_environment", [] { check(sk_reload_environment()); });
}
