// libggml-tsffn.so: a ggml backend that computes the dReLU FFNs of tsconv's models sparsely.
//
// It is loaded with ggml_backend_load() (or GGML_BACKEND_PATH) and takes the FFN weights of a model that was opened
// here and armed while llama.cpp loads the file:
//
//     struct tsffn_model * model = tsffn_model_open(path, sidecar, "predictor", error, sizeof(error));
//     tsffn_model_arm(model);
//     ... llama_model_load_from_file(path) with general.architecture overridden to "llama" ...
//     tsffn_model_arm(NULL);
//
// A program that cannot call these functions (llama-server, llama-bench) names the model in the environment instead:
// TSFFN_MODEL=path, and optionally TSFFN_PREDICTOR=path and TSFFN_SPARSITY, as tsffn_model_open takes it.
#ifndef TSFFN_H
#define TSFFN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TSFFN_API __attribute__((visibility("default")))

// Limits of the file format (docs/format.md).
#define TSFFN_MODEL_VERSION 2   // newest turbosparse.format_version of a model,
#define TSFFN_SIDECAR_VERSION 4 // and of a sidecar;
#define TSFFN_Q3_NL_VERSION 3   // that of a sidecar with a matrix of q3_nl,
#define TSFFN_FORM_VERSION 4    // and with a form, or with thresholds of neurons
#define TSFFN_MAX_LAYERS 512
#define TSFFN_MAX_EXPERTS 1024
#define TSFFN_MAX_DIM (1 << 20)
#define TSFFN_MAX_CONTEXT (1 << 24)

// Functions that take a model accept NULL: they do nothing then, and return false, 0 or NULL. So they do for NULL
// instead of an array or struct that they fill.
struct tsffn_model;

// Checks that the running ggml is the one this library was built for: version, tensor size, operation numbers.
// Returns false and writes one line to `error` when it is not.
TSFFN_API bool tsffn_check_abi(char * error, size_t error_size);

// Opens a model file and, in predictor mode, its sidecar (sidecar_path NULL: NAME.predictor.gguf beside NAME.gguf), and
// checks both completely: keys, shapes, sizes, that they are a pair. Only headers are read. `sparsity` says which
// neurons a token computes:
//
//     predictor    those of the checkpoint's own mask
//     predictor:D  those, with D added to the threshold that the predictor's logits must pass
//     exact        all; what is not zero adds to the output
//     dense        all, and every weight is read and multiplied: a baseline
//     topk:S       gate and up of all; of each token and expert the share S with the smallest |f(gate) * g(up)| is
//                  dropped, 0 <= S < 1 (src/ffn/topk.h)
//     NULL         predictor where the model names one, else exact
//
// Returns NULL and writes one line to `error` that names file, tensor, expected and found, and the remedy.
TSFFN_API struct tsffn_model * tsffn_model_open(const char * model_path, const char * sidecar_path,
                                                const char * sparsity, char * error, size_t error_size);

// Drops the caller's reference. Weight buffers hold their own: the memory goes when the last of them is freed.
TSFFN_API void tsffn_model_close(struct tsffn_model * model);

// The model whose FFN weights the backend claims from now on in loads of the calling thread, NULL for none. While a
// model is armed, a context is refused (llama.cpp: "failed to initialize TSFFN backend") unless all of its FFN weights
// are in buffers of this backend: another device would compute them as SwiGLU.
TSFFN_API void tsffn_model_arm(struct tsffn_model * model);

// Bytes of the model file.
TSFFN_API uint64_t tsffn_model_file_bytes(const struct tsffn_model * model);
// Brings bytes [offset, offset + size) of the model file into the page cache, in huge pages where the file system has
// them. Does nothing to what is there already, or behind the file's end. offset: a multiple of the page size. To be
// called before llama.cpp loads the model, piece by piece, where the file fits in memory. Returns 0 or an errno.
TSFFN_API int tsffn_model_cache(const struct tsffn_model * model, uint64_t offset, uint64_t size);

