// Runs of the plugins against a float64 reference: on a GPU, or the same program on the emulator through the
// stand-in for the CUDA runtime.
#include <thread>

#include "layer_run.h"

using namespace test;

namespace {

struct Case {
  Layer layer;
  std::vector<int64_t> x;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  const auto linear = [](const sk_pattern& pattern, int32_t dtype, int64_t n, int64_t k) {
    Layer layer;
    layer.pattern = pattern, layer.dtype = dtype, layer.n = n, layer.k = k;
    return layer;
  };
  for (const int32_t dtype : {SK_F16, SK_BF16}) {
    all.push_back({linear(nm(2, 4), dtype, 32, 64), {9, 64}});
    all.push_back({linear(nm(2, 4, 4), dtype, 72, 200), {2, 3, 200}});
    all.push_back({linear(bsr(16, 16), dtype, 40, 96), {1, 96}});
    all.push_back({linear(bsr(32, 64), dtype, 64, 256), {70, 256}});
    Layer all_of_it = linear(nm(2, 4), dtype, 24, 576);  // sums that several blocks share
    all_of_it.bias = all_of_it.residual = true;
    all.push_back({all_of_it, {5, 7, 576}});
    all_of_it.residual_first = true, all_of_it.activation = SK_ACTIVATION_RELU;
    all.push_back({all_of_it, {33, 576}});
    Layer odd = linear(bsr(16, 32), dtype, 19, 70);  // rows of x and y on no multiple of 16 bytes
    odd.bias = true;
    all.push_back({odd, {6, 70}});
    odd.activation = SK_ACTIVATION_GELU;
    all.push_back({odd, {70}});

    Layer conv = Layer::convolution(nm(2, 4), dtype, 32, 16, {3, 3});
    conv.pads = {1, 1, 1, 1};
    all.push_back({conv, {2, 16, 5, 6}});
    conv.bias = conv.residual = conv.residual_first = true, conv.activation = SK_ACTIVATION_RELU;
    conv.strides = {2, 1}, conv.pads = {0, 2, 1, 0};
    all.push_back({conv, {1, 16, 7, 5}});
    // Channels that fill up no 16 bytes: y is padded with zeros.
    Layer few = Layer::convolution(bsr(16, 16), dtype, 20, 5, {1, 3});
    few.dilations = {1, 2}, few.bias = few.residual = true;
    all.push_back({few, {2, 5, 3, 9}});
    // 1x1 runs as a matmul; groups start on 16 bytes, or are copied there.
    all.push_back({Layer::convolution(nm(2, 4), dtype, 24, 16, {1, 1}), {2, 16, 4, 3}});
    all.push_back({Layer::convolution(nm(2, 4), dtype, 32, 16, {3, 3}, 2), {1, 32, 4, 4}});
    Layer copied = Layer::convolution(nm(2, 4), dtype, 36, 12, {1, 1}, 3);
    copied.bias = copied.residual = true;
    all.push_back({copied, {2, 36, 3, 3}});
    all.push_back({Layer::convolution(bsr(16, 16), dtype, 64, 12, {2, 1}, 2), {1, 24, 4, 3}});
  }
  // On CUDA cores: few rows and many.
  for (const sk_pattern& pattern : {nm(2, 4), nm(1, 4), nm(2, 4, 4), bsr(16, 16), bsr(4, 1)}) {
    Layer layer = linear(pattern, SK_F32, 40, 96);
    layer.bias = layer.residual = true;
    all.push_back({layer, {5, 96}});
    layer.residual_first = true, layer.activation = SK_ACTIVATION_RELU;
    all.push_back({layer, {2, 35, 96}});
    Layer odd = linear(pattern, SK_F32, 19, 70);  // rows of x and y on no multiple of 16 bytes
    odd.bias = true, odd.activation = SK_ACTIVATION_SILU;
    all.push_back({odd, {1, 70}});

    Layer conv = Layer::convolution(pattern, SK_F32, 36, 12, {3, 3});  // 16 bytes: 4 channels
    conv.pads = {1, 1, 1, 1}, conv.bias = conv.residual = true;
    all.push_back({conv, {1, 12, 5, 6}});
    Layer few = Layer::convolution(pattern, SK_F32, 18, 6, {1, 3});  // pixels are not padded
    few.dilations = {1, 2}, few.bias = few.residual = true;
    all.push_back({few, {2, 6, 3, 9}});
    all.push_back({Layer::convolution(pattern, SK_F32, 32, 12, {3, 3}, 2), {1, 24, 4, 4}});
    Layer copied = Layer::convolution(pattern, SK_F32, 48, 6, {1, 1}, 3);
    copied.bias = copied.residual = true;
    all.push_back({copied, {2, 18, 3, 3}});
  }
  for (const int32_t dtype : {SK_F16, SK_BF16}) {
    Layer layer = linear(nm(1, 4), dtype, 40, 90);
    layer.bias = layer.residual = true;
    all.push_back({layer, {5, 90}});
    all.push_back({layer, {70, 90}});
    Layer blocks = linear(bsr(4, 1), dtype, 24, 64);
    all.push_back({blocks, {6, 64}});
    Layer conv = Layer::convolution(nm(1, 4), dtype, 40, 10, {3, 3}, 2);
    conv.bias = conv.residual = true, conv.pads = {1, 1, 1, 1};
    all.push_back({conv, {1, 20, 4, 5}});
    // Packed for the cores, though the tensor cores could.
    for (const sk_pattern& pattern : {nm(2, 4), bsr(16, 16)}) {
      Layer simple = linear(pattern, dtype, 32, 64);
      simple.format = pattern.family == SK_FAMILY_NM ? "nm" : "bsr";
      all.push_back({simple, {9, 64}});
    }
  }
  const size_t count = all.size();  // and each with a weight that is packed already
  for (size_t i = 0; i < count; ++i) {
    if (all[i].layer.format != "canonical") continue;
    Case packed = all[i];
    packed.layer.format = gpu_format(packed.layer);
    all.push_back(packed);
  }
  return all;
}

std::vector<uint8_t> workspace_of(const Call& call, const Plugin& plugin) {
  return std::vector<uint8_t>(call.workspace_bytes(plugin), 0xff);  // it may hold anything
}

void test_numbers(const Library& library) {
  Random random(5);
  for (const Case& c : cases()) {
    context = c.layer.describe();
    const LayerWeight weight(c.layer, Fill::kIntegers, random);
    Call call(c.layer, weight, c.x, Fill::kIntegers, random);
    const Plugin plugin = call.plugin(library);
    const GpuBytes constant(weight.bytes), workspace(workspace_of(call, plugin));
    for (int round = 0; round < 2; ++round) {  // counters are left as they were found
      call.run(plugin, constant.address(), workspace.address(), nullptr);
      call.check_y();
      call.refill(Fill::kIntegers, random);
      call.clear_y();
    }
  }
}

// One context, several shapes; none at all; on a stream of its own; a weight that moves.
void test_shapes(const Library& library) {
  Random random(6);
  Layer layer;
  layer.bias = true;
  for (const std::string format : {"canonical", "nm_mma_sp", "nm"}) {
    context = "shapes " + format;
    layer.format = format;
    const LayerWeight weight(layer, Fill::kIntegers, random);
    const Call large(layer, weight, {4, 20, 64}, Fill::kIntegers, random);
    const Plugin plugin = large.plugin(library);
    // TensorRT may move it, also to where kernels cannot read it.
    const GpuBytes aligned(weight.bytes), moved(weight.bytes, 64),
        workspace(workspace_of(large, plugin));
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreate(&stream));
    for (const std::vector<int64_t>& x :
         {std::vector<int64_t>{4, 20, 64}, {1, 64}, {0, 64}, {3, 0, 64}, {80, 64}, {64}}) {
      Call call(layer, weight, x, Fill::kIntegers, random);
      for (const GpuBytes* constant : {&aligned, &moved}) {
        call.run(plugin, constant->address(), workspace.address(), stream);
        call.check_y();
        call.clear_y();
      }
    }
    CHECK_CUDA(cudaStreamDestroy(stream));
  }
}

