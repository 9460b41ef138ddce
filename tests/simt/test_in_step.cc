// ptx.cuh declares the same functions for the GPU and, through ptx.h, for the emulator; every_instruction.cuh calls
// each of them.
#include <cctype>
#include <fstream>
#include <map>
#include <sstream>

#include "check.h"

namespace {

std::string read(const std::string& path) {
  std::ifstream file(path);
  CHECK(file.good());
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// Without comments, and with white space only where two words meet.
std::string squeeze(const std::string& text) {
  std::string squeezed;
  bool gap = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text.compare(i, 2, "//") == 0) i = text.find('\n', i);
    if (std::isspace(static_cast<unsigned char>(text[i]))) {
      gap = true;
      continue;
    }
    if (gap && !squeezed.empty() && is_word(squeezed.back()) && is_word(text[i])) squeezed += ' ';
    gap = false;
    squeezed += text[i];
  }
  return squeezed;
}

// Every function after SK_DEVICE, with the template's head before it: "template<class T>uint32_t pack2(float first,...".
std::map<std::string, int> functions(const std::string& path) {
  const std::string text = squeeze(read(path)), mark = "SK_DEVICE ";
  std::map<std::string, int> found;
  for (size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + 1)) {
    const size_t brace = text.find('{', at);
    if (text.compare(at - 8, 8, "#define ") == 0) continue;
    const size_t previous = text.find_last_of(";}\"", at);
    const size_t head = text.find("template<", previous == std::string::npos ? 0 : previous);
    std::string declaration = (head < at ? text.substr(head, at - head) : "") +
                              text.substr(at + mark.size(), brace - at - mark.size());
    for (const char* place : {",SK_PLACE", "SK_PLACE"}) {
      const size_t extra = declaration.find(place);
      if (extra != std::string::npos) declaration.erase(extra, std::string(place).size());
    }
    ++found[declaration];
  }
  return found;
}

std::string name_of(const std::string& declaration) {
  const size_t end = declaration.find('(');
  size_t start = end;
  while (start > 0 && is_word(declaration[start - 1])) --start;
  return declaration.substr(start, end - start);
}

}  // namespace

int main() {
  const std::string root = SIMT_TEST_SOURCE;
  const auto device = functions(root + "/csrc/cuda/ptx/ptx.cuh");
  const auto emulated = functions(root + "/tests/simt/simt/ptx.h");
  CHECK(device.size() > 20);
  for (const auto& entry : device) {
    if (!emulated.count(entry.first)) fail("ptx.h", 0, "lacks what ptx.cuh has: " + entry.first);
  }
  for (const auto& entry : emulated) {
    if (!device.count(entry.first)) fail("ptx.cuh", 0, "lacks what ptx.h has: " + entry.first);
  }
  const std::string calls = squeeze(read(root + "/tests/simt/every_instruction.cuh"));
  for (const auto& entry : device) {
    const std::string called = "ptx::" + name_of(entry.first);
    if (calls.find(called + "(") == std::string::npos &&
        calls.find(called + "<") == std::string::npos) {
      fail("every_instruction.cuh", 0, "does not call " + called);
    }
  }
}
