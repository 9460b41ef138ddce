/* sparsekit: the C interface.
 *
 * Everything the library does for a caller without Python: describe a pruned weight, pack it into
 * the bytes a kernel wants, multiply. No call allocates memory that the caller must free, throws,
 * exits or keeps a pointer after it returns. Every function returns a status; the text of the last
 * failure on the calling thread is at sk_last_error().
 *
 *     y[m, n] = activation(x[m, k] · W[n, k]ᵀ + bias[n]) + residual[m, n]          W is the sparse
 * one
 *
 * conv2d is the same with rows of x that are gathered from images: a pixel of y is a row, a kernel
 * position (tap) of all channels a run of columns.
 *
 * Weights take three steps, each with its inverse:
 *
 *     dense + mask  --sk_compress-->  canonical (sk_weight)  --sk_pack-->  a kernel's format
 * (bytes)
 *                   <-sk_decompress--                        <-sk_unpack--
 *
 * The canonical form is what files hold; formats belong to one family of kernels. layout/README.md
 * shows the bytes of each.
 */
#ifndef SPARSEKIT_SPARSEKIT_H_
#define SPARSEKIT_SPARSEKIT_H_

#include <stdint.h>

#if defined(_WIN32)
#define SK_API
#else
#define SK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum sk_status {
  SK_OK = 0,
  SK_INVALID_ARGUMENT = 1, /* the caller's mistake: Python raises ValueError */
  SK_UNSUPPORTED = 2,      /* nothing here can run it: NotImplementedError */
  SK_RUNTIME_ERROR = 3     /* the device or the system failed: RuntimeError */
} sk_status;

typedef enum sk_dtype { SK_F32 = 0, SK_BF16 = 1, SK_F16 = 2 } sk_dtype;

typedef enum sk_activation {
  SK_ACTIVATION_NONE = 0,
  SK_ACTIVATION_RELU = 1,
  SK_ACTIVATION_GELU = 2,      /* with erf */
  SK_ACTIVATION_GELU_TANH = 3, /* the tanh approximation */
  SK_ACTIVATION_SILU = 4,
  SK_ACTIVATION_RELU6 = 5 /* min(max(v, 0), 6) */
} sk_activation;

typedef enum sk_device_type { SK_CPU = 0, SK_CUDA = 1 } sk_device_type;

typedef enum sk_family { SK_FAMILY_NM = 0, SK_FAMILY_BSR = 1 } sk_family;

/* A sparsity pattern. SK_FAMILY_NM: `kept` values of every `group` consecutive ones along k, shared
 * by `vector` consecutive rows. SK_FAMILY_BSR: blocks of block_rows x block_cols. Unused fields are
 * 0. */
typedef struct sk_pattern {
  int32_t family;
  int32_t kept, group, vector;
  int32_t block_rows, block_cols;
} sk_pattern;

/* A pruned weight W[n, k] in canonical form. The arrays are the caller's.
 *
 * NM, with groups = ceil(k / group) and slots = groups * kept:
 *   values        [n, slots]                             kept numbers, ascending positions in a
 * group indices       [ceil(n / vector), ceil(slots * bits / 8)] bytes; position in the group,
 * `bits` wide (2 for group <= 4, else 4), least significant bits first, each row byte aligned
 *   crow_indices  NULL
 * BSR, with nnzb kept blocks:
 *   values        [nnzb, block_rows, block_cols]         blocks at the edge are padded with zeros
 *   indices       int32 [nnzb]                           block columns, ascending in a block row
 *   crow_indices  int32 [ceil(n / block_rows) + 1]       first block of each block row
 */
typedef struct sk_weight {
  sk_pattern pattern;
  int32_t dtype;
  int64_t n, k;
  void* values;
  int64_t values_bytes;
  void* indices;
  int64_t indices_bytes;
  void* crow_indices;
  int64_t crow_indices_bytes;
} sk_weight;

/* What a packed buffer says of itself. */
typedef struct sk_packed_info {
  char format[32];
  sk_pattern pattern;
  int32_t dtype;
  int64_t n, k;
  int64_t nnzb; /* BSR: kept blocks; NM: 0 */
  int64_t bytes;
} sk_packed_info;

/* When the residual is added. */
typedef enum sk_residual_order {
  SK_RESIDUAL_LAST = 0, /* activation(sum + bias) + residual */
  SK_RESIDUAL_FIRST = 1 /* activation(sum + bias + residual), as residual networks do */
} sk_residual_order;