// Models larger than memory: neurons are read from the file when they are needed, and those that are used most often
// are kept in `bytes` of memory. To be called once, before llama.cpp loads the model. The predictors are read into
// memory now and stay there. Where the bytes are too few it returns false and writes one line to `error`.
TSFFN_API bool tsffn_model_stream(struct tsffn_model * model, uint64_t bytes, char * error, size_t error_size);
// The model file as a stdio stream (FILE *) for llama_model_load_from_file_ptr with LLAMA_LOAD_MODE_NONE, which reads
// nothing of what tsffn_model_stream keeps from being loaded: the FFN weights, but for the first bytes of each tensor,
// are passed over. The caller closes it. NULL without memory.
TSFFN_API void * tsffn_model_file(struct tsffn_model * model);
// Reads neurons of each FFN, the first ones, into what tsffn_model_stream has kept for them, about `bytes` more in this
// call. *filled: bytes that are there now, of *room; a call that changes nothing is the last. False with one line in
// `error` where the file cannot be read, or without tsffn_model_stream.
TSFFN_API bool tsffn_model_fill(struct tsffn_model * model, uint64_t bytes, uint64_t * filled, uint64_t * room,
                                char * error, size_t error_size);
// How it reads: "io_uring", or "threads" where the system does not allow that; NULL without tsffn_model_stream.
TSFFN_API const char * tsffn_model_reads(const struct tsffn_model * model);
// How it would read on this machine.
TSFFN_API const char * tsffn_reads(void);

// A GPU beside the CPU: it has predictors and the first neurons of each FFN, and computes them while the CPU computes
// the others. The module that drives it is libtsffn-cuda.so beside this library, or the file that TSFFN_CUDA_MODULE
// names; "off" means none.
struct tsffn_gpu_share {
    char name[128];         // of the GPU
    int32_t capability;     // 10 * major + minor
    int32_t predictors;     // layers whose predictor it has,
    int32_t n_predictors;   // of so many
    uint64_t neurons;       // that it has,
    uint64_t n_neurons;     // of so many
    uint64_t bytes;         // of its memory: these, and what a call takes
    int32_t prefill_tokens; // of a prompt, that it takes part in at once; 0: the CPU computes prompts alone
};
struct tsffn_gpu {
    char name[128];
    int32_t capability;
    uint64_t free_bytes, total_bytes;
};
// How many GPUs the module finds. 0 with one line in `error`: no module, no driver, or one that is too old.
TSFFN_API int32_t tsffn_gpus(char * error, size_t error_size);
TSFFN_API bool tsffn_gpu(int32_t number, struct tsffn_gpu * gpu, char * error, size_t error_size);
// Decides what GPU number `gpu` takes of a model that llama.cpp has loaded: at most `bytes` of memory. Where it has
// less, it takes less. Predictors come first, then neurons, of each FFN the same share of the first hot[n_layer][n_ffn]
// (n_hot numbers in all; NULL: of all). Once for each load. False with one line in `error` where it takes nothing.
TSFFN_API bool tsffn_model_gpu(struct tsffn_model * model, int32_t gpu, uint64_t bytes, const int32_t * hot,
                               size_t n_hot, struct tsffn_gpu_share * share, char * error, size_t error_size);
// Before llama.cpp makes a context: its ggml device of this name ("CUDA0") is the GPU that will have a share. Where the
// environment variable TSFFN_CUDA_SHARE is 1, x and y of the FFNs stay in its memory then, as far as llama.cpp computes
// what is around them there. NULL: they do not. False: the name is too long.
TSFFN_API bool tsffn_model_gpu_memory(struct tsffn_model * model, const char * device);
// Copies the share of one more layer there. *copied: bytes that are there now, of *bytes. When all are, the GPU
// computes with the next call. False with one line in `error`: the GPU takes nothing then.
TSFFN_API bool tsffn_model_gpu_upload(struct tsffn_model * model, uint64_t * copied, uint64_t * bytes, char * error,
                                      size_t error_size);

// What the model was opened with: never NULL for a model.
TSFFN_API const char * tsffn_model_sparsity(const struct tsffn_model * model);
TSFFN_API int32_t tsffn_model_n_layer(const struct tsffn_model * model);

