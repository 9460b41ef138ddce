#include "core/error.h"

#include <cstdio>
#include <utility>

namespace sk {

Error::Error(sk_status status, std::string message)
    : status_(status), message_(std::move(message)) {}
Error::~Error() = default;
const char* Error::what() const noexcept { return message_.c_str(); }
sk_status Error::status() const noexcept { return status_; }

void append(std::string& text, const char* part) { text += part; }
void append(std::string& text, const std::string& part) { text += part; }
void append_integer(std::string& text, int64_t part) { text += std::to_string(part); }
void append_real(std::string& text, double part) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", part);
  text += digits;
}

}  // namespace sk
