#include "cpu/cost_neon.h"
#include "cpu/matmul_bsr.h"
#include "cpu/simd_neon.h"

namespace sk {
namespace {

double cost_us(const Problem& p) { return neon_bsr_cost_us(p); }

}  // namespace

extern const KernelFunctions matmul_bsr_rows_f32_neon, matmul_bsr_rows_bf16_neon,
    matmul_bsr_rows_f16_neon, matmul_bsr_rows_f32_neon_decode, matmul_bsr_rows_bf16_neon_decode,
    matmul_bsr_rows_f16_neon_decode;

const KernelFunctions matmul_bsr_rows_f32_neon{any_bsr, cost_us, run_bsr_fma<Neon, float>,
                                               "tokens in lanes"};
const KernelFunctions matmul_bsr_rows_bf16_neon{any_bsr, cost_us, run_bsr_fma<Neon, bf16>,
                                                "tokens in lanes, computed in f32"};
const KernelFunctions matmul_bsr_rows_f16_neon{any_bsr, cost_us, run_bsr_fma<Neon, f16>,
                                               "tokens in lanes, computed in f32"};
const KernelFunctions matmul_bsr_rows_f32_neon_decode{few_tokens_panels, neon_decode_cost_us,
                                                      run_bsr_decode<Neon, float>,
                                                      "few tokens: rows in lanes"};
const KernelFunctions matmul_bsr_rows_bf16_neon_decode{few_tokens_panels, neon_decode_cost_us,
                                                       run_bsr_decode<Neon, bf16>,
                                                       "few tokens: rows in lanes"};
const KernelFunctions matmul_bsr_rows_f16_neon_decode{
    few_tokens_panels, neon_decode_cost_us, run_bsr_decode<Neon, f16>, "few tokens: rows in lanes"};

}  // namespace sk