/* One matmul. All tensors have the weight's dtype; rows may be strided (in elements), columns not.
 */
typedef struct sk_matmul_args {
  int64_t m, n, k;
  int32_t dtype;
  const void* x; /* [m, k] */
  int64_t x_row_stride;
  const void* weight; /* a buffer that sk_pack wrote, 64-byte aligned */
  int64_t weight_bytes;
  void* y; /* [m, n] */
  int64_t y_row_stride;
  const void* bias;     /* [n] or NULL */
  const void* residual; /* [m, n] or NULL; may not overlap y */
  int64_t residual_row_stride;
  int32_t residual_order; /* sk_residual_order */
  int32_t activation;
  int32_t num_threads; /* 0: as many as there are cores */
  /* The rest is for SK_CUDA, where all tensors, `weight` and `workspace` are in the memory of one
   * GPU: rows of x on 16 bytes, the weight on 128. The call starts the work and returns. */
  int32_t device_type;
  int32_t device_index;
  void* stream;              /* cudaStream_t */
  const void* weight_header; /* host copy of the first SK_HEADER_BYTES of the packed buffer */
  /* Calls that may run at the same time need workspaces and counters of their own. */
  void* workspace;
  int64_t workspace_bytes; /* at least what sk_get_cuda_info says */
  /* SK_CUDA_COUNTER_BYTES, which are zero before each call and, once its work is done, zero again.
   * NULL: the workspace starts with them; else nobody reads what is there. */
  void* counters;
} sk_matmul_args;

/* Where sk_conv2d finds the rows of x: row (b * out_height + p) * out_width + q is an output pixel of
 * image b, and its columns are, tap by tap,
 *
 *     x[b, p * stride_height - padding_top + r * dilation_height,
 *          q * stride_width - padding_left + s * dilation_width, 0 .. in_channels)
 *
 * with zeros outside the image and behind the last channel: column (r * kernel_width + s) * tap + c
 * of W is channel c, tap = k / (kernel_height * kernel_width) is at least in_channels. The padding at
 * the bottom and the right is what out_height and out_width ask for. A group of channels is a call
 * of its own. */
typedef struct sk_conv2d_shape {
  int64_t batch, in_height, in_width, in_channels;
  int64_t x_image_stride, x_line_stride,
      x_pixel_stride; /* in elements; channels lie side by side */
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t dilation_height, dilation_width;
  int64_t padding_top, padding_left;
  int64_t out_height, out_width;
} sk_conv2d_shape;

/* Which elements sk_pack_cuda keeps. */
typedef enum sk_keep {
  SK_KEEP_MASK = 0,     /* those where the mask is not zero */
  SK_KEEP_NONZERO = 1,  /* those that are not zero; where that does not fit, as SK_KEEP_MAGNITUDE */
  SK_KEEP_MAGNITUDE = 2 /* in each group the two largest, of equals the first */
} sk_keep;

/* A dense 2:4 weight to be packed on a GPU. All addresses but `header` are in the memory of that GPU.
 */
typedef struct sk_pack_cuda_args {
  sk_pattern pattern; /* 2:4; vectors of more than one row need a mask */
  int32_t dtype;      /* SK_BF16 or SK_F16 */
  int64_t n, k;
  const void* weight;        /* [n, k], without NaN where there is no mask */
  int64_t weight_row_stride; /* in elements */
  int32_t keep;
  const uint8_t* mask; /* [n, k] for SK_KEEP_MASK, else NULL */
  int64_t mask_row_stride;
  void* packed; /* receives the packed buffer, 128-byte aligned; of no use when the call fails */
  int64_t packed_bytes; /* what sk_format_bytes says */
  void* header;         /* receives the first SK_HEADER_BYTES of the packed buffer, on the host */
  void* misfit;         /* 8 bytes, aligned to 8, for the call's own use */
  int32_t device_index;
  void* stream; /* cudaStream_t */
} sk_pack_cuda_args;

/* A packed 2:4 weight to be unpacked on the GPU that has it in its memory, into the same. */
typedef struct sk_unpack_cuda_args {
  const void* packed; /* format nm_mma_sp, 128-byte aligned */
  int64_t packed_bytes;
  const void* header; /* host copy of the first SK_HEADER_BYTES of the packed buffer */
  int64_t n, k;       /* of `dense`, with its dtype: those of the packed weight */
  int32_t dtype;
  void* dense; /* receives [n, k]; what was pruned becomes zero */
  int64_t dense_row_stride;
  int32_t device_index;
  void* stream; /* cudaStream_t */
} sk_unpack_cuda_args;