// A context for each thread, with the weight of all.
void test_threads(const Library& library) {
  context = "threads";
  Random random(7);
  const Layer layer = cases()[4].layer;
  const LayerWeight weight(layer, Fill::kIntegers, random);
  const GpuBytes constant(weight.bytes);
  const std::vector<int64_t> x = {12, layer.k};
  const Plugin first = Call(layer, weight, x, Fill::kIntegers, random).plugin(library);
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      context = "thread " + std::to_string(t);
      Random own(100 + t);
      const Plugin plugin = first.attach();
      Call call(layer, weight, x, Fill::kIntegers, own);
      const GpuBytes workspace(workspace_of(call, plugin));
      cudaStream_t stream;
      CHECK_CUDA(cudaStreamCreate(&stream));
      for (int round = 0; round < 5; ++round) {
        call.run(plugin, constant.address(), workspace.address(), stream);
        call.check_y();
        call.refill(Fill::kIntegers, own);
      }
      CHECK_CUDA(cudaStreamDestroy(stream));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Every tactic, at the m it was timed with and where it is ignored.
void test_tactics(const Library& library) {
  Random random(8);
  for (const auto& [pattern, dtype] : {std::pair{nm(2, 4), SK_F16},
                                       {bsr(64, 16), SK_F16},
                                       {nm(2, 4), SK_F32},
                                       {bsr(16, 16), SK_F32},
                                       {nm(1, 4), SK_BF16}}) {
    Layer layer;
    layer.pattern = pattern, layer.dtype = dtype, layer.n = 128;
    context = "tactics of " + layer.describe();
    const LayerWeight weight(layer, Fill::kIntegers, random);
    const GpuBytes constant(weight.bytes);
    const Call tuned(layer, weight, {16, 64}, Fill::kIntegers, random),
        more(layer, weight, {40, 64}, Fill::kIntegers, random);
    const Plugin plugin = tuned.plugin(library);
    const GpuBytes workspace(workspace_of(more, plugin));
    const int32_t count = plugin.build().getNbTactics();
    CHECK(count >= 3);
    std::vector<int32_t> ids(static_cast<size_t>(count));
    CHECK(plugin.build().getValidTactics(ids.data(), count) == 0);
    for (const int32_t id : ids) {
      CHECK(id > 0 && plugin.runtime().setTactic(id) == 0);
      for (const Call* call : {&tuned, &more}) {
        call->run(plugin, constant.address(), workspace.address(), nullptr);
        call->check_y();
      }
    }
  }
}

#ifndef FAKE_CUDART
// A run captured into a graph and replayed with other inputs.
void test_graph(const Library& library) {
  context = "graph";
  Random random(9);
  for (const size_t index :
       {4, 6, 10, 13}) {  // shared sums, copied rows, padded channels, groups that are copied
    const Case c = cases()[index];
    const LayerWeight weight(c.layer, Fill::kIntegers, random);
    Call call(c.layer, weight, c.x, Fill::kIntegers, random);
    const Plugin plugin = call.plugin(library);
    const GpuBytes constant(weight.bytes), workspace(workspace_of(call, plugin));
    cudaStream_t stream;
    CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaGraph_t graph;
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(call.enqueue(plugin, constant.address(), workspace.address(), stream) != 0);
    check_message(kErrorLevel, "run the context once before capturing");
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    CHECK_CUDA(cudaGraphDestroy(graph));
    call.run(plugin, constant.address(), workspace.address(), stream);
    CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    CHECK(call.enqueue(plugin, constant.address(), workspace.address(), stream) == 0);
    CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t instance;
    CHECK_CUDA(cudaGraphInstantiate(&instance, graph, 0));
    for (int round = 0; round < 3; ++round) {
      call.refill(Fill::kIntegers, random);
      call.clear_y();
      CHECK_CUDA(cudaGraphLaunch(instance, stream));
      CHECK_CUDA(cudaStreamSynchronize(stream));
      call.check_y();
    }
    CHECK_CUDA(cudaGraphExecDestroy(instance));
    CHECK_CUDA(cudaGraphDestroy(graph));
    CHECK_CUDA(cudaStreamDestroy(stream));
    check_silence();
  }
}
#endif

}  // namespace

int main(int, char** arguments) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU\n");
    return 77;  // skipped
  }
  const Library library(arguments[1]);
  test_numbers(library);
  test_shapes(library);
  test_threads(library);
  test_tactics(library);
#ifndef FAKE_CUDART
  test_graph(library);
#endif
}
