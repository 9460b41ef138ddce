// Which kernels there are for a layer: asked of the registry, known nowhere here.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "tensorrt/attributes.h"

namespace sk::tensorrt {

// "matmul", or "conv2d": the operation that a layer's kernels do.
const char* kernel_op(const Attributes& attributes);

// Formats that kernels on GPUs read for the layer's operation and dtype, as "a, b".
std::string gpu_formats(const Attributes& attributes);

// The format that `weight` gets on the current GPU (without any GPU: on one of compute capability
// 8.0). Throws, with each kernel's reason, when nothing takes it.
std::string format_here(const Attributes& attributes);

// A tactic is a kernel, or "auto": the library's own choice for each m.
struct Tactic {
  int32_t id;  // > 0, the same in every build that has the kernel
  std::string name;
};

// 31 bits of FNV-1a.
int32_t tactic_id(const std::string& name);

// "auto", and the kernels that can run the layer with m rows on this GPU.
std::vector<Tactic> tactics(const Attributes& attributes, const std::string& format, int64_t m,
                            int device);

// The kernel with this id: "" for "auto" and 0; throws when there is none.
std::string kernel_of_tactic(int32_t id);

}  // namespace sk::tensorrt
