// A kernel with and without asking for cache lines meanwhile (kernels.h), from one definition: its macro parameters
// ASKS (used as ASKS() behind the parameters), BEGIN and ASK are either of these triples.
#ifndef TSFFN_ASKS_H
#define TSFFN_ASKS_H

#define NO_ASKS()
#define BEGIN_NOTHING(n_steps) (void)0
#define ASK_NOTHING() (void)0

#define WITH_ASKS() , const struct tsffn_asks * asks
#define BEGIN_ASKING(n_steps) struct tsffn_asking asking = tsffn_asking_begin(asks, n_steps)
#define ASK_STEP() tsffn_asking_step(&asking)

// For the table of a tier that has them all.
#define TSFFN_ASKING_KERNELS                                                                                           \
    .dot_asking = {dot_asking_f32, dot_asking_f16, dot_asking_bf16, dot_asking_q8_0, dot_asking_q4_0},                 \
    .axpy_asking = {axpy_asking_f32, axpy_asking_f16, axpy_asking_bf16, axpy_asking_q8_0, axpy_asking_q4_0}

#endif
