// Errors: thrown inside the library, turned into a status and a message at the C interface.
//
// Files compiled for one instruction set throw too. What they call is out of line in error.cc or
// local to the file: an inline function that the linker merges might be kept in their version (see
// cmake/isa.cmake).
#pragma once
#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>

#include "sparsekit/sparsekit.h"

namespace sk {

class Error : public std::exception {
 public:
  Error(sk_status status, std::string message);
  ~Error() override;
  const char* what() const noexcept override;
  sk_status status() const noexcept;

 private:
  sk_status status_;
  std::string message_;
};

void append(std::string& text, const char* part);
void append(std::string& text, const std::string& part);
void append_integer(std::string& text, int64_t part);
void append_real(std::string& text, double part);

namespace {

template <class Part>
void append_part(std::string& text, const Part& part) {
  if constexpr (std::is_integral_v<Part> || std::is_enum_v<Part>) {
    append_integer(text, int64_t(part));
  } else if constexpr (std::is_floating_point_v<Part>) {
    append_real(text, double(part));
  } else {
    append(text, part);
  }
}

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append_part(text, parts), ...);
  return text;
}

}  // namespace

// Throws unless `condition`; the parts of the message are only formatted on failure.
#define SK_CHECK(condition, status, ...)                                    \
  do {                                                                      \
    if (!(condition)) throw ::sk::Error(status, ::sk::concat(__VA_ARGS__)); \
  } while (false)

#define SK_REQUIRE(condition, ...) SK_CHECK(condition, SK_INVALID_ARGUMENT, __VA_ARGS__)

}  // namespace sk
