#include "tensorrt/attributes.h"

#include <cstring>

#include "tensorrt/error.h"
#include "tensorrt/kernels.h"

namespace sk::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr int32_t kMost = INT32_MAX;
constexpr int32_t kMostFields = 1024;  // of a collection that is not made up

int32_t serialization_version = kSerializationVersion;  // fields point at it

// Calls visit(name, numbers, count, least, most) for every attribute that is a number or several.
template <class Visit>
void each_number(Attributes& a, const Visit& visit) {
  visit("n", &a.n, 1, 1, kMost);
  visit("k", &a.k, 1, 1, kMost);
  visit("pattern", a.pattern, 6, 0, kMost);
  visit("nnzb", &a.nnzb, 1, 0, kMost);
  visit("dtype", &a.dtype, 1, SK_F32, SK_F16);
  visit("has_bias", &a.has_bias, 1, 0, 1);
  visit("activation", &a.activation, 1, SK_ACTIVATION_NONE, SK_ACTIVATION_RELU6);
  visit("residual_first", &a.residual_first, 1, 0, 1);
  if (a.op == Op::kLinear) return;
  visit("channels", &a.channels, 1, 1, kMost);
  visit("kernel_shape", a.kernel_shape, 2, 1, kMost);
  visit("strides", a.strides, 2, 1, kMost);
  visit("dilations", a.dilations, 2, 1, kMost);
  visit("pads", a.pads, 4, 0, kMost);
  visit("group", &a.group, 1, 1, kMost);
}

template <class Visit>
void each_fact(BuildFacts& f, const Visit& visit) {
  visit("inputs", &f.inputs, 1, 0, 3);
  visit("tuned_m", &f.tuned_m, 1, 0, kMost);
  visit("workspace_bytes", &f.workspace_bytes, 1, 0, kMost);
}

const PluginField& find(const char* op, const PluginFieldCollection& fields, const char* name) {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (!field.name || std::strcmp(field.name, name) != 0) continue;
    SK_EXPECT(field.data && field.length > 0, op, ": attribute ", name,
              " is empty; export the model again");
    return field;
  }
  throw Error(
      concat(op, ": expected an attribute ", name, ", there is none; export the model again"));
}

template <class T>
T load(const void* array, int index) {
  T value;  // a plan's fields lie anywhere
  std::memcpy(&value, static_cast<const char*>(array) + sizeof(T) * size_t(index), sizeof value);
  return value;
}

void read_numbers(const char* op, const PluginFieldCollection& fields, const char* name,
                  int32_t* numbers, int count, int32_t least, int32_t most) {
  const PluginField& field = find(op, fields, name);
  const bool wide = field.type == PluginFieldType::kINT64;
  SK_EXPECT(wide || field.type == PluginFieldType::kINT32, op, ": expected attribute ", name,
            " of type int32 (", int(PluginFieldType::kINT32), "), got type ", int(field.type));
  SK_EXPECT(field.length == count, op, ": expected ", count, count == 1 ? " number" : " numbers",
            " in attribute ", name, ", got ", field.length);
  for (int i = 0; i < count; ++i) {
    const int64_t value =
        wide ? load<int64_t>(field.data, i) : int64_t{load<int32_t>(field.data, i)};
    SK_EXPECT(value >= least && value <= most, op, ": expected attribute ", name, " from ", least,
              " to ", most, ", got ", value);
    numbers[i] = int32_t(value);
  }
}

std::string read_text(const char* op, const PluginFieldCollection& fields, const char* name) {
  const PluginField& field = find(op, fields, name);
  SK_EXPECT(field.type == PluginFieldType::kCHAR, op, ": expected attribute ", name,
            " of type char (", int(PluginFieldType::kCHAR), "), got type ", int(field.type));
  // Parsers count the NUL at the end, people may not.
  const char* text = static_cast<const char*>(field.data);
  return std::string(text, strnlen(text, size_t(field.length)));
}