// Counters of one layer since the model was opened or tsffn_model_reset_stats was called. Neurons are counted per token
// (and routed expert), bytes are bytes of weights.
struct tsffn_layer_stats {
    uint64_t calls;           // times the FFN was computed, fused
    uint64_t rows;            // tokens, times the routed experts of each
    uint64_t neurons;         // n_ff per row
    uint64_t predicted;       // neurons the predictor let through (all without one)
    uint64_t gate_positive;   // of these, gate > 0
    uint64_t active;          // of these, up > 0 (and kept, with topk)
    uint64_t bytes_predictor; // read by the predictor
    uint64_t bytes_ffn;       // read of gate, up and down
    uint64_t bytes_dense;     // what a dense FFN would have read
    uint64_t ns_predictor;
    uint64_t ns_ffn;
    uint64_t single_ops;   // operations computed alone because the graph was cut between them
    uint64_t ns_attention; // from the end of the FFN of the layer before to the start of this one, in the same graph:
                           // what llama.cpp computes in between (norms, attention, router). 0 for layer 0
    // Of a model whose neurons are read from disk (tsffn_model_stream).
    uint64_t needed;     // neurons, each once for a tile of up to 64 rows
    uint64_t missing;    // of these, not in memory,
    uint64_t ahead;      // of which so many were read ahead, while the layer before was computed
    uint64_t in_vain;    // neurons that were read ahead and not needed
    uint64_t reads;      // of the disk
    uint64_t bytes_disk; // that these read
    uint64_t ns_disk;    // in which a thread waited for them
    // Of a model that a GPU shares (tsffn_model_gpu).
    uint64_t gpu_calls;        // of `calls`, those that it took part in
    uint64_t gpu_neurons;      // of `neurons`, those that it computed,
    uint64_t gpu_active;       // and of `active`
    uint64_t gpu_bytes;        // of bytes_predictor and bytes_ffn, what it read of its memory
    uint64_t gpu_streamed;     // bytes of neurons that were copied there for a call
    uint64_t ns_gpu;           // in which it computed,
    uint64_t ns_gpu_predictor; // and of that the predictor
    uint64_t ns_gpu_wait;      // in which the CPU did not: it waited, or told the GPU what to do
};
TSFFN_API bool tsffn_model_stats(const struct tsffn_model * model, int32_t layer, struct tsffn_layer_stats * stats);
TSFFN_API void tsffn_model_reset_stats(struct tsffn_model * model);

// Activation statistics. While they are on, gate and up are computed for every neuron, so that what the predictor
// misses is seen too; the output stays the model's.
#define TSFFN_N_COUNTS 6     // gate > 0, up > 0, both (active), predicted, predicted and gate > 0, predicted and active
#define TSFFN_N_HISTOGRAMS 3 // |gate . x|, |up . x|, relu(gate . x) * relu(up . x), over all neurons
#define TSFFN_N_BINS 130     // below 2^-20 (and 0); four to an octave up to 2^12, linear within it; the rest
#define TSFFN_N_SQUARES 2    // sums of (relu(gate . x) * relu(up . x))^2: of all tokens, of those not predicted
// Begins counting from 0, or stops and drops the counts. Call it while nothing computes. False: out of memory, no
// model, or one that was opened with topk.
TSFFN_API bool tsffn_model_profile(struct tsffn_model * model, bool on);
// Copies the counts of one layer: tokens [n_ffn] that each FFN (expert) saw, neurons [TSFFN_N_COUNTS][n_ffn][n_ff],
// histograms [TSFFN_N_HISTOGRAMS][TSFFN_N_BINS]. False when counting is off or there is no such layer.
TSFFN_API bool tsffn_model_read_profile(const struct tsffn_model * model, int32_t layer, uint64_t * tokens,
                                        uint64_t * neurons, uint64_t * histograms);
// The same for squares [TSFFN_N_SQUARES][n_ffn][n_ff].
TSFFN_API bool tsffn_model_read_squares(const struct tsffn_model * model, int32_t layer, double * squares);

// Recording of activations. `record` is called by the thread that computes, each time an FFN of a layer in [first, end)
// has been computed as a whole, on the CPU. What it is given is valid during the call. Where it returns false, nothing
// more of the batch is computed: llama_decode returns 2, and the tokens have not been added to the context. NULL
// instead of `record` ends it. Call this while nothing computes. False: no model, or no such layers.
struct tsffn_activations {
    int32_t layer;
    int64_t n_rows;       // tokens, times the routed experts of each, sorted by expert
    int64_t n_embd, n_ff; //
    const int32_t * ffn;  // [n_rows] the expert, 0 in a dense layer
    const float * x;      // [n_rows][n_embd] what goes into gate and up
    const float * h;      // [n_rows][n_ff] relu(gate . x) * relu(up . x), 0 where the neuron was left out
};
typedef bool (*tsffn_record_fn)(const struct tsffn_activations * activations, void * user);
TSFFN_API bool tsffn_model_record(struct tsffn_model * model, int32_t first, int32_t end, tsffn_record_fn record,
                                  void * user);

// Bytes that this process can come to use without swapping: MemAvailable, and what is left in each of its control
// groups (v1 and v2). Page cache counts as free. proc: where the proc file system is, NULL for /proc. 0: not known.
// tsconv/machine/limits.py says the same in Python.
TSFFN_API uint64_t tsffn_available_memory(const char * proc);

