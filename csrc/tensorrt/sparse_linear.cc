#include "tensorrt/sparse_linear.h"

#include "tensorrt/error.h"

namespace sk::tensorrt {
namespace {

class SparseLinear : public Plugin {
 public:
  using Plugin::Plugin;

 private:
  std::unique_ptr<Plugin> copy() const override { return std::make_unique<SparseLinear>(*this); }

  TensorFormat layout() const override { return TensorFormat::kLINEAR; }

  template <class Shape>
  int last(const Shape& x) const {
    SK_EXPECT(x.nbDims >= 1 && x.nbDims <= Dims::MAX_DIMS, op(),
              ": expected x with one dimension or more, got ", x.nbDims);
    return x.nbDims - 1;
  }

  void expect_features(int64_t features) const {
    SK_EXPECT(features == attributes().k, op(), ": x has k=", features,
              ", the weight has k=", attributes().k);
  }

  Dims output_dims(const Dims& x) const override {
    Dims y = x;
    expect_features(x.d[last(x)]);
    y.d[last(x)] = attributes().n;
    return y;
  }

  DimsExprs output_exprs(const DimsExprs& x, IExprBuilder& builder) const override {
    DimsExprs y = x;
    const IDimensionExpr& features = *x.d[last(x)];
    if (features.isConstant()) expect_features(features.getConstantValue());
    y.d[last(x)] = builder.constant(attributes().n);
    return y;
  }

  Sizes sizes(const Dims& x, const Dims&) const override {
    Sizes s;
    s.m = 1;
    for (int i = 0; i < last(x); ++i) {
      SK_EXPECT(!__builtin_mul_overflow(s.m, x.d[i], &s.m), op(), ": x has too many rows");
    }
    s.x_rows = s.m;
    s.x_stride = attributes().k;
    s.y_stride = attributes().n;
    return s;
  }
};

}  // namespace

std::unique_ptr<Plugin> make_sparse_linear(Attributes attributes, BuildFacts facts,
                                           TensorRTPhase phase) {
  return std::make_unique<SparseLinear>(std::move(attributes), facts, phase);
}

}  // namespace sk::tensorrt
