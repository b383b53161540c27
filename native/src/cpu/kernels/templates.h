// Kernels made of bodies that are inlined for each number of vectors or rows.
#ifndef TSFFN_TEMPLATES_H
#define TSFFN_TEMPLATES_H

#include "kernels.h"

#define TSFFN_INLINED static inline __attribute__((always_inline))

// dots from BODY, a function of the same parameters that is inlined for 1 to MOST <= 8 vectors.
#define TSFFN_DOTS_OF(N_X, MOST, BODY)                                                                                 \
    case N_X:                                                                                                          \
        if ((N_X) <= (MOST)) {                                                                                         \
            BODY(n, row, (N_X) <= (MOST) ? (N_X) : 1, x, s, asks);                                                     \
        }                                                                                                              \
        break
#define TSFFN_DEFINE_DOTS(NAME, MOST, BODY)                                                                            \
    void NAME(int64_t n, const void * row, int n_x, const void * const * x, float * s,                                 \
              const struct tsffn_asks * asks) {                                                                        \
        for (; n_x > 0; n_x -= (MOST), x += (MOST), s += (MOST), asks = NULL) {                                        \
            switch (n_x < (MOST) ? n_x : (MOST)) {                                                                     \
                TSFFN_DOTS_OF(1, MOST, BODY);                                                                          \
                TSFFN_DOTS_OF(2, MOST, BODY);                                                                          \
                TSFFN_DOTS_OF(3, MOST, BODY);                                                                          \
                TSFFN_DOTS_OF(4, MOST, BODY);                                                                          \
                TSFFN_DOTS_OF(5, MOST, BODY);                                                                          \
                TSFFN_DOTS_OF(6, MOST, BODY);                                                                          \
                TSFFN_DOTS_OF(7, MOST, BODY);                                                                          \
                TSFFN_DOTS_OF(8, MOST, BODY);                                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }
// dots from DOT(n, row, x), which takes one vector and does not ask.
#define TSFFN_DEFINE_DOTS_ONE_BY_ONE(NAME, DOT)                                                                        \
    void NAME(int64_t n, const void * row, int n_x, const void * const * x, float * s,                                 \
              const struct tsffn_asks * asks) {                                                                        \
        tsffn_ask_all(asks);                                                                                           \
        for (int t = 0; t < n_x; ++t) {                                                                                \
            s[t] = DOT(n, row, x[t]);                                                                                  \
        }                                                                                                              \
    }
// axpys from BODY, a function of n, n_rows, a, rows, y and the asking, that is inlined for 1 to 4 rows: so many share
// reading and writing y. It asks STEPS times.
#define TSFFN_AXPYS_OF(N_ROWS, BODY)                                                                                   \
    case N_ROWS:                                                                                                       \
        BODY(n, N_ROWS, a, rows, y, &asking);                                                                          \
        break
#define TSFFN_DEFINE_AXPYS(NAME, STEPS, BODY)                                                                          \
    void NAME(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,                            \
              const struct tsffn_asks * asks) {                                                                        \
        struct tsffn_asking asking = tsffn_asking_begin(asks, (STEPS) * ((n_rows + 3) / 4));                           \
        for (; n_rows > 0; n_rows -= 4, a += 4, rows += 4) {                                                           \
            switch (n_rows < 4 ? n_rows : 4) {                                                                         \
                TSFFN_AXPYS_OF(1, BODY);                                                                               \
                TSFFN_AXPYS_OF(2, BODY);                                                                               \
                TSFFN_AXPYS_OF(3, BODY);                                                                               \
                TSFFN_AXPYS_OF(4, BODY);                                                                               \
            }                                                                                                          \
        }                                                                                                              \
    }
// axpys from AXPY(n, a, row, y), which does not ask.
#define TSFFN_DEFINE_AXPYS_ONE_BY_ONE(NAME, AXPY)                                                                      \
    void NAME(int64_t n, int n_rows, const float * a, const void * const * rows, float * y,                            \
              const struct tsffn_asks * asks) {                                                                        \
        struct tsffn_asking asking = tsffn_asking_begin(asks, n_rows);                                                 \
        for (int i = 0; i < n_rows; ++i) {                                                                             \
            tsffn_asking_step(&asking);                                                                                \
            AXPY(n, a[i], rows[i], y);                                                                                 \
        }                                                                                                              \
    }

// panel from BODY, a function of the same parameters that is inlined for 1 to 4 vectors, which share unpacking the
// weights.
#define TSFFN_PANEL_OF(N_X, BODY)                                                                                      \
    case N_X:                                                                                                          \
        BODY(n, panel, N_X, x, s, asks);                                                                               \
        break
#define TSFFN_DEFINE_PANEL(NAME, BODY)                                                                                 \
    void NAME(int64_t n, const void * panel, int n_x, const void * const * x, float (*s)[TSFFN_PANEL_ROWS],            \
              const struct tsffn_asks * asks) {                                                                        \
        for (; n_x > 0; n_x -= 4, x += 4, s += 4, asks = NULL) {                                                       \
            switch (n_x < 4 ? n_x : 4) {                                                                               \
                TSFFN_PANEL_OF(1, BODY);                                                                               \
                TSFFN_PANEL_OF(2, BODY);                                                                               \
                TSFFN_PANEL_OF(3, BODY);                                                                               \
                TSFFN_PANEL_OF(4, BODY);                                                                               \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
