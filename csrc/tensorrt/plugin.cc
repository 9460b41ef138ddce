#include "tensorrt/plugin.h"

#include <algorithm>
#include <cstring>

#include "tensorrt/log.h"

namespace sk::tensorrt {
namespace {

constexpr int32_t kX = 0, kWeight = 1, kResidual = 2;  // inputs

// Of the GPUs that there are; where there is none, nothing is run.
constexpr int64_t kWorkspaceWithoutGpu = int64_t{64} << 20;

DataType data_type(int32_t dtype) {
  return dtype == SK_F32 ? DataType::kFLOAT : dtype == SK_F16 ? DataType::kHALF : DataType::kBF16;
}

bool equal(const Dims& a, const Dims& b) {
  return a.nbDims == b.nbDims &&
         std::equal(a.d, a.d + std::max(0, std::min(a.nbDims, Dims::MAX_DIMS)), b.d);
}

std::string text(const Dims& dims) {
  std::string list = "[";
  for (int i = 0; i < std::min(dims.nbDims, Dims::MAX_DIMS); ++i)
    list += concat(i ? ", " : "", dims.d[i]);
  return list + "]";
}

// Without dimensions that are known at run time only.
bool is_static(const Dims& dims) {
  return dims.nbDims > 0 && dims.nbDims <= Dims::MAX_DIMS &&
         std::all_of(dims.d, dims.d + dims.nbDims, [](int64_t d) { return d >= 0; });
}

}  // namespace

// Runs f; what it throws is logged, and `otherwise` returned.
template <class F>
auto Plugin::guarded(F f, decltype(f()) otherwise) const noexcept -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& error) {
    log(Severity::kERROR, error.what());
  } catch (...) {
    log(Severity::kERROR, "an unknown exception");
  }
  return otherwise;
}

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
      tactic_(other.tactic_),
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

// ---- build ------------------------------------------------------------------------------------------

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

// ---- run --------------------------------------------------------------------------------------------

int32_t Plugin::setTactic(int32_t tactic) noexcept {
  return guarded(
      [&] {
        tactic_ = tactic;
        kernel_.clear();
        try {
          kernel_ = kernel_of_tactic(tactic);
        } catch (const Error& error) {  // slower, perhaps, but right
          log(Severity::kWARNING, concat(op(), ": ", error.what()));
        }
        return 0;
      },
      1);
}

void Plugin::expect_fits(const PluginTensorDesc* in, int32_t inputs,
                         const PluginTensorDesc& out) const {
  const auto expect = [&](const char* name, const PluginTensorDesc& tensor, const Dims& dims) {
    SK_EXPECT(is_static(tensor.dims), op(), ": ", name, " has dimensions ", text(tensor.dims));
    SK_EXPECT(tensor.type == data_type(attributes_.dtype) && tensor.format == layout(), op(),
              ": expected ", name, " of type ", int(data_type(attributes_.dtype)), " and format ",
              int(layout()), ", got type ", int(tensor.type), " and format ", int(tensor.format));
    SK_EXPECT(equal(tensor.dims, dims), op(), ": expected ", name, " of shape ", text(dims),
              ", got ", text(tensor.dims));
  };
  expect("x", in[kX], in[kX].dims);
  const Dims y = output_dims(in[kX].dims);
  expect("y", out, y);
  if (inputs > kResidual) expect("residual", in[kResidual], y);
  const PluginTensorDesc& weight = in[kWeight];
  SK_EXPECT(weight.dims.nbDims == 1 && weight.type == DataType::kINT32 &&
                weight.format == TensorFormat::kLINEAR,
            op(), ": expected weight as a vector of int32, got type ", int(weight.type),
            " and shape ", text(weight.dims));
  sections_of(attributes_, weight.dims.d[0]);
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t inputs,
                              const PluginTensorDesc* out, int32_t outputs) noexcept {
  return guarded(
      [&] {
        expect_count(inputs, outputs);
        expect_fits(in, inputs, out[0]);
        facts_.inputs = inputs;
        return 0;
      },
      1);
}

// Do the rows of x, or of the channels of a group, start elsewhere than on 16 bytes? Then the kernels
// get a copy in which they do.
bool Plugin::copies_x(int64_t x_stride) const {
  return x_stride % attributes_.chunk() != 0 ||
         (attributes_.group > 1 && attributes_.channels % attributes_.chunk() != 0);
}

int64_t Plugin::copy_bytes(const Sizes& s) const {
  if (!copies_x(s.x_stride)) return 0;
  return s.x_rows * round_up(attributes_.channels, attributes_.chunk()) *
         attributes_.element_bytes();
}

Plugin::Rows Plugin::rows_of_group(int group, const Sizes& s, const void* x, uint8_t* copy,
                                   cudaStream_t stream) const {
  const int64_t size = attributes_.element_bytes(), channels = attributes_.channels;
  const uint8_t* from = static_cast<const uint8_t*>(x) + group * channels * size;
  if (!copies_x(s.x_stride)) return {from, s.x_stride};
  const int64_t stride = round_up(channels, attributes_.chunk());
  check_cuda(cudaMemcpy2DAsync(copy, size_t(stride * size), from, size_t(s.x_stride * size),
                               size_t(channels * size), size_t(s.x_rows), cudaMemcpyDeviceToDevice,
                               stream),
             "copying x to aligned rows");
  return {copy, stride};
}

