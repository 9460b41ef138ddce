#include "tensorrt/kernels.h"

#include <algorithm>

#include "tensorrt/error.h"

namespace sk::tensorrt {
namespace {

constexpr const char* kAuto = "auto";
constexpr const char* kDtypeNames[] = {"f32", "bf16", "f16"};

// Calls visit(info) for every kernel that runs on GPUs.
template <class Visit>
void each_gpu_kernel(const Visit& visit) {
  for (int32_t i = 0; i < sk_kernel_count(); ++i) {
    sk_kernel_info info;
    check(sk_get_kernel(i, &info));
    if (info.device_type == SK_CUDA) visit(info);
  }
}

}  // namespace

const char* kernel_op(const Attributes& a) {
  // The library runs these as a matmul.
  const bool one_tap = a.taps() == 1 && a.tap() == a.channels && a.strides[0] == 1 &&
                       a.strides[1] == 1 && !a.pads[0] && !a.pads[1] && !a.pads[2] && !a.pads[3];
  return a.op == Op::kLinear || one_tap ? "matmul" : "conv2d";
}

std::string gpu_formats(const Attributes& a) {
  std::vector<std::string> names;
  each_gpu_kernel([&](const sk_kernel_info& kernel) {
    if (std::string(kernel.op) != kernel_op(a) || kernel.dtype != std::string(kDtypeNames[a.dtype]))
      return;
    if (std::find(names.begin(), names.end(), kernel.format) == names.end())
      names.push_back(kernel.format);
  });
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string format_here(const Attributes& a) {
  if (!a.canonical()) return a.format;
  int device = 0;
  const bool here = cudaGetDevice(&device) == cudaSuccess;
  if (!here) cudaGetLastError();
  const sk_pattern pattern = a.sparsity();
  char format[32];
  check(sk_default_format(&pattern, a.dtype, here ? concat("cuda:", device).c_str() : "cuda",
                          format));
  SK_EXPECT((", " + gpu_formats(a) + ",").find(concat(", ", format, ",")) != std::string::npos,
            op_type(a.op), ": no kernel does ", kernel_op(a), " with format ", format, " in ",
            kDtypeNames[a.dtype], "; keep this layer dense");
  return format;
}

int32_t tactic_id(const std::string& name) {
  uint32_t hash = 0x811c9dc5;
  for (const unsigned char c : name) hash = (hash ^ c) * 0x01000193;
  return int32_t(std::max(hash & 0x7fffffff, 1u));
}

std::vector<Tactic> tactics(const Attributes& a, const std::string& format, int64_t m, int device) {
  std::vector<Tactic> list = {{tactic_id(kAuto), kAuto}};
  std::vector<sk_candidate> answers(size_t(std::max(sk_kernel_count(), 1)));
  const sk_pattern pattern = a.sparsity();
  check(sk_explain_on(SK_CUDA, device, kernel_op(a), format.c_str(), &pattern, a.dtype, m,
                      a.n / a.group, a.k, 0, answers.data()));
  for (const sk_candidate& answer : answers) {
    if (!answer.ok) continue;
    const int32_t id = tactic_id(answer.name);
    const bool taken =
        std::any_of(list.begin(), list.end(), [id](const Tactic& t) { return t.id == id; });
    if (!taken) list.push_back({id, answer.name});
  }
  return list;
}

std::string kernel_of_tactic(int32_t id) {
  if (id == 0 || id == tactic_id(kAuto)) return "";
  std::string name;
  each_gpu_kernel([&](const sk_kernel_info& kernel) {
    if (name.empty() && tactic_id(kernel.name) == id) name = kernel.name;
  });
  SK_EXPECT(!name.empty(), "no kernel has the tactic ", id,
            ": the engine was built with another version of sparsekit; build it again");
  return name;
}

}  // namespace sk::tensorrt
