// Bringing the file of a model into the page cache.
#include "../model/model.h"
#include "mapping.h"

#include <errno.h>
#include <unistd.h>

int tsffn_model_cache(const struct tsffn_model * model, uint64_t offset, uint64_t size) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (model == NULL || offset % page != 0 || offset > model->file_bytes) {
        return EINVAL;
    }
    const uint64_t left = model->file_bytes - offset;
    size = size < left ? size : left;
    return size > 0 ? tsffn_cache_pages(model->fd, offset, size) : 0;
}
