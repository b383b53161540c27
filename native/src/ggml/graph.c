// llama.cpp builds an FFN as  gate = MUL_MAT(W_gate, x), up = MUL_MAT(W_up, x), h = SWIGLU(gate, up), y =
// MUL_MAT(W_down, h) (MUL_MAT_ID with expert ids in src[2] for MoE). The four are computed as one sparse dReLU FFN when
// they arrive in one graph; when the scheduler cuts between them (an evaluation callback), each is computed alone, with
// the same result.
#include "graph.h"

#include "../cache/neuron_cache.h"
#include "../ffn/topk.h"
#include "../hybrid/hybrid.h"
#include "environment.h"
#include "load.h"
#include "log.h"
#include "weight.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static bool is_matmul(const tsffn_tensor * op) {
    return op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID;
}

static bool is_swiglu(const tsffn_tensor * op) {
    return op->op == GGML_OP_GLU && ggml_get_glu_op(op) == GGML_GLU_OP_SWIGLU && op->src[1] != NULL;
}

// Whether `t` is a gate product of ours, or is made of one by adding to it or scaling it (as LoRA adapters do). Such a
// SWIGLU must never fall to a backend that would really compute SiLU.
static bool comes_from_gate(const tsffn_tensor * t, struct tsffn_weight * weight) {
    while (t != NULL && (t->op == GGML_OP_ADD || t->op == GGML_OP_MUL || t->op == GGML_OP_SCALE ||
                         t->op == GGML_OP_ADD_ID || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW)) {
        t = t->src[0];
    }
    return t != NULL && is_matmul(t) && tsffn_identify(t->src[0], weight) && weight->part == TSFFN_PART_GATE;
}

bool tsffn_supports_op(const tsffn_tensor * op) {
    struct tsffn_weight weight;
    // The first weight of a load, for which llama.cpp asks an accelerator before the CPU.
    if (op->op == GGML_OP_GET_ROWS && tsffn_is_asked_for(op->src[0]) && tsffn_model_armed() != NULL &&
        strcmp(op->src[0]->name, "token_embd.weight") == 0) {
        tsffn_begin_load(tsffn_model_armed());
    }
    if (op->op == GGML_OP_NONE) {
        return tsffn_identify(op, &weight); // the weight itself: it belongs here
    }
    if (is_swiglu(op)) {
        return comes_from_gate(op->src[0], &weight) && op->type == GGML_TYPE_F32;
    }
    // Whatever its activations are: no other backend knows how the weights lie. What cannot be computed is refused
    // then.
    if (!is_matmul(op) || !tsffn_identify(op->src[0], &weight)) {
        return false;
    }
    // Activations that nothing computes: llama.cpp looks for a place for the weight.
    if (tsffn_is_asked_for(op->src[0]) && op->src[1]->op == GGML_OP_NONE) {
        tsffn_claim(&weight);
    }
    return true;
}

// Refuses a product whose activations or expert ids are not laid out as list_rows and compute read them. ggml itself
// sees to it that a token has as many rows of activations as it has experts, or one part of them.
static bool check_operands(const tsffn_tensor * op, const struct tsffn_weight * weight) {
    const tsffn_tensor * x = op->src[1];
    const tsffn_tensor * ids = op->op == GGML_OP_MUL_MAT_ID ? op->src[2] : NULL;
    const bool row_per_slot = ids != NULL && x->ne[1] != 1;
    if ((ids != NULL) == (weight->model->n_expert > 0) && x->type == GGML_TYPE_F32 && x->nb[0] == sizeof(float) &&
        x->ne[3] == 1 && (ids != NULL || x->ne[2] == 1) && (ids == NULL || ids->type == GGML_TYPE_I32) &&
        (!row_per_slot || x->nb[2] == (size_t)x->ne[1] * x->nb[1])) {
        return true;
    }
    tsffn_log_error("%s: expected contiguous f32 activations of %s, found %s [%lld, %lld, %lld, %lld]", op->name,
                    weight->model->n_expert > 0 ? "tokens and their experts" : "tokens", ggml_type_name(x->type),
                    (long long)x->ne[0], (long long)x->ne[1], (long long)x->ne[2], (long long)x->ne[3]);
    return false;
}

static bool reserve(void ** memory, int64_t * capacity, int64_t n, size_t element) {
    if (n <= *capacity) {
        return true;
    }
    void * larger = realloc(*memory, (size_t)n * element);
    if (larger == NULL) {
        return false;
    }
    *memory = larger;
    *capacity = n;
    return true;
}

