// Runs a TensorRT engine that has sparsekit layers, and measures it.
//
//   run_engine PLAN PLUGIN [BATCH]
//
//   g++ -std=c++17 -O2 -o run_engine run_engine.cc -lnvinfer -lcudart
//   (elsewhere than in the usual folders: -I and -L for TensorRT and CUDA)
//
// PLAN is what trtexec --saveEngine wrote, PLUGIN the path that sparsekit.export.plugin_path() returns.
// Inputs get random numbers (integers: zeros and ones); a dimension that the engine leaves open becomes
// BATCH (1) where it is the first, else what the first optimisation profile names as optimal.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using nvinfer1::DataType;

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, char const* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "TensorRT: %s\n", message);
  }
};

void check(cudaError_t error, char const* doing) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(error));
}

template <class T>
std::unique_ptr<T> made(T* object, char const* what) {
  if (!object) throw std::runtime_error(std::string("TensorRT did not make ") + what);
  return std::unique_ptr<T>(object);
}

std::vector<char> read(char const* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Device memory of one tensor.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(std::max<size_t>(bytes, 1)) {
    check(cudaMalloc(&data_, bytes_), "allocating a tensor");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer const&) = delete;
  Buffer& operator=(Buffer const&) = delete;

  void* data() const { return data_; }
  void fill(std::vector<uint8_t> const& host) {
    check(cudaMemcpy(data_, host.data(), host.size(), cudaMemcpyHostToDevice), "copying an input");
  }
  std::vector<uint8_t> read() const {
    std::vector<uint8_t> host(bytes_);
    check(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "copying an output");
    return host;
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

size_t bytes_of(DataType type) {
  switch (type) {
    case DataType::kINT64:
      return 8;
    case DataType::kFLOAT:
    case DataType::kINT32:
      return 4;
    case DataType::kHALF:
    case DataType::kBF16:
      return 2;
    case DataType::kINT8:
    case DataType::kUINT8:
    case DataType::kBOOL:
      return 1;
    default:
      throw std::runtime_error("a tensor has a type that this example does not fill");
  }
}

size_t count(nvinfer1::Dims const& dims) {
  size_t product = 1;
  for (int i = 0; i < dims.nbDims; ++i) product *= size_t(dims.d[i]);
  return product;
}

// Random bits that are a number of about 1 in each type: what a network expects after normalisation.
std::vector<uint8_t> numbers(DataType type, size_t elements, std::mt19937& random) {
  std::vector<uint8_t> bytes(elements * bytes_of(type));
  for (size_t i = 0; i < elements; ++i) {
    uint8_t* at = bytes.data() + i * bytes_of(type);
    uint32_t const bits = random();
    switch (type) {
      case DataType::kFLOAT: {
        float const value = float(int32_t(bits)) / 2147483648.0F;
        std::copy_n(reinterpret_cast<uint8_t const*>(&value), 4, at);
        break;
      }
      case DataType::kHALF: {  // sign, exponent of 0.5, ten random bits
        uint16_t const value = uint16_t((bits & 0x8000) | 0x3800 | (bits >> 16 & 0x3ff));
        std::copy_n(reinterpret_cast<uint8_t const*>(&value), 2, at);
        break;
      }
      case DataType::kBF16: {
        uint16_t const value = uint16_t((bits & 0x8000) | 0x3f00 | (bits >> 16 & 0x7f));
        std::copy_n(reinterpret_cast<uint8_t const*>(&value), 2, at);
        break;
      }
      default:
        at[0] = uint8_t(bits & 1);  // little-endian: 0 or 1 of any width
    }
  }
  return bytes;
}

void run(char const* plan_path, char const* plugin_path, int64_t batch) {
  Logger logger;
  auto runtime = made(nvinfer1::createInferRuntime(logger), "a runtime");
  if (!runtime->getPluginRegistry().loadLibrary(plugin_path))
    throw std::runtime_error(std::string("TensorRT did not load the plugin ") + plugin_path);
  std::vector<char> const plan = read(plan_path);
  auto engine = made(runtime->deserializeCudaEngine(plan.data(), plan.size()), "an engine");
  auto context = made(engine->createExecutionContext(), "an execution context");

  std::mt19937 random(0);
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<std::string> outputs;
  for (int32_t i = 0; i < engine->getNbIOTensors(); ++i) {
    char const* name = engine->getIOTensorName(i);
    if (engine->getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) {
      outputs.emplace_back(name);
      continue;
    }
    nvinfer1::Dims dims = engine->getTensorShape(name);
    auto const optimal = engine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kOPT);
    for (int d = 0; d < dims.nbDims; ++d)
      if (dims.d[d] < 0) dims.d[d] = d == 0 ? batch : optimal.d[d];
    if (!context->setInputShape(name, dims))
      throw std::runtime_error(std::string("the engine does not take this shape of ") + name);
    DataType const type = engine->getTensorDataType(name);
    buffers.push_back(std::make_unique<Buffer>(count(dims) * bytes_of(type)));
    buffers.back()->fill(numbers(type, count(dims), random));
    context->setTensorAddress(name, buffers.back()->data());
  }
  for (std::string const& name : outputs) {
    size_t const elements = count(context->getTensorShape(name.c_str()));
    DataType const type = engine->getTensorDataType(name.c_str());
    buffers.push_back(std::make_unique<Buffer>(elements * bytes_of(type)));
    context->setTensorAddress(name.c_str(), buffers.back()->data());
  }

  cudaStream_t stream{};
  check(cudaStreamCreate(&stream), "creating a stream");
  auto const enqueue = [&] {
    if (!context->enqueueV3(stream)) throw std::runtime_error("the engine did not run");
  };
  // The first run prepares the sparse weights; from then on calls can be captured into a graph.
  enqueue();
  check(cudaStreamSynchronize(stream), "running the engine");
  cudaGraph_t graph{};
  cudaGraphExec_t launch{};
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing");
  enqueue();
  check(cudaStreamEndCapture(stream, &graph), "capturing");
  check(cudaGraphInstantiate(&launch, graph, 0), "making a graph");

  std::vector<double> ms;
  for (int i = 0; i < 220; ++i) {
    auto const start = std::chrono::steady_clock::now();
    check(cudaGraphLaunch(launch, stream), "launching the graph");
    check(cudaStreamSynchronize(stream), "running the graph");
    std::chrono::duration<double, std::milli> const took = std::chrono::steady_clock::now() - start;
    if (i >= 20) ms.push_back(took.count());
  }
  std::sort(ms.begin(), ms.end());
  std::printf("%s, batch %lld: median %.3f ms, 99th percentile %.3f ms\n", plan_path,
              static_cast<long long>(batch), ms[ms.size() / 2], ms[ms.size() * 99 / 100]);
  for (size_t i = 0; i < outputs.size(); ++i) {
    uint64_t sum = 0xcbf29ce484222325;  // FNV-1a: the same on every run of one engine
    for (uint8_t byte : buffers[buffers.size() - outputs.size() + i]->read())
      sum = (sum ^ byte) * 0x100000001b3;
    std::printf("output %s: checksum %016llx\n", outputs[i].c_str(),
                static_cast<unsigned long long>(sum));
  }
  cudaGraphExecDestroy(launch);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: run_engine PLAN PLUGIN [BATCH]\n");
    return 2;
  }
  try {
    run(argv[1], argv[2], argc == 4 ? std::strtoll(argv[3], nullptr, 10) : 1);
  } catch (std::exception const& error) {
    std::fprintf(stderr, "run_engine: %s\n", error.what());
    return 1;
  }
  return 0;
}