/* What every packed buffer starts with: the header, and zeros up to here. */
#define SK_HEADER_BYTES 128
#define SK_CUDA_COUNTER_BYTES 16384

/* One line of the kernel registry. */
typedef struct sk_kernel_info {
  const char* name; /* <op>_<format>_<dtype>_<arch>[_variant] */
  const char* op;
  const char* format;
  const char* dtype;
  const char* arch;
  const char* variant; /* "" for the main one */
  int32_t available;   /* this machine (and SPARSEKIT_ISA) can run it */
  const char* reason;  /* why not, or what it is for */
  int32_t device_type; /* where its tensors are */
} sk_kernel_info;

/* How one kernel answers a problem. */
typedef struct sk_candidate {
  const char* name;
  int32_t ok;
  int32_t chosen;
  double cost_us;      /* the cost model's estimate, 0 when not ok */
  char reason[192];    /* why not, or what it is for; of the chosen one first why it is */
  int32_t device_type; /* where its tensors are */
} sk_candidate;

/* The kernel that was measured to be the fastest for matmuls of this kind, with m from m_from to
 * m_to. It counts for blocks of any share of zeros, and on a CPU for this number of threads. */
typedef struct sk_preference {
  const char* op;
  const char* format;
  sk_pattern pattern;
  int32_t dtype;
  int64_t n, k;
  int32_t num_threads; /* 0: as many as there are cores */
  int32_t device_type, device_index;
  int64_t m_from, m_to;
  const char* kernel;
} sk_preference;

/* The message of the last call on this thread that did not return SK_OK. Never NULL. */
SK_API const char* sk_last_error(void);
SK_API const char* sk_version(void);

/* --- canonical form ------------------------------------------------------------------------------
 */

/* Bytes of the three arrays of a weight; `nnzb` counts for BSR only. */
SK_API sk_status sk_weight_sizes(const sk_pattern* pattern, int32_t dtype, int64_t n, int64_t k,
                                 int64_t nnzb, int64_t* values_bytes, int64_t* indices_bytes,
                                 int64_t* crow_indices_bytes);

/* Blocks of a BSR pattern in which the mask (bytes, row-major [n, k], non-zero = kept) keeps
 * anything. */
SK_API sk_status sk_count_blocks(const sk_pattern* pattern, const uint8_t* mask, int64_t n,
                                 int64_t k, int64_t* nnzb);

/* Dense rows and mask to canonical. Fails, and says where first, if the mask does not fit the
 * pattern. A group that keeps fewer than it may is filled with zeros at the lowest free positions.
 */
SK_API sk_status sk_compress(const void* dense, int64_t row_stride, const uint8_t* mask,
                             sk_weight* out);

/* Canonical to dense rows; what was pruned becomes zero. */
SK_API sk_status sk_decompress(const sk_weight* weight, void* dense, int64_t row_stride);

/* Refuses sizes that do not belong together and indices out of range: call it on what comes from a
 * file. */
SK_API sk_status sk_validate(const sk_weight* weight);

/* --- formats -------------------------------------------------------------------------------------
 */

/* The format whose kernel is the best this machine has for the pattern. `target`: "auto" or "cpu"
 * for this CPU, "reference" for the canonical format that the scalar kernels read, "cuda" or
 * "cuda:<device>" for a GPU ("cuda" on a machine without one: for compute capability 8.0).
 * SK_UNSUPPORTED, with each kernel's reason, when nothing on a GPU takes the pattern. */
SK_API sk_status sk_default_format(const sk_pattern* pattern, int32_t dtype, const char* target,
                                   char format[32]);
SK_API sk_status sk_packed_bytes(const sk_weight* weight, const char* format, int64_t* bytes);
/* The same before there is a weight; `nnzb` counts for BSR only. */
SK_API sk_status sk_format_bytes(const sk_pattern* pattern, int32_t dtype, int64_t n, int64_t k,
                                 int64_t nnzb, const char* format, int64_t* bytes);