// Lists the output rows of `out` (the result of a matmul with activations `x` and, for MoE, expert ids) sorted by
// expert.
static enum ggml_status list_rows(struct tsffn_stream * stream, const struct tsffn_model * model,
                                  const tsffn_tensor * x, const tsffn_tensor * ids, const tsffn_tensor * h,
                                  const tsffn_tensor * out, int64_t * n_rows) {
    const int64_t n_used = ids != NULL ? ids->ne[0] : 1;
    const int64_t n_tokens = ids != NULL ? ids->ne[1] : x->ne[1];
    *n_rows = n_used * n_tokens;
    if (!reserve((void **)&stream->rows, &stream->n_rows, *n_rows, sizeof(*stream->rows))) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    if (ids == NULL) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            stream->rows[t] = (struct tsffn_row){
                .token = (int32_t)t,
                .y = (float *)((char *)out->data + (size_t)t * out->nb[1]),
                .h = h != NULL ? (float *)((char *)h->data + (size_t)t * h->nb[1]) : NULL,
            };
        }
        return GGML_STATUS_SUCCESS;
    }
    // Counting sort, stable in (token, slot). x has one row per token, or (down) one per token and slot; in general the
    // slots of a token take its rows in turn.
    int64_t start[TSFFN_MAX_EXPERTS + 1] = {0};
    for (int pass = 0; pass < 2; ++pass) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            for (int64_t slot = 0; slot < n_used; ++slot) {
                const int32_t e =
                    *(const int32_t *)((const char *)ids->data + (size_t)t * ids->nb[1] + (size_t)slot * ids->nb[0]);
                if (e < 0 || e >= model->n_expert) {
                    tsffn_log_error("expert id %d is out of range: expected 0 to %d", e, (int)model->n_expert - 1);
                    return GGML_STATUS_FAILED;
                }
                if (pass == 0) {
                    start[e + 1] += 1;
                    continue;
                }
                const int64_t token = x->ne[1] == 1 ? t : t * x->ne[1] + slot % x->ne[1];
                char * y = (char *)out->data + (size_t)t * out->nb[2] + (size_t)slot * out->nb[1];
                char * hidden = h != NULL ? (char *)h->data + (size_t)t * h->nb[2] + (size_t)slot * h->nb[1] : NULL;
                stream->rows[start[e]++] = (struct tsffn_row){
                    .ffn = e,
                    .token = (int32_t)token,
                    .y = (float *)y,
                    .h = (float *)hidden,
                };
            }
        }
        for (int64_t e = 0; pass == 0 && e < model->n_expert; ++e) {
            start[e + 1] += start[e];
        }
    }
    return GGML_STATUS_SUCCESS;
}

// The device of the weight's model, with scratch memory for this stream. False: out of memory.
static bool open_device(struct tsffn_stream * stream, const struct tsffn_weight * weight) {
    if (stream->device == NULL) {
        stream->scratch = weight->model->computes->open();
        stream->device = stream->scratch != NULL ? weight->model->computes : NULL;
    }
    return stream->device != NULL;
}

// A call of a model whose neurons are read from disk has what is kept of them for itself.
static void begin_reading(const struct tsffn_weight * weight, struct tsffn_call * call) {
    if (weight->model->cache != NULL) {
        // What was computed of a graph that was cut, or is counted, or chosen when it is computed, tells nothing about
        // what text needs.
        const bool tells = call->op == TSFFN_OP_FUSED && call->profile == NULL && call->keep == 0;
        if (tsffn_neuron_cache_begin(weight->model->cache, weight->layer, tells ? call->n_tokens : 0)) {
            call->next = tsffn_loaded_prepared(weight + TSFFN_N_PARTS); // the weights of a load follow each other
        }
    }
}

static bool end_reading(const struct tsffn_weight * weight) {
    if (weight->model->cache == NULL) {
        return true;
    }
    struct tsffn_cache_counts reads;
    char error[1024];
    const bool ok = tsffn_neuron_cache_end(weight->model->cache, &reads, error, sizeof(error));
    tsffn_model_count_reads(weight->model, weight->layer, &reads);
    if (!ok) {
        tsffn_log_error("%s", error);
    }
    return ok;
}

