// Included ahead of every C++ file of ggml while llama-cpp-python is compiled (see the Makefile).
//
// GCC 12 declares that _tile_loadconfig reads 8 bytes of its argument; the instruction reads 64. The optimizer
// therefore drops the stores to the rest of ggml's tile configuration, and LDTILECFG faults on whatever the stack held:
// on a CPU with AMX, llama.cpp then crashes with any quantized model. This says what the instruction really reads.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char (*)[64])(config)))
#endif
