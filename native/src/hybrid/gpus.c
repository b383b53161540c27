// The GPUs that FFNs can be computed on.
#include "../cuda/load.h"
#include "../error.h"
#include "tsffn.h"

#include <string.h>

int32_t tsffn_gpus(char * error, size_t error_size) {
    const struct tsffn_cuda_module * module = tsffn_cuda_module_in_use(error, error_size);
    const int n = module != NULL ? module->n_devices(error, error_size) : 0;
    if (n == 0 && module != NULL) {
        tsffn_fail(error, error_size, "CUDA: no GPU");
    }
    return n > 0 ? n : 0;
}

bool tsffn_gpu(int32_t number, struct tsffn_gpu * gpu, char * error, size_t error_size) {
    const struct tsffn_cuda_module * module = tsffn_cuda_module_in_use(error, error_size);
    struct tsffn_cuda_info info = {0};
    struct tsffn_cuda * cuda = module != NULL ? module->open(number, 0, &info, error, error_size) : NULL;
    if (cuda != NULL) {
        module->close(cuda);
        memcpy(gpu->name, info.name, sizeof(gpu->name));
        gpu->capability = info.capability;
        gpu->free_bytes = info.free_bytes;
        gpu->total_bytes = info.total_bytes;
    }
    return cuda != NULL;
}
