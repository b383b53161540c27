// The kernels of all tiers, by name: tsffn_WHAT_FORMAT_TIER. A tier's file has its own and ends with its table, which
// names all that runs on such a machine: those that it takes from another tier, too.
#ifndef TSFFN_TIERS_H
#define TSFFN_TIERS_H

#include "kernels.h"

// Plain C: the reference of all others, and what runs where no tier fits.
tsffn_dots tsffn_dots_f32_ref, tsffn_dots_f16_ref, tsffn_dots_bf16_ref, tsffn_dots_q8_0_ref, tsffn_dots_q4_0_ref;
tsffn_axpys tsffn_axpys_f32_ref, tsffn_axpys_f16_ref, tsffn_axpys_bf16_ref, tsffn_axpys_q8_0_ref, tsffn_axpys_q4_0_ref;
tsffn_panel tsffn_panel_q8_0_ref, tsffn_panel_q4_0_ref, tsffn_panel_q3_nl_ref, tsffn_panel_bits1_ref,
    tsffn_panel_bits2_ref;
extern const struct tsffn_kernels tsffn_kernels_ref;

#if defined(TSFFN_HAVE_X86)
// AVX2, FMA, F16C: Intel from Haswell on, AMD from Zen on.
tsffn_dots tsffn_dots_f32_avx2, tsffn_dots_f16_avx2, tsffn_dots_bf16_avx2, tsffn_dots_q8_0_avx2, tsffn_dots_q4_0_avx2;
tsffn_axpys tsffn_axpys_f32_avx2, tsffn_axpys_f16_avx2, tsffn_axpys_bf16_avx2, tsffn_axpys_q8_0_avx2,
    tsffn_axpys_q4_0_avx2;
tsffn_add_rows tsffn_add_rows_f32_avx2, tsffn_add_rows_f16_avx2, tsffn_add_rows_bf16_avx2, tsffn_add_rows_q8_0_avx2,
    tsffn_add_rows_q4_0_avx2;
tsffn_panel tsffn_panel_q8_0_avx2, tsffn_panel_q4_0_avx2, tsffn_panel_q3_nl_avx2, tsffn_panel_bits1_avx2,
    tsffn_panel_bits2_avx2;
extern const struct tsffn_kernels tsffn_kernels_avx2;

// And AVX-VNNI: Intel's Alder Lake and later, which lack AVX-512.
tsffn_panel tsffn_panel_q8_0_avxvnni, tsffn_panel_q4_0_avxvnni, tsffn_panel_q3_nl_avxvnni;
extern const struct tsffn_kernels tsffn_kernels_avxvnni;

// AVX-512 F, BW, DQ, VL: Skylake-SP.
tsffn_dots tsffn_dots_f32_avx512, tsffn_dots_f16_avx512, tsffn_dots_bf16_avx512, tsffn_dots_q8_0_avx512,
    tsffn_dots_q4_0_avx512;
tsffn_axpys tsffn_axpys_f32_avx512, tsffn_axpys_f16_avx512, tsffn_axpys_bf16_avx512, tsffn_axpys_q8_0_avx512,
    tsffn_axpys_q4_0_avx512;
tsffn_add_rows tsffn_add_rows_f32_avx512, tsffn_add_rows_f16_avx512, tsffn_add_rows_bf16_avx512,
    tsffn_add_rows_q8_0_avx512, tsffn_add_rows_q4_0_avx512;
extern const struct tsffn_kernels tsffn_kernels_avx512;

// And VNNI: Cascade Lake.
tsffn_dots tsffn_dots_q4_0_avx512vnni;
tsffn_panel tsffn_panel_q8_0_avx512vnni, tsffn_panel_q4_0_avx512vnni, tsffn_panel_q3_nl_avx512vnni;
extern const struct tsffn_kernels tsffn_kernels_avx512vnni;

// And VPOPCNTDQ: Ice Lake, AMD Zen 4 and Zen 5.
tsffn_panel tsffn_panel_bits1_avx512popcnt, tsffn_panel_bits2_avx512popcnt;
extern const struct tsffn_kernels tsffn_kernels_avx512popcnt;

// And AMX: Sapphire Rapids and later.
tsffn_panel tsffn_panel_q8_0_amx, tsffn_panel_q4_0_amx, tsffn_panel_q3_nl_amx;
extern const struct tsffn_gemm tsffn_gemm_amx; // gemm_amx.c
extern const struct tsffn_kernels tsffn_kernels_amx;
#elif defined(TSFFN_HAVE_NEON)
// What every AArch64 has.
tsffn_dots tsffn_dots_f32_neon, tsffn_dots_f16_neon, tsffn_dots_bf16_neon, tsffn_dots_q8_0_neon, tsffn_dots_q4_0_neon;
tsffn_axpys tsffn_axpys_f32_neon, tsffn_axpys_f16_neon, tsffn_axpys_bf16_neon, tsffn_axpys_q8_0_neon,
    tsffn_axpys_q4_0_neon;
tsffn_panel tsffn_panel_q8_0_neon, tsffn_panel_q4_0_neon, tsffn_panel_q3_nl_neon, tsffn_panel_bits1_neon,
    tsffn_panel_bits2_neon;
extern const struct tsffn_kernels tsffn_kernels_neon;

// And the dot-product extension of ARMv8.2: Neoverse, Apple M, Cortex-A76 and later.
tsffn_dots tsffn_dots_q8_0_neondot, tsffn_dots_q4_0_neondot;
tsffn_panel tsffn_panel_q8_0_neondot, tsffn_panel_q4_0_neondot, tsffn_panel_q3_nl_neondot;
extern const struct tsffn_kernels tsffn_kernels_neondot;
#endif

#endif