// Measuring this machine. Both return false for arguments that make no sense, and when OpenMP grants fewer threads.
//
// Reads one row of every `every` consecutive ones of memory [n_rows][row_bytes], in ascending order, each thread an
// equal contiguous share, rows asked for 4 KB ahead: every = 1 reads all of it, every = 10 is an FFN at a tenth of its
// neurons. Which row of the `every` is random but fixed; another `pass` (below `every`) reads others. row_bytes is a
// multiple of 8, memory aligned to it. `seconds` is wall time, `sum` the sum of all 64-bit words read, modulo 2^64.
TSFFN_API bool tsffn_measure_rows(const void * memory, size_t n_rows, size_t row_bytes, size_t every, uint64_t pass,
                                  int n_threads, double * seconds, uint64_t * sum);
// Q4_0 rows of 4096 weights multiplied per second by n_threads threads, out of the caches, for min_seconds (at most
// 60).
TSFFN_API bool tsffn_measure_compute(int n_threads, double min_seconds, double * rows_per_second);

// What tsffn_model_place does with the pages of a loaded model.
enum tsffn_place_flags {
    TSFFN_PLACE_PREFAULT = 1,    // the hot neurons and the sidecar: into this process, from disk where need be
    TSFFN_PLACE_LOCK = 2,        // the same: into RAM until the model is freed, as far as the system allows
    TSFFN_PLACE_RANDOM_REST = 4, // the other neurons: no read-ahead
};

// What it did, in bytes of whole pages. An errno is 0 when nothing failed.
struct tsffn_placed {
    uint64_t ffn;              // gate, up and down weights of the model (not of whole pages)
    uint64_t hot;              // of them, the pages of the hot neurons
    uint64_t hot_resident;     // of these, in this process's memory afterwards
    uint64_t hot_locked;       // of these, locked in RAM
    uint64_t sidecar;          // the predictor sidecar; 0 in exact mode
    uint64_t sidecar_resident; //
    uint64_t sidecar_locked;   //
    uint64_t random;           // pages without read-ahead
    int32_t prefault_errno;    // the first failure of each kind
    int32_t lock_errno;        // ENOMEM: RLIMIT_MEMLOCK, or too many mappings (vm.max_map_count)
    int32_t advice_errno;      //
};

// Decides where the memory of a model that llama.cpp has loaded is: `hot` [n_layer][n_ffn] says how many neurons at the
// front of each FFN belong in RAM (n_ffn: experts, 1 for a dense model; n_hot numbers in all). Their gate, up and down
// rows and the whole sidecar are treated as `flags` (tsffn_place_flags) say. When the limit does not allow to lock all
// of it, what is locked is the sidecar, which every token reads, and then an equal share of every FFN's front. Replaces
// what an earlier call did; ends when the model is freed. Returns false and writes one line to `error` when a number is
// out of range or missing, when the weights are not loaded, or without memory.
TSFFN_API bool tsffn_model_place(struct tsffn_model * model, const int32_t * hot, size_t n_hot, uint32_t flags,
                                 struct tsffn_placed * placed, char * error, size_t error_size);

// A llama_context_params.cb_eval that ends the graph before the output matrix: layers are computed, logits are not.
// `tensor` is a struct ggml_tensor.
TSFFN_API bool tsffn_stop_before_output(const void * tensor, bool ask, void * user_data);

// Rounds a predictor's second matrix to q3_nl (docs/format.md): w [n_rows][n_cols], n_cols a multiple of 32 of at most
// 2^17, to n_rows plain rows, one behind the other. importance[k] >= 0 is the mean of activation k, up to a common
// factor; d[i], as f16, the unit of row i, of which its weights can be at most 7 * 15; a row with d = 0 becomes zeros.
// False: out of memory, or arguments that make no sense.
TSFFN_API bool tsffn_quantize_q3_nl(const float * w, int64_t n_rows, int64_t n_cols, const float * importance,
                                    const uint16_t * d, uint8_t * rows);

// The ISA tier in use: "ref", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512popcnt", "amx"; "neon", "neondot". It
// is the best one of this machine, or, when the environment variable TSFFN_ISA names one, the best one up to that; the
// same as long as the process lives.
TSFFN_API const char * tsffn_isa_name(void);

// The ggml version this library was built for.
TSFFN_API const char * tsffn_ggml_version(void);

#ifdef __cplusplus
}
#endif

#endif
