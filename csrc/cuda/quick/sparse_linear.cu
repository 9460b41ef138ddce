// One kernel as PTX: cmake/quick.cmake says which, such as -DSK_QUICK_KIND=decode -DSK_QUICK_DTYPE=f32.
#include "cuda/quick/sparse_linear.cuh"

#define SK_QUICK_NAMED(kind, dtype) SK_QUICK_##kind(dtype)
#define SK_QUICK(kind, dtype) SK_QUICK_NAMED(kind, dtype)
SK_QUICK(SK_QUICK_KIND, SK_QUICK_DTYPE)
