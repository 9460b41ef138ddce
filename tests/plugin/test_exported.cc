// Nodes of files that sparsekit.export.onnx wrote, run by the plugins: test_exported library case...
//
// tests/export/test_tensorrt_exported.py writes the cases. A case is lines of text up to an empty one, and the
// bytes of its tensors in their order:
//
//   op SparseConv2d
//   ints kernel_shape 3 3              an attribute, as TensorRT's parser hands it over: INT32
//   text format canonical              or CHAR
//   tensor x 2 16 9 9                  x, weight (int32), perhaps residual: dense, as in ONNX
//   tensor y 2 32 9 9                  what must come out, in float64
//   tensor allowed 2 32 9 9            how far off each element may be, in float64
#include <fstream>
#include <sstream>

#include "layer_run.h"

using namespace test;

namespace {

struct Tensor {
  std::vector<int64_t> dims;
  std::vector<uint8_t> bytes;

  std::vector<double> doubles() const {
    std::vector<double> numbers(bytes.size() / 8);
    std::memcpy(numbers.data(), bytes.data(), bytes.size());
    return numbers;
  }
};

struct Case {
  std::string op;
  Fields fields;
  std::map<std::string, Tensor> tensors;
  Layer layer;  // as far as types and layouts depend on it

  explicit Case(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<std::string> order;
    std::string line;
    while (std::getline(file, line) && !line.empty()) {
      std::istringstream words(line);
      std::string kind, name;
      words >> kind >> name;
      if (kind == "op") {
        op = name;
      } else if (kind == "ints") {
        fields.set(name, numbers<int32_t>(words));
      } else if (kind == "text") {
        std::string text;
        words >> text;
        fields.set_text(name, text);
      } else {
        CHECK(kind == "tensor");
        order.push_back(name);
        tensors[name].dims = numbers<int64_t>(words);
      }
    }
    layer.conv = op == "SparseConv2d";
    layer.dtype = fields.number("dtype");
    for (const std::string& name : order) {
      Tensor& tensor = tensors[name];
      const bool reference = name == "y" || name == "allowed";
      const int64_t size = reference ? 8 : name == "weight" ? 4 : dtype_bytes(layer.dtype);
      tensor.bytes.resize(size_t(count(tensor.dims) * size));
      file.read(reinterpret_cast<char*>(tensor.bytes.data()), int64_t(tensor.bytes.size()));
    }
    CHECK(file.good() && file.peek() == std::ifstream::traits_type::eof());
  }

 private:
  template <class T>
  static std::vector<T> numbers(std::istringstream& words) {
    std::vector<T> all;
    for (T number; words >> number;) all.push_back(number);
    return all;
  }
};

// Where an element of a dense tensor of ONNX stands in TensorRT's layout.
class Places {
 public:
  Places(const Layer& layer, const std::vector<int64_t>& dims)
      : conv_(layer.conv), channels_(layer.conv ? dims[1] : dims.back()) {
    stride_ = layer.layout() == TensorFormat::kHWC8 ? (channels_ + 7) / 8 * 8 : channels_;
    pixels_ = layer.conv ? dims[2] * dims[3] : 1;
    rows_ = layer.conv ? dims[0] * pixels_ : count(dims) / channels_;
  }
  int64_t elements() const { return rows_ * stride_; }
  bool padding(int64_t place) const { return place % stride_ >= channels_; }
  int64_t operator[](int64_t at) const {
    if (!conv_) return at;
    const int64_t image = at / pixels_ / channels_, channel = at / pixels_ % channels_;
    return (image * pixels_ + at % pixels_) * stride_ + channel;
  }

