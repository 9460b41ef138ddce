// x for kernels on CUDA cores: one token's columns, out of a matrix or out of images.
//
// `four(column)` gives four columns from a multiple of four on, `one(column)` any. Past k, past m and outside of an
// image zeros come; a negative column is none.
#pragma once
#include "cuda/elements.cuh"
#include "cuda/windows.cuh"

namespace sk::cuda {

struct MatrixParams {
  const void* x;   // [m, k]
  int64_t stride;  // in elements
  int k;
  bool fours;  // rows start on four elements
};

template <class T>
class MatrixX {
  using E = Element<T>;

 public:
  using Params = MatrixParams;

  SK_DEVICE MatrixX(const Params& p, int64_t token, int64_t m)
      : row_(static_cast<const typename E::Bits*>(p.x) + (token < m ? token : 0) * p.stride),
        columns_(token < m ? p.k : 0),
        fours_(p.fours) {}

  SK_DEVICE typename E::Quad four(int column) const {
    const int count = column < 0 ? 0 : columns_ - column;
    return load_some<T>(row_ + column, fours_ && count >= 4, count);
  }
  SK_DEVICE typename E::Bits one(int column) const {
    return column >= 0 && column < columns_ ? ptx::load_global_nc(row_ + column)
                                            : typename E::Bits{};
  }

 private:
  const typename E::Bits* row_;
  const int columns_;
  const bool fours_;
};

template <class T>
class PixelX {
  using E = Element<T>;
  static constexpr int kElements = 16 / int(sizeof(typename E::Bits));  // of a chunk

 public:
  struct Params {
    PixelParams pixels;
    int k;
  };

  SK_DEVICE PixelX(const Params& p, int64_t token, int64_t m)
      : p_(p), window_(window_of(p.pixels, token, 0, m)) {}

  SK_DEVICE typename E::Quad four(int column) const {
    int count;
    const typename E::Bits* from = find(column, count);
    return load_some<T>(from, count);
  }
  SK_DEVICE typename E::Bits one(int column) const {
    int count;
    const typename E::Bits* from = find(column, count);
    return count > 0 ? ptx::load_global_nc(from) : typename E::Bits{};
  }

 private:
  // Where a column stands, and how many of its tap from there on.
  SK_DEVICE const typename E::Bits* find(int column, int& count) const {
    const PixelParams& x = p_.pixels;
    const Tap tap = tap_of<kElements>(x, column < 0 ? 0 : column);
    const bool some = column >= 0 && column < p_.k && tap.inside(x, window_);
    count = some ? x.in_channels - tap.channel : 0;
    return reinterpret_cast<const typename E::Bits*>(x.x + int64_t{window_.offset + tap.offset}) +
           tap.channel % kElements;
  }

  const Params& p_;
  const Window window_;
};

}  // namespace sk::cuda
