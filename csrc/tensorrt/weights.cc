#include "tensorrt/weights.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include "tensorrt/kernels.h"
#include "tensorrt/log.h"

namespace sk::tensorrt {
namespace {

constexpr int64_t kSection = 16;  // sections of `weight` start on multiples

// Host memory as sk_pack wants it, all zero.
class HostMemory {
 public:
  explicit HostMemory(int64_t bytes)
      : bytes_(bytes),
        data_(std::aligned_alloc(kAlignment, size_t(round_up(bytes + 1, kAlignment)))) {
    SK_EXPECT(data_, "no ", bytes, " bytes of memory to prepare a weight");
    std::memset(data_.get(), 0, size_t(bytes));
  }
  uint8_t* data() const { return static_cast<uint8_t*>(data_.get()); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  int64_t bytes_;
  std::unique_ptr<void, Free> data_;
};

// A canonical weight in the memory of a HostMemory.
sk_weight canonical_at(const Attributes& a, const Sections& s, uint8_t* base) {
  sk_weight w{};
  w.pattern = a.sparsity();
  w.dtype = a.dtype, w.n = a.n, w.k = a.k;
  check(sk_weight_sizes(&w.pattern, w.dtype, w.n, w.k, a.nnzb, &w.values_bytes, &w.indices_bytes,
                        &w.crow_indices_bytes));
  w.values = base + s.values;
  w.indices = base + s.indices;
  if (a.blocks()) w.crow_indices = base + s.crow_indices;
  return w;
}

Sections canonical_sections(const Attributes& a) {
  Sections s;
  const sk_weight sizes = canonical_at(a, s, nullptr);
  s.indices = round_up(sizes.values_bytes, kSection);
  s.crow_indices = round_up(s.indices + sizes.indices_bytes, kSection);
  s.bias = round_up(s.crow_indices + sizes.crow_indices_bytes, kSection);
  const int64_t arrays_end =
      a.blocks() ? s.crow_indices + sizes.crow_indices_bytes : s.indices + sizes.indices_bytes;
  s.end = round_up(a.has_bias ? s.bias + a.bias_bytes() : arrays_end, 4);
  return s;
}

// The arrays of one group, which is rows of the whole; `crow` receives those of blocks.
sk_weight group_of(const sk_weight& whole, const Attributes& a, int group,
                   std::vector<int32_t>& crow) {
  sk_weight part = whole;
  part.n = a.n / a.group;
  int64_t blocks = 0, first = 0;
  if (a.blocks()) {
    const int64_t rows = round_up(part.n, whole.pattern.block_rows) / whole.pattern.block_rows;
    const int32_t* starts = static_cast<const int32_t*>(whole.crow_indices) + group * rows;
    first = starts[0], blocks = starts[rows] - first;
    crow.assign(starts, starts + rows + 1);
    for (int32_t& start : crow) start -= int32_t(first);
    part.crow_indices = crow.data();
  }
  check(sk_weight_sizes(&part.pattern, part.dtype, part.n, part.k, blocks, &part.values_bytes,
                        &part.indices_bytes, &part.crow_indices_bytes));
  const int64_t block = blocks ? part.values_bytes / blocks : 0;
  part.values = static_cast<uint8_t*>(whole.values) +
                (a.blocks() ? first * block : group * part.values_bytes);
  part.indices =
      static_cast<uint8_t*>(whole.indices) + (a.blocks() ? first * 4 : group * part.indices_bytes);
  return part;
}

// The groups of a validated weight packed in `format`, and behind them room for the bias.
HostMemory pack_groups(const Attributes& a, const sk_weight& whole, GpuWeight& out) {
  std::vector<int32_t> crow;
  for (int group = 0; group < a.group; ++group) {
    const sk_weight part = group_of(whole, a, group, crow);
    int64_t bytes = 0;
    check(sk_packed_bytes(&part, out.format.c_str(), &bytes));
    out.group_bytes = std::max(out.group_bytes, bytes);
  }
  if (a.group > 1) out.group_bytes = round_up(out.group_bytes, kAlignment);
  out.bias = round_up(a.group * out.group_bytes, kSection);
  HostMemory packed(out.bias + a.bias_bytes());
  out.headers.resize(size_t(a.group));
  for (int group = 0; group < a.group; ++group) {
    const sk_weight part = group_of(whole, a, group, crow);
    uint8_t* to = packed.data() + group * out.group_bytes;
    int64_t bytes = 0;
    check(sk_packed_bytes(&part, out.format.c_str(), &bytes));
    check(sk_pack(&part, out.format.c_str(), to, bytes));
    std::memcpy(out.headers[size_t(group)].data(), to, SK_HEADER_BYTES);
  }
  return packed;
}

// What the sections say is checked by unpacking them into a weight that is validated and packed again:
// kernels trust every byte.
HostMemory open_packed(const Attributes& a, const Sections& s, const HostMemory& given,
                       GpuWeight& out) {
  const char* op = op_type(a.op);
  const Sections canonical = canonical_sections(a);
  HostMemory arrays(canonical.end);
  const sk_weight whole = canonical_at(a, canonical, arrays.data());
  const int64_t rows = a.n / a.group;
  const int64_t block_rows = a.blocks() ? round_up(rows, a.pattern[4]) / a.pattern[4] : 0;
  int64_t blocks = 0;
  for (int group = 0; group < a.group; ++group) {
    const uint8_t* from = given.data() + group * s.group_bytes;
    sk_packed_info info;
    check(sk_read_packed_info(from, s.group_bytes, &info));
    const sk_pattern pattern = a.sparsity();
    SK_EXPECT(info.format == a.format && !std::memcmp(&info.pattern, &pattern, sizeof pattern) &&
                  info.dtype == a.dtype && info.n == rows && info.k == a.k &&
                  info.nnzb <= a.nnzb - blocks,
              op, ": the packed weight of group ", group,
              " is not what the attributes say; export the model again");
    sk_weight part = whole;
    part.n = rows;
    check(sk_weight_sizes(&part.pattern, part.dtype, rows, part.k, info.nnzb, &part.values_bytes,
                          &part.indices_bytes, &part.crow_indices_bytes));
    const int64_t block = info.nnzb ? part.values_bytes / info.nnzb : 0;
    part.values = static_cast<uint8_t*>(whole.values) +
                  (a.blocks() ? blocks * block : group * part.values_bytes);
    part.indices = static_cast<uint8_t*>(whole.indices) +
                   (a.blocks() ? blocks * 4 : group * part.indices_bytes);
    std::vector<int32_t> crow(size_t(block_rows + 1));
    part.crow_indices = a.blocks() ? crow.data() : nullptr;
    check(sk_unpack(from, s.group_bytes, &part));
    check(sk_validate(&part));
    auto* starts = static_cast<int32_t*>(whole.crow_indices);
    for (int64_t row = 0; row < block_rows; ++row)
      starts[group * block_rows + row + 1] = int32_t(blocks + crow[size_t(row + 1)]);
    blocks += info.nnzb;
  }
  SK_EXPECT(blocks == a.nnzb, op, ": expected ", a.nnzb, " blocks in all groups, got ", blocks,
            "; export the model again");
  HostMemory again = pack_groups(a, whole, out);
  SK_EXPECT(out.group_bytes == s.group_bytes &&
                !std::memcmp(again.data(), given.data(), size_t(a.group * s.group_bytes)),
            op, ": the packed weight is damaged; export the model again");
  return again;
}

// A weight of this size that keeps nothing but zeros, where a pattern must keep something.
HostMemory empty_weight(const Attributes& a) {
  const Sections s = canonical_sections(a);
  HostMemory arrays(s.end);
  const sk_weight w = canonical_at(a, s, arrays.data());
  const sk_pattern& p = w.pattern;
  auto* indices = static_cast<uint8_t*>(w.indices);
  if (!a.blocks()) {
    const int64_t index_rows = round_up(a.n, p.vector) / p.vector;
    const int64_t row_bytes = w.indices_bytes / index_rows;
    const int64_t slots = round_up(a.k, p.group) / p.group * p.kept;
    const int bits = p.group <= 4 ? 2 : 4;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t bit = slot * bits;
      indices[bit / 8] = uint8_t(indices[bit / 8] | (slot % p.kept) << bit % 8);
    }
    for (int64_t row = 1; row < index_rows; ++row)
      std::memcpy(indices + row * row_bytes, indices, size_t(row_bytes));
    return arrays;
  }
  const int64_t rows = round_up(a.n, p.block_rows) / p.block_rows;
  const int64_t columns = round_up(a.k, p.block_cols) / p.block_cols;
  auto* crow = static_cast<int32_t*>(w.crow_indices);
  auto* column = reinterpret_cast<int32_t*>(indices);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = a.nnzb * row / rows, end = a.nnzb * (row + 1) / rows;
    crow[row + 1] = int32_t(end);
    for (int64_t b = first; b < end; ++b)
      column[b] = int32_t((b - first) * columns / (end - first));
  }
  return arrays;
}

// 128 bits of a content; who forges one gets a weight of the same description.
std::pair<uint64_t, uint64_t> hash(const HostMemory& memory) {
  uint64_t a = 0xcbf29ce484222325, b = 0x9e3779b97f4a7c15;
  for (int64_t at = 0; at < memory.bytes(); at += 4) {
    uint32_t word;
    std::memcpy(&word, memory.data() + at, 4);
    a = (a ^ word) * 0x100000001b3;
    b = ((b << 29 | b >> 35) ^ word) * 0xff51afd7ed558ccd;
  }
  return {a, b};
}

// Each holder owns its weight; what nobody holds any more is freed.
using Key = std::tuple<uint64_t, uint64_t, int, bool, std::string>;
std::mutex cache_mutex;
std::map<Key, std::weak_ptr<const GpuWeight>> cache;

std::shared_ptr<const GpuWeight> upload(GpuWeight weight, const HostMemory& packed,
                                        cudaStream_t stream) {
  weight.memory = DeviceMemory(packed.bytes(), "a packed weight");
  check_cuda(cudaMemcpyAsync(weight.memory.address(), packed.data(), size_t(packed.bytes()),
                             cudaMemcpyHostToDevice, stream),
             "copying a packed weight to the GPU");
  check_cuda(cudaStreamSynchronize(stream), "waiting for a packed weight");
  return std::make_shared<const GpuWeight>(std::move(weight));
}

std::shared_ptr<const GpuWeight> prepare(const Attributes& a, const Sections& s,
                                         const HostMemory& given, bool in_place, int device,
                                         cudaStream_t stream) {
  GpuWeight weight;
  weight.device = device;
  weight.format = format_here(a);
  const auto packed = [&] {
    if (!a.canonical()) return open_packed(a, s, given, weight);
    const sk_weight whole = canonical_at(a, s, given.data());
    check(sk_validate(&whole));
    return pack_groups(a, whole, weight);
  }();
  if (in_place) {
    weight.bias = s.bias;
    return std::make_shared<const GpuWeight>(std::move(weight));
  }
  if (a.has_bias)
    std::memcpy(packed.data() + weight.bias, given.data() + s.bias, size_t(a.bias_bytes()));
  return upload(std::move(weight), packed, stream);
}

std::shared_ptr<const GpuWeight> prepare_empty(const Attributes& a, int device,
                                               cudaStream_t stream) {
  GpuWeight weight;
  weight.device = device;
  weight.format = format_here(a);
  const HostMemory arrays = empty_weight(a);
  const HostMemory packed =
      pack_groups(a, canonical_at(a, canonical_sections(a), arrays.data()), weight);
  return upload(std::move(weight), packed, stream);
}

}  // namespace

