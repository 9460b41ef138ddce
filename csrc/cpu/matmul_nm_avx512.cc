#include "cpu/matmul_nm_lanes.h"
#include "cpu/matmul_nm_quads.h"
#include "cpu/simd_avx512.h"

namespace sk {

extern const KernelFunctions matmul_nm_rows16_f32_avx512_decode,
    matmul_nm_rows16_bf16_avx512_decode, matmul_nm_rows16_f32_avx512_lanes,
    matmul_nm_rows16_bf16_avx512_lanes;

SK_MATMUL_AND_CONV2D(nm_rows16_f32_avx512, any_nm, nm_cost_us<Avx512>, run_nm<Avx512, float>,
                     "tokens in lanes")
SK_MATMUL_AND_CONV2D(nm_rows16_bf16_avx512, any_nm, nm_cost_us<Avx512>, run_nm<Avx512, bf16>,
                     "tokens in lanes, computed in f32")
const KernelFunctions matmul_nm_rows16_f32_avx512_decode{
    few_tokens, decode_cost_us<Avx512>, run_nm_decode<Avx512, float>, "few tokens: rows in lanes"};
const KernelFunctions matmul_nm_rows16_bf16_avx512_decode{
    few_tokens, decode_cost_us<Avx512>, run_nm_decode<Avx512, bf16>, "few tokens: rows in lanes"};

SK_MATMUL_AND_CONV2D(nm_quads_f32_avx512, any_nm, quads_cost_us<Avx512>, run_nm_quads<Avx512>,
                     "tokens in lanes, four rows share loads")

const KernelFunctions matmul_nm_rows16_f32_avx512_lanes{
    only_2_of_4, fma_lanes_cost_us<Avx512>, run_nm_lanes<FmaLanes<Avx512, float>>, "rows in lanes"};
const KernelFunctions matmul_nm_rows16_bf16_avx512_lanes{only_2_of_4, fma_lanes_cost_us<Avx512>,
                                                         run_nm_lanes<FmaLanes<Avx512, bf16>>,
                                                         "rows in lanes, computed in f32"};

}  // namespace sk
