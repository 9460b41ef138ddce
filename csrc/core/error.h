// Errors: thrown inside the library, turned into a status and a message at the C interface.
#pragma once
#include <exception>
#include <sstream>
#include <string>
#include <utility>

#include "sparsekit/sparsekit.h"

namespace sk {

class Error : public std::exception {
 public:
  Error(sk_status status, std::string message) : status_(status), message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }
  sk_status status() const noexcept { return status_; }

 private:
  sk_status status_;
  std::string message_;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws unless `condition`; the parts of the message are only formatted on failure.
#define SK_CHECK(condition, status, ...) \
  do {                                   \
    if (!(condition)) throw ::sk::Error(status, ::sk::concat(__VA_ARGS__)); \
  } while (false)

#define SK_REQUIRE(condition, ...) SK_CHECK(condition, SK_INVALID_ARGUMENT, __VA_ARGS__)

}  // namespace sk
