// What a builder gives a plugin to compute shapes with: expressions of variables, which tests set.
#pragma once
#include <functional>

#include "plugin_case.h"

namespace test {

struct Expression : nvinfer1::apiv::VDimensionExpr {
  explicit Expression(bool constant_, std::function<int64_t(const std::vector<int64_t>&)> value_)
      : constant(constant_), value(std::move(value_)) {}
  bool isConstant() const override { return constant; }
  int64_t getConstantValue() const override { return constant ? value({}) : INT64_MIN; }
  bool isSizeTensor() const override { return false; }
  bool constant;
  std::function<int64_t(const std::vector<int64_t>&)> value;  // of the variables
};

class Dimension : public nvinfer1::IDimensionExpr {
 public:
  Dimension(bool constant, std::function<int64_t(const std::vector<int64_t>&)> value)
      : expression_(constant, std::move(value)) {
    mImpl = &expression_;
  }
  ~Dimension() noexcept override = default;
  int64_t at(const std::vector<int64_t>& variables) const { return expression_.value(variables); }

 private:
  Expression expression_;
};

int64_t value(const nvinfer1::IDimensionExpr* e, const std::vector<int64_t>& variables) {
  return static_cast<const Dimension*>(e)->at(variables);
}

class Builder : public nvinfer1::IExprBuilder, nvinfer1::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  ~Builder() noexcept override = default;
  const nvinfer1::IDimensionExpr* variable(size_t index) {
    return add(false, [index](const std::vector<int64_t>& v) { return v[index]; });
  }
  const nvinfer1::IDimensionExpr* number(int64_t n) { return constant(n); }

 private:
  const nvinfer1::IDimensionExpr* constant(int64_t n) override {
    return add(true, [n](const std::vector<int64_t>&) { return n; });
  }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation op,
                                            const nvinfer1::IDimensionExpr& a,
                                            const nvinfer1::IDimensionExpr& b) override {
    return add(a.isConstant() && b.isConstant(), [op, &a, &b](const std::vector<int64_t>& v) {
      const int64_t x = value(&a, v), y = value(&b, v);
      switch (op) {
        case nvinfer1::DimensionOperation::kSUM:
          return x + y;
        case nvinfer1::DimensionOperation::kSUB:
          return x - y;
        case nvinfer1::DimensionOperation::kFLOOR_DIV:
          return int64_t(std::floor(double(x) / double(y)));
        default:
          fail(__FILE__, __LINE__, "an operation that no shape needs");
      }
    });
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    return nullptr;
  }
  const nvinfer1::IDimensionExpr* add(bool constant,
                                      std::function<int64_t(const std::vector<int64_t>&)> value) {
    dimensions_.push_back(std::make_unique<Dimension>(constant, std::move(value)));
    return dimensions_.back().get();
  }
  std::vector<std::unique_ptr<Dimension>> dimensions_;
};

}  // namespace test
