#include "cpu/cost_neon.h"
#include "cpu/matmul_bsr.h"
#include "cpu/simd_neon.h"

namespace sk {
namespace {

double cost_us(const Problem& p) {
  const int rows = bsr_rows_at_once<Neon>(bsr_panel_rows(p.pattern.block_rows));
  return neon_tile_cost_us(
      p, {1, 1.0 / rows, neon_converts(p) / rows * 2, 4.0 / rows, bsr_max_vectors<Neon>(rows)});
}

// A multiply-add; x comes broadcast from memory, which is half a vector instruction more.
double decode_us(const Problem& p) { return neon_decode_cost_us(p, 1.5, neon_converts(p)); }

}  // namespace

extern const KernelFunctions matmul_bsr_rows_f32_neon_decode, matmul_bsr_rows_bf16_neon_decode,
    matmul_bsr_rows_f16_neon_decode;

SK_MATMUL_AND_CONV2D(bsr_rows_f32_neon, any_bsr, cost_us, run_bsr_fma<Neon, float>,
                     "tokens in lanes")
SK_MATMUL_AND_CONV2D(bsr_rows_bf16_neon, any_bsr, cost_us, run_bsr_fma<Neon, bf16>,
                     "tokens in lanes, computed in f32")
SK_MATMUL_AND_CONV2D(bsr_rows_f16_neon, any_bsr, cost_us, run_bsr_fma<Neon, f16>,
                     "tokens in lanes, computed in f32")
const KernelFunctions matmul_bsr_rows_f32_neon_decode{
    few_tokens_panels, decode_us, run_bsr_decode<Neon, float>, "few tokens: rows in lanes"};
const KernelFunctions matmul_bsr_rows_bf16_neon_decode{
    few_tokens_panels, decode_us, run_bsr_decode<Neon, bf16>, "few tokens: rows in lanes"};
const KernelFunctions matmul_bsr_rows_f16_neon_decode{
    few_tokens_panels, decode_us, run_bsr_decode<Neon, f16>, "few tokens: rows in lanes"};

}  // namespace sk
