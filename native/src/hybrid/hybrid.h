// A model whose FFNs two devices share: a GPU has predictors and the first neurons of each FFN, as many as fit into
// its memory, the CPU all the others. A call goes through these steps; `=` marks what both do at the same time.
//
//   GPU   x comes, predictor, masks go | = its neurons       | the sum of both parts, y goes
//   CPU   waits for the masks          | = all other neurons | waits for y
//
// A call of many rows, of a prompt, goes the same way, some tokens at a time; the GPU multiplies on tensor cores. With
// enough rows the CPU's neurons are copied there instead, and computed there, too (prefill.c).
//
// Where the CPU has the predictor, it computes that first and the masks come with x. Sums are added in a fixed order:
// for a plan and a number of threads y is always the same.
//
// The first call of each layer is computed by the CPU alone, too, and the results are compared. When the GPU fails, or
// they differ, the CPU computes the call, and all later ones, and one line says why.
#ifndef TSFFN_HYBRID_H
#define TSFFN_HYBRID_H

#include "plan.h"
#include "tsffn.h"

struct tsffn_hybrid;
struct tsffn_hybrid_counts;

// Who learns what calls counted that had not ended when tsffn_hybrid_compute_resident returned.
struct tsffn_hybrid_counter {
    void (*add)(void * context, int64_t layer, const struct tsffn_counts * counts,
                const struct tsffn_hybrid_counts * gpu);
    void * context;
};

// Opens GPU number `device` for layers [n_layer] of a model, which must stay until tsffn_hybrid_free, and plans what of
// them goes there. `bytes` of its memory are used at most; where it does not have them, less, and `share` says how
// much. hot: as for tsffn_plan_make. NULL with one line in `error` where it cannot be used.
struct tsffn_hybrid * tsffn_hybrid_open(int device, const struct tsffn_layer * layers, int64_t n_layer, size_t bytes,
                                        const int32_t * hot, struct tsffn_hybrid_counter counter,
                                        struct tsffn_gpu_share * share, char * error, size_t error_size);
void tsffn_hybrid_free(struct tsffn_hybrid * hybrid);

// Copies a layer's share there, if it has one; once for each layer. False with one line in `error`.
bool tsffn_hybrid_upload(struct tsffn_hybrid * hybrid, int64_t layer, char * error, size_t error_size);
// Neurons of an FFN that the GPU has, at its front.
int64_t tsffn_hybrid_neurons(const struct tsffn_hybrid * hybrid, int64_t layer, int64_t ffn);
// Bytes of a layer's share.
size_t tsffn_hybrid_layer_bytes(const struct tsffn_hybrid * hybrid, int64_t layer);

// Whether the GPU takes part in a call of a layer: in sparse ones.
bool tsffn_hybrid_takes(const struct tsffn_hybrid * hybrid, int64_t layer, const struct tsffn_call * call);

// What the GPU did in a call; its neurons and bytes are counted in tsffn_counts, too.
struct tsffn_hybrid_counts {
    bool took_part; // else it failed, and the CPU computed all
    uint64_t neurons, active, bytes;
    uint64_t bytes_streamed; // copied there for this call
    uint64_t ns_gpu;         // in which it computed,
    uint64_t ns_predictor;   // and of that the predictor
    uint64_t ns_waiting;     // of the caller: for it, and to tell it what to do
};

// The CPU's part of the work.
struct tsffn_hybrid_host {
    const struct tsffn_device * device;
    void * scratch;
    const void * prepared;
};

// Computes a call that the GPU takes part in, and in which nobody wants h; one at a time. False: out of memory.
bool tsffn_hybrid_compute(struct tsffn_hybrid * hybrid, int64_t layer, const struct tsffn_hybrid_host * host,
                          const struct tsffn_call * call, struct tsffn_counts * counts,
                          struct tsffn_hybrid_counts * gpu);

// Calls whose x and y are in the GPU's memory, because another library computes there what is around them. They are
// taken where the GPU has the layer's predictor, and has been compared.
bool tsffn_hybrid_takes_resident(const struct tsffn_hybrid * hybrid, int64_t layer, const struct tsffn_call * call);
// Computes one. y is there after resident->done; this returns before. False: the GPU failed, and nothing is written; or
// out of memory.
bool tsffn_hybrid_compute_resident(struct tsffn_hybrid * hybrid, int64_t layer, const struct tsffn_hybrid_host * host,
                                   const struct tsffn_call * call, const struct tsffn_cuda_resident * resident,
                                   struct tsffn_counts * counts);
// Copies what is in the GPU's memory after an event, and waits for it. False: the GPU failed.
bool tsffn_hybrid_fetch(struct tsffn_hybrid * hybrid, void * ready, const void * from, void * to, size_t bytes);
// Waits for the last of these calls. False: it failed, or one before it did, and what came of it is worthless.
bool tsffn_hybrid_finish(struct tsffn_hybrid * hybrid);

// The line that says why the GPU does not compute any more, once; NULL: it does, or that was said.
const char * tsffn_hybrid_complaint(struct tsffn_hybrid * hybrid);

#endif
