#define _DEFAULT_SOURCE // madvise
#include "mapping.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 // glibc before 2.35
#endif

enum {
    LINE_SIZE = 4096 + 128, // PATH_MAX and what stands before the path
    PAGEMAP_ENTRIES = 512,
};

// A shared mapping of a file.
struct mapping {
    uintptr_t begin, end;
    const char * path; // in `line`; NULL: there is none
    char line[LINE_SIZE];
};

// The one shared mapping of a file that all of [begin, end) lies in. A line of /proc/self/maps (proc(5)): begin-end
// rwxp offset device inode path, with 's' instead of 'p' for a shared mapping and inode 0 for no file.
static bool find_mapping(uintptr_t begin, uintptr_t end, struct mapping * mapping) {
    mapping->path = NULL;
    FILE * maps = fopen("/proc/self/maps", "r");
    if (maps == NULL) {
        return false;
    }
    char * line = mapping->line;
    while (mapping->path == NULL && fgets(line, LINE_SIZE, maps) != NULL) {
        uint64_t first, last, inode;
        char sharing;
        int path_at = 0;
        const int n = sscanf(line, "%" SCNx64 "-%" SCNx64 " %*c%*c%*c%c %*s %*s %" SCNu64 " %n", &first, &last,
                             &sharing, &inode, &path_at);
        if (n == 4 && first <= begin && end <= last && sharing == 's' && inode != 0) {
            line[strcspn(line, "\n")] = '\0';
            mapping->begin = (uintptr_t)first;
            mapping->end = (uintptr_t)last;
            mapping->path = line + path_at;
        }
    }
    fclose(maps);
    return mapping->path != NULL;
}

void tsffn_release_pages(void * address, size_t size) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)address + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)address + size) / page * page;
    struct mapping mapping;
    if (begin < end && find_mapping(begin, end, &mapping)) {
        madvise((void *)begin, end - begin, MADV_DONTNEED);
    }
}

bool tsffn_release_mapping(const void * address, size_t size) {
    struct mapping mapping;
    return find_mapping((uintptr_t)address, (uintptr_t)address + size, &mapping) &&
           madvise((void *)mapping.begin, mapping.end - mapping.begin, MADV_DONTNEED) == 0; // EINVAL: locked
}

int tsffn_prefault_pages(void * pages, size_t size) {
    if (madvise(pages, size, MADV_POPULATE_READ) == 0) {
        return 0;
    }
    if (errno != EINVAL) {
        return errno;
    }
    // Linux before 5.14.
    madvise(pages, size, MADV_WILLNEED);
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t offset = 0; offset < size; offset += page) {
        (void)*(const volatile uint8_t *)((const char *)pages + offset);
    }
    return 0;
}

int tsffn_cache_pages(int fd, uint64_t offset, uint64_t size) {
    void * pages = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, (off_t)offset);
    if (pages == MAP_FAILED) {
        return errno;
    }
    // A page fault of a mapping with this advice reads two huge pages. EINVAL: a kernel without them.
    madvise(pages, (size_t)size, MADV_HUGEPAGE);
    const int reason = tsffn_prefault_pages(pages, (size_t)size);
    munmap(pages, (size_t)size);
    return reason;
}

// /proc/self/pagemap has 64 bits for every page, bit 63 set when it is present (Linux, admin-guide/mm/pagemap.rst).
// mincore would tell of the page cache instead, and of files that the caller may not write that all of them is there.
size_t tsffn_resident_bytes(const void * pages, size_t size, size_t unknown) {
    const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return unknown;
    }
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t n_pages = size / page;
    size_t n_present = 0;
    uint64_t entries[PAGEMAP_ENTRIES];
    for (size_t i = 0; i < n_pages; i += PAGEMAP_ENTRIES) {
        const size_t n = n_pages - i < PAGEMAP_ENTRIES ? n_pages - i : PAGEMAP_ENTRIES;
        const off_t at = (off_t)(((uintptr_t)pages / page + i) * sizeof(entries[0]));
        if (pread(fd, entries, n * sizeof(entries[0]), at) != (ssize_t)(n * sizeof(entries[0]))) {
            close(fd);
            return unknown;
        }
        for (size_t k = 0; k < n; ++k) {
            n_present += entries[k] >> 63;
        }
    }
    close(fd);
    return n_present * page;
}

// By way of the path, because the device and inode numbers in /proc/self/maps are not always those of stat (overlayfs,
// btrfs).
bool tsffn_is_mapped_from_another_file(const void * address, size_t size, uint64_t device, uint64_t inode) {
    struct mapping mapping;
    struct stat info;
    return find_mapping((uintptr_t)address, (uintptr_t)address + size, &mapping) && stat(mapping.path, &info) == 0 &&
           ((uint64_t)info.st_dev != device || (uint64_t)info.st_ino != inode);
}
