// What the tests of the plugins share: the library, fields, and a layer with its weight.
#pragma once
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <map>

#include "cpp/support.h"
#include "stand_in.h"

namespace test {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneCore;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

constexpr int kErrorLevel = 1, kWarningLevel = 2, kVerboseLevel = 4;

// ---- the library ------------------------------------------------------------------------------------

class Library {
 public:
  explicit Library(const std::string& path, bool with_finder = true)
      : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (!handle_) fail(__FILE__, __LINE__, dlerror());
    if (with_finder) set_finder(stand_in::finder());
  }
  ~Library() { dlclose(handle_); }
  Library(const Library&) = delete;

  template <class F>
  F* symbol(const char* name) const {
    void* found = dlsym(handle_, name);
    if (!found) fail(__FILE__, __LINE__, std::string("no symbol ") + name);
    return reinterpret_cast<F*>(found);
  }
  void set_finder(nvinfer1::ILoggerFinder* finder) const {
    symbol<void(nvinfer1::ILoggerFinder*)>("setLoggerFinder")(finder);
  }
  nvinfer1::IPluginCreatorV3One& creator(const std::string& name) const {
    int32_t count = 0;
    const auto* list =
        symbol<nvinfer1::IPluginCreatorInterface* const*(int32_t&)>("getCreators")(count);
    CHECK(count == 2);
    for (int32_t i = 0; i < count; ++i) {
      auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(list[i]);
      if (name == creator->getPluginName()) return *creator;
    }
    fail(__FILE__, __LINE__, "no creator " + name);
  }

 private:
  void* handle_;
};

// The only message since the last look, of this level.
inline void check_message(int level, const std::string& part) {
  const auto messages = stand_in::take_messages();
  for (const auto& [severity, text] : messages) {
    if (severity == level && text.find("sparsekit: ") == 0 && text.find(part) != std::string::npos)
      return;
  }
  std::string all;
  for (const auto& [severity, text] : messages)
    all += "\n  " + std::to_string(severity) + " " + text;
  fail(__FILE__, __LINE__,
       "expected the message '" + part + "', got" + (all.empty() ? " none" : all));
}
inline void check_silence() {
  for (const auto& [severity, text] : stand_in::take_messages()) {
    if (severity < kVerboseLevel) fail(__FILE__, __LINE__, "unexpected message: " + text);
  }
}

// ---- fields -----------------------------------------------------------------------------------------

class Fields {
 public:
  void set(const std::string& name, const std::vector<int32_t>& numbers) {
    put(name, PluginFieldType::kINT32, numbers.data(), numbers.size(), 4);
  }
  void set64(const std::string& name, const std::vector<int64_t>& numbers) {
    put(name, PluginFieldType::kINT64, numbers.data(), numbers.size(), 8);
  }
  void set_text(const std::string& name, const std::string& text, bool with_end = true) {
    put(name, PluginFieldType::kCHAR, text.c_str(), text.size() + with_end, 1);
  }
  void put(const std::string& name, PluginFieldType type, const void* data, size_t count,
           size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    fields_[name] = {type, int32_t(count), {bytes, bytes + count * size}};
  }
  void erase(const std::string& name) { fields_.erase(name); }

  const PluginFieldCollection& collection() {
    list_.clear();
    for (const auto& [name, field] : fields_)
      list_.emplace_back(name.c_str(), field.data.data(), field.type, field.length);
    collection_ = {int32_t(list_.size()), list_.data()};
    return collection_;
  }

  // A copy of what a plugin wants to keep.
  static Fields of(const PluginFieldCollection& collection) {
    Fields fields;
    for (int32_t i = 0; i < collection.nbFields; ++i) {
      const PluginField& f = collection.fields[i];
      CHECK(f.type == PluginFieldType::kINT32 || f.type == PluginFieldType::kCHAR);
      fields.put(f.name, f.type, f.data, size_t(f.length),
                 f.type == PluginFieldType::kINT32 ? 4 : 1);
    }
    return fields;
  }
  int32_t number(const std::string& name) const {
    int32_t value;
    CHECK(fields_.at(name).type == PluginFieldType::kINT32);
    std::memcpy(&value, fields_.at(name).data.data(), 4);
    return value;
  }
  bool operator==(const Fields& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.first == b.first && a.second.type == b.second.type && a.second.data == b.second.data;
    };
    return fields_.size() == other.fields_.size() &&
           std::equal(fields_.begin(), fields_.end(), other.fields_.begin(), same);
  }

 private:
  struct Field {
    PluginFieldType type;
    int32_t length;
    std::vector<uint8_t> data;
  };
  std::map<std::string, Field> fields_;
  std::vector<PluginField> list_;
  PluginFieldCollection collection_{};
};

