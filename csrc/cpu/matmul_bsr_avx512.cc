#include "cpu/matmul_bsr.h"
#include "cpu/matmul_bsr_lanes.h"
#include "cpu/simd_avx512.h"

namespace sk {

extern const KernelFunctions matmul_bsr_rows_f32_avx512_decode, matmul_bsr_rows_bf16_avx512_decode;

SK_MATMUL_AND_CONV2D(bsr_rows_f32_avx512, any_bsr, bsr_cost_us<Avx512>, run_bsr_fma<Avx512, float>,
                     "tokens in lanes")
SK_MATMUL_AND_CONV2D(bsr_rows_bf16_avx512, any_bsr, bsr_cost_us<Avx512>, run_bsr_fma<Avx512, bf16>,
                     "tokens in lanes, computed in f32")
const KernelFunctions matmul_bsr_rows_f32_avx512_decode{
    few_tokens_panels, bsr_decode_cost_us<Avx512>, run_bsr_decode<Avx512, float>,
    "few tokens: rows in lanes"};
const KernelFunctions matmul_bsr_rows_bf16_avx512_decode{
    few_tokens_panels, bsr_decode_cost_us<Avx512>, run_bsr_decode<Avx512, bf16>,
    "few tokens: rows in lanes"};

SK_MATMUL_AND_CONV2D(bsr_rows_f32_avx512_lanes, panels_of_16, bsr_lanes_cost_us<Avx512>,
                     BsrLanes<FmaColumns<Avx512>>::run, "rows in lanes")

}  // namespace sk