static void complain(struct tsffn_hybrid * hybrid) {
    const char * complaint = tsffn_hybrid_complaint(hybrid);
    if (complaint != NULL) {
        tsffn_log_error("%s", complaint);
    }
}

// The call on the GPU and the CPU together, as far as the GPU takes part in it. False: out of memory.
static bool compute_call(struct tsffn_stream * stream, const struct tsffn_weight * weight, const void * prepared,
                         const struct tsffn_call * call, struct tsffn_counts * counts) {
    struct tsffn_hybrid * hybrid = tsffn_loaded_hybrid(weight);
    const bool records = tsffn_model_records(weight->model, weight->layer);
    if (hybrid == NULL || records || !tsffn_hybrid_takes(hybrid, weight->layer, call)) {
        return stream->device->compute(stream->scratch, prepared, call, counts);
    }
    for (int64_t r = 0; r < call->n_rows; ++r) {
        stream->rows[r].h = NULL; // who wants h has a graph that is cut behind it
    }
    const struct tsffn_hybrid_host host = {stream->device, stream->scratch, prepared};
    struct tsffn_hybrid_counts of_gpu;
    const bool computed = tsffn_hybrid_compute(hybrid, weight->layer, &host, call, counts, &of_gpu);
    complain(hybrid);
    if (of_gpu.took_part) {
        tsffn_model_count_gpu(weight->model, weight->layer, &of_gpu);
    }
    return computed;
}

// A call of `op`, without its rows.
static struct tsffn_call call_of(const struct tsffn_stream * stream, enum tsffn_op op,
                                 const struct tsffn_weight * weight, const tsffn_tensor * x, const tsffn_tensor * ids) {
    // A token's activations: dense x is [n, n_tokens], MoE x is [n, 1 or n_used, n_tokens].
    const bool row_per_slot = ids == NULL || x->ne[1] != 1;
    return (struct tsffn_call){
        .op = op,
        .n_rows = ids != NULL ? ids->ne[0] * ids->ne[1] : x->ne[1],
        .x = x->data,
        .x_stride = row_per_slot ? x->nb[1] : x->nb[2],
        .n_tokens = x->ne[1] * x->ne[2],
        .n_threads = stream->n_threads,
        .dense = weight->model->sparsity.kind == TSFFN_SPARSITY_DENSE,
        .keep = weight->model->keep,
    };
}

static void count_call(struct tsffn_stream * stream, const struct tsffn_weight * weight, const struct tsffn_call * call,
                       uint64_t start_ns, const struct tsffn_counts * counts) {
    if (call->op != TSFFN_OP_FUSED) {
        tsffn_model_count_single(weight->model, weight->layer);
        stream->next_layer = 0;
        return;
    }
    // Every graph begins at layer 0, so the layer before was computed in the same one.
    const bool follows = weight->layer > 0 && weight->layer == stream->next_layer;
    tsffn_model_count(weight->model, weight->layer, call->n_rows, follows ? start_ns - stream->last_end_ns : 0, counts);
    stream->next_layer = weight->layer + 1;
    stream->last_end_ns = now_ns();
}

