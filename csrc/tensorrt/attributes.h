// What a plugin is created from: the attributes of its ONNX node (docs/onnx.md), and what a plan keeps
// of the build.
#pragma once
#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sparsekit/sparsekit.h"

namespace sk::tensorrt {

enum class Op { kLinear, kConv2d };

constexpr const char* kNamespace = "sparsekit";
constexpr const char* kPluginVersion = "1";
constexpr int32_t kSerializationVersion = 1;

inline const char* op_type(Op op) { return op == Op::kLinear ? "SparseLinear" : "SparseConv2d"; }

// Numbers are int32 as in the node, so that a field is serialised from where it stands.
struct Attributes {
  Op op = Op::kLinear;
  int32_t n = 0, k = 0;
  int32_t pattern[6] = {};  // an sk_pattern
  int32_t nnzb = 0;
  int32_t dtype = SK_F32;
  int32_t has_bias = 0;
  int32_t activation = SK_ACTIVATION_NONE;
  int32_t residual_first = 0;
  std::string format;  // of `weight`: "canonical", or a packed one

  // Of a convolution. A matmul is one group of k channels.
  int32_t channels = 0;
  int32_t kernel_shape[2] = {1, 1}, strides[2] = {1, 1}, dilations[2] = {1, 1};
  int32_t pads[4] = {};
  int32_t group = 1;

  sk_pattern sparsity() const {
    return {pattern[0], pattern[1], pattern[2], pattern[3], pattern[4], pattern[5]};
  }
  bool blocks() const { return pattern[0] == SK_FAMILY_BSR; }
  bool canonical() const { return format == "canonical"; }
  int64_t element_bytes() const { return dtype == SK_F32 ? 4 : 2; }
  int64_t bias_bytes() const { return has_bias ? n * element_bytes() : 0; }
  int64_t taps() const { return int64_t{kernel_shape[0]} * kernel_shape[1]; }
  int64_t tap() const { return k / taps(); }
  // Elements that 16 bytes hold: kernels read rows of x in such pieces.
  int64_t chunk() const { return 16 / element_bytes(); }
  // All of it in one line, the same for equal attributes.
  std::string describe() const;
};

// What the build found out and a plan keeps.
struct BuildFacts {
  int32_t inputs = 0;   // 2, or 3 with a residual; 0: not known yet
  int32_t tuned_m = 0;  // of the profile that tactics were timed for; 0: not known
  int32_t workspace_bytes =
      0;  // that TensorRT was asked for, without the copy of x; 0: not asked yet
};

// From a node's attributes, or at kRUNTIME from what fields_to_serialize() wrote. Everything is
// checked: it may come from anywhere. Throws.
void read_fields(const nvinfer1::PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase,
                 Attributes& attributes, BuildFacts& facts);

// The fields point into the arguments.
std::vector<nvinfer1::PluginField> fields_to_serialize(Attributes& attributes, BuildFacts& facts);

// Names and types alone, for a parser that asks which attributes to pass.
std::vector<nvinfer1::PluginField> field_names(Op op);

}  // namespace sk::tensorrt
