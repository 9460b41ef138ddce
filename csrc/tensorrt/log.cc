// ILogger and ILoggerFinder are the two interfaces a plugin calls whose layout differs between the
// versions that this library serves: TensorRT 11 put two functions in front of each. So neither is
// called as the headers of this build declare it. The finder's vtable lies in the library that made the
// finder; that library says its version, and the version says the layout.
#include "tensorrt/log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace sk::tensorrt {
namespace {

// As TensorRT 10 and 11 lay them out; nothing here is ever constructed.
struct Logger10 {
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~Logger10() = default;
};
struct Logger11 {
  virtual int32_t api_language() const noexcept = 0;
  virtual nvinfer1::InterfaceInfo interface_info() const noexcept = 0;
  virtual ~Logger11() = default;
  virtual void log(Severity severity, const char* message) noexcept = 0;
};
struct Finder10 {
  virtual void* find() = 0;
  virtual ~Finder10() = default;
};
struct Finder11 {
  virtual int32_t api_language() const noexcept = 0;
  virtual nvinfer1::InterfaceInfo interface_info() const noexcept = 0;
  virtual ~Finder11() = default;
  virtual void* find() = 0;
};

// The major version of the TensorRT that made an object; 0: not a TensorRT whose layout is known.
int version_behind(const void* object) {
  const void* vtable;
  std::memcpy(&vtable, object, sizeof vtable);
  Dl_info library;
  if (!dladdr(vtable, &library) || !library.dli_fname) return 0;
  void* handle = dlopen(library.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
  if (!handle) return 0;
  void* symbol = dlsym(handle, "getInferLibVersion");
  const int version = symbol ? reinterpret_cast<int32_t (*)() noexcept>(symbol)() : 0;
  dlclose(handle);
  const int major = version / 10000;
  return major == 10 || major == 11 ? major : 0;
}

struct Found {
  void* finder = nullptr;
  int version = 0;
};

std::mutex mutex;
Found found;

Found current() {
  const std::lock_guard<std::mutex> lock(mutex);
  return found;
}

bool log_to_tensorrt(Severity severity, const char* message) {
  const Found f = current();
  if (f.version == 10) {
    auto* logger = static_cast<Logger10*>(static_cast<Finder10*>(f.finder)->find());
    if (logger) logger->log(severity, message);
    return logger;
  }
  if (f.version == 11) {
    auto* logger = static_cast<Logger11*>(static_cast<Finder11*>(f.finder)->find());
    if (logger) logger->log(severity, message);
    return logger;
  }
  return false;
}

}  // namespace

void set_logger_finder(void* finder) noexcept {
  try {
    const Found next{finder, finder ? version_behind(finder) : 0};
    const std::lock_guard<std::mutex> lock(mutex);
    found = next;
  } catch (...) {  // logging stays as it was
  }
}

void log(Severity severity, const std::string& message) noexcept {
  try {
    const std::string line = "sparsekit: " + message;
    if (log_to_tensorrt(severity, line.c_str())) return;
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", line.c_str());
  } catch (...) {  // a message that cannot be told is no reason to fail
  }
}

}  // namespace sk::tensorrt
