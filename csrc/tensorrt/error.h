// What goes wrong in a plugin: thrown inside the library, told to TensorRT's logger at the interface.
#pragma once
#include <cuda_runtime_api.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "sparsekit/sparsekit.h"

namespace sk::tensorrt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CudaError : Error {
  using Error::Error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws unless `condition`; the parts of the message are only formatted on failure.
#define SK_EXPECT(condition, ...)                                                       \
  do {                                                                                  \
    if (!(condition)) throw ::sk::tensorrt::Error(::sk::tensorrt::concat(__VA_ARGS__)); \
  } while (false)

// Of the C interface, which has told why.
inline void check(sk_status status) {
  if (status != SK_OK) throw Error(sk_last_error());
}

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it has been told; nobody else is to find it
  throw CudaError(concat("CUDA failed while ", doing, ": ", cudaGetErrorName(error), ", ",
                         cudaGetErrorString(error)));
}

}  // namespace sk::tensorrt
