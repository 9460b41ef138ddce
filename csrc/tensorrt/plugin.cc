#include "tensorrt/plugin.h"

#include <algorithm>

#include "tensorrt/tensors.h"

namespace sk::tensorrt {
namespace {

// Of the GPUs that there are; where there is none, nothing is run.
constexpr int64_t kWorkspaceWithoutGpu = int64_t{64} << 20;

}  // namespace

Plugin::Plugin(Attributes attributes, BuildFacts facts, TensorRTPhase phase)
    : attributes_(std::move(attributes)),
      facts_(facts),
      phase_(phase),
      description_(concat("sparsekit ", sk_version(), " ", attributes_.describe())) {}

Plugin::Plugin(const Plugin& other)
    : IPluginV3(),
      IPluginV3OneCore(),
      IPluginV3OneBuild(),
      IPluginV3OneRuntime(),
      attributes_(other.attributes_),
      facts_(other.facts_),
      phase_(other.phase_),
      kernel_(other.kernel_),
      description_(other.description_) {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded([&]() -> IPluginV3* { return copy().release(); }, nullptr);
}

void Plugin::expect_count(int32_t inputs, int32_t outputs) const {
  SK_EXPECT((inputs == 2 || inputs == 3) && outputs == 1, op(),
            ": expected inputs x, weight and maybe residual, and one output, got ", inputs,
            " inputs and ", outputs, " outputs");
}

int32_t Plugin::getOutputDataTypes(DataType* types, int32_t outputs, const DataType* input_types,
                                   int32_t inputs) const noexcept {
  return guarded(
      [&] {
        expect_count(inputs, outputs);
        types[0] = input_types[kX];
        return 0;
      },
      1);
}

int32_t Plugin::getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs*, int32_t,
                                DimsExprs* out, int32_t outputs, IExprBuilder& builder) noexcept {
  return guarded(
      [&] {
        expect_count(inputs, outputs);
        SK_EXPECT(in[kWeight].nbDims == 1, op(), ": expected weight of one dimension, got ",
                  in[kWeight].nbDims);
        if (in[kWeight].d[0]->isConstant())
          sections_of(attributes_, in[kWeight].d[0]->getConstantValue());
        out[0] = output_exprs(in[kX], builder);
        return 0;
      },
      1);
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                       int32_t inputs, int32_t outputs) noexcept {
  return guarded(
      [&] {
        expect_count(inputs, outputs);
        SK_EXPECT(position >= 0 && position < inputs + outputs, op(),
                  ": expected a position from 0 to ", inputs + outputs - 1, ", got ", position);
        const PluginTensorDesc& tensor = tensors[position].desc;
        if (position == kWeight)
          return tensor.type == DataType::kINT32 && tensor.format == TensorFormat::kLINEAR;
        if (tensor.type != data_type(attributes_.dtype) || tensor.format != layout()) return false;
        format_here(attributes_);  // throws where no kernel takes it
        return true;
      },
      false);
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs,
                                const DynamicPluginTensorDesc* out, int32_t outputs) noexcept {
  return guarded(
      [&] {
        expect_count(inputs, outputs);
        facts_.inputs = inputs;
        facts_.tuned_m = 0;
        for (const auto& [x, y] :
             {std::pair{in[kX].opt, out[0].opt}, std::pair{in[kX].desc.dims, out[0].desc.dims}}) {
          if (facts_.tuned_m || !is_static(x) || !is_static(y)) continue;
          facts_.tuned_m = int32_t(std::min<int64_t>(sizes(x, output_dims(x)).m, INT32_MAX));
        }
        return 0;
      },
      1);
}

// What the GPU that is current takes, or at run time what TensorRT was asked for.
int64_t Plugin::workspace_here() const {
  if (facts_.workspace_bytes > 0) return facts_.workspace_bytes;
  int device = 0;
  sk_cuda_info info;
  if (cudaGetDevice(&device) == cudaSuccess && sk_get_cuda_info(device, &info) == SK_OK)
    return info.workspace_bytes;
  cudaGetLastError();
  return kWorkspaceWithoutGpu;
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs,
                                const DynamicPluginTensorDesc* out,
                                int32_t outputs) const noexcept {
  return guarded(
      [&] {
        expect_count(inputs, outputs);
        const Dims& largest = is_static(in[kX].max) ? in[kX].max : in[kX].desc.dims;
        const Dims& y = is_static(out[0].max) ? out[0].max : out[0].desc.dims;
        const int64_t copy = is_static(largest) && is_static(y) ? copy_bytes(sizes(largest, y)) : 0;
        return size_t(round_up(workspace_here(), kAlignment) + copy + kAlignment);
      },
      size_t(0));
}

int32_t Plugin::getNbTactics() noexcept {
  return guarded(
      [&] {
        tactics_.clear();
        int device = 0;
        check_cuda(cudaGetDevice(&device), "asking for the current device");
        const int64_t m = std::max(facts_.tuned_m, 1);
        for (const Tactic& tactic : tactics(attributes_, format_here(attributes_), m, device))
          tactics_.push_back(tactic.id);
        return int32_t(tactics_.size());
      },
      0);
}

int32_t Plugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  return guarded(
      [&] {
        SK_EXPECT(count == int32_t(tactics_.size()), op(), ": expected room for ", tactics_.size(),
                  " tactics, got ", count);
        std::copy(tactics_.begin(), tactics_.end(), tactics);
        return 0;
      },
      1);
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  return guarded(
      [&]() -> const nvinfer1::PluginFieldCollection* {
        facts_.workspace_bytes = int32_t(workspace_here());
        fields_ = fields_to_serialize(attributes_, facts_);
        collection_ = {int32_t(fields_.size()), fields_.data()};
        return &collection_;
      },
      nullptr);
}

}  // namespace sk::tensorrt
