#define _DEFAULT_SOURCE // madvise
#include "mapping.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

// Whether [begin, end) lies in one shared file mapping. A line of /proc/self/maps (proc(5)):
// begin-end rwxp offset device inode path, with 's' instead of 'p' for a shared mapping and inode 0 for no file.
static bool is_shared_file(uintptr_t begin, uintptr_t end) {
    FILE * maps = fopen("/proc/self/maps", "r");
    if (maps == NULL) {
        return false;
    }
    char line[512];
    bool found = false;
    while (!found && fgets(line, sizeof(line), maps) != NULL) {
        uint64_t first, last, inode;
        char sharing;
        const int n =
            sscanf(line, "%" SCNx64 "-%" SCNx64 " %*c%*c%*c%c %*s %*s %" SCNu64, &first, &last, &sharing, &inode);
        found = n == 4 && first <= begin && end <= last && sharing == 's' && inode != 0;
    }
    fclose(maps);
    return found;
}

void tsffn_release_pages(void * address, size_t size) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)address + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)address + size) / page * page;
    if (begin < end && is_shared_file(begin, end)) {
        madvise((void *)begin, end - begin, MADV_DONTNEED);
    }
}