Sections sections_of(const Attributes& a, int64_t words) {
  const char* op = op_type(a.op);
  Sections s;
  if (a.canonical()) {
    s = canonical_sections(a);
  } else if (a.group == 1) {
    const sk_pattern pattern = a.sparsity();
    check(sk_format_bytes(&pattern, a.dtype, a.n, a.k, a.nnzb, a.format.c_str(), &s.group_bytes));
    s.bias = round_up(s.group_bytes, kSection);
    s.end = a.has_bias ? round_up(s.bias + a.bias_bytes(), 4) : s.group_bytes;
  } else {  // as long as the longest group: what is there tells
    s.bias = words * 4 - round_up(a.bias_bytes(), 4);
    s.end = words * 4;
    s.group_bytes = s.bias / a.group;
    SK_EXPECT(words > 0 && words < int64_t{1} << 59 && s.group_bytes >= SK_HEADER_BYTES &&
                  s.group_bytes % kAlignment == 0 && s.group_bytes * a.group == s.bias,
              op, ": expected weight to hold ", a.group,
              " packed buffers of a multiple of 128 bytes", a.has_bias ? " and a bias" : "",
              ", got ", words, " words; export the model again");
  }
  SK_EXPECT(s.end == words * 4, op, ": expected weight to hold ", s.end / 4, " words, got ", words,
            "; export the model again");
  return s;
}