// Computes the rows of `out`, and of `h` where there is one, from activations `x` with the layer of a weight. All of
// them are in the host's memory.
static enum ggml_status compute_here(struct tsffn_stream * stream, enum tsffn_op op, const struct tsffn_weight * weight,
                                     const tsffn_tensor * x, const tsffn_tensor * ids, const tsffn_tensor * h,
                                     const tsffn_tensor * out) {
    const uint64_t start_ns = now_ns();
    const void * layer = tsffn_loaded_prepared(weight);
    if (layer == NULL || !open_device(stream, weight)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    struct tsffn_call call = call_of(stream, op, weight, x, ids);
    const enum ggml_status status = list_rows(stream, weight->model, x, ids, h, out, &call.n_rows);
    if (status != GGML_STATUS_SUCCESS) {
        return status;
    }
    struct tsffn_profile profile;
    const bool profiling = op == TSFFN_OP_FUSED && tsffn_model_lock_profile(weight->model, weight->layer, &profile);
    const bool records = op == TSFFN_OP_FUSED && tsffn_model_records(weight->model, weight->layer);
    call.rows = stream->rows;
    call.profile = profiling ? &profile : NULL;
    struct tsffn_counts counts = {0};
    const bool has_room = !records || tsffn_recorder_begin(&stream->recorder, weight, stream->rows, &call);
    begin_reading(weight, &call);
    const bool computed = has_room && compute_call(stream, weight, layer, &call, &counts);
    const bool read = end_reading(weight);
    if (profiling) {
        tsffn_model_unlock_profile(weight->model);
    }
    if (!computed) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    if (!read) {
        return GGML_STATUS_FAILED;
    }
    count_call(stream, weight, &call, start_ns, &counts);
    const bool goes_on = !records || tsffn_recorder_end(&stream->recorder, weight, call.n_rows);
    return goes_on ? GGML_STATUS_SUCCESS : GGML_STATUS_ABORTED;
}

// The FFN whose x and y are in the GPU's memory, with a hybrid that takes it. False: it is not computed.
static bool compute_there(struct tsffn_stream * stream, struct tsffn_hybrid * hybrid,
                          const struct tsffn_weight * weight, const tsffn_tensor * x, const tsffn_tensor * ids,
                          const tsffn_tensor * out) {
    const uint64_t start_ns = now_ns();
    struct tsffn_resident * r = stream->resident;
    const void * layer = tsffn_loaded_prepared(weight);
    const tsffn_tensor * real_x = tsffn_resident_real(r, x);
    struct tsffn_call call = call_of(stream, TSFFN_OP_FUSED, weight, x, ids);
    call.x = real_x->data;
    if (layer == NULL || !open_device(stream, weight) || !tsffn_hybrid_takes_resident(hybrid, weight->layer, &call)) {
        return false;
    }
    stream->hybrid = hybrid; // of which something may be on its way from now on
    void * ready = tsffn_resident_ready(r);
    tsffn_tensor host_ids;
    if (ids != NULL) {
        const tsffn_tensor * real_ids = tsffn_resident_real(r, ids);
        const bool is_there = tsffn_resident_has(r, real_ids);
        if (!tsffn_resident_to_host(r, 0, ids, false, &host_ids) ||
            (is_there && !tsffn_hybrid_fetch(hybrid, ready, real_ids->data, host_ids.data, ggml_nbytes(real_ids)))) {
            return false;
        }
    }
    if (list_rows(stream, weight->model, x, ids != NULL ? &host_ids : NULL, NULL, out, &call.n_rows) !=
        GGML_STATUS_SUCCESS) {
        return false;
    }
    float * y[TSFFN_CUDA_MAX_ROWS];
    for (int64_t i = 0; i < call.n_rows; ++i) {
        y[i] = stream->rows[i].y;
    }
    call.rows = stream->rows;
    const struct tsffn_cuda_resident resident = {
        .x = call.x,
        .y = y,
        .ready = ready,
        .done = tsffn_resident_done(r),
    };
    const struct tsffn_hybrid_host host = {stream->device, stream->scratch, layer};
    struct tsffn_counts counts = {0};
    begin_reading(weight, &call);
    const bool computed = tsffn_hybrid_compute_resident(hybrid, weight->layer, &host, &call, &resident, &counts);
    if (!end_reading(weight) || !computed) {
        complain(hybrid);
        return false;
    }
    tsffn_resident_wait(r);
    count_call(stream, weight, &call, start_ns, &counts);
    return true;
}

// compute_here with tensors that may be in the GPU's memory.
static enum ggml_status compute(struct tsffn_stream * stream, enum tsffn_op op, const struct tsffn_weight * weight,
                                const tsffn_tensor * x, const tsffn_tensor * ids, const tsffn_tensor * h,
                                tsffn_tensor * out) {
    struct tsffn_resident * r = stream->resident;
    if (r == NULL) {
        return compute_here(stream, op, weight, x, ids, h, out);
    }
    struct tsffn_hybrid * hybrid = tsffn_loaded_hybrid(weight);
    const bool is_there = tsffn_resident_has(r, tsffn_resident_real(r, x)) && tsffn_resident_has(r, out);
    if (op == TSFFN_OP_FUSED && hybrid != NULL && is_there && weight->model->profile == NULL &&
        !tsffn_model_records(weight->model, weight->layer) && compute_there(stream, hybrid, weight, x, ids, out)) {
        return GGML_STATUS_SUCCESS;
    }
    tsffn_tensor host_x, host_ids, host_out;
    if (!tsffn_finish_graph(stream)) {
        return GGML_STATUS_FAILED;
    }
    if (!tsffn_resident_to_host(r, 0, x, true, &host_x) ||
        (ids != NULL && !tsffn_resident_to_host(r, 1, ids, true, &host_ids)) ||
        !tsffn_resident_to_host(r, 2, out, false, &host_out)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    // Nobody reads h of an FFN that is computed as a whole.
    const enum ggml_status status =
        compute_here(stream, op, weight, &host_x, ids != NULL ? &host_ids : NULL, NULL, &host_out);
    if (status == GGML_STATUS_SUCCESS) {
        tsffn_resident_from_host(r, &host_out, out);
    }
    return status;
}

static enum ggml_status compute_matmul(struct tsffn_stream * stream, tsffn_tensor * op) {
    static const enum tsffn_op ops[TSFFN_N_PARTS] = {
        [TSFFN_PART_GATE] = TSFFN_OP_GATE, [TSFFN_PART_UP] = TSFFN_OP_UP, [TSFFN_PART_DOWN] = TSFFN_OP_DOWN};
    const struct tsffn_weight * weight = tsffn_weight_of(op->src[0]);
    if (weight == NULL) {
        tsffn_log_error("%s: not an FFN weight of an opened model", op->src[0]->name);
        return GGML_STATUS_FAILED;
    }
    if (!tsffn_loaded_has(weight, weight->part)) {
        tsffn_log_error("%s: gate, up and down of a layer are in bundles, but not all three are in buffers of this "
                        "backend; load all FFN tensors into TSFFN, or convert with --ffn-layout rows",
                        op->src[0]->name);
        return GGML_STATUS_ALLOC_FAILED;
    }
    return check_operands(op, weight) ? compute(stream, ops[weight->part], weight, op->src[1], op->src[2], NULL, op)
                                      : GGML_STATUS_FAILED;
}

// h of gate and up, in the host's memory; the predictor's mask is already in gate, as zeros.
static enum ggml_status compute_glu_here(const tsffn_tensor * op) {
    const tsffn_tensor * gate = op->src[0];
    const tsffn_tensor * up = op->src[1];
    struct tsffn_weight weight;
    if (!comes_from_gate(gate, &weight)) {
        return GGML_STATUS_FAILED;
    }
    if (!is_matmul(gate) && weight.model->sparsity.kind == TSFFN_SPARSITY_PREDICTOR) {
        tsffn_log_error("%s: an adapter changes the gate of layer %lld, which the predictor's mask does not cover; run "
                        "with exact sparsity",
                        op->name, (long long)weight.layer);
        return GGML_STATUS_FAILED;
    }
    if ((!is_matmul(gate) || !is_matmul(up)) && weight.model->hot_first) {
        tsffn_log_error("%s: an adapter changes the FFN of layer %lld, whose neurons are in another order; use a model "
                        "that was converted without --profile",
                        op->name, (long long)weight.layer);
        return GGML_STATUS_FAILED;
    }
    const struct tsffn_activation activation = weight.model->activation;
    for (int64_t k = 0; k < op->ne[2]; ++k) {
        for (int64_t j = 0; j < op->ne[1]; ++j) {
            const float * g =
                (const float *)((const char *)gate->data + (size_t)j * gate->nb[1] + (size_t)k * gate->nb[2]);
            const float * u = (const float *)((const char *)up->data + (size_t)j * up->nb[1] + (size_t)k * up->nb[2]);
            float * h = (float *)((char *)op->data + (size_t)j * op->nb[1] + (size_t)k * op->nb[2]);
            for (int64_t i = 0; i < op->ne[0]; ++i) {
                const float by_gate = tsffn_factor_of(activation.gate, g[i]);
                const float by_up = tsffn_factor_of(activation.up, u[i]);
                h[i] = by_gate != 0.0f && by_up != 0.0f ? by_gate * by_up : 0.0f;
            }
            if (weight.model->keep > 0) {
                tsffn_keep_largest(h, op->ne[0], weight.model->keep);
            }
        }
    }
    tsffn_model_count_single(weight.model, weight.layer);
    return GGML_STATUS_SUCCESS;
}

static enum ggml_status compute_glu(struct tsffn_stream * stream, tsffn_tensor * op) {
    struct tsffn_resident * r = stream->resident;
    if (r == NULL) {
        return compute_glu_here(op);
    }
    tsffn_tensor gate, up, host;
    if (!tsffn_resident_to_host(r, 0, op->src[0], true, &gate) ||
        !tsffn_resident_to_host(r, 1, op->src[1], true, &up) || !tsffn_resident_to_host(r, 2, op, false, &host)) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    host.src[0] = &gate;
    host.src[1] = &up;
    const enum ggml_status status = compute_glu_here(&host);
    if (status == GGML_STATUS_SUCCESS) {
        tsffn_resident_from_host(r, &host, op);
    }
    return status;
}

static bool is_computed(const tsffn_tensor * node) {
    return node->op != GGML_OP_NONE && node->op != GGML_OP_RESHAPE && node->op != GGML_OP_VIEW &&
           node->op != GGML_OP_PERMUTE && node->op != GGML_OP_TRANSPOSE &&
           (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0 && !ggml_is_empty(node);
}

// Whether the four operations are one FFN whose intermediate results nobody else asks for.
static bool is_ffn(tsffn_tensor * const op[4], const struct tsffn_weight ** weight) {
    const tsffn_tensor * glu = op[2];
    const tsffn_tensor * down = op[3];
    if (!is_swiglu(glu) || !is_matmul(op[0]) || !is_matmul(op[1]) || !is_matmul(down) || down->src[1] != glu) {
        return false;
    }
    const tsffn_tensor * gate = glu->src[0];
    const tsffn_tensor * up = glu->src[1];
    if (!((gate == op[0] && up == op[1]) || (gate == op[1] && up == op[0]))) {
        return false;
    }
    const struct tsffn_weight * first = tsffn_weight_of(gate->src[0]);
    const struct tsffn_weight * second = tsffn_weight_of(up->src[0]);
    const struct tsffn_weight * third = tsffn_weight_of(down->src[0]);
    if (first == NULL || second == NULL || third == NULL) {
        return false;
    }
    // The three weights of a layer stand side by side.
    *weight = first;
    return first->part == TSFFN_PART_GATE && second == first + TSFFN_PART_UP && third == first + TSFFN_PART_DOWN &&
           gate->src[1] == up->src[1] && gate->src[2] == up->src[2] && gate->src[2] == down->src[2] &&
           ((gate->flags | up->flags | glu->flags) & GGML_TENSOR_FLAG_OUTPUT) == 0;
}

bool tsffn_finish_graph(struct tsffn_stream * stream) {
    struct tsffn_hybrid * hybrid = stream->hybrid;
    stream->hybrid = NULL;
    if (hybrid == NULL || tsffn_hybrid_finish(hybrid)) {
        return true;
    }
    complain(hybrid);
    return false;
}

enum ggml_status tsffn_compute_graph(struct tsffn_stream * stream, struct ggml_cgraph * graph) {
    if (stream->is_lost) { // the graph before this one gave no error, and its results were worthless
        stream->is_lost = false;
        tsffn_log_error("the GPU failed while the last tokens were computed: their logits are wrong");
        return GGML_STATUS_FAILED;
    }
    tsffn_share_from_environment(); // by now llama.cpp has taken what it needs of a GPU's memory
    const int n_nodes = ggml_graph_n_nodes(graph);
    int i = 0;
    while (i < n_nodes) {
        // The next four computed nodes, and where each ends.
        tsffn_tensor * op[4];
        int after[4];
        int n_ops = 0;
        for (int j = i; j < n_nodes && n_ops < 4; ++j) {
            tsffn_tensor * node = ggml_graph_node(graph, j);
            if (is_computed(node)) {
                op[n_ops] = node;
                after[n_ops] = j + 1;
                ++n_ops;
            }
        }
        if (n_ops == 0) {
            break;
        }
        const struct tsffn_weight * weight;
        enum ggml_status status;
        if (n_ops == 4 && is_ffn(op, &weight)) {
            const tsffn_tensor * gate = op[2]->src[0];
            status = check_operands(gate, weight)
                         ? compute(stream, TSFFN_OP_FUSED, weight, gate->src[1], gate->src[2], op[2], op[3])
                         : GGML_STATUS_FAILED;
            i = after[3];
        } else {
            status = is_matmul(op[0]) ? compute_matmul(stream, op[0]) : compute_glu(stream, op[0]);
            i = after[0];
        }
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
    }
    return GGML_STATUS_SUCCESS;
}

bool tsffn_stop_before_output(const void * tensor, bool ask, void * user_data) {
    (void)user_data;
    // The scheduler asks whether a node's result is wanted, and then, when it is there, whether to go on. The last node
    // before the output matrix has this name (llama.cpp, src/models/llama.cpp).
    return ask && strcmp(((const tsffn_tensor *)tensor)->name, "result_norm") == 0;
}
