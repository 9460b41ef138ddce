#include "cpu/cost_neon.h"
#include "cpu/matmul_nm_pairs.h"
#include "cpu/simd_neon.h"

namespace sk {
namespace {

double cost_us(const Problem& p) {
  return neon_tile_cost_us(p, p.pattern.vector >= 4 ? NeonStep{1, 0.25, neon_converts(p) / 2, 3, 6}
                                                    : NeonStep{1, 1, neon_converts(p), 6, 8});
}
// As many common columns as usual: 18 of 32.
double pairs_us(const Problem& p) { return neon_tile_cost_us(p, {1, 0.72, 0, 9, 8}); }

// A permutation and a multiply-add; the positions become indices of bytes once.
double decode_us(const Problem& p) { return neon_decode_cost_us(p, 2, 3 + neon_converts(p)); }

}  // namespace

extern const KernelFunctions matmul_nm_rows16_f32_neon_decode, matmul_nm_rows16_bf16_neon_decode,
    matmul_nm_rows16_f16_neon_decode;

SK_MATMUL_AND_CONV2D(nm_rows16_f32_neon, any_nm, cost_us, run_nm<Neon, float>, "tokens in lanes")
SK_MATMUL_AND_CONV2D(nm_rows16_bf16_neon, any_nm, cost_us, run_nm<Neon, bf16>,
                     "tokens in lanes, computed in f32")
SK_MATMUL_AND_CONV2D(nm_rows16_f16_neon, any_nm, cost_us, run_nm<Neon, f16>,
                     "tokens in lanes, computed in f32")
const KernelFunctions matmul_nm_rows16_f32_neon_decode{
    few_tokens, decode_us, run_nm_decode<Neon, float>, "few tokens: rows in lanes"};
const KernelFunctions matmul_nm_rows16_bf16_neon_decode{
    few_tokens, decode_us, run_nm_decode<Neon, bf16>, "few tokens: rows in lanes"};
const KernelFunctions matmul_nm_rows16_f16_neon_decode{
    few_tokens, decode_us, run_nm_decode<Neon, f16>, "few tokens: rows in lanes"};

SK_MATMUL_AND_CONV2D(nm_rows16_f32_neon_pairs, only_with_pairs, pairs_us, run_nm_pairs<Neon>,
                     "tokens in lanes, two rows share loads")

}  // namespace sk