// ---- layers -----------------------------------------------------------------------------------------

struct Layer {
  sk_pattern pattern = nm(2, 4);
  int32_t dtype = SK_F16;
  int64_t n = 32, k = 64;
  std::string format = "canonical";
  bool bias = false;
  int32_t activation = SK_ACTIVATION_NONE;
  bool residual = false, residual_first = false;
  // Of a convolution.
  bool conv = false;
  int32_t channels = 0, group = 1;
  std::vector<int32_t> kernel = {1, 1}, strides = {1, 1}, dilations = {1, 1}, pads = {0, 0, 0, 0};

  const char* op() const { return conv ? "SparseConv2d" : "SparseLinear"; }
  TensorFormat layout() const {
    return !conv             ? TensorFormat::kLINEAR
           : dtype == SK_F32 ? TensorFormat::kHWC
                             : TensorFormat::kHWC8;
  }
  DataType type() const {
    return dtype == SK_F32 ? DataType::kFLOAT : dtype == SK_F16 ? DataType::kHALF : DataType::kBF16;
  }
  Epilogue epilogue() const {
    return {bias, residual, activation, residual_first ? SK_RESIDUAL_FIRST : SK_RESIDUAL_LAST};
  }
  std::string describe() const {
    return std::string(op()) + " " + name(pattern) + " " + dtype_name(dtype) +
           " n=" + std::to_string(n) + " k=" + std::to_string(k) + " " + format +
           " group=" + std::to_string(group);
  }

  // A 2d convolution: a tap is padded to a multiple of 8 and of the pattern's columns.
  static Layer convolution(const sk_pattern& pattern, int32_t dtype, int64_t n, int32_t channels,
                           std::vector<int32_t> kernel, int32_t group = 1) {
    Layer layer;
    layer.conv = true;
    layer.pattern = pattern, layer.dtype = dtype, layer.n = n;
    layer.channels = channels, layer.group = group, layer.kernel = std::move(kernel);
    const int64_t taps = int64_t{layer.kernel[0]} * layer.kernel[1];
    const int64_t step = std::max<int64_t>(8, pattern.block_cols);
    layer.k = taps == 1 ? channels : taps * ((channels + step - 1) / step * step);
    return layer;
  }

  Fields fields(int64_t nnzb = 0) const {
    Fields f;
    const auto number = [&](const char* name, int64_t value) {
      f.set(name, std::vector{int32_t(value)});
    };
    number("n", n), number("k", k), number("nnzb", nnzb), number("dtype", dtype);
    number("has_bias", bias), number("activation", activation);
    number("residual_first", residual_first);
    f.set("pattern", std::vector{pattern.family, pattern.kept, pattern.group, pattern.vector,
                                 pattern.block_rows, pattern.block_cols});
    f.set_text("format", format);
    if (!conv) return f;
    number("channels", channels), number("group", group);
    f.set("kernel_shape", kernel), f.set("strides", strides), f.set("dilations", dilations);
    f.set("pads", pads);
    return f;
  }
};

// A layer's numbers, and the bytes of its input `weight`.
struct LayerWeight {
  Weight dense;
  Matrix bias;
  int64_t nnzb = 0;
  std::vector<uint8_t> bytes;

  LayerWeight(const Layer& layer, Fill how, Random& random)
      : dense(layer.pattern, layer.dtype, layer.n, layer.k, how, random),
        bias(layer.dtype, 1, layer.n) {
    fill(bias, how, random);
    const auto section = [this](const void* data, int64_t size) {
      if (size == 0) return;
      bytes.resize((bytes.size() + 15) / 16 * 16);
      const auto* from = static_cast<const uint8_t*>(data);
      bytes.insert(bytes.end(), from, from + size);
    };
    const Canonical whole = compress(dense.dense, dense.mask, layer.pattern, layer.dtype);
    if (layer.pattern.family == SK_FAMILY_BSR) nnzb = whole.weight.indices_bytes / 4;
    if (layer.format == "canonical") {
      section(whole.weight.values, whole.weight.values_bytes);
      section(whole.weight.indices, whole.weight.indices_bytes);
      section(whole.weight.crow_indices, whole.weight.crow_indices_bytes);
    } else {
      const std::vector<Buffer> groups = pack_groups(layer, layer.format.c_str());
      int64_t longest = 0;
      for (const Buffer& group : groups) longest = std::max(longest, group.bytes());
      if (layer.group > 1) longest = (longest + 127) / 128 * 128;
      for (const Buffer& group : groups) {
        section(group.data(), group.bytes());
        bytes.resize(bytes.size() + size_t(longest - group.bytes()));
      }
    }
    if (layer.bias) section(bias.data(), layer.n * dtype_bytes(layer.dtype));
    bytes.resize((bytes.size() + 3) / 4 * 4);
  }

