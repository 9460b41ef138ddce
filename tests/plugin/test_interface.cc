// Everything of the plugins that needs no GPU, through TensorRT's own interfaces: creation, shapes, formats,
// plans. Compiled against the headers of two versions, run against one library.
#include <unistd.h>

#include <set>

#include "expressions.h"

using namespace test;

namespace {

std::string library_path, other_path;

Layer linear() {
  Layer layer;
  layer.bias = true;
  layer.activation = SK_ACTIVATION_GELU;
  return layer;
}
Layer conv() {
  Layer layer = Layer::convolution(nm(2, 4), SK_BF16, 48, 20, {3, 5}, 2);
  layer.strides = {2, 1}, layer.dilations = {1, 2}, layer.pads = {1, 2, 0, 3};
  return layer;
}

void test_creators(const Library& library) {
  context = "creators";
  CHECK(std::string(library.symbol<const char*()>("sparsekit_tensorrt_version")()) == sk_version());
  for (const Layer& layer : {linear(), conv()}) {
    nvinfer1::IPluginCreatorV3One& creator = library.creator(layer.op());
    CHECK(creator.getInterfaceInfo().major == 1);
    CHECK(std::string(creator.getPluginVersion()) == "1");
    CHECK(std::string(creator.getPluginNamespace()) == "sparsekit");
    // As docs/onnx.md lists them.
    std::set<std::string> expected = {"n",      "k",        "pattern",    "nnzb",          "dtype",
                                      "format", "has_bias", "activation", "residual_first"};
    if (layer.conv)
      expected.insert({"channels", "kernel_shape", "strides", "dilations", "pads", "group"});
    std::set<std::string> names;
    const PluginFieldCollection* fields = creator.getFieldNames();
    for (int32_t i = 0; i < fields->nbFields; ++i) {
      names.insert(fields->fields[i].name);
      CHECK(fields->fields[i].type ==
            (names.count("format") && std::string("format") == fields->fields[i].name
                 ? PluginFieldType::kCHAR
                 : PluginFieldType::kINT32));
    }
    CHECK(names == expected);
    for (const TensorRTPhase phase : {TensorRTPhase::kBUILD}) {
      const Plugin plugin = Plugin::create(library, layer.op(), layer.fields(), phase);
      CHECK(plugin);
      CHECK(std::string(plugin.core().getPluginName()) == layer.op());
      CHECK(std::string(plugin.core().getPluginVersion()) == "1");
      CHECK(std::string(plugin.core().getPluginNamespace()) == "sparsekit");
      CHECK(plugin->getInterfaceInfo().major == 1 && plugin.core().getInterfaceInfo().major == 1);
      CHECK(plugin.build().getInterfaceInfo().major == 1);
      CHECK(plugin.runtime().getInterfaceInfo().major == 1);
      CHECK(!plugin->getCapabilityInterface(PluginCapabilityType(77)));
      CHECK(plugin.build().getNbOutputs() == 1);
      CHECK(plugin.build().getFormatCombinationLimit() >= 1);
    }
  }
  check_silence();
}

// Each wrong attribute is refused, with a message that names it.
void test_attributes(const Library& library) {
  const auto refuse = [&](const Layer& layer, auto change, const std::string& message) {
    context = message;
    Fields fields = layer.fields();
    change(fields);
    CHECK(!Plugin::create(library, layer.op(), fields));
    check_message(kErrorLevel, message);
  };
  using F = Fields&;
  const auto set = [](const char* name, std::vector<int32_t> numbers) {
    return [=](F f) { f.set(name, numbers); };
  };
  for (const Layer& layer : {linear(), conv()}) {
    const std::string op = layer.op();
    const PluginFieldCollection* names = library.creator(layer.op()).getFieldNames();
    for (int32_t i = 0; i < names->nbFields; ++i) {
      const std::string name = names->fields[i].name;
      refuse(
          layer, [&](F f) { f.erase(name); },
          op + ": expected an attribute " + name + ", there is none; export the model again");
      refuse(
          layer, [&](F f) { f.put(name, PluginFieldType::kFLOAT32, "\0\0\0\0", 1, 4); },
          op + ": expected attribute " + name + " of type ");
      refuse(
          layer, [&](F f) { f.put(name, PluginFieldType::kINT32, "", 0, 4); },
          op + ": attribute " + name + " is empty");
      if (name == "format") continue;
      refuse(
          layer, [&](F f) { f.set(name, std::vector<int32_t>(7, 1)); },
          " in attribute " + name + ", got 7");
      refuse(
          layer,
          [&](F f) { f.set(name, std::vector<int32_t>(size_t(names->fields[i].length), -1)); },
          op + ": expected attribute " + name + " from ");
      refuse(
          layer,
          [&](F f) {
            f.set64(name, std::vector<int64_t>(size_t(names->fields[i].length), int64_t{1} << 31));
          },
          ", got 2147483648");
    }
    refuse(layer, set("n", {0}), op + ": expected attribute n from 1 to 2147483647, got 0");
    refuse(layer, set("dtype", {3}), op + ": expected attribute dtype from 0 to 2, got 3");
    refuse(layer, set("activation", {6}), "expected attribute activation from 0 to 5, got 6");
    refuse(layer, set("pattern", {0, 3, 2, 1, 0, 0}), "N:M pattern: expected 1 <= N < M, got 3:2");
    refuse(layer, set("pattern", {7, 2, 4, 1, 0, 0}),
           "pattern: expected family nm (0) or bsr (1), got 7");
    refuse(layer, set("pattern", {1, 0, 0, 0, 0, 16}),
           "expected block sides from 1 to 128, got 0x16");
    refuse(layer, set("pattern", {0, 2, 4, 1, 16, 0}),
           op + ": expected zeros for the other family in attribute pattern");
    refuse(layer, set("pattern", {1, 0, 0, 1, 16, 16}), ": expected zeros for the other family");
    refuse(layer, set("nnzb", {1}), op + ": expected nnzb=0 for N:M, got 1");
    refuse(
        layer, [](F f) { f.set_text("format", "nm_rows16"); },
        op + ": unknown format 'nm_rows16'; expected canonical, nm, bsr, nm_mma_sp, bsr_mma, or "
             "install");
    refuse(
        layer, [](F f) { f.set_text("format", "bsr_mma"); },
        "pack: format bsr_mma does not hold the pattern 2:4");
    refuse(
        layer, [](F f) { f.set("n", {1 << 30}), f.set("k", {1 << 30}); },
        "weight: expected at most 2^48 elements");
  }
  refuse(conv(), set("group", {5}), "expected n as a multiple of group=5, got 48");
  refuse(conv(), set("channels", {25}),
         "SparseConv2d: k=360 is not 3x5 positions of 25 channels or more; export the model again");
  refuse(conv(), set("k", {361}), "k=361 is not 3x5 positions of 20 channels or more");
  refuse(conv(), set("k", {15 * 20}),
         "expected a multiple of 8 columns for each kernel position, got 20");
  refuse(
      conv(), [](F f) { f.set("n", {40}), f.set("pattern", {0, 2, 4, 16, 0, 0}); },
      "the pattern decides 16 rows together, a group has 20, which is no multiple");
  refuse(
      conv(), [](F f) { f.set("group", {INT32_MAX}), f.set("n", {INT32_MAX}); },
      "expected fewer than 2^31 channels, got 2147483647 groups of 20");
  Layer blocks = linear();
  blocks.pattern = bsr(16, 16);
  refuse(blocks, set("nnzb", {9}), "bsr: expected 0 to 8 blocks, got 9");

  context = "other spellings";
  for (const Layer& layer : {linear(), conv()}) {
    Fields fields = layer.fields();
    fields.set_text("format", "canonical", false);
    fields.set64("n", {layer.n});
    CHECK(Plugin::create(library, layer.op(), fields));
  }
  CHECK(!library.creator("SparseLinear").createPlugin("x", nullptr, TensorRTPhase::kBUILD));
  check_message(kErrorLevel, "SparseLinear: expected a collection of attributes");
  const PluginFieldCollection negative{-1, nullptr}, null{3, nullptr};
  CHECK(!library.creator("SparseLinear").createPlugin("x", &negative, TensorRTPhase::kBUILD));
  CHECK(!library.creator("SparseLinear").createPlugin("x", &null, TensorRTPhase::kRUNTIME));
  stand_in::take_messages();
}

// Random bytes for fields, in both phases: a plugin or null, never anything else.
void test_fuzz(const Library& library) {
  context = "fuzz";
  Random random(3);
  int made = 0;
  for (int round = 0; round < 3000; ++round) {
    const Layer layer = round % 2 ? linear() : conv();
    const Plugin plugin = Plugin::create(library, layer.op(), layer.fields());
    DynamicPluginTensorDesc none[4]{};
    plugin.build().configurePlugin(none, 2, none, 1);
    Fields fields = plugin.serialized();
    const PluginFieldCollection& all = fields.collection();
    for (int changes = int(random.integer(1, 3)); changes > 0; --changes) {
      const PluginField& field = all.fields[random.integer(0, all.nbFields - 1)];
      std::vector<uint8_t> bytes(size_t(random.integer(0, 40)) * 8);
      for (uint8_t& byte : bytes)
        byte = uint8_t(random.chance(0.5) ? random.bits() : random.integer(0, 3));
      const auto type =
          PluginFieldType(random.chance(0.7) ? int32_t(field.type) : random.integer(-1, 13));
      const size_t length =
          random.chance(0.7) ? size_t(std::max(field.length, 0)) : bytes.size() / 8;
      bytes.resize(std::max(bytes.size(), length * 8));
      const std::string name = field.name;
      fields.put(name, type, bytes.data(), length, type == PluginFieldType::kCHAR ? 1 : 8);
      if (random.chance(0.1)) fields.erase(name);
      fields.collection();
    }
    const Plugin other =
        Plugin::create(library, layer.op(), fields,
                       random.chance(0.5) ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME);
    if (!other) continue;
    ++made;
    const Plugin copy = other.clone();
    CHECK(copy && copy.runtime().getFieldsToSerialize());
  }
  CHECK(made > 10);
  stand_in::take_messages();
}

void test_shapes(const Library& library) {
  context = "shapes";
  Random random(1);
  Builder builder;
  DimsExprs in[3]{}, out{};
  const auto shapes = [&](const Plugin& plugin, int32_t inputs = 2) {
    out = {};
    return plugin.build().getOutputShapes(in, inputs, nullptr, 0, &out, 1, builder);
  };
  const Layer layer = linear();
  const int64_t words = LayerWeight(layer, Fill::kIntegers, random).words();
  const Plugin plugin = Plugin::create(library, layer.op(), layer.fields());
  in[0] = {3, {builder.variable(0), builder.variable(1), builder.number(64)}};
  in[1] = {1, {builder.number(words)}};
  CHECK(shapes(plugin) == 0 && out.nbDims == 3);
  CHECK(value(out.d[0], {5, 7}) == 5 && value(out.d[1], {5, 7}) == 7);
  CHECK(out.d[2]->isConstant() && out.d[2]->getConstantValue() == 32);
  in[0] = {1, {builder.variable(0)}};
  CHECK(shapes(plugin, 3) == 0 && out.nbDims == 1 && out.d[0]->getConstantValue() == 32);
  in[0] = {2, {builder.variable(0), builder.number(63)}};
  CHECK(shapes(plugin) != 0);
  check_message(kErrorLevel, "SparseLinear: x has k=63, the weight has k=64");
  in[0] = {0, {}};
  CHECK(shapes(plugin) != 0);
  check_message(kErrorLevel, "SparseLinear: expected x with one dimension or more, got 0");
  in[0] = {2, {builder.variable(0), builder.number(64)}};
  in[1] = {1, {builder.number(words + 1)}};
  CHECK(shapes(plugin) != 0);
  check_message(kErrorLevel, "SparseLinear: expected weight to hold " + std::to_string(words) +
                                 " words, got " + std::to_string(words + 1));
  in[1] = {2, {builder.number(1), builder.number(words)}};
  CHECK(shapes(plugin) != 0);
  check_message(kErrorLevel, "expected weight of one dimension, got 2");
  CHECK(shapes(plugin, 4) != 0);
  check_message(kErrorLevel,
                "expected inputs x, weight and maybe residual, and one output, got 4 inputs");

  context = "shapes of convolutions";
  const Layer c = conv();
  const Plugin convolution = Plugin::create(library, c.op(), c.fields());
  in[1] = {1, {builder.variable(3)}};
  in[0] = {4, {builder.variable(0), builder.number(40), builder.variable(1), builder.variable(2)}};
  CHECK(shapes(convolution) == 0 && out.nbDims == 4);
  CHECK(out.d[1]->getConstantValue() == 48);
  for (const int64_t height : {2, 3, 17, 224}) {
    for (const int64_t width : {4, 5, 224}) {
      const std::vector<int64_t> v = {3, height, width};
      CHECK(value(out.d[0], v) == 3);
      CHECK(value(out.d[2], v) == (height + 1 - 2 - 1) / 2 + 1);
      CHECK(value(out.d[3], v) == (width + 5 - 8 - 1) / 1 + 1);
    }
  }
  in[0].d[1] = builder.number(41);
  CHECK(shapes(convolution) != 0);
  check_message(kErrorLevel, "SparseConv2d: x has 41 channels, expected 2 groups of 20");
  in[0].d[1] = builder.number(40), in[0].d[3] = builder.number(3);
  CHECK(shapes(convolution) != 0);
  check_message(kErrorLevel,
                "the kernel of 5 positions does not fit into the padded image of 3 columns");
  in[0].nbDims = 3;
  CHECK(shapes(convolution) != 0);
  check_message(kErrorLevel, "expected x as [N, C, H, W], got 3 dimensions");

  context = "types";
  const DataType types[] = {DataType::kBF16, DataType::kINT32, DataType::kBF16};
  DataType type{};
  CHECK(plugin.build().getOutputDataTypes(&type, 1, types, 3) == 0 && type == DataType::kBF16);
  CHECK(plugin.build().getOutputDataTypes(&type, 2, types, 3) != 0);
  stand_in::take_messages();
}

// Every type, format and position: those of docs/tensorrt.md and no others.
void test_formats(const Library& library) {
  for (const Layer& base : {linear(), conv()}) {
    for (const int32_t dtype : kDtypes) {
      Layer layer = base;
      layer.dtype = dtype;
      context = "formats " + layer.describe();
      const Plugin plugin = Plugin::create(library, layer.op(), layer.fields());
      for (const int32_t inputs : {2, 3}) {
        for (int32_t position = 0; position <= inputs; ++position) {
          for (int type = 0; type < 12; ++type) {
            for (int layout = 0; layout < 13; ++layout) {
              DynamicPluginTensorDesc tensors[4]{};
              tensors[position].desc = tensor(DataType(type), TensorFormat(layout), {1});
              const bool expected =
                  position == 1
                      ? DataType(type) == DataType::kINT32 && layout == 0
                      : DataType(type) == layer.type() && TensorFormat(layout) == layer.layout();
              CHECK(plugin.build().supportsFormatCombination(position, tensors, inputs, 1) ==
                    expected);
            }
          }
        }
      }
      check_silence();
      DynamicPluginTensorDesc tensors[4]{};
      CHECK(!plugin.build().supportsFormatCombination(9, tensors, 2, 1));
      stand_in::take_messages();
    }
  }
}

std::vector<DynamicPluginTensorDesc> described(const Layer& layer, int64_t words,
                                               const std::vector<int64_t>& x,
                                               const std::vector<int64_t>& y) {
  std::vector<DynamicPluginTensorDesc> all = {
      dynamic(tensor(layer.type(), layer.layout(), x)),
      dynamic(tensor(DataType::kINT32, TensorFormat::kLINEAR, {words}))};
  if (layer.residual) all.push_back(dynamic(tensor(layer.type(), layer.layout(), y)));
  all.push_back(dynamic(tensor(layer.type(), layer.layout(), y)));
  return all;
}

// A plan keeps everything; newer and damaged ones are refused.
void test_plans(const Library& library) {
  Random random(2);
  for (Layer layer : {linear(), conv()}) {
    layer.residual = layer.conv;
    context = "plan of " + layer.describe();
    Plugin plugin = Plugin::create(library, layer.op(), layer.fields());
    const int64_t words = LayerWeight(layer, Fill::kIntegers, random).words();
    const std::vector<int64_t> x =
        layer.conv ? std::vector<int64_t>{2, 40, 9, 10} : std::vector<int64_t>{3, 5, 64};
    const std::vector<int64_t> y =
        layer.conv ? std::vector<int64_t>{2, 48, 4, 7} : std::vector<int64_t>{3, 5, 32};
    auto tensors = described(layer, words, x, y);
    const int32_t inputs = int32_t(tensors.size()) - 1;
    CHECK(plugin.build().configurePlugin(tensors.data(), inputs, &tensors.back(), 1) == 0);
    const size_t workspace =
        plugin.build().getWorkspaceSize(tensors.data(), inputs, &tensors.back(), 1);
    CHECK(workspace >= size_t{1} << 20);
    if (layer.conv) {  // groups of 20 channels start on no multiple of 16 bytes: they are copied
      auto smaller = tensors;
      smaller[0].max.d[0] = 1, smaller.back().max.d[0] = 1;
      CHECK(workspace -
                plugin.build().getWorkspaceSize(smaller.data(), inputs, &smaller.back(), 1) ==
            size_t(9 * 10 * 24 * 2));
    }
    const Fields written = plugin.serialized();
    CHECK(written.number("serialization_version") == 1 && written.number("inputs") == inputs);
    CHECK(written.number("tuned_m") == (layer.conv ? 2 * 4 * 7 : 15));
    CHECK(written.number("workspace_bytes") > 0);
    Plugin copy = plugin.clone();
    const std::string id = plugin.build().getTimingCacheID();
    plugin.reset();
    CHECK(copy && copy.serialized() == written && copy.build().getTimingCacheID() == id);
    CHECK(copy.build().getMetadataString() == id);
    CHECK(id.find("n=" + std::to_string(layer.n)) != std::string::npos &&
          id.find(sk_version()) != std::string::npos);
    Plugin read = Plugin::create(library, layer.op(), written, TensorRTPhase::kRUNTIME);
    CHECK(read && read.serialized() == written && read.build().getTimingCacheID() == id);
    Plugin attached = read.attach();
    read.reset();
    CHECK(attached && attached.serialized() == written);

    std::vector<PluginTensorDesc> concrete;
    for (const auto& t : tensors) concrete.push_back(t.desc);
    const auto change = [&] {
      return attached.runtime().onShapeChange(concrete.data(), inputs, &concrete.back(), 1);
    };
    CHECK(change() == 0);
    check_silence();
    concrete[0].dims.d[0] = -1;
    CHECK(change() != 0);
    check_message(kErrorLevel, ": x has dimensions [-1, ");
    concrete[0].dims.d[0] = x[0], concrete.back().dims.d[1] += 1;
    CHECK(change() != 0);
    check_message(kErrorLevel, ": expected y of shape [");
    concrete.back().dims.d[1] -= 1, concrete[0].type = DataType::kINT8;
    CHECK(change() != 0);
    check_message(kErrorLevel, ": expected x of type ");
    concrete[0].type = layer.type(), concrete[1].dims.d[0] -= 1;
    CHECK(change() != 0);
    check_message(kErrorLevel, ": expected weight to hold ");
    concrete[1].dims.d[0] += 1, concrete[1].type = DataType::kFLOAT;
    CHECK(change() != 0);
    check_message(kErrorLevel, ": expected weight as a vector of int32");
    concrete[1].type = DataType::kINT32;
    if (layer.residual) {
      concrete[2].dims.d[2] = 99;
      CHECK(change() != 0);
      check_message(kErrorLevel, ": expected residual of shape [2, 48, 4, 7], got [2, 48, 99, 7]");
    }

    Fields wrong = written;
    wrong.set("serialization_version", {2});
    CHECK(!Plugin::create(library, layer.op(), wrong, TensorRTPhase::kRUNTIME));
    check_message(kErrorLevel,
                  "the plan's serialization_version is 2, this library reads up to 1; install");
    wrong = written;
    wrong.set("inputs", {1});
    CHECK(!Plugin::create(library, layer.op(), wrong, TensorRTPhase::kRUNTIME));
    check_message(kErrorLevel, "expected 2 or 3 inputs, got 1");
    CHECK(!Plugin::create(library, layer.op(), layer.fields(), TensorRTPhase::kRUNTIME));
    check_message(kErrorLevel, "expected an attribute serialization_version, there is none");
  }

  context = "profiles";
  const Layer layer = linear();
  const Plugin plugin = Plugin::create(library, layer.op(), layer.fields());
  auto tensors = described(layer, 1, {4, 64}, {4, 32});
  const auto tuned = [&] {
    CHECK(plugin.build().configurePlugin(tensors.data(), 2, &tensors.back(), 1) == 0);
    return plugin.serialized().number("tuned_m");
  };
  tensors[0].desc.dims.d[0] = tensors[2].desc.dims.d[0] = -1;
  CHECK(tuned() == 4);
  tensors[0].opt.d[0] = tensors[2].opt.d[0] = 100;
  CHECK(tuned() == 100);
  tensors[0].opt.d[0] = tensors[2].opt.d[0] = -1;
  CHECK(tuned() == 0);
  check_silence();
}

void test_tactics(const Library& library) {
  context = "tactics";
  const Layer layer = linear();
  const Plugin plugin = Plugin::create(library, layer.op(), layer.fields());
  CHECK(plugin.runtime().setTactic(0) == 0);
  check_silence();
  CHECK(plugin.runtime().setTactic(12345) == 0);
  check_message(kWarningLevel,
                "no kernel has the tactic 12345: the engine was built with another version");
  int32_t untouched[3] = {7, 7, 7};
  CHECK(plugin.build().getValidTactics(untouched, 3) != 0 && untouched[0] == 7);
  check_message(kErrorLevel, "tactics, got 3");
  // The names of all kernels differ in their 31 bits, and from "auto".
  std::set<int32_t> ids;
  ids.insert(tactic_id("auto"));
  for (const sk_kernel_info& kernel : kernels()) {
    CHECK(tactic_id(kernel.name) > 0 && ids.insert(tactic_id(kernel.name)).second);
    if (kernel.device_type == SK_CUDA)
      CHECK(plugin.runtime().setTactic(tactic_id(kernel.name)) == 0);
  }
  check_silence();
}

void test_logging(const Library& library) {
  context = "logging";
  CHECK(!Plugin::create(library, "SparseLinear", Fields()));
  check_message(kErrorLevel, "expected an attribute n, there is none");
  stand_in::have_logger(false);  // stderr
  CHECK(!Plugin::create(library, "SparseLinear", Fields()));
  stand_in::have_logger(true);
  CHECK(stand_in::take_messages().empty());
  library.set_finder(nullptr);
  CHECK(!Plugin::create(library, "SparseLinear", Fields()));
  CHECK(stand_in::take_messages().empty());
  // TensorRT-RTX says version 1, of which the layout is not known.
  void* other = dlopen(other_path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!other) fail(__FILE__, __LINE__, dlerror());
  const auto find =
      reinterpret_cast<nvinfer1::ILoggerFinder* (*)()>(dlsym(other, "stand_in_finder"));
  CHECK(find && find() != stand_in::finder());
  library.set_finder(find());
  CHECK(!Plugin::create(library, "SparseLinear", Fields()));
  const auto messages = reinterpret_cast<int (*)()>(dlsym(other, "stand_in_message_count"));
  CHECK(messages && messages() == 0);
  library.set_finder(stand_in::finder());
  CHECK(!Plugin::create(library, "SparseLinear", Fields()));
  check_message(kErrorLevel, "expected an attribute n");
}

// A second copy of the library in one process: its own creators, its own logger.
void test_two_copies(const Library& first) {
  context = "two copies";
  const std::string path = "second_copy_" + std::to_string(getpid()) + ".so";
  {
    std::FILE *from = std::fopen(library_path.c_str(), "rb"), *to = std::fopen(path.c_str(), "wb");
    CHECK(from && to);
    std::vector<char> buffer(1 << 20);
    for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), from)) > 0;)
      CHECK(std::fwrite(buffer.data(), 1, n, to) == n);
    CHECK(std::fclose(from) == 0 && std::fclose(to) == 0);
  }
  {
    const Library second("./" + path, false);
    CHECK(&first.creator("SparseLinear") != &second.creator("SparseLinear"));
    CHECK(!Plugin::create(second, "SparseLinear", Fields()));
    CHECK(stand_in::take_messages().empty());
    CHECK(!Plugin::create(first, "SparseLinear", Fields()));
    check_message(kErrorLevel, "expected an attribute n");
    const Plugin plugin = Plugin::create(second, "SparseLinear", linear().fields());
    CHECK(plugin);
  }
  CHECK(Plugin::create(first, "SparseLinear", linear().fields()));
  std::remove(path.c_str());
}

