#include "tensorrt/sparse_conv2d.h"

#include "tensorrt/error.h"

namespace sk::tensorrt {
namespace {

using nvinfer1::DimensionOperation;

enum { kImages, kChannels, kHeight, kWidth, kRank };  // dimensions

class SparseConv2d : public Plugin {
 public:
  using Plugin::Plugin;

 private:
  std::unique_ptr<Plugin> copy() const override { return std::make_unique<SparseConv2d>(*this); }

  TensorFormat layout() const override {
    return attributes().dtype == SK_F32 ? TensorFormat::kHWC : TensorFormat::kHWC8;
  }
  // Elements from one pixel to the next.
  int64_t pixel(int64_t channels) const {
    return layout() == TensorFormat::kHWC8 ? round_up(channels, 8) : channels;
  }

  void expect_rank(int32_t dimensions) const {
    SK_EXPECT(dimensions == kRank, op(), ": expected x as [N, C, H, W], got ", dimensions,
              " dimensions");
  }
  void expect_channels(int64_t channels) const {
    const Attributes& a = attributes();
    SK_EXPECT(channels == int64_t{a.channels} * a.group, op(), ": x has ", channels,
              " channels, expected ", a.group, " groups of ", a.channels);
  }

  // Of the height (axis 0) or the width: what padding adds to the image and the kernel takes away. The
  // size of y is this many and the image's, divided by the stride, and one.
  int64_t surplus(int axis) const {
    const Attributes& a = attributes();
    return int64_t{a.pads[axis]} + a.pads[axis + 2] -
           int64_t{a.dilations[axis]} * (a.kernel_shape[axis] - 1) - 1;
  }

  int64_t output_size(int64_t size, int axis) const {
    const int64_t steps = size + surplus(axis);
    SK_EXPECT(size >= 1 && size <= INT32_MAX && steps >= 0, op(), ": the kernel of ",
              attributes().kernel_shape[axis], " positions does not fit into the padded image of ",
              size, axis == 0 ? " lines" : " columns");
    return steps / attributes().strides[axis] + 1;
  }

  Dims output_dims(const Dims& x) const override {
    expect_rank(x.nbDims);
    expect_channels(x.d[kChannels]);
    Dims y = x;
    y.d[kChannels] = attributes().n;
    for (int axis : {0, 1}) y.d[kHeight + axis] = output_size(x.d[kHeight + axis], axis);
    return y;
  }

  DimsExprs output_exprs(const DimsExprs& x, IExprBuilder& builder) const override {
    expect_rank(x.nbDims);
    if (x.d[kChannels]->isConstant()) expect_channels(x.d[kChannels]->getConstantValue());
    DimsExprs y = x;
    y.d[kChannels] = builder.constant(attributes().n);
    for (int axis : {0, 1}) {
      const IDimensionExpr& size = *x.d[kHeight + axis];
      if (size.isConstant()) output_size(size.getConstantValue(), axis);
      const int64_t more = surplus(axis);
      const auto apply = [&](DimensionOperation operation, const IDimensionExpr* first,
                             int64_t by) {
        return builder.operation(operation, *first, *builder.constant(by));
      };
      const IDimensionExpr* steps = apply(
          more < 0 ? DimensionOperation::kSUB : DimensionOperation::kSUM, &size, std::abs(more));
      y.d[kHeight + axis] =
          apply(DimensionOperation::kSUM,
                apply(DimensionOperation::kFLOOR_DIV, steps, attributes().strides[axis]), 1);
    }
    return y;
  }

  Sizes sizes(const Dims& x, const Dims& y) const override {
    const Attributes& a = attributes();
    Sizes s;
    const auto pixels = [&](const Dims& image, int64_t* count) {
      return !__builtin_mul_overflow(image.d[kImages], image.d[kHeight], count) &&
             !__builtin_mul_overflow(*count, image.d[kWidth], count);
    };
    SK_EXPECT(pixels(x, &s.x_rows) && pixels(y, &s.m), op(), ": x or y has too many pixels");
    s.x_stride = pixel(int64_t{a.channels} * a.group);
    s.y_stride = pixel(a.n);
    sk_conv2d_shape& c = s.conv;
    c.batch = x.d[kImages];
    c.in_height = x.d[kHeight], c.in_width = x.d[kWidth];
    c.in_channels = a.channels;
    c.kernel_height = a.kernel_shape[0], c.kernel_width = a.kernel_shape[1];
    c.stride_height = a.strides[0], c.stride_width = a.strides[1];
    c.dilation_height = a.dilations[0], c.dilation_width = a.dilations[1];
    c.padding_top = a.pads[0], c.padding_left = a.pads[1];
    c.out_height = y.d[kHeight], c.out_width = y.d[kWidth];
    return s;
  }
};

}  // namespace

std::unique_ptr<Plugin> make_sparse_conv2d(Attributes attributes, BuildFacts facts,
                                           TensorRTPhase phase) {
  return std::make_unique<SparseConv2d>(std::move(attributes), facts, phase);
}

}  // namespace sk::tensorrt