std::shared_ptr<const GpuWeight> prepare_weight(const Attributes& a, const void* constant,
                                                int64_t words, bool may_be_unwritten,
                                                cudaStream_t stream) {
  const Sections s = sections_of(a, words);
  const AmidCaptures amid;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capture), "asking whether a stream is captured");
  SK_EXPECT(
      capture == cudaStreamCaptureStatusNone, op_type(a.op),
      ": the weight is prepared in an execution context's first run, which cannot be captured; "
      "run the context once before capturing");
  HostMemory given(s.end);
  check_cuda(cudaMemcpyAsync(given.data(), constant, size_t(s.end), cudaMemcpyDeviceToHost, stream),
             "copying weight from the GPU");
  check_cuda(cudaStreamSynchronize(stream), "waiting for weight");
  const bool in_place = !a.canonical() && is_aligned(constant, kAlignment);
  const auto [first, second] = hash(given);
  const Key key(first, second, device, in_place, a.describe());
  const std::lock_guard<std::mutex> lock(cache_mutex);
  for (auto at = cache.begin(); at != cache.end();)
    at = at->second.expired() ? cache.erase(at) : std::next(at);
  if (const auto found = cache.find(key); found != cache.end()) {
    if (auto shared = found->second.lock()) return shared;
  }
  try {
    const auto weight = prepare(a, s, given, in_place, device, stream);
    cache[key] = weight;
    return weight;
  } catch (const CudaError&) {
    throw;  // says nothing about the weight
  } catch (const Error& error) {
    if (!may_be_unwritten) throw;
    log(Severity::kVERBOSE, concat(error.what(),
                                   "; taken for a weight that the builder has not written, "
                                   "and replaced by zeros for timing"));
    return prepare_empty(a, device, stream);
  }
}

}  // namespace sk::tensorrt
