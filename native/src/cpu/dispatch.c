// Choice of the ISA tier at run time. This file is compiled without ISA flags.
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

// __builtin_cpu_supports reads CPUID and, for the AVX families, XGETBV: the operating system must save the registers.
static int machine_has(enum tsffn_isa isa) {
#if defined(TSFFN_HAVE_X86)
    switch (isa) {
    case TSFFN_ISA_REF:
        return 1;
    case TSFFN_ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case TSFFN_ISA_AVX512:
        return machine_has(TSFFN_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    default:
        return 0;
    }
#else
    return isa == TSFFN_ISA_REF;
#endif
}

const struct tsffn_kernels * tsffn_kernels_for(enum tsffn_isa isa) {
    static const struct tsffn_kernels * const tiers[TSFFN_ISA_COUNT] = {
        [TSFFN_ISA_REF] = &tsffn_kernels_ref,
#if defined(TSFFN_HAVE_X86)
        [TSFFN_ISA_AVX2] = &tsffn_kernels_avx2,
        [TSFFN_ISA_AVX512] = &tsffn_kernels_avx512,
#endif
    };
    return ((unsigned)isa < TSFFN_ISA_COUNT && machine_has(isa)) ? tiers[isa] : NULL;
}

const struct tsffn_kernels * tsffn_kernels_best(void) {
    const char * limit = getenv("TSFFN_ISA");
    const struct tsffn_kernels * best = &tsffn_kernels_ref;
    for (int isa = TSFFN_ISA_REF; isa < TSFFN_ISA_COUNT; ++isa) {
        const struct tsffn_kernels * kernels = tsffn_kernels_for((enum tsffn_isa)isa);
        if (kernels == NULL) {
            continue;
        }
        best = kernels;
        if (limit != NULL && strcmp(limit, kernels->name) == 0) {
            break;
        }
    }
    return best;
}
