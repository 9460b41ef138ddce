// The part of a plugin that runs: what a call is made of, checked, and the call of the C interface.
#include <algorithm>

#include "tensorrt/plugin.h"
#include "tensorrt/tensors.h"

namespace sk::tensorrt {

int32_t Plugin::setTactic(int32_t tactic) noexcept {
  return guarded(
      [&] {
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
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t inputs,
                              const PluginTensorDesc* out, int32_t outputs) noexcept {
  return guarded(
      [&] {
        expect_count(inputs, outputs);
        expect_fits(in, inputs, out[0]);
        sections_of(attributes_, in[kWeight].dims.d[0]);  // throws
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
