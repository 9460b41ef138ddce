#pragma once
#include "tensorrt/plugin.h"

namespace sk::tensorrt {

// [N, C, H, W] → [N, n, H', W'] with channels innermost in memory: kHWC8, where a pixel is padded to a
// multiple of 8 channels, for 16-bit numbers, and kHWC for float.
std::unique_ptr<Plugin> make_sparse_conv2d(Attributes attributes, BuildFacts facts,
                                           TensorRTPhase phase);

}  // namespace sk::tensorrt
