// What the library exports: TensorRT's two entry points, and its version.
#include <NvInferRuntime.h>

#include "tensorrt/log.h"
#include "tensorrt/sparse_conv2d.h"
#include "tensorrt/sparse_linear.h"

namespace sk::tensorrt {
namespace {

class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Op op)
      : op_(op), fields_(field_names(op)), names_{int32_t(fields_.size()), fields_.data()} {}

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                    TensorRTPhase phase) noexcept override {
    return guarded(
        [&]() -> nvinfer1::IPluginV3* {
          Attributes attributes;
          attributes.op = op_;
          BuildFacts facts;
          read_fields(fields, phase, attributes, facts);
          const auto make = op_ == Op::kLinear ? make_sparse_linear : make_sparse_conv2d;
          return make(std::move(attributes), facts, phase).release();
        },
        nullptr);
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const char* getPluginName() const noexcept override { return op_type(op_); }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  Op op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection names_;
};

}  // namespace
}  // namespace sk::tensorrt

#define SK_EXPORT extern "C" __attribute__((visibility("default")))

SK_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  using sk::tensorrt::Creator;
  try {
    static Creator linear(sk::tensorrt::Op::kLinear), conv2d(sk::tensorrt::Op::kConv2d);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&linear, &conv2d};
    count = 2;
    return creators;
  } catch (...) {
    count = 0;
    return nullptr;
  }
}

SK_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  sk::tensorrt::set_logger_finder(finder);
}

SK_EXPORT const char* sparsekit_tensorrt_version() noexcept { return sk_version(); }