 private:
  bool conv_;
  int64_t channels_, stride_, pixels_, rows_;
};

std::vector<uint8_t> laid_out(const Layer& layer, const Tensor& tensor) {
  const int64_t size = dtype_bytes(layer.dtype);
  const Places places(layer, tensor.dims);
  std::vector<uint8_t> bytes(size_t(places.elements() * size), 0xff);
  for (int64_t at = 0; at < count(tensor.dims); ++at)
    std::copy_n(tensor.bytes.begin() + at * size, size, bytes.begin() + places[at] * size);
  return bytes;
}

void check_y(const Case& c, const std::vector<uint8_t>& bytes) {
  const Tensor& y = c.tensors.at("y");
  const std::vector<double> expected = y.doubles(), allowed = c.tensors.at("allowed").doubles();
  CHECK(expected.size() == allowed.size());
  const Places places(c.layer, y.dims);
  const int64_t size = dtype_bytes(c.layer.dtype);
  const auto number = [&](int64_t place) {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes.data() + place * size, size_t(size));
    return decode(c.layer.dtype, bits);
  };
  for (int64_t at = 0; at < count(y.dims); ++at) {
    const double got = number(places[at]), want = expected[size_t(at)];
    if (std::fabs(got - want) <= allowed[size_t(at)]) continue;
    fail(__FILE__, __LINE__,
         "y[" + std::to_string(at) + "] is " + std::to_string(got) + ", expected " +
             std::to_string(want) + " within " + std::to_string(allowed[size_t(at)]));
  }
  for (int64_t place = 0; place < places.elements(); ++place)
    CHECK(!places.padding(place) || number(place) == 0);
}

// As a builder and a runtime would: created of the attributes, asked, configured, written, read, run.
void run(const Library& library, const Case& c) {
  const Plugin build = Plugin::create(library, c.op.c_str(), c.fields);
  check_silence();
  CHECK(build);
  std::vector<DynamicPluginTensorDesc> descs;
  std::vector<std::unique_ptr<GpuBytes>> memory;
  std::vector<const void*> in;
  for (const char* name : {"x", "weight", "residual"}) {
    const auto found = c.tensors.find(name);
    if (found == c.tensors.end()) continue;
    const Tensor& t = found->second;
    const bool weight = found->first == "weight";
    descs.push_back(dynamic(weight ? tensor(DataType::kINT32, TensorFormat::kLINEAR, t.dims)
                                   : tensor(c.layer.type(), c.layer.layout(), t.dims)));
    memory.push_back(std::make_unique<GpuBytes>(weight ? t.bytes : laid_out(c.layer, t)));
    in.push_back(memory.back()->address());
  }
  const int32_t inputs = int32_t(descs.size());
  const Tensor& y = c.tensors.at("y");
  descs.push_back(dynamic(tensor(c.layer.type(), c.layer.layout(), y.dims)));
  for (int32_t position = 0; position <= inputs; ++position)
    CHECK(build.build().supportsFormatCombination(position, descs.data(), inputs, 1));
  CHECK(build.build().configurePlugin(descs.data(), inputs, &descs.back(), 1) == 0);
  const GpuBytes workspace(std::vector<uint8_t>(
      build.build().getWorkspaceSize(descs.data(), inputs, &descs.back(), 1), 0xff));

  const Plugin plugin =
      Plugin::create(library, c.op.c_str(), build.serialized(), TensorRTPhase::kRUNTIME).attach();
  std::vector<PluginTensorDesc> tensors;
  for (const DynamicPluginTensorDesc& desc : descs) tensors.push_back(desc.desc);
  const Places places(c.layer, y.dims);
  const GpuBytes out(
      std::vector<uint8_t>(size_t(places.elements() * dtype_bytes(c.layer.dtype)), 0xff));
  void* outputs[] = {out.address()};
  const int32_t failed =
      plugin.runtime().onShapeChange(tensors.data(), inputs, &tensors.back(), 1) ||
      plugin.runtime().enqueue(tensors.data(), &tensors.back(), in.data(), outputs,
                               workspace.address(), nullptr);
  check_silence();
  CHECK(!failed);
  CHECK_CUDA(cudaStreamSynchronize(nullptr));
  check_y(c, out.read());
}

}  // namespace

int main(int count, char** arguments) {
  const Library library(arguments[1]);
  for (int i = 2; i < count; ++i) {
    context = arguments[i];
    run(library, Case(arguments[i]));
    std::printf("%s: right\n", arguments[i]);
  }
}
