// What can be seen only where the CUDA runtime is a stand-in: which memory the plugins hold, what they launch,
// and what they do when CUDA fails or a weight is hostile.
#include <thread>

#include "fake_cudart.h"
#include "layer_run.h"

using namespace test;

namespace {

constexpr int64_t kCounterBytes = SK_CUDA_COUNTER_BYTES;

int count_pieces(int device = -1) {
  int pieces = 0;
  for (const fake::Memory& memory : fake::memory()) pieces += device < 0 || memory.device == device;
  return pieces;
}

// Pieces of memory that begin with these bytes.
int count_with(const std::vector<uint8_t>& bytes) {
  int pieces = 0;
  for (const fake::Memory& memory : fake::memory()) {
    pieces += memory.bytes.size() >= bytes.size() &&
              std::equal(bytes.begin(), bytes.end(), memory.bytes.begin());
  }
  return pieces;
}

Layer small_layer() {
  Layer layer;
  layer.bias = true;
  return layer;
}

// A layer, its weight in the GPU's memory, and a context that runs it.
struct Scene {
  Layer layer;
  Random random{11};
  LayerWeight weight;
  Call call;
  Plugin plugin;
  GpuBytes constant, workspace;

  Scene(const Library& library, const Layer& layer_, const std::vector<int64_t>& x)
      : layer(layer_),
        weight(layer, Fill::kIntegers, random),
        call(layer, weight, x, Fill::kIntegers, random),
        plugin(call.plugin(library)),
        constant(weight.bytes),
        workspace(std::vector<uint8_t>(call.workspace_bytes(plugin), 0xff)) {}

