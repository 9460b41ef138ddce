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

// Where a vtable has ILoggerFinder::findLogger and ILogger::log: the first function of their classes in
// TensorRT 10; in 11 behind those of IVersionedInterface, two and a destructor's two.
constexpr int kSlot10 = 0, kSlot11 = 4;

// Calls by the Itanium C++ ABI, as every compiler for Linux has it. A class declared here and derived by
// nobody would do but for optimisers, which see that nobody derives it.
template <class Result, class... Arguments>
Result call_slot(void* object, int slot, Arguments... arguments) {
  void** vtable;
  std::memcpy(&vtable, object, sizeof vtable);
  return reinterpret_cast<Result (*)(void*, Arguments...)>(vtable[slot])(object, arguments...);
}

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
  if (f.version == 0) return false;
  const int slot = f.version == 10 ? kSlot10 : kSlot11;
  void* logger = call_slot<void*>(f.finder, slot);
  if (logger) call_slot<void>(logger, slot, severity, message);
  return logger;
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
