// TensorRT's logger, found at run time. See log.cc for why its headers do not say how.
#pragma once
#include <NvInferRuntime.h>

#include <string>

namespace sk::tensorrt {

using Severity = nvinfer1::ILogger::Severity;

// `finder` is an ILoggerFinder of whatever TensorRT loaded this library; null: log to stderr.
void set_logger_finder(void* finder) noexcept;

// To the logger of the engine or builder that called the plugin on this thread. Without one, warnings
// and errors go to stderr.
void log(Severity severity, const std::string& message) noexcept;

}  // namespace sk::tensorrt
