#include "llama_keys.h"

#include "tsffn.h"

#include <stdlib.h>
#include <string.h>

static bool check_u32(const struct tsffn_gguf * file, const char * key, uint32_t limit) {
    uint32_t found;
    if (!tsffn_gguf_u32(file, key, &found)) {
        return false;
    }
    if (found == 0 || found > limit) {
        return tsffn_fail(file->error, file->error_size, "%s: key %s: expected 1 to %u, found %u; convert again",
                          file->path, key, limit, found);
    }
    return true;
}

// ggml_rms_norm wants eps >= 0.
static bool check_epsilon(const struct tsffn_gguf * file) {
    static const char key[] = "llama.attention.layer_norm_rms_epsilon";
    float found;
    if (!tsffn_gguf_f32(file, key, &found)) {
        return false;
    }
    if (!(found >= 0.0f && found < 1.0f)) {
        return tsffn_fail(file->error, file->error_size, "%s: key %s: expected 0 to 1, found %g; convert again",
                          file->path, key, (double)found);
    }
    return true;
}

static int compare(const void * a, const void * b) {
    return strcmp(*(const char * const *)a, *(const char * const *)b);
}

// llama_vocab::impl::load wants every token's text to be another.
static bool check_tokens(const struct tsffn_gguf * file) {
    static const char key[] = "tokenizer.ggml.tokens";
    size_t n;
    const char ** tokens = tsffn_gguf_strings(file, key, &n);
    if (tokens == NULL) {
        return false;
    }
    qsort(tokens, n, sizeof(*tokens), compare);
    bool ok = true;
    for (size_t i = 1; ok && i < n; ++i) {
        if (strcmp(tokens[i - 1], tokens[i]) == 0) {
            ok = tsffn_fail(file->error, file->error_size,
                            "%s: key %s: expected every token once, found '%.64s' twice; convert again", file->path,
                            key, tokens[i]);
        }
    }
    free(tokens);
    return ok;
}

bool tsffn_check_llama_keys(const struct tsffn_gguf * file, int64_t n_expert) {
    return check_u32(file, "llama.context_length", TSFFN_MAX_CONTEXT) && check_epsilon(file) &&
           (n_expert == 0 || check_u32(file, "llama.expert_used_count", (uint32_t)n_expert)) &&
           tsffn_gguf_expect(file, "tokenizer.ggml.model", "llama") && check_tokens(file);
}
