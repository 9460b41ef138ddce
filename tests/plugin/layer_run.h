// A layer run by a plugin as TensorRT would, and what must come out, in float64 on the host.
#pragma once
#include <cuda_runtime_api.h>

#include "plugin_case.h"

namespace test {

#define CHECK_CUDA(call)                                                        \
  do {                                                                          \
    if (const cudaError_t error = (call); error != cudaSuccess)                 \
      ::test::fail(__FILE__, __LINE__,                                          \
                   std::string(#call " failed: ") + cudaGetErrorString(error)); \
  } while (false)

class GpuBytes {
 public:
  explicit GpuBytes(const std::vector<uint8_t>& bytes, int64_t offset = 0)
      : offset_(offset), size_(bytes.size()) {
    CHECK_CUDA(cudaMalloc(&base_, bytes.size() + size_t(offset) + 1));
    write(bytes);
  }
  ~GpuBytes() { cudaFree(base_); }
  GpuBytes(const GpuBytes&) = delete;

  void* address() const { return static_cast<uint8_t*>(base_) + offset_; }
  void write(const std::vector<uint8_t>& bytes) {
    CHECK(bytes.size() == size_);
    CHECK_CUDA(cudaMemcpy(address(), bytes.data(), size_, cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaStreamSynchronize(nullptr));  // other streams may not wait for this one
  }
  std::vector<uint8_t> read() const {
    std::vector<uint8_t> bytes(size_);
    CHECK_CUDA(cudaMemcpy(bytes.data(), address(), size_, cudaMemcpyDeviceToHost));
    return bytes;
  }

 private:
  void* base_ = nullptr;
  int64_t offset_;
  size_t size_;
};

// Rows and what lies between and behind them: whole rows, as TensorRT's tensors have them.
inline std::vector<uint8_t> row_bytes(const Matrix& matrix) {
  std::vector<uint8_t> bytes(size_t(matrix.rows() * matrix.stride() * dtype_bytes(matrix.dtype())),
                             0xff);
  const auto* from = static_cast<const uint8_t*>(matrix.data());
  const int64_t size = dtype_bytes(matrix.dtype());
  for (int64_t row = 0; row < matrix.rows(); ++row) {
    std::copy_n(from + row * matrix.stride() * size, matrix.cols() * size,
                bytes.begin() + row * matrix.stride() * size);
  }
  return bytes;
}

// x and residual of one call, y, the workspace.
class Call {
 public:
  Call(const Layer& layer, const LayerWeight& weight, std::vector<int64_t> x_dims, Fill how,
       Random& random)
      : layer_(layer),
        weight_(weight),
        x_dims_(std::move(x_dims)),
        y_dims_(output_dims()),
        x_(layer.dtype, rows(x_dims_), channels(x_dims_), gap(channels(x_dims_))),
        residual_(layer.dtype, rows(y_dims_), layer.n, gap(layer.n)),
        x_memory_((fill(x_, how, random), row_bytes(x_))),
        residual_memory_((fill(residual_, how, random), row_bytes(residual_))),
        y_memory_(std::vector<uint8_t>(row_bytes(residual_).size(), 0xff)) {}

  // Of x with other numbers.
  void refill(Fill how, Random& random) {
    fill(x_, how, random);
    x_memory_.write(row_bytes(x_));
  }
  void clear_y() { y_memory_.write(std::vector<uint8_t>(row_bytes(residual_).size(), 0xff)); }

  std::vector<DynamicPluginTensorDesc> tensors() const {
    std::vector<DynamicPluginTensorDesc> all = {
        dynamic(tensor(layer_.type(), layer_.layout(), x_dims_)),
        dynamic(tensor(DataType::kINT32, TensorFormat::kLINEAR, {weight_.words()}))};
    if (layer_.residual) all.push_back(dynamic(tensor(layer_.type(), layer_.layout(), y_dims_)));
    all.push_back(dynamic(tensor(layer_.type(), layer_.layout(), y_dims_)));
    return all;
  }

  size_t workspace_bytes(const Plugin& plugin) const {
    const auto all = tensors();
    return plugin.build().getWorkspaceSize(all.data(), int32_t(all.size()) - 1, &all.back(), 1);
  }

  // As a builder would: configured, written into a plan, read, attached.
  Plugin plugin(const Library& library) const {
    const Plugin build = Plugin::create(library, layer_.op(), layer_.fields(weight_.nnzb));
    CHECK(build);
    const auto all = tensors();
    CHECK(build.build().configurePlugin(all.data(), int32_t(all.size()) - 1, &all.back(), 1) == 0);
    const Plugin run =
        Plugin::create(library, layer_.op(), build.serialized(), TensorRTPhase::kRUNTIME);
    CHECK(run);
    return run.attach();
  }

  int32_t enqueue(const Plugin& plugin, const void* weight, void* workspace,
                  cudaStream_t stream) const {
    std::vector<PluginTensorDesc> all;
    for (const auto& t : tensors()) all.push_back(t.desc);
    const int32_t inputs = int32_t(all.size()) - 1;
    if (const int32_t bad = plugin.runtime().onShapeChange(all.data(), inputs, &all.back(), 1))
      return bad;
    const void* in[] = {x_memory_.address(), weight, residual_memory_.address()};
    void* out[] = {y_memory_.address()};
    return plugin.runtime().enqueue(all.data(), &all.back(), in, out, workspace, stream);
  }

  // The same, to its end and without a word.
  void run(const Plugin& plugin, const void* weight, void* workspace, cudaStream_t stream) const {
    const int32_t failed = enqueue(plugin, weight, workspace, stream);
    check_silence();
    CHECK(!failed);
    CHECK_CUDA(cudaStreamSynchronize(stream));
  }

  int64_t m() const { return rows(y_dims_); }
  std::vector<uint8_t> y() const { return y_memory_.read(); }

  void check_y() const {
    const std::vector<uint8_t> bytes = y();
    const std::vector<double> expected = reference();
    const int64_t size = dtype_bytes(layer_.dtype), stride = residual_.stride();
    const bool exact = layer_.activation == SK_ACTIVATION_NONE ||
                       layer_.activation == SK_ACTIVATION_RELU ||
                       layer_.activation == SK_ACTIVATION_RELU6;
    for (int64_t row = 0; row < m(); ++row) {
      for (int64_t col = 0; col < stride; ++col) {
        uint32_t bits = 0;
        std::memcpy(&bits, bytes.data() + (row * stride + col) * size, size_t(size));
        const double got = decode(layer_.dtype, bits);
        const double want = col < layer_.n ? expected[size_t(row * layer_.n + col)] : 0;
        const double slack = std::ldexp(std::fabs(want), 1 - digits(layer_.dtype)) + 1e-5;
        if (exact || col >= layer_.n ? got == round_to(layer_.dtype, want)
                                     : std::fabs(got - want) <= slack)
          continue;
        fail(__FILE__, __LINE__,
             "y[" + std::to_string(row) + ", " + std::to_string(col) + "] is " +
                 std::to_string(got) + ", expected " + std::to_string(want));
      }
    }
  }

 private:
  static int64_t rows(const std::vector<int64_t>& dims, bool conv) {
    return conv ? dims[0] * dims[2] * dims[3] : count(dims) / std::max<int64_t>(1, dims.back());
  }
  int64_t rows(const std::vector<int64_t>& dims) const { return rows(dims, layer_.conv); }
  int64_t channels(const std::vector<int64_t>& dims) const {
    return layer_.conv ? dims[1] : dims.back();
  }
  int64_t gap(int64_t channels) const {
    return layer_.layout() == TensorFormat::kHWC8 ? (8 - channels % 8) % 8 : 0;
  }

  std::vector<int64_t> output_dims() const {
    std::vector<int64_t> y = x_dims_;
    if (!layer_.conv) {
      y.back() = layer_.n;
      return y;
    }
    y[1] = layer_.n;
    for (size_t axis : {0, 1}) {
      y[2 + axis] = (x_dims_[2 + axis] + layer_.pads[axis] + layer_.pads[axis + 2] -
                     layer_.dilations[axis] * (layer_.kernel[axis] - 1) - 1) /
                        layer_.strides[axis] +
                    1;
    }
    return y;
  }

  // The rows of x that a group multiplies; of a convolution gathered from the images.
  Matrix gathered(int group) const {
    Matrix matrix(layer_.dtype, m(), layer_.k);
    if (!layer_.conv) {
      for (int64_t row = 0; row < m(); ++row) {
        for (int64_t col = 0; col < layer_.k; ++col) matrix.set(row, col, x_.get(row, col));
      }
      return matrix;
    }
    const int64_t height = x_dims_[2], width = x_dims_[3];
    const int64_t tap = layer_.k / (layer_.kernel[0] * layer_.kernel[1]);
    for (int64_t row = 0; row < m(); ++row) {
      const int64_t image = row / (y_dims_[2] * y_dims_[3]), p = row / y_dims_[3] % y_dims_[2],
                    q = row % y_dims_[3];
      for (int64_t col = 0; col < layer_.k; ++col) {
        const int64_t r = col / tap / layer_.kernel[1], s = col / tap % layer_.kernel[1],
                      c = col % tap;
        const int64_t line = p * layer_.strides[0] - layer_.pads[0] + r * layer_.dilations[0];
        const int64_t place = q * layer_.strides[1] - layer_.pads[1] + s * layer_.dilations[1];
        const bool inside =
            line >= 0 && line < height && place >= 0 && place < width && c < layer_.channels;
        matrix.set(
            row, col,
            inside ? x_.get((image * height + line) * width + place, group * layer_.channels + c)
                   : 0);
      }
    }
    return matrix;
  }

  std::vector<double> reference() const {
    std::vector<double> y(size_t(m() * layer_.n));
    const Epilogue e = layer_.epilogue();
    const int64_t n = layer_.n / layer_.group;
    for (int group = 0; group < layer_.group; ++group) {
      const Sums sums(weight_.group_weight(layer_, group), gathered(group));
      for (int64_t row = 0; row < m(); ++row) {
        for (int64_t col = 0; col < n; ++col) {
          const int64_t at = group * n + col;
          const double residual = e.residual ? residual_.get(row, at) : 0;
          const double sum =
              sums.value[size_t(row * n + col)] + (e.bias ? weight_.bias.get(0, at) : 0);
          y[size_t(row * layer_.n + at)] = e.order == SK_RESIDUAL_FIRST
                                               ? activate(sum + residual, e.activation)
                                               : activate(sum, e.activation) + residual;
        }
      }
    }
    return y;
  }

  const Layer layer_;
  const LayerWeight& weight_;
  std::vector<int64_t> x_dims_, y_dims_;
  Matrix x_, residual_;
  GpuBytes x_memory_, residual_memory_, y_memory_;
};

inline std::string gpu_format(const Layer& layer) {
  char format[32];
  CHECK_OK(sk_default_format(&layer.pattern, layer.dtype, "cuda", format));
  return format;
}

}  // namespace test