  int64_t words() const { return int64_t(bytes.size()) / 4; }

  // Each group's rows as the library packs them.
  std::vector<Buffer> pack_groups(const Layer& layer, const char* format) const {
    std::vector<Buffer> packed;
    for (int group = 0; group < layer.group; ++group) {
      const Weight part = group_weight(layer, group);
      packed.push_back(
          test::pack(compress(part.dense, part.mask, layer.pattern, layer.dtype), format));
    }
    return packed;
  }

  Weight group_weight(const Layer& layer, int group) const {
    const int64_t rows = layer.n / layer.group;
    Random unused(1);
    Weight part(layer.pattern, layer.dtype, rows, layer.k, Fill::kIntegers, unused);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = 0; col < layer.k; ++col) {
        const int64_t from = group * rows + row;
        part.mask[size_t(row * layer.k + col)] = dense.mask[size_t(from * layer.k + col)];
        part.dense.set(row, col, dense.dense.get(from, col));
      }
    }
    return part;
  }
};

// ---- tensors ----------------------------------------------------------------------------------------

inline Dims dims(const std::vector<int64_t>& sizes) {
  Dims d{};
  d.nbDims = int32_t(sizes.size());
  std::copy(sizes.begin(), sizes.end(), d.d);
  return d;
}
inline PluginTensorDesc tensor(DataType type, TensorFormat format,
                               const std::vector<int64_t>& sizes) {
  return {dims(sizes), type, format, -1.0f};
}
inline DynamicPluginTensorDesc dynamic(const PluginTensorDesc& desc) {
  return {desc, desc.dims, desc.dims, desc.dims};
}
inline int64_t count(const std::vector<int64_t>& sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) product *= size;
  return product;
}

// A kernel's, as FNV-1a makes it of its name.
inline int32_t tactic_id(const std::string& name) {
  uint32_t hash = 2166136261u;
  for (const char c : name) hash = (hash ^ uint8_t(c)) * 16777619u;
  return int32_t(hash & 0x7fffffff);
}

// ---- a plugin and its interfaces ----------------------------------------------------------------------

class Plugin {
 public:
  explicit Plugin(IPluginV3* plugin) : plugin_(plugin) {}

  static Plugin create(const Library& library, const char* op, Fields fields,
                       TensorRTPhase phase = TensorRTPhase::kBUILD) {
    return Plugin(library.creator(op).createPlugin("layer", &fields.collection(), phase));
  }

  explicit operator bool() const { return bool(plugin_); }
  IPluginV3* operator->() const { return plugin_.get(); }
  void reset() { plugin_.reset(); }
  IPluginV3OneCore& core() const { return as<IPluginV3OneCore>(PluginCapabilityType::kCORE); }
  IPluginV3OneBuild& build() const { return as<IPluginV3OneBuild>(PluginCapabilityType::kBUILD); }
  IPluginV3OneRuntime& runtime() const {
    return as<IPluginV3OneRuntime>(PluginCapabilityType::kRUNTIME);
  }
  Plugin clone() const { return Plugin(plugin_->clone()); }
  Plugin attach() const { return Plugin(runtime().attachToContext(nullptr)); }
  Fields serialized() const {
    const PluginFieldCollection* fields = runtime().getFieldsToSerialize();
    CHECK(fields);
    return Fields::of(*fields);
  }

 private:
  template <class T>
  T& as(PluginCapabilityType type) const {
    auto* capability = plugin_->getCapabilityInterface(type);
    CHECK(capability);
    return *static_cast<T*>(capability);
  }
  std::unique_ptr<IPluginV3> plugin_;
};

}  // namespace test
