// Which device computes.
#include "device.h"

#include "../error.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

static const struct tsffn_device * load_module(const char * path, char * error, size_t error_size) {
    void * library = dlopen(path, RTLD_NOW | RTLD_LOCAL); // for as long as the process lives
    if (library == NULL) {
        tsffn_fail(error, error_size, "TSFFN_DEVICE: %s", dlerror());
        return NULL;
    }
    tsffn_device_module_fn module;
    *(void **)&module = dlsym(library, TSFFN_DEVICE_MODULE);
    const struct tsffn_device * device = module != NULL ? module() : NULL;
    if (device == NULL || device->version != TSFFN_DEVICE_VERSION) {
        tsffn_fail(error, error_size, "TSFFN_DEVICE: %s: expected a device of version %d, found %s %d", path,
                   TSFFN_DEVICE_VERSION, device != NULL ? "version" : "none:", device != NULL ? device->version : 0);
        return NULL;
    }
    return device;
}

const struct tsffn_device * tsffn_device(char * error, size_t error_size) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static const struct tsffn_device * chosen;
    pthread_mutex_lock(&mutex);
    if (chosen == NULL) {
        const char * path = getenv("TSFFN_DEVICE");
        const bool is_named = path != NULL && path[0] != '\0';
        chosen = is_named ? load_module(path, error, error_size) : &tsffn_cpu_device;
    }
    const struct tsffn_device * device = chosen;
    pthread_mutex_unlock(&mutex);
    if (device != NULL && !device->init()) {
        tsffn_fail(error, error_size, "libggml-tsffn.so: this ggml has no CPU backend: load it first");
        return NULL;
    }
    return device;
}
