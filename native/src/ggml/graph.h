// Recognition of FFN operations in ggml graphs, and their computation.
#ifndef TSFFN_GRAPH_H
#define TSFFN_GRAPH_H

#include "buffer.h"
#include "record.h"
#include "resident.h"

// The context of one backend instance (one llama_context): its threads and its scratch memory.
struct tsffn_stream {
    int n_threads;
    const struct tsffn_device * device; // of the models that are computed; NULL before the first
    void * scratch;                     // of the device
    struct tsffn_resident * resident;   // what goes in and out is in a GPU's memory; NULL: in the host's
    struct tsffn_hybrid * hybrid;       // that computed there last
    bool is_lost;                       // what it computed, as was seen when the graph had ended
    struct tsffn_row * rows;            // [n_rows]
    int64_t n_rows;
    struct tsffn_recorder recorder;
    int64_t next_layer; // the one after that whose FFN was computed last as a whole; 0: none was
    uint64_t last_end_ns;
};

// True for MUL_MAT and MUL_MAT_ID with an FFN weight of an opened model, and for the SWIGLU between them.
bool tsffn_supports_op(const tsffn_tensor * op);

// Waits for what was begun. False: it failed.
bool tsffn_finish_graph(struct tsffn_stream * stream);

enum ggml_status tsffn_compute_graph(struct tsffn_stream * stream, struct ggml_cgraph * graph);

#endif
