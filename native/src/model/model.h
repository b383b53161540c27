// An opened model: what its file promises, the mapped predictor sidecar, and the counters.
#ifndef TSFFN_MODEL_H
#define TSFFN_MODEL_H

#include "../ffn/device.h"
#include "sparsity.h"
#include "tsffn.h"

#include <pthread.h>
#include <stdatomic.h>

// The predictor of one layer, or of one expert of it, as in ffn/layer.h; nothing in exact mode.
struct tsffn_predictor {
    struct tsffn_weights fc1, fc2, fc3;
    const float * thresholds;
};

struct tsffn_region;

struct tsffn_neuron_cache;

struct tsffn_loaded;

// What llama.cpp was told when it loaded the model last: it asks where each weight may go before it loads any.
struct tsffn_load {
    int64_t number;               // of loads so far
    bool is_ours;                 // it is the model's file that is loaded, as far as can be told
    char other[256];              // else: the path of another model of tsconv that may be; empty for none
    bool * claimed;               // [n_layer][TSFFN_N_PARTS] FFN tensors that this backend takes
    struct tsffn_loaded * loaded; // the weights that came of it; NULL before the first, and when they are gone
};

struct tsffn_model {
    atomic_int references;
    const struct tsffn_device * computes;
    struct tsffn_sparsity sparsity;
    int64_t keep; // neurons of a row that add to its output: of top-k, else 0
    struct tsffn_activation activation;
    int64_t n_layer, n_embd, n_ff;
    int64_t n_expert;                  // 0 for a dense model
    bool hot_first;                    // the neurons are not in the order of the checkpoint
    bool bundled;                      // gate, up and down of a layer are one matrix of bundles in three pieces
    char * path;                       // of the model file, for messages
    int fd;                            // the file that was checked
    uint64_t file_bytes;               //
    uint64_t device, inode;            //
    uint64_t * ffn_offset;             // [n_layer][TSFFN_N_PARTS] where gate, up and down begin in it,
    size_t * ffn_row_bytes;            // and how long their rows are
    struct tsffn_neuron_cache * cache; // what neurons are read into; NULL where all are in memory, or mapped
    void * sidecar;                    // the file, mapped or read; NULL in exact mode
    size_t sidecar_size;
    int sidecar_fd;
    struct tsffn_predictor * predictors; // [n_layer][max(1, n_expert)]
    enum tsffn_predictor_form form;      // of all predictors
    int input_bits;                      // of what they are multiplied with, for weights of bits1 and bits2
    const float ** pred_scale;           // [n_layer] -> [n_embd] or NULL
    float * threshold;                   // [n_layer]
    bool on_when_equal;
    pthread_mutex_t residency_mutex; // held while pages are asked for, and while buffers come and go
    struct tsffn_region * regions;   // those with weights
    struct tsffn_load load;          // the last one; guarded by residency_mutex
    char resident_on[64];            // the ggml device in whose memory x and y of FFNs stay; empty: in the host's
    bool armed_for_process;          // by TSFFN_MODEL: a load of any file may be going on
    pthread_mutex_t stats_mutex;
    struct tsffn_layer_stats * stats; // [n_layer]
    pthread_mutex_t profile_mutex;    // held while a call adds to the profile
    uint64_t * profile;               // [n_layer][profile_per_layer], see profile.c; NULL when it is off
    size_t profile_per_layer;
    struct {
        int32_t first, end; // layers
        tsffn_record_fn record;
        void * user;
    } recording; // changes only while nothing computes
};

struct tsffn_model * tsffn_model_retain(struct tsffn_model * model);

// The model that this thread armed, or else the one of TSFFN_MODEL; NULL for none.
struct tsffn_model * tsffn_model_armed(void);
// Arms the model of TSFFN_MODEL, for all threads that arm none of their own and until the process ends. Call it once,
// before anything is loaded.
void tsffn_model_arm_for_process(struct tsffn_model * model);

// Adds one fused computation of `rows` rows to the counters of `layer`, and the time since that of the layer before.
void tsffn_model_count(struct tsffn_model * model, int64_t layer, int64_t rows, uint64_t ns_attention,
                       const struct tsffn_counts * counts);
// Adds what a GPU did of one computation; and that and what it counted, which came later than the rest (a struct
// tsffn_hybrid_counter, whose context is the model).
struct tsffn_hybrid_counts;
void tsffn_model_count_late(void * model, int64_t layer, const struct tsffn_counts * counts,
                            const struct tsffn_hybrid_counts * gpu);
void tsffn_model_count_gpu(struct tsffn_model * model, int64_t layer, const struct tsffn_hybrid_counts * counts);
// Adds one operation that was computed alone.
void tsffn_model_count_single(struct tsffn_model * model, int64_t layer);

// When activation statistics are on: where those of `layer` go, and true with the lock held until
// tsffn_model_unlock_profile.
bool tsffn_model_lock_profile(struct tsffn_model * model, int64_t layer, struct tsffn_profile * profile);
void tsffn_model_unlock_profile(struct tsffn_model * model);

// Whether activations of a layer are to be recorded.
static inline bool tsffn_model_records(const struct tsffn_model * model, int64_t layer) {
    return model->recording.record != NULL && layer >= model->recording.first && layer < model->recording.end;
}

// Adds what the neurons of one computation cost that were not in memory.
struct tsffn_cache_counts;
void tsffn_model_count_reads(struct tsffn_model * model, int64_t layer, const struct tsffn_cache_counts * counts);

static inline int64_t tsffn_model_ffns_per_layer(const struct tsffn_model * model) {
    return model->n_expert > 0 ? model->n_expert : 1;
}

#endif
