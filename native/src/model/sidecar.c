#define _DEFAULT_SOURCE // madvise
#include "sidecar.h"

#include "predictors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// Refuses a model where its sidecar should be, with more help than the key's value gives.
static bool check_is_sidecar(const struct tsffn_gguf * file, const char * model_path) {
    const char * type;
    if (!tsffn_gguf_string(file, "general.type", &type)) {
        return false;
    }
    if (strcmp(type, "model") == 0) {
        return tsffn_fail(
            file->error, file->error_size,
            "%s: is a model: expected its predictor sidecar; use the NAME.predictor.gguf that was written "
            "with %s",
            file->path, model_path);
    }
    return tsffn_gguf_expect(file, "general.type", "predictor");
}

static bool check_pair(const struct tsffn_gguf * sidecar, const char * model_path, const struct tsffn_model * model,
                       const struct tsffn_identity * id) {
    struct tsffn_identity own;
    struct tsffn_model shape;
    memset(&shape, 0, sizeof(shape));
    if (!tsffn_check_format(sidecar, TSFFN_SIDECAR_VERSION) || !check_is_sidecar(sidecar, model_path) ||
        !tsffn_read_pair_id(sidecar, &own) ||
        !tsffn_copy_string(sidecar, "turbosparse.neuron_order", own.order, sizeof(own.order)) ||
        !tsffn_read_shape(sidecar, &shape)) {
        return false;
    }
    if (strcmp(own.pair_id, id->pair_id) != 0) {
        return tsffn_fail(
            sidecar->error, sidecar->error_size,
            "%s: is the sidecar of another model than %s: expected pair_id %s, found %s; use the two files "
            "that one conversion wrote",
            sidecar->path, model_path, id->pair_id, own.pair_id);
    }
    if (strcmp(own.order, id->order) != 0) {
        return tsffn_fail(sidecar->error, sidecar->error_size,
                          "%s: other neuron order than %s: expected %s, found %s; reorder both files together",
                          sidecar->path, model_path, id->order, own.order);
    }
    if (shape.n_layer != model->n_layer || shape.n_embd != model->n_embd || shape.n_ff != model->n_ff ||
        shape.n_expert != model->n_expert) {
        return tsffn_fail(sidecar->error, sidecar->error_size,
                          "%s: other shape than %s: expected %" PRId64 " layers, n_embd %" PRId64 ", n_ff %" PRId64
                          ", %" PRId64 " experts, found %" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                          "; convert again",
                          sidecar->path, model_path, model->n_layer, model->n_embd, model->n_ff, model->n_expert,
                          shape.n_layer, shape.n_embd, shape.n_ff, shape.n_expert);
    }
    return true;
}

static bool map_sidecar(const struct tsffn_gguf * file, struct tsffn_model * model) {
    void * memory = mmap(NULL, file->file_size, PROT_READ, MAP_SHARED, file->fd, 0);
    if (memory == MAP_FAILED) {
        return tsffn_fail(file->error, file->error_size, "%s: cannot be mapped: %s", file->path, strerror(errno));
    }
    madvise(memory, file->file_size, MADV_HUGEPAGE); // all of it is read for every token
    model->sidecar = memory;
    model->sidecar_size = file->file_size;
    return true;
}

// NAME.predictor.gguf beside NAME.gguf.
static bool default_sidecar_path(const char * model_path, char * out, size_t size) {
    const char suffix[] = ".gguf";
    const size_t length = strlen(model_path);
    const size_t stem = length >= strlen(suffix) && strcmp(model_path + length - strlen(suffix), suffix) == 0
                            ? length - strlen(suffix)
                            : length;
    return snprintf(out, size, "%.*s.predictor.gguf", (int)stem, model_path) < (int)size;
}

bool tsffn_has_sidecar_beside(const char * model_path) {
    char beside[PATH_MAX];
    return default_sidecar_path(model_path, beside, sizeof(beside)) && access(beside, F_OK) == 0;
}