SK_API sk_status sk_pack(const sk_weight* weight, const char* format, void* packed, int64_t bytes);
/* Reads nothing behind the first SK_HEADER_BYTES. */
SK_API sk_status sk_read_packed_info(const void* packed, int64_t bytes, sk_packed_info* info);
/* `out` holds arrays of the sizes sk_weight_sizes gives for the packed buffer's own description. */
SK_API sk_status sk_unpack(const void* packed, int64_t bytes, sk_weight* out);

/* Dense to format nm_mma_sp without leaving the GPU, with the bytes that sk_compress and sk_pack would
 * give. It synchronises the stream, to fail as sk_compress does where the mask does not fit; so it
 * cannot be captured into a graph. */
SK_API sk_status sk_pack_cuda(const sk_pack_cuda_args* args);
/* The inverse, straight to dense. Starts the work and returns; may be captured. */
SK_API sk_status sk_unpack_cuda(const sk_unpack_cuda_args* args);

/* --- run -----------------------------------------------------------------------------------------
 */

/* Runs the kernel named; when it is NULL the one that SPARSEKIT_KERNEL names, else the preferred one,
 * else, or where that one cannot run, the one that the cost model estimates to be the fastest. */
SK_API sk_status sk_matmul(const sk_matmul_args* args, const char* kernel);

/* The same for a convolution. `args` as for sk_matmul with m = batch * out_height * out_width, but x
 * is the images and x_row_stride does not count. A GPU wants x, its strides and tap * element size on
 * multiples of 16 bytes. A 1x1 convolution without stride and padding is run as a matmul. */
SK_API sk_status sk_conv2d(const sk_matmul_args* args, const sk_conv2d_shape* shape,
                           const char* kernel);

SK_API int32_t sk_kernel_count(void);
SK_API sk_status sk_get_kernel(int32_t index, sk_kernel_info* info);
/* Every kernel's answer to the problem: `out` holds sk_kernel_count() entries. */
SK_API sk_status sk_explain(const char* op, const char* format, const sk_pattern* pattern,
                            int32_t dtype, int64_t m, int64_t n, int64_t k, int32_t num_threads,
                            sk_candidate* out);
/* The same for tensors on a device. */
SK_API sk_status sk_explain_on(int32_t device_type, int32_t device_index, const char* op,
                               const char* format, const sk_pattern* pattern, int32_t dtype,
                               int64_t m, int64_t n, int64_t k, int32_t num_threads,
                               sk_candidate* out);

/* Adds preferences, all or none; of two for the same m the later one counts. Any thread may call
 * these while others multiply: a running call keeps its choice. */
SK_API sk_status sk_prefer_kernel(const sk_preference* preferences, int32_t count);
SK_API sk_status sk_clear_preferences(void);
SK_API sk_status sk_preference_count(int64_t* count);

/* --- machine -------------------------------------------------------------------------------------
 */

typedef struct sk_cpu_info {
  char model[64];
  char isa[16];          /* the level in use: scalar, avx2, avx512, avx512bf16, neon or neon_bf16 */
  char isa_detected[16]; /* before SPARSEKIT_ISA */
  char features[256];    /* space-separated */
  int32_t cores;
  int64_t l1d_bytes, l2_bytes, l3_bytes;
} sk_cpu_info;

SK_API sk_status sk_get_cpu_info(sk_cpu_info* info);

typedef struct sk_cuda_info {
  char name[128];
  int32_t major, minor; /* compute capability */
  int32_t sm_count;
  int64_t shared_bytes_per_block; /* that one block can opt in to */
  int64_t shared_bytes_per_sm;
  int64_t l2_bytes, memory_bytes;
  int64_t bandwidth;       /* of the memory, bytes per second; 0: unknown */
  int32_t driver_version;  /* 1000 * major + 10 * minor, of CUDA */
  int32_t runtime_version; /* the same for the runtime that is built in */
  int64_t workspace_bytes; /* what sk_matmul_args.workspace takes on this device */
} sk_cuda_info;

/* Both start the CUDA driver: a process that forks should ask after it did. */
SK_API sk_status sk_cuda_device_count(int32_t* count);
/* Without any device this fails (SK_UNSUPPORTED), and the message says why there is none. */
SK_API sk_status sk_get_cuda_info(int32_t device, sk_cuda_info* info);

/* Reads SPARSEKIT_ISA and SPARSEKIT_KERNEL again; they are otherwise read once. */
SK_API sk_status sk_reload_environment(void);

#ifdef __cplusplus
}
#endif
#endif /* SPARSEKIT_SPARSEKIT_H_ */
