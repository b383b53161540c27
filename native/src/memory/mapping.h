// Memory-mapped weights.
#ifndef TSFFN_MAPPING_H
#define TSFFN_MAPPING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// llama.cpp maps model files with MAP_POPULATE, so that every page of them counts as this process's resident memory.
// This takes the pages of [address, address + size) out of the process again (they stay in the page cache): from then
// on only what is touched is resident. Does nothing unless the memory is a shared mapping of a file, where no data can
// be lost.
void tsffn_release_pages(void * address, size_t size);

// The same for the whole mapping that [address, address + size) is a part of. False, and nothing is done, when that is
// locked (mlock) or is more than one mapping.
bool tsffn_release_mapping(const void * address, size_t size);

// Brings whole pages into this process, reading them when they are on disk. Returns 0 or an errno.
int tsffn_prefault_pages(void * pages, size_t size);

// Reads bytes [offset, offset + size) of a file into the page cache, in huge pages where its file system has large
// folios: a mapping of it then finds its pages faster (docs/notes/2026-11-28-pages-and-bundles.md). `offset` is a
// multiple of the page size. Does nothing to what is cached already. Returns 0 or an errno.
int tsffn_cache_pages(int fd, uint64_t offset, uint64_t size);

// How many bytes of whole pages are in this process's memory now; `unknown` when the kernel does not tell.
size_t tsffn_resident_bytes(const void * pages, size_t size, size_t unknown);

// Whether [address, address + size) is known to be mapped from another file than the one with this device and inode
// number (stat). False when it cannot be told.
bool tsffn_is_mapped_from_another_file(const void * address, size_t size, uint64_t device, uint64_t inode);

#endif
