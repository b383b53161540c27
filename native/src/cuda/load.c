#include "load.h"

#include "../error.h"

#include <dlfcn.h>

const struct tsffn_cuda_module * tsffn_cuda_load(const char * path, char * error, size_t error_size) {
    void * library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        tsffn_fail(error, error_size, "CUDA module: %s", dlerror());
        return NULL;
    }
    tsffn_cuda_module_fn get;
    *(void **)&get = dlsym(library, TSFFN_CUDA_MODULE);
    const struct tsffn_cuda_module * module = get != NULL ? get() : NULL;
    if (module == NULL) {
        tsffn_fail(error, error_size, "CUDA module: %s: expected a function %s, found none", path, TSFFN_CUDA_MODULE);
        return NULL;
    }
    if (module->version != TSFFN_CUDA_VERSION) {
        tsffn_fail(error, error_size, "CUDA module: %s: expected version %d, found %d: reinstall tsconv", path,
                   TSFFN_CUDA_VERSION, module->version);
        return NULL;
    }
    return module;
}
