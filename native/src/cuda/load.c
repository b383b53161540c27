#define _GNU_SOURCE // dladdr
#include "load.h"

#include "../error.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

// Where the module is: a file beside the one that this function is in.
static bool default_path(char * path, size_t size, char * error, size_t error_size) {
    Dl_info info;
    if (dladdr((const void *)TSFFN_CUDA_MODULE, &info) == 0 || info.dli_fname == NULL) {
        return tsffn_fail(error, error_size, "CUDA module: the folder of this library is not known");
    }
    const char * end = strrchr(info.dli_fname, '/');
    const int folder = end != NULL ? (int)(end - info.dli_fname) + 1 : 0;
    const int n = snprintf(path, size, "%.*slibtsffn-cuda.so", folder, info.dli_fname);
    if (n < 0 || (size_t)n >= size || access(path, R_OK) != 0) {
        return tsffn_fail(error, error_size,
                          "CUDA module: none: tsconv was installed where there was no CUDA compiler (nvcc)");
    }
    return true;
}

const struct tsffn_cuda_module * tsffn_cuda_module_in_use(char * error, size_t error_size) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static const struct tsffn_cuda_module * loaded;
    const char * named = getenv("TSFFN_CUDA_MODULE");
    char path[4096];
    pthread_mutex_lock(&mutex);
    if (loaded == NULL && named != NULL && strcmp(named, "off") == 0) {
        tsffn_fail(error, error_size, "CUDA module: TSFFN_CUDA_MODULE is off");
    } else if (loaded == NULL && named != NULL && named[0] != '\0') {
        loaded = tsffn_cuda_load(named, error, error_size);
    } else if (loaded == NULL && default_path(path, sizeof(path), error, error_size)) {
        loaded = tsffn_cuda_load(path, error, error_size);
    }
    const struct tsffn_cuda_module * module = loaded;
    pthread_mutex_unlock(&mutex);
    return module;
}
