// Preloaded into a program of llama.cpp that has no --override-kv (llama-bench): models are loaded as the architecture
// "llama", as --override-kv general.architecture=str:llama does elsewhere.
#define _GNU_SOURCE // RTLD_NEXT
#include "llama.h"

#include <dlfcn.h>
#include <stdlib.h>

static const struct llama_model_kv_override overrides[] = {
    {.tag = LLAMA_KV_OVERRIDE_TYPE_STR, .key = "general.architecture", .val_str = "llama"},
    {.key = ""}, // the end
};

struct llama_model_params llama_model_default_params(void) {
    typedef struct llama_model_params (*function)(void);
    void * next = dlsym(RTLD_NEXT, "llama_model_default_params");
    if (next == NULL) {
        abort(); // not a program of llama.cpp
    }
    struct llama_model_params params = (*(function *)&next)();
    params.kv_overrides = overrides;
    return params;
}