// Where there is no GPU, a run is refused like any other mistake.
void test_no_gpu(const Library& library) {
  context = "no GPU";
  int32_t count = 0;
  CHECK_OK(sk_cuda_device_count(&count));
  if (count > 0) return;
  const Layer layer = linear();
  Random random(4);
  const LayerWeight weight(layer, Fill::kIntegers, random);
  const Plugin plugin = Plugin::create(library, layer.op(), layer.fields()).attach();
  const PluginTensorDesc in[] = {tensor(DataType::kHALF, TensorFormat::kLINEAR, {2, 64}),
                                 tensor(DataType::kINT32, TensorFormat::kLINEAR, {weight.words()})};
  const PluginTensorDesc out = tensor(DataType::kHALF, TensorFormat::kLINEAR, {2, 32});
  const void* inputs[] = {&plugin, &plugin};
  void* outputs[] = {nullptr};
  CHECK(plugin.runtime().enqueue(in, &out, inputs, outputs, nullptr, nullptr) != 0);
  check_message(kErrorLevel, "SparseLinear: expected onShapeChange before enqueue");
  CHECK(plugin.runtime().onShapeChange(in, 2, &out, 1) == 0);
  CHECK(plugin.runtime().enqueue(in, &out, inputs, outputs, nullptr, nullptr) != 0);
  check_message(kErrorLevel, "CUDA");
  CHECK(plugin.build().getNbTactics() == 0);
  check_message(kErrorLevel, "CUDA");
}

}  // namespace

int main(int, char** arguments) {
  library_path = arguments[1], other_path = arguments[2];
  const Library library(library_path);
  test_creators(library);
  test_attributes(library);
  test_fuzz(library);
  test_shapes(library);
  test_formats(library);
  test_plans(library);
  test_tactics(library);
  test_logging(library);
  test_two_copies(library);
  test_no_gpu(library);
}
