#include "stand_in.h"

#include <mutex>

#ifndef STAND_IN_VERSION
#define STAND_IN_VERSION (NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100)
#endif

extern "C" STAND_IN_API int32_t getInferLibVersion() noexcept { return STAND_IN_VERSION; }

namespace stand_in {
namespace {

std::mutex mutex;
std::vector<std::pair<int, std::string>> messages;

struct Logger : nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex);
    messages.emplace_back(int(severity), message);
  }
};

bool there_is_a_logger = true;

struct Finder : nvinfer1::ILoggerFinder {
  nvinfer1::ILogger* findLogger() override {
    static Logger logger;
    return there_is_a_logger ? &logger : nullptr;
  }
};

}  // namespace

nvinfer1::ILoggerFinder* finder() {
  static Finder instance;
  return &instance;
}
std::vector<std::pair<int, std::string>> take_messages() {
  const std::lock_guard<std::mutex> lock(mutex);
  return std::exchange(messages, {});
}
void have_logger(bool have) { there_is_a_logger = have; }

}  // namespace stand_in

// For a second one in a process, which is opened and not linked.
extern "C" STAND_IN_API nvinfer1::ILoggerFinder* stand_in_finder() { return stand_in::finder(); }
extern "C" STAND_IN_API int stand_in_message_count() {
  return int(stand_in::take_messages().size());
}
