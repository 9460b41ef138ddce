#pragma once
#include "tensorrt/plugin.h"

namespace sk::tensorrt {

// [..., k] → [..., n]: the leading dimensions are the rows.
std::unique_ptr<Plugin> make_sparse_linear(Attributes attributes, BuildFacts facts,
                                           TensorRTPhase phase);

}  // namespace sk::tensorrt
