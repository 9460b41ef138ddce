#include "cpu/matmul_nm_lanes.h"
#include "cpu/matmul_nm_pairs.h"
#include "cpu/simd_avx2.h"

namespace sk {

extern const KernelFunctions matmul_nm_rows16_f32_avx2_decode, matmul_nm_rows16_bf16_avx2_decode,
    matmul_nm_rows16_f32_avx2_lanes, matmul_nm_rows16_bf16_avx2_lanes;

SK_MATMUL_AND_CONV2D(nm_rows16_f32_avx2, any_nm, nm_cost_us<Avx2>, run_nm<Avx2, float>,
                     "tokens in lanes")
SK_MATMUL_AND_CONV2D(nm_rows16_bf16_avx2, any_nm, nm_cost_us<Avx2>, run_nm<Avx2, bf16>,
                     "tokens in lanes, computed in f32")
const KernelFunctions matmul_nm_rows16_f32_avx2_decode{
    few_tokens, decode_cost_us<Avx2>, run_nm_decode<Avx2, float>, "few tokens: rows in lanes"};
const KernelFunctions matmul_nm_rows16_bf16_avx2_decode{
    few_tokens, decode_cost_us<Avx2>, run_nm_decode<Avx2, bf16>, "few tokens: rows in lanes"};

SK_MATMUL_AND_CONV2D(nm_rows16_f32_avx2_pairs, only_with_pairs, pairs_cost_us<Avx2>,
                     run_nm_pairs<Avx2>, "tokens in lanes, two rows share loads")

const KernelFunctions matmul_nm_rows16_f32_avx2_lanes{
    only_2_of_4, fma_lanes_cost_us<Avx2>, run_nm_lanes<FmaLanes<Avx2, float>>, "rows in lanes"};
const KernelFunctions matmul_nm_rows16_bf16_avx2_lanes{only_2_of_4, fma_lanes_cost_us<Avx2>,
                                                       run_nm_lanes<FmaLanes<Avx2, bf16>>,
                                                       "rows in lanes, computed in f32"};

}  // namespace sk
