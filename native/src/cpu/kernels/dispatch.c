// Choice of the ISA tier at run time. This file is compiled without ISA flags.
#define _GNU_SOURCE // syscall
#include "tiers.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(TSFFN_HAVE_NEON)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(TSFFN_HAVE_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// AMX-TILE, AMX-INT8, AMX-BF16 and AVX512_BF16, and Linux's leave to use the tile registers, which a process must ask
// for. ggml asks for the same.
static int machine_has_amx(void) {
    enum {
        LEAF_7_AMX_BF16 = 1 << 22, // EDX of leaf 7, subleaf 0
        LEAF_7_AMX_TILE = 1 << 24, //
        LEAF_7_AMX_INT8 = 1 << 25, //
        LEAF_7_AMX = LEAF_7_AMX_BF16 | LEAF_7_AMX_TILE | LEAF_7_AMX_INT8,
        LEAF_7_1_AVX512_BF16 = 1 << 5, // EAX of leaf 7, subleaf 1
        ARCH_REQ_XCOMP_PERM = 0x1023,  // asm/prctl.h
        XFEATURE_XTILEDATA = 18,
    };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & LEAF_7_AMX) != LEAF_7_AMX ||
        !__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & LEAF_7_1_AVX512_BF16) == 0) {
        return 0;
    }
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// AVX-VNNI, which GCC 12's __builtin_cpu_supports does not know; its registers are AVX2's.
static int machine_has_avx_vnni(void) {
    enum { LEAF_7_1_AVX_VNNI = 1 << 4 }; // EAX of leaf 7, subleaf 1
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & LEAF_7_1_AVX_VNNI) != 0;
}
#endif

// __builtin_cpu_supports reads CPUID and, for the AVX families, XGETBV: the operating system must save the registers.
static int machine_has(enum tsffn_isa isa) {
#if defined(TSFFN_HAVE_X86)
    switch (isa) {
    case TSFFN_ISA_REF:
        return 1;
    case TSFFN_ISA_AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case TSFFN_ISA_AVXVNNI:
        return machine_has(TSFFN_ISA_AVX2) && machine_has_avx_vnni();
    case TSFFN_ISA_AVX512:
        return machine_has(TSFFN_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case TSFFN_ISA_AVX512VNNI:
        return machine_has(TSFFN_ISA_AVX512) && __builtin_cpu_supports("avx512vnni");
    case TSFFN_ISA_AVX512POPCNT:
        return machine_has(TSFFN_ISA_AVX512VNNI) && __builtin_cpu_supports("avx512vpopcntdq");
    case TSFFN_ISA_AMX:
        return machine_has(TSFFN_ISA_AVX512POPCNT) && machine_has_amx();
    default:
        return 0;
    }
#elif defined(TSFFN_HAVE_NEON)
    return isa == TSFFN_ISA_REF || isa == TSFFN_ISA_NEON ||
           (isa == TSFFN_ISA_NEONDOT && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0);
#else
    return isa == TSFFN_ISA_REF;
#endif
}

// The tiers that this library was built with.
static const struct tsffn_kernels * const tiers[TSFFN_ISA_COUNT] = {
    [TSFFN_ISA_REF] = &tsffn_kernels_ref,
#if defined(TSFFN_HAVE_X86)
    [TSFFN_ISA_AVX2] = &tsffn_kernels_avx2,
    [TSFFN_ISA_AVXVNNI] = &tsffn_kernels_avxvnni,
    [TSFFN_ISA_AVX512] = &tsffn_kernels_avx512,
    [TSFFN_ISA_AVX512VNNI] = &tsffn_kernels_avx512vnni,
    [TSFFN_ISA_AVX512POPCNT] = &tsffn_kernels_avx512popcnt,
    [TSFFN_ISA_AMX] = &tsffn_kernels_amx,
#elif defined(TSFFN_HAVE_NEON)
    [TSFFN_ISA_NEON] = &tsffn_kernels_neon,
    [TSFFN_ISA_NEONDOT] = &tsffn_kernels_neondot,
#endif
};

const struct tsffn_kernels * tsffn_kernels_for(enum tsffn_isa isa) {
    return (unsigned)isa < TSFFN_ISA_COUNT && tiers[isa] != NULL && machine_has(isa) ? tiers[isa] : NULL;
}

const struct tsffn_kernels * tsffn_kernels_up_to(const char * limit) {
    const struct tsffn_kernels * best = &tsffn_kernels_ref;
    for (int isa = TSFFN_ISA_REF; isa < TSFFN_ISA_COUNT; ++isa) {
        if (tiers[isa] == NULL) {
            continue;
        }
        if (machine_has((enum tsffn_isa)isa)) {
            best = tiers[isa];
        }
        if (limit != NULL && strcmp(limit, tiers[isa]->name) == 0) {
            return best;
        }
    }
    return limit == NULL ? best : NULL;
}

static void warn_of_unknown(const char * limit) {
    char names[128] = "";
    size_t used = 0;
    for (int isa = TSFFN_ISA_REF; isa < TSFFN_ISA_COUNT; ++isa) {
        if (tiers[isa] != NULL) {
            used +=
                (size_t)snprintf(names + used, sizeof(names) - used, "%s%s", used > 0 ? ", " : "", tiers[isa]->name);
        }
    }
    fprintf(stderr, "tsffn: TSFFN_ISA: expected one of %s, found '%s'; it is ignored\n", names, limit);
}

const struct tsffn_kernels * tsffn_kernels_best(void) {
    static _Atomic(const struct tsffn_kernels *) chosen;
    const struct tsffn_kernels * best = atomic_load(&chosen);
    if (best != NULL) {
        return best;
    }
    const char * limit = getenv("TSFFN_ISA");
    if (limit != NULL && limit[0] == '\0') {
        limit = NULL;
    }
    const struct tsffn_kernels * limited = tsffn_kernels_up_to(limit);
    const struct tsffn_kernels * choice = limited != NULL ? limited : tsffn_kernels_up_to(NULL);
    if (!atomic_compare_exchange_strong(&chosen, &best, choice)) {
        return best; // another thread was first
    }
    if (limited == NULL) {
        warn_of_unknown(limit);
    }
    return choice;
}

// The distances that were fastest on the processors tried (docs/notes/2026-11-23-reading-rows.md).
int64_t tsffn_stream_ahead(void) {
    enum { NEAR = 2048, FAR = 8192 };
#if defined(TSFFN_HAVE_X86)
    return __builtin_cpu_is("amd") ? FAR : NEAR;
#else
    return NEAR;
#endif
}
