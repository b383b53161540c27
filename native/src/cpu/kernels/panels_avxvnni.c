// The AVX-VNNI variant of panels_avx2.c.
#define TSFFN_PANELS_AVXVNNI
#include "panels_avx2.c"
