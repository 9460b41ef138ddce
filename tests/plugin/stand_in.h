// The part of a TensorRT that plugins call back: a finder of loggers, in a library that says its version.
// Built once against each version's headers, so that the layout of its objects is that version's.
#pragma once
#include <NvInferRuntime.h>

#include <string>
#include <utility>
#include <vector>

#define STAND_IN_API __attribute__((visibility("default")))

namespace stand_in {

STAND_IN_API nvinfer1::ILoggerFinder* finder();
// Severity and text of what was logged since the last call.
STAND_IN_API std::vector<std::pair<int, std::string>> take_messages();
// Without a logger, as on a thread that TensorRT does not know.
STAND_IN_API void have_logger(bool have);

}  // namespace stand_in