bool tsffn_load_sidecar(struct tsffn_model * model, const char * model_path, const char * sidecar_path,
                        const struct tsffn_identity * id, char * error, size_t error_size) {
    char beside[PATH_MAX];
    if (sidecar_path == NULL) {
        if (!default_sidecar_path(model_path, beside, sizeof(beside))) {
            return tsffn_fail(error, error_size, "%s: the path is too long", model_path);
        }
        if (access(beside, F_OK) != 0) {
            return tsffn_fail(
                error, error_size,
                "%s: the predictor sidecar is missing: expected it beside %s; put it there, name it, or run "
                "with exact sparsity",
                beside, model_path);
        }
        sidecar_path = beside;
    }
    struct tsffn_gguf file;
    if (!tsffn_gguf_open(&file, sidecar_path, error, error_size)) {
        return false;
    }
    const bool ok =
        check_pair(&file, model_path, model, id) && map_sidecar(&file, model) && tsffn_read_predictors(&file, model);
    model->sidecar_fd = tsffn_gguf_take_fd(&file);
    tsffn_gguf_close(&file);
    return ok;
}

// ---- a sidecar that stays in memory

// Bytes that begin at a huge page; NULL without memory.
static char * allocate_huge(size_t bytes) {
    enum { HUGE_PAGE = 2 << 20 };
    char * at = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        return NULL;
    }
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t before = (HUGE_PAGE - (uintptr_t)at % HUGE_PAGE) % HUGE_PAGE;
    const size_t end = (before + bytes + page - 1) / page * page;
    if (before > 0) {
        munmap(at, before);
    }
    if (end < bytes + HUGE_PAGE) {
        munmap(at + end, bytes + HUGE_PAGE - end);
    }
    madvise(at + before, bytes, MADV_HUGEPAGE);
    madvise(at + before, bytes, MADV_DONTFORK);
    return at + before;
}

// Reads a file, and leaves nothing of it in the page cache. 0 or an errno.
static int read_past_cache(int fd, char * to, size_t bytes) {
    enum { PIECE = 8 << 20 };
    for (size_t done = 0; done < bytes;) {
        const size_t left = bytes - done;
        const ssize_t n = pread(fd, to + done, left < PIECE ? left : PIECE, (off_t)done);
        if (n < 0 && errno != EINTR) {
            return errno;
        }
        if (n == 0) {
            return ENODATA;
        }
        done += n > 0 ? (size_t)n : 0;
        posix_fadvise(fd, 0, (off_t)done, POSIX_FADV_DONTNEED);
    }
    return 0;
}

// The same place in other memory; NULL stays.
static const void * moved(const void * at, const void * from, const char * to) {
    return at != NULL ? to + ((const char *)at - (const char *)from) : NULL;
}

bool tsffn_keep_sidecar(struct tsffn_model * model, char * error, size_t error_size) {
    const void * mapped = model->sidecar;
    if (mapped == NULL) {
        return true;
    }
    char * kept = allocate_huge(model->sidecar_size);
    if (kept == NULL) {
        return tsffn_fail(error, error_size, "%s: out of memory for its predictors, %zu bytes", model->path,
                          model->sidecar_size);
    }
    const int reason = read_past_cache(model->sidecar_fd, kept, model->sidecar_size);
    if (reason != 0) {
        munmap(kept, model->sidecar_size);
        return tsffn_fail(error, error_size, "%s: its predictor sidecar cannot be read: %s", model->path,
                          reason == ENODATA ? "the file is truncated" : strerror(reason));
    }
    for (int64_t i = 0; i < model->n_layer * tsffn_model_ffns_per_layer(model); ++i) {
        struct tsffn_predictor * predictor = &model->predictors[i];
        predictor->fc1.data = moved(predictor->fc1.data, mapped, kept);
        predictor->fc2.data = moved(predictor->fc2.data, mapped, kept);
        predictor->fc3.data = moved(predictor->fc3.data, mapped, kept);
        predictor->thresholds = moved(predictor->thresholds, mapped, kept);
    }
    for (int64_t layer = 0; layer < model->n_layer; ++layer) {
        model->pred_scale[layer] = moved(model->pred_scale[layer], mapped, kept);
    }
    munmap(model->sidecar, model->sidecar_size);
    model->sidecar = kept;
    return true;
}
