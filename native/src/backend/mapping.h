// Memory-mapped weights.
#ifndef TSFFN_MAPPING_H
#define TSFFN_MAPPING_H

#include <stddef.h>

// llama.cpp maps model files with MAP_POPULATE, so that every page of them counts as this process's resident memory.
// This takes the pages of [address, address + size) out of the process again (they stay in the page cache): from then
// on only what is touched is resident. Does nothing unless the memory is a shared mapping of a file, where no data can
// be lost.
void tsffn_release_pages(void * address, size_t size);

#endif
