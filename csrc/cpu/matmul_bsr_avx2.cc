#include "cpu/matmul_bsr_lanes.h"
#include "cpu/simd_avx2.h"

namespace sk {

extern const KernelFunctions matmul_bsr_rows_f32_avx2_decode, matmul_bsr_rows_bf16_avx2_decode;

SK_MATMUL_AND_CONV2D(bsr_rows_f32_avx2, any_bsr, bsr_cost_us<Avx2>, run_bsr_fma<Avx2, float>,
                     "tokens in lanes")
SK_MATMUL_AND_CONV2D(bsr_rows_bf16_avx2, any_bsr, bsr_cost_us<Avx2>, run_bsr_fma<Avx2, bf16>,
                     "tokens in lanes, computed in f32")
const KernelFunctions matmul_bsr_rows_f32_avx2_decode{few_tokens_panels, bsr_decode_cost_us<Avx2>,
                                                      run_bsr_decode<Avx2, float>,
                                                      "few tokens: rows in lanes"};
const KernelFunctions matmul_bsr_rows_bf16_avx2_decode{few_tokens_panels, bsr_decode_cost_us<Avx2>,
                                                       run_bsr_decode<Avx2, bf16>,
                                                       "few tokens: rows in lanes"};

SK_MATMUL_AND_CONV2D(bsr_rows_f32_avx2_lanes, panels_of_16, bsr_lanes_cost_us<Avx2>,
                     BsrLanes<FmaColumns<Avx2>>::run, "rows in lanes")

}  // namespace sk
