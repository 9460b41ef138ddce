// What SparseLinear and SparseConv2d have in common: all of TensorRT's interfaces, the weight, the
// choice of a kernel. A layer adds how its tensors are shaped.
#pragma once
#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "tensorrt/attributes.h"
#include "tensorrt/kernels.h"
#include "tensorrt/log.h"
#include "tensorrt/weights.h"

namespace sk::tensorrt {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

// A call's tensors as rows of elements that lie side by side.
struct Sizes {
  int64_t m = 0;       // rows of y, n wide
  int64_t x_rows = 0;  // of all groups' channels
  int64_t x_stride = 0, y_stride = 0;
  sk_conv2d_shape conv{};  // of a convolution, but for strides of x
};

// Runs f, a method of an interface, none of which may throw: what it throws is logged, and `otherwise`
// returned.
template <class F>
auto guarded(F f, decltype(f()) otherwise) noexcept -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& error) {
    log(Severity::kERROR, error.what());
  } catch (...) {
    log(Severity::kERROR, "an unknown exception");
  }
  return otherwise;
}

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(Attributes attributes, BuildFacts facts, TensorRTPhase phase);

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return op_type(attributes_.op); }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs,
                          const DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType* input_types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const DimsExprs* in, int32_t inputs, const DimsExprs* shape_inputs,
                          int32_t shape_input_count, DimsExprs* out, int32_t outputs,
                          IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return 1; }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs,
                          const DynamicPluginTensorDesc* out,
                          int32_t outputs) const noexcept override;
  int32_t getNbTactics() noexcept override;
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
  const char* getTimingCacheID() noexcept override { return description_.c_str(); }
  const char* getMetadataString() noexcept override { return description_.c_str(); }

  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    return clone();
  }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 protected:
  virtual std::unique_ptr<Plugin> copy() const = 0;
  // How x, residual and y lie in memory.
  virtual TensorFormat layout() const = 0;
  // Shape of y for a shape of x, once as numbers and once as expressions. Throw where x does not fit.
  virtual Dims output_dims(const Dims& x) const = 0;
  virtual DimsExprs output_exprs(const DimsExprs& x, IExprBuilder& builder) const = 0;
  virtual Sizes sizes(const Dims& x, const Dims& y) const = 0;

  const Attributes& attributes() const { return attributes_; }
  const char* op() const { return op_type(attributes_.op); }

 private:
  struct Rows {
    const uint8_t* address;
    int64_t stride;
  };

  void expect_count(int32_t inputs, int32_t outputs) const;
  void expect_fits(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc& out) const;
  int64_t workspace_here() const;
  bool copies_x(int64_t x_stride) const;
  int64_t copy_bytes(const Sizes& s) const;
  void prepare(const void* constant, int64_t words, cudaStream_t stream);
  Rows rows_of_group(int group, const Sizes& s, const void* x, uint8_t* copy,
                     cudaStream_t stream) const;
  void run(sk_matmul_args& args, const sk_conv2d_shape& conv);

  // Every copy starts with these.
  Attributes attributes_;
  BuildFacts facts_;
  TensorRTPhase phase_;
  std::string kernel_;  // of the tactic; "": the library's choice
  std::string description_;

  // Those are its own.
  std::vector<int32_t> tactics_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
  std::shared_ptr<const GpuWeight> weight_;
  DeviceMemory counters_, workspace_;  // the latter where TensorRT's is too small for this GPU
  int64_t workspace_bytes_ = 0;        // that this GPU needs

 protected:
  Plugin(const Plugin& other);
};

}  // namespace sk::tensorrt