// Once for a plugin and a GPU: the weight, zeroed counters and, where an engine came from a smaller GPU, a
// workspace.
void Plugin::prepare(const void* constant, int64_t words, cudaStream_t stream) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  const bool elsewhere = weight_ && weight_->in_place() && !is_aligned(constant, kAlignment);
  if (weight_ && weight_->device == device && !elsewhere) return;
  sk_cuda_info info;
  check(sk_get_cuda_info(device, &info));
  auto weight =
      prepare_weight(attributes_, constant, words, phase_ == TensorRTPhase::kBUILD, stream);
  DeviceMemory counters(SK_CUDA_COUNTER_BYTES, "counters"), workspace;
  check_cuda(cudaMemsetAsync(counters.address(), 0, SK_CUDA_COUNTER_BYTES, stream),
             "zeroing counters");
  check_cuda(cudaStreamSynchronize(stream), "waiting for the counters");
  if (workspace_here() < info.workspace_bytes)
    workspace = DeviceMemory(info.workspace_bytes, "a workspace that the engine does not have");
  workspace_bytes_ = info.workspace_bytes;
  counters_ = std::move(counters);
  workspace_ = std::move(workspace);
  weight_ = std::move(weight);
}

// The tactic's kernel for as many rows as it was timed with, more or less; else the library's choice.
void Plugin::run(sk_matmul_args& args, const sk_conv2d_shape& conv) {
  const auto call = [&](const char* kernel) {
    return attributes_.op == Op::kLinear ? sk_matmul(&args, kernel)
                                         : sk_conv2d(&args, &conv, kernel);
  };
  const int64_t tuned = facts_.tuned_m;
  if (!kernel_.empty() && 2 * args.m >= tuned && args.m <= 2 * tuned) {
    const sk_status status = call(kernel_.c_str());
    if (status != SK_UNSUPPORTED) return check(status);
    log(Severity::kWARNING, concat(op(), ": ", sk_last_error(), "; another kernel is chosen"));
    kernel_.clear();
  }
  check(call(nullptr));
}

int32_t Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  return guarded(
      [&] {
        const Attributes& a = attributes_;
        SK_EXPECT(facts_.inputs, op(), ": expected onShapeChange before enqueue");
        expect_fits(in, facts_.inputs, out[0]);
        const Sizes s = sizes(in[kX].dims, out[0].dims);
        if (s.m == 0) return 0;
        prepare(inputs[kWeight], in[kWeight].dims.d[0], stream);
        SK_EXPECT(workspace, op(), ": TensorRT gave no workspace");
        auto* at = reinterpret_cast<uint8_t*>(
            round_up(int64_t(reinterpret_cast<uintptr_t>(workspace)), kAlignment));
        uint8_t* const copy = at + round_up(workspace_here(), kAlignment);
        const auto* base = weight_->in_place() ? static_cast<const uint8_t*>(inputs[kWeight])
                                               : weight_->memory.address();
        const int64_t size = a.element_bytes(), rows = a.n / a.group;
        sk_matmul_args args{};
        args.m = s.m, args.n = rows, args.k = a.k;
        args.dtype = a.dtype;
        args.weight_bytes = weight_->group_bytes;
        args.y_row_stride = args.residual_row_stride = s.y_stride;
        args.residual_order = a.residual_first ? SK_RESIDUAL_FIRST : SK_RESIDUAL_LAST;
        args.activation = a.activation;
        args.device_type = SK_CUDA, args.device_index = weight_->device;
        args.stream = stream;
        args.workspace = workspace_.address() ? workspace_.address() : at;
        args.workspace_bytes = workspace_bytes_;
        args.counters = counters_.address();
        for (int group = 0; group < a.group; ++group) {
          const int64_t offset = group * rows * size;
          const auto part = [&](const void* whole) {
            return static_cast<const uint8_t*>(whole) + offset;
          };
          const Rows x = rows_of_group(group, s, inputs[kX], copy, stream);
          args.x = x.address, args.x_row_stride = x.stride;
          args.weight = base + group * weight_->group_bytes;
          args.weight_header = weight_->headers[size_t(group)].data();
          args.y = static_cast<uint8_t*>(outputs[0]) + offset;
          args.bias = a.has_bias ? part(base + weight_->bias) : nullptr;
          args.residual = facts_.inputs > kResidual ? part(inputs[kResidual]) : nullptr;
          sk_conv2d_shape conv = s.conv;
          conv.x_pixel_stride = x.stride;
          conv.x_line_stride = x.stride * conv.in_width;
          conv.x_image_stride = conv.x_line_stride * conv.in_height;
          run(args, conv);
        }
        if (s.y_stride > a.n) {  // channels that only fill up the layout
          check_cuda(cudaMemset2DAsync(static_cast<uint8_t*>(outputs[0]) + a.n * size,
                                       size_t(s.y_stride * size), 0,
                                       size_t((s.y_stride - a.n) * size), size_t(s.m), stream),
                     "zeroing the padding of y");
        }
        return 0;
      },
      1);
}

}  // namespace sk::tensorrt
