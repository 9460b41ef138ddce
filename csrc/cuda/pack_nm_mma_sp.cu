// Launches of the kernels in pack_nm_mma_sp.cuh. What they are given was checked by dispatch/pack_cuda.cc.
#include <algorithm>

#include "core/cuda_check.h"
#include "cuda/pack_nm_mma_sp.cuh"
#include "dispatch/pack_cuda.h"

namespace sk {
namespace {

template <SpMask kMask>
void launch(const SpPackArgs& args, cudaStream_t stream) {
  sp_pack_kernel<kMask><<<unsigned(sp_grid(args.n, args.k)), kSpThreads, 0, stream>>>(args);
  check_cuda(cudaGetLastError(), "launching a kernel that packs");
}

void copy_to_host(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream),
             "copying to the host");
}

// What compress() would have said.
[[noreturn]] void fail_misfit(const sk_pack_cuda_args& a, uint64_t misfit, cudaStream_t stream) {
  const int64_t row0 = int64_t(misfit >> 32), group = int64_t(misfit & 0xffffffff);
  const int64_t rows = std::min<int64_t>(a.pattern.vector, a.n - row0);
  const int64_t columns = std::min<int64_t>(4, a.k - 4 * group);
  uint8_t mask[kMmaRows][4] = {};
  for (int64_t row = 0; row < rows; ++row) {
    copy_to_host(mask[row], a.mask + (row0 + row) * a.mask_row_stride + 4 * group, size_t(columns),
                 stream);
  }
  check_cuda(cudaStreamSynchronize(stream), "looking where the mask does not fit");
  int count = 0;
  for (int column = 0; column < 4; ++column) {
    count += std::any_of(mask, mask + rows, [&](const uint8_t(&row)[4]) { return row[column]; });
  }
  fail_mask(a.pattern, a.n, a.k, row0, group, count);
}

}  // namespace

void launch_pack_nm_mma_sp(const sk_pack_cuda_args& a, const PackedHeader& header) {
  const auto stream = static_cast<cudaStream_t>(a.stream);
  uint8_t* packed = static_cast<uint8_t*>(a.packed);
  SpPackArgs args{};
  args.weight = static_cast<const uint16_t*>(a.weight);
  args.weight_stride = a.weight_row_stride;
  args.mask = a.mask;
  args.mask_stride = a.mask_row_stride;
  args.n = a.n, args.k = a.k;
  args.vector = a.pattern.vector;
  args.units = packed + header.values_offset;
  args.misfit = static_cast<uint64_t*>(a.misfit);

  static_assert(kSpFits == ~uint64_t{0}, "bytes of 0xff");
  check_cuda(cudaMemsetAsync(a.misfit, 0xff, sizeof kSpFits, stream), "preparing to pack");
  check_cuda(cudaMemsetAsync(packed, 0, SK_HEADER_BYTES, stream), "preparing to pack");
  check_cuda(cudaMemcpyAsync(packed, &header, sizeof header, cudaMemcpyHostToDevice, stream),
             "copying the header of a packed weight");
  if (a.keep == SK_KEEP_MASK) {
    launch<SpMask::kGiven>(args, stream);
  } else if (a.keep == SK_KEEP_NONZERO) {
    launch<SpMask::kNonZero>(args, stream);
  } else {
    launch<SpMask::kMagnitude>(args, stream);
  }

  uint64_t misfit;
  copy_to_host(&misfit, a.misfit, sizeof misfit, stream);
  check_cuda(cudaStreamSynchronize(stream), "packing");
  if (misfit == kSpFits) return;
  if (a.keep == SK_KEEP_MASK) fail_misfit(a, misfit, stream);
  launch<SpMask::kMagnitude>(args, stream);
}

void launch_unpack_nm_mma_sp(const sk_unpack_cuda_args& a, const PackedHeader& header) {
  const SpUnpackArgs args{static_cast<const uint8_t*>(a.packed) + header.values_offset, a.n, a.k,
                          static_cast<uint16_t*>(a.dense), a.dense_row_stride};
  sp_unpack_kernel<<<unsigned(sp_grid(a.n, a.k)), kSpThreads, 0,
                     static_cast<cudaStream_t>(a.stream)>>>(args);
  check_cuda(cudaGetLastError(), "launching a kernel that unpacks");
}

}  // namespace sk