// Numbers that are in range one by one fit each other.
void check_together(const Attributes& a) {
  const char* op = op_type(a.op);
  const sk_pattern pattern = a.sparsity();
  int64_t bytes[3];
  check(sk_weight_sizes(&pattern, a.dtype, a.n, a.k, a.nnzb, &bytes[0], &bytes[1], &bytes[2]));
  const bool own = a.blocks() ? !pattern.kept && !pattern.group && !pattern.vector
                              : !pattern.block_rows && !pattern.block_cols;
  SK_EXPECT(own, op, ": expected zeros for the other family in attribute pattern");
  SK_EXPECT(a.blocks() || a.nnzb == 0, op, ": expected nnzb=0 for N:M, got ", a.nnzb);
  SK_EXPECT(a.n % a.group == 0, op, ": expected n as a multiple of group=", a.group, ", got ", a.n);
  const int32_t together = a.blocks() ? pattern.block_rows : pattern.vector;
  SK_EXPECT(a.group == 1 || a.n / a.group % together == 0, op, ": the pattern decides ", together,
            " rows together, a group has ", a.n / a.group,
            ", which is no multiple; choose another pattern");
  if (a.op == Op::kConv2d) {
    SK_EXPECT(a.k % a.taps() == 0 && a.tap() >= a.channels, op, ": k=", a.k, " is not ",
              a.kernel_shape[0], "x", a.kernel_shape[1], " positions of ", a.channels,
              " channels or more; export the model again");
    SK_EXPECT(a.taps() == 1 || a.tap() % a.chunk() == 0, op, ": expected a multiple of ", a.chunk(),
              " columns for each kernel position, got ", a.tap(), "; export the model again");
    SK_EXPECT(int64_t{a.channels} * a.group <= kMost, op,
              ": expected fewer than 2^31 channels, got ", a.group, " groups of ", a.channels);
  }
  if (a.canonical()) return;
  const std::string formats = gpu_formats(a);
  SK_EXPECT((", " + formats + ",").find(", " + a.format + ",") != std::string::npos, op,
            ": unknown format '", a.format, "'; expected canonical", formats.empty() ? "" : ", ",
            formats, ", or install a newer sparsekit");
  int64_t packed = 0;
  check(sk_format_bytes(&pattern, a.dtype, a.n / a.group, a.k, a.blocks() ? a.nnzb / a.group : 0,
                        a.format.c_str(), &packed));
}

}  // namespace

std::string Attributes::describe() const {
  std::ostringstream text;
  text << op_type(op);
  each_number(const_cast<Attributes&>(*this),
              [&](const char* name, const int32_t* numbers, int count, int32_t, int32_t) {
                text << ' ' << name << '=';
                for (int i = 0; i < count; ++i) text << (i ? "," : "") << numbers[i];
              });
  text << " format=" << format;
  return text.str();
}

void read_fields(const PluginFieldCollection* fields, nvinfer1::TensorRTPhase phase,
                 Attributes& attributes, BuildFacts& facts) {
  const char* op = op_type(attributes.op);
  SK_EXPECT(fields && fields->nbFields >= 0 && fields->nbFields <= kMostFields &&
                (fields->fields || fields->nbFields == 0),
            op, ": expected a collection of attributes");
  const auto read = [&](const char* name, int32_t* numbers, int count, int32_t least,
                        int32_t most) {
    read_numbers(op, *fields, name, numbers, count, least, most);
  };
  if (phase == nvinfer1::TensorRTPhase::kRUNTIME) {
    int32_t version = 0;
    read("serialization_version", &version, 1, 1, kMost);
    SK_EXPECT(version <= kSerializationVersion, op, ": the plan's serialization_version is ",
              version, ", this library reads up to ", kSerializationVersion,
              "; install the sparsekit that the engine was built with, or build it again");
    each_fact(facts, read);
    SK_EXPECT(facts.inputs == 2 || facts.inputs == 3, op, ": expected 2 or 3 inputs, got ",
              facts.inputs);
  }
  each_number(attributes, read);
  attributes.format = read_text(op, *fields, "format");
  if (attributes.op == Op::kLinear) attributes.channels = attributes.k;
  check_together(attributes);
}

std::vector<PluginField> fields_to_serialize(Attributes& attributes, BuildFacts& facts) {
  std::vector<PluginField> fields;
  const auto add = [&](const char* name, const int32_t* numbers, int count, int32_t, int32_t) {
    fields.emplace_back(name, numbers, PluginFieldType::kINT32, count);
  };
  add("serialization_version", &serialization_version, 1, 0, 0);
  each_number(attributes, add);
  each_fact(facts, add);
  fields.emplace_back("format", attributes.format.c_str(), PluginFieldType::kCHAR,
                      int32_t(attributes.format.size() + 1));
  return fields;
}

std::vector<PluginField> field_names(Op op) {
  Attributes any;
  any.op = op;
  std::vector<PluginField> fields;
  each_number(any, [&](const char* name, const int32_t*, int count, int32_t, int32_t) {
    fields.emplace_back(name, nullptr, PluginFieldType::kINT32, count);
  });
  fields.emplace_back("format", nullptr, PluginFieldType::kCHAR, 1);
  return fields;
}

}  // namespace sk::tensorrt