  void run(const Plugin& by) { call.run(by, constant.address(), workspace.address(), nullptr); }
  void refuse(const Plugin& by, const std::string& message) {
    fake::take_launches();
    CHECK(call.enqueue(by, constant.address(), workspace.address(), nullptr) != 0);
    check_message(kErrorLevel, message);
    CHECK(fake::take_launches().empty());
  }
  std::vector<uint8_t> packed() const {
    std::vector<uint8_t> bytes;
    const auto groups = weight.pack_groups(layer, gpu_format(layer).c_str());
    int64_t longest = 0;
    for (const Buffer& group : groups) longest = std::max(longest, group.bytes());
    if (layer.group > 1) longest = (longest + 127) / 128 * 128;
    for (const Buffer& group : groups) {
      bytes.insert(bytes.end(), group.data(), group.data() + group.bytes());
      bytes.resize(bytes.size() + size_t(longest - group.bytes()));
    }
    bytes.resize((bytes.size() + 15) / 16 * 16);
    const auto* bias = static_cast<const uint8_t*>(weight.bias.data());
    if (layer.bias) bytes.insert(bytes.end(), bias, bias + layer.n * dtype_bytes(layer.dtype));
    return bytes;
  }
};

std::vector<Layer> layers() {
  std::vector<Layer> all = {small_layer()};
  for (const sk_pattern& pattern : {nm(2, 4), nm(2, 4, 8), bsr(16, 32)}) {
    Layer conv = Layer::convolution(pattern, SK_BF16, 64, 16, {1, 3}, 2);
    conv.bias = true;
    all.push_back(conv);
  }
  Layer blocks;
  blocks.pattern = bsr(32, 16), blocks.n = 70, blocks.k = 100;
  all.push_back(blocks);
  blocks.pattern = bsr(4, 1), blocks.dtype = SK_F32;
  all.push_back(blocks);
  Layer one = small_layer();
  one.pattern = nm(3, 4);
  all.push_back(one);
  Layer conv = Layer::convolution(nm(2, 4), SK_F32, 64, 16, {1, 3}, 2);
  conv.bias = true;
  all.push_back(conv);
  return all;
}
std::vector<int64_t> x_of(const Layer& layer) {
  return layer.conv ? std::vector<int64_t>{1, 32, 3, 4} : std::vector<int64_t>{7, layer.k};
}

// The bytes are those of sk_pack; all contexts share them; the last one frees them.
void test_memory(const Library& library) {
  for (const Layer& layer : layers()) {
    for (const bool canonical : {true, false}) {
      Layer given = layer;
      if (!canonical) given.format = gpu_format(layer);
      context = "memory " + given.describe();
      Scene scene(library, given, x_of(given));
      const int before = count_pieces();
      const std::vector<uint8_t> packed = scene.packed();
      const int copies = canonical ? 0 : 1;  // TensorRT's own
      CHECK(count_with(packed) == copies);
      Plugin second = scene.plugin.clone(), third = second.attach();
      scene.run(scene.plugin);
      CHECK(count_with(packed) == 1);
      CHECK(count_pieces() == before + (canonical ? 2 : 1));  // counters, and the packed weight
      scene.run(scene.plugin);
      scene.run(second), scene.run(third);
      scene.call.check_y();
      CHECK(count_with(packed) == 1);
      CHECK(count_pieces() == before + (canonical ? 4 : 3));
      int zeros = 0;
      for (const fake::Memory& memory : fake::memory()) {
        zeros += int64_t(memory.bytes.size()) == kCounterBytes &&
                 std::count(memory.bytes.begin(), memory.bytes.end(), 0) == kCounterBytes;
      }
      CHECK(zeros == 3);
      scene.plugin.reset(), second.reset();
      CHECK(count_with(packed) == 1 && count_pieces() == before + (canonical ? 2 : 1));
      scene.run(third);
      third.reset();
      CHECK(count_with(packed) == copies && count_pieces() == before);
    }
  }
  context = "memory of other weights";
  Scene one(library, small_layer(), {2, 64}), other(library, small_layer(), {2, 64});
  one.run(one.plugin);
  other.run(other.plugin);  // the same numbers
  CHECK(count_with(one.packed()) == 1);
  Random random(99);
  const LayerWeight changed(small_layer(), Fill::kReals, random);
  const GpuBytes constant(changed.bytes);
  const Plugin plugin = one.call.plugin(library);
  one.call.run(plugin, constant.address(), one.workspace.address(), nullptr);
  Layer same = small_layer();
  same.activation = SK_ACTIVATION_RELU;  // a layer of another kind with the same bytes has its own
  const Plugin third = Plugin::create(library, same.op(), same.fields());
  CHECK(third);
  one.call.run(third, one.constant.address(), one.workspace.address(), nullptr);
  CHECK(count_with(one.packed()) == 2);
}

// Contexts that start at the same time in several threads.
void test_threads(const Library& library) {
  context = "threads";
  Scene scene(library, small_layer(), {9, 64});
  const int before = count_pieces();
  std::vector<Plugin> plugins;
  for (int i = 0; i < 4; ++i) plugins.push_back(scene.plugin.attach());
  std::vector<std::thread> threads;
  for (const Plugin& plugin : plugins) {
    threads.emplace_back([&] {
      Random random(1);
      const Call call(scene.layer, scene.weight, {3, 64}, Fill::kIntegers, random);
      const GpuBytes workspace(std::vector<uint8_t>(call.workspace_bytes(plugin), 0xff));
      call.run(plugin, scene.constant.address(), workspace.address(), nullptr);
      call.check_y();
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(count_with(scene.packed()) == 1 && count_pieces() == before + 1 + 4);
}

// The builder may time a layer before it writes the weight.
void test_unwritten(const Library& library) {
  for (const Layer& layer : layers()) {
    for (const bool canonical : {true, false}) {
      Layer given = layer;
      if (!canonical) given.format = gpu_format(layer);
      context = "unwritten " + given.describe();
      Scene scene(library, given, x_of(given));
      const Plugin build = Plugin::create(library, given.op(), given.fields(scene.weight.nnzb));
      scene.constant.write(std::vector<uint8_t>(scene.weight.bytes.size(), 0xff));
      scene.refuse(scene.plugin, canonical ? "indices" : "packed weight");
      CHECK(scene.call.enqueue(build, scene.constant.address(), scene.workspace.address(),
                               nullptr) == 0);
      const std::vector<fake::Launch> launches = fake::take_launches();
      CHECK(int(launches.size()) == given.group && launches[0].emulated);
      const auto messages = stand_in::take_messages();
      CHECK(messages.size() == 1 && messages[0].first == kVerboseLevel);
      CHECK(messages[0].second.find("replaced by zeros for timing") != std::string::npos);
      // y is that of a weight of zeros.
      const auto y = scene.call.y();
      const bool padded = given.layout() == TensorFormat::kHWC8;
      const int64_t stride = given.n + (padded ? (8 - given.n % 8) % 8 : 0);
      CHECK(std::count(y.begin(), y.end(), 0) == int64_t(y.size()) &&
            int64_t(y.size()) == scene.call.m() * stride * dtype_bytes(given.dtype));
      // A later one has the weight.
      scene.constant.write(scene.weight.bytes);
      const Plugin later = build.attach();
      scene.run(later);
      scene.call.check_y();
    }
  }
}

void test_launches(const Library& library) {
  context = "launches";
  Scene scene(library, small_layer(), {0, 64});
  fake::take_launches();
  scene.run(scene.plugin);
  CHECK(fake::take_launches().empty() && count_with(scene.packed()) == 0);  // not even prepared
  const auto stream = reinterpret_cast<cudaStream_t>(&scene);
  Random random(1);
  const Call call(scene.layer, scene.weight, {5, 64}, Fill::kIntegers, random);
  call.run(scene.plugin, scene.constant.address(), scene.workspace.address(), stream);
  auto launches = fake::take_launches();
  CHECK(launches.size() == 1 && launches[0].stream == stream && launches[0].device == 0);

  context = "capture";
  const Plugin fresh = scene.plugin.attach();
  fake::set_capturing(true);
  CHECK(call.enqueue(fresh, scene.constant.address(), scene.workspace.address(), stream) != 0);
  check_message(kErrorLevel,
                "SparseLinear: the weight is prepared in an execution context's first run, which "
                "cannot be captured; "
                "run the context once before capturing");
  call.run(scene.plugin, scene.constant.address(), scene.workspace.address(), stream);
  fake::set_capturing(false);
  call.run(fresh, scene.constant.address(), scene.workspace.address(), stream);
  CHECK(fake::take_launches().size() == 2);

  // A tactic is its kernel near the m that it was timed with, and nothing elsewhere.
  context = "tactics";
  Layer layer = small_layer();
  layer.n = 512, layer.k = 128;
  Scene timed(library, layer, {64, 128});
  std::vector<sk_candidate> answers(static_cast<size_t>(sk_kernel_count()));
  CHECK_OK(sk_explain_on(SK_CUDA, 0, "matmul", "nm_mma_sp", &layer.pattern, layer.dtype, 64,
                         layer.n, layer.k, 0, answers.data()));
  int tactics = 1;
  const int32_t all = timed.plugin.build().getNbTactics();
  std::vector<int32_t> ids(static_cast<size_t>(all));
  CHECK(timed.plugin.build().getValidTactics(ids.data(), all) == 0);
  Plugin run_by = timed.plugin.clone();
  const auto kernel_at = [&](int64_t m) {
    const Call at(layer, timed.weight, {m, 128}, Fill::kIntegers, random);
    const GpuBytes workspace(std::vector<uint8_t>(at.workspace_bytes(timed.plugin), 0xff));
    fake::take_launches();
    at.run(run_by, timed.constant.address(), workspace.address(), nullptr);
    const auto done = fake::take_launches();
    CHECK(done.size() == 1);
    return done[0].kernel;
  };
  fake::emulate(false);
  const std::string own_choice[] = {kernel_at(31), kernel_at(64), kernel_at(129)};
  for (const sk_candidate& answer : answers) {
    if (!answer.ok) continue;
    CHECK(ids[size_t(tactics++)] == tactic_id(answer.name));
    CHECK(timed.plugin.runtime().setTactic(tactic_id(answer.name)) == 0);
    run_by = timed.plugin.attach();
    int rows = 0, tokens = 0;
    CHECK(std::sscanf(answer.name, "matmul_nm_mma_sp_f16_sm80_%dx%d", &rows, &tokens) == 2);
    const std::string tile =
        "4TileINS_3ptx3F16ELi" + std::to_string(rows) + "ELi" + std::to_string(tokens) + "E";
    for (const int64_t m : {32, 64, 128}) CHECK(kernel_at(m).find(tile) != std::string::npos);
    CHECK(kernel_at(31) == own_choice[0] && kernel_at(129) == own_choice[2]);
  }
  CHECK(tactics == all);
  CHECK(run_by.runtime().setTactic(ids[0]) == 0 && kernel_at(64) == own_choice[1]);  // "auto"
  // One that refuses: blocks of other rows.
  const char* wrong = "matmul_bsr_mma_f16_sm80_64x16";
  CHECK(timed.plugin.runtime().setTactic(tactic_id(wrong)) == 0);
  const Call at(layer, timed.weight, {64, 128}, Fill::kIntegers, random);
  CHECK(at.enqueue(timed.plugin, timed.constant.address(), timed.workspace.address(), nullptr) ==
        0);
  check_message(kWarningLevel, std::string("kernel ") + wrong + " cannot run");
  CHECK(kernel_at(64) == own_choice[1]);
  fake::emulate(true);
}

// A context that goes on on another GPU, and an engine that came from a smaller one.
void test_devices(const Library& library) {
  context = "devices";
  Scene scene(library, small_layer(), {6, 64});
  scene.run(scene.plugin);
  CHECK(count_pieces(1) == 0);
  CHECK_CUDA(cudaSetDevice(1));
  {
    Scene second(library, small_layer(), {6, 64});
    const int before = count_pieces(1);
    fake::take_launches();
    second.call.run(scene.plugin, second.constant.address(), second.workspace.address(), nullptr);
    second.call.check_y();
    CHECK(fake::take_launches()[0].device == 1);
    // Weight, counters and, since the plan is that of the first, a workspace.
    CHECK(count_pieces(1) == before + 3);
    sk_cuda_info info;
    CHECK_OK(sk_get_cuda_info(1, &info));
    CHECK(scene.plugin.serialized().number("workspace_bytes") < info.workspace_bytes);
    CHECK(second.plugin.serialized().number("workspace_bytes") == info.workspace_bytes);
    scene.plugin.reset();
    CHECK(count_pieces(1) == before);
  }
  context = "a GPU without kernels";
  CHECK_CUDA(cudaSetDevice(2));
  const Layer layer = small_layer();
  const Plugin build = Plugin::create(library, layer.op(), layer.fields());
  DynamicPluginTensorDesc x[4]{};
  x[0].desc = tensor(layer.type(), layer.layout(), {6, 64});
  CHECK(!build.build().supportsFormatCombination(0, x, 2, 1));
  check_message(kErrorLevel, "pack: no kernel on a GPU takes 2:4 in f16:");
  CHECK_CUDA(cudaSetDevice(0));
}

// Whatever fails, the layer says so and a later run is right.
void test_failures(const Library& library) {
  Scene scene(library, small_layer(), {6, 64});
  for (const auto& [function, message] :
       {std::pair<std::string, std::string>{"cudaMalloc", "CUDA failed while getting "},
        {"cudaMemcpyAsync", "CUDA failed while copying weight from the GPU: cudaErrorUnknown"},
        {"cudaMemsetAsync", "CUDA failed while zeroing counters"},
        {"cudaStreamSynchronize", "CUDA failed while waiting for weight"},
        {"cudaStreamIsCapturing", "CUDA failed while asking whether a stream is captured"},
        {"cudaLaunchKernel", "CUDA failed while launching a tile kernel"},
        {"cudaGetDevice", "CUDA failed while asking for the current device"}}) {
    context = "failure of " + function;
    const Plugin plugin = scene.plugin.attach();
    const Plugin build = Plugin::create(library, scene.layer.op(), scene.layer.fields());
    for (const Plugin* p : {&plugin, &build}) {
      const int before = count_pieces();
      fake::fail_next(function);
      scene.refuse(*p, message);
      if (function != "cudaLaunchKernel") CHECK(count_pieces() == before);
      scene.run(*p);
      scene.call.check_y();
    }
  }
  context = "no driver";
  const Plugin plugin = scene.plugin.attach();
  fake::set_driver(false);
  scene.refuse(plugin,
               "CUDA failed while asking for the current device: cudaErrorInsufficientDriver");
  fake::set_driver(true);
  context = "no workspace";
  CHECK(scene.call.enqueue(scene.plugin, scene.constant.address(), nullptr, nullptr) != 0);
  check_message(kErrorLevel, "SparseLinear: TensorRT gave no workspace");
  context = "host memory";
  CHECK(scene.call.enqueue(scene.plugin, scene.constant.address(), &scene, nullptr) != 0);
  check_message(kErrorLevel,
                "matmul: expected the workspace in the memory of device 0, got host memory");
}

// Weights of the right size with any bytes: refused before a kernel sees them.
void test_hostile(const Library& library) {
  Random random(13);
  for (const Layer& layer : layers()) {
    for (const bool canonical : {true, false}) {
      Layer given = layer;
      if (!canonical) given.format = gpu_format(layer);
      context = "hostile " + given.describe();
      Scene scene(library, given, x_of(given));
      fake::take_launches();
      int refused = 0;
      for (int round = 0; round < 150; ++round) {
        std::vector<uint8_t> bytes = scene.weight.bytes;
        for (int64_t changes = random.integer(1, 4); changes > 0; --changes) {
          const int64_t at = random.integer(0, int64_t(bytes.size()) / 4 - 1) * 4;
          uint32_t word =
              uint32_t(random.chance(0.5) ? random.bits() : uint64_t(random.integer(-2, 300)));
          std::memcpy(bytes.data() + at, &word, 4);
        }
        scene.constant.write(bytes);
        const Plugin plugin = scene.plugin.attach();
        // What passes runs on the emulator, which stops at an access outside of memory.
        if (scene.call.enqueue(plugin, scene.constant.address(), scene.workspace.address(),
                               nullptr) != 0) {
          ++refused;
          CHECK(fake::take_launches().empty());
          CHECK(!stand_in::take_messages().empty());
        } else {
          CHECK(!fake::take_launches().empty());
          check_silence();
        }
      }
      CHECK(refused > 0);
    }
  }
  // What only the packed form can get wrong.
  Layer layer;
  layer.pattern = bsr(32, 16), layer.n = 70, layer.k = 100, layer.format = "bsr_mma";
  context = "hostile stages";
  Scene scene(library, layer, {7, 100});
  std::vector<uint8_t> bytes = scene.weight.bytes;
  bytes[128 + 64 + 4] ^= 1;  // the first stage of the second block row
  scene.constant.write(bytes);
  scene.refuse(scene.plugin, "SparseLinear: the packed weight is damaged; export the model again");
  context = "hostile header";
  Layer narrow;
  narrow.format = "nm_mma_sp";
  Scene padded(library, narrow, {7, 64});
  narrow.n = 31;  // as many units
  const LayerWeight narrower(narrow, Fill::kIntegers, random);
  padded.constant.write(narrower.bytes);
  padded.refuse(padded.plugin,
                "SparseLinear: the packed weight of group 0 is not what the attributes say");

  context = "hostile groups";
  Layer groups = Layer::convolution(bsr(16, 16), SK_F16, 128, 32, {1, 3}, 2);
  groups.format = "bsr_mma";
  Scene grouped(library, groups, {1, 64, 3, 4});
  const auto parts = grouped.weight.pack_groups(groups, "bsr_mma");
  CHECK(parts[0].bytes() != parts[1].bytes());
  const size_t half = grouped.weight.bytes.size() / 2;
  const bool first_is_longer = parts[0].bytes() > parts[1].bytes();
  for (const bool twice_the_longer : {true, false}) {
    bytes = grouped.weight.bytes;
    if (twice_the_longer == first_is_longer) {
      std::copy_n(bytes.begin(), half, bytes.begin() + int64_t(half));
    } else {
      std::copy_n(bytes.begin() + int64_t(half), half, bytes.begin());
    }
    grouped.constant.write(bytes);
    grouped.refuse(grouped.plugin,
                   twice_the_longer ? "the packed weight of group 1 is not what the attributes say"
                                    : " blocks in all groups, got ");
  }
  bytes = grouped.weight.bytes;
  bytes[40] ^= 1;
  grouped.constant.write(bytes);
  grouped.refuse(grouped.plugin, "packed weight: the header is damaged; pack the weight again");
}

}  // namespace

int main(int, char** arguments) {
  {
    const Library library(arguments[1]);
    test_memory(library);
    test_threads(library);
    test_unwritten(library);
    test_launches(library);
    test_devices(library);
    test_failures(library);
    test_hostile(library);
  }
  context = "the end";
  CHECK(count_pieces() == 0);
}
