// TensorRT's tensors, as the plugins look at them.
#pragma once
#include <algorithm>
#include <string>

#include "tensorrt/error.h"
#include "tensorrt/plugin.h"

namespace sk::tensorrt {

constexpr int32_t kX = 0, kWeight = 1, kResidual = 2;  // inputs

inline DataType data_type(int32_t dtype) {
  return dtype == SK_F32 ? DataType::kFLOAT : dtype == SK_F16 ? DataType::kHALF : DataType::kBF16;
}

// Without dimensions that are known at run time only.
inline bool is_static(const Dims& dims) {
  return dims.nbDims > 0 && dims.nbDims <= Dims::MAX_DIMS &&
         std::all_of(dims.d, dims.d + dims.nbDims, [](int64_t d) { return d >= 0; });
}

// Of dims that are static both.
inline bool equal(const Dims& a, const Dims& b) {
  return a.nbDims == b.nbDims && std::equal(a.d, a.d + a.nbDims, b.d);
}

inline std::string text(const Dims& dims) {
  std::string list = "[";
  for (int i = 0; i < std::min(dims.nbDims, Dims::MAX_DIMS); ++i)
    list += concat(i ? ", " : "", dims.d[i]);
  return list + "]";
}

}  // namespace sk::tensorrt
