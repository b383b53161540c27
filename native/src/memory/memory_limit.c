// How much memory this process may come to use.
// Sources: proc(5); Linux admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
#include "tsffn.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

// Longer lines are of other mounts: overlay file systems list their layers.
enum { LINE_SIZE = 2048, PATH_SIZE = LINE_SIZE + 64 };

// Fills `path` with the format's text; false when it does not fit.
#define PRINT_PATH(path, ...) (snprintf(path, PATH_SIZE, __VA_ARGS__) < PATH_SIZE)

// The first number in a file; false for "max", or without the file.
static bool read_number(const char * folder, const char * name, uint64_t * value) {
    char path[PATH_SIZE];
    FILE * file = PRINT_PATH(path, "%s/%s", folder, name) ? fopen(path, "r") : NULL;
    const bool found = file != NULL && fscanf(file, "%" SCNu64, value) == 1;
    if (file != NULL) {
        fclose(file);
    }
    return found;
}

// The sum of the numbers that stand behind two names in a file of "name number" lines.
static uint64_t sum_of(const char * path, const char * const names[2]) {
    FILE * file = fopen(path, "r");
    char line[LINE_SIZE];
    uint64_t sum = 0;
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        char name[64];
        uint64_t value;
        if (sscanf(line, "%63s %" SCNu64, name, &value) == 2 &&
            (strcmp(name, names[0]) == 0 || strcmp(name, names[1]) == 0)) {
            sum += value;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return sum;
}

// What is left in one control group: its limit less what it uses, but for page cache.
static uint64_t left_in_group(const char * folder, bool is_v2) {
    static const char * const v1[2] = {"total_inactive_file", "total_active_file"};
    static const char * const v2[2] = {"inactive_file", "active_file"};
    uint64_t limit, used;
    char path[PATH_SIZE];
    if (!read_number(folder, is_v2 ? "memory.max" : "memory.limit_in_bytes", &limit) ||
        !read_number(folder, is_v2 ? "memory.current" : "memory.usage_in_bytes", &used) ||
        !PRINT_PATH(path, "%s/memory.stat", folder)) {
        return UINT64_MAX;
    }
    const uint64_t cache = sum_of(path, is_v2 ? v2 : v1);
    used = used > cache ? used - cache : 0;
    return limit > used ? limit - used : 0;
}

// The least that is left in the group `inside` of the hierarchy at `mount` and in all groups around it.
static uint64_t left_around(const char * mount, char * inside, bool is_v2) {
    uint64_t least = UINT64_MAX;
    for (;;) {
        char folder[PATH_SIZE];
        const uint64_t left = PRINT_PATH(folder, "%s%s", mount, inside) ? left_in_group(folder, is_v2) : UINT64_MAX;
        least = left < least ? left : least;
        char * slash = strrchr(inside, '/');
        if (slash == NULL) {
            return least;
        }
        *slash = '\0';
    }
}

static bool is_listed(const char * list, const char * name) {
    const size_t length = strlen(name);
    for (const char * at = list; (at = strstr(at, name)) != NULL; at += length) {
        if ((at == list || at[-1] == ',') && (at[length] == ',' || at[length] == '\0')) {
            return true;
        }
    }
    return false;
}

// This process's group in the hierarchy of cgroup v2, or of the memory controller of v1: "/a/b" of a line
// "N:names:/a/b".
static bool find_membership(const char * proc, bool is_v2, char group[LINE_SIZE]) {
    char path[PATH_SIZE], line[LINE_SIZE];
    FILE * file = PRINT_PATH(path, "%s/self/cgroup", proc) ? fopen(path, "r") : NULL;
    bool found = false;
    while (file != NULL && !found && fgets(line, sizeof(line), file) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char * names = strchr(line, ':');
        char * at = names != NULL ? strchr(names + 1, ':') : NULL;
        if (at == NULL) {
            continue;
        }
        *at = '\0';
        found = is_v2 ? names[1] == '\0' : is_listed(names + 1, "memory");
        if (found) {
            strcpy(group, at + 1);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return found;
}

// Cuts off the next word of a line, at which *rest points; NULL at its end.
static char * next_word(char ** rest) {
    char * word = *rest + strspn(*rest, " \n");
    char * end = word + strcspn(word, " \n");
    *rest = *end != '\0' ? end + 1 : end;
    *end = '\0';
    return *word != '\0' ? word : NULL;
}

// What is left in this process's groups of a hierarchy, by its line of mountinfo:
//     id parent device root mount-point options [optional fields] - type source super-options
// UINT64_MAX for other mounts.
static uint64_t left_in_hierarchy(const char * proc, char * line) {
    char * rest = strstr(line, " - ");
    if (rest == NULL) {
        return UINT64_MAX;
    }
    rest += strlen(" - ");
    const char * type = next_word(&rest);
    next_word(&rest);
    const char * options = next_word(&rest);
    rest = line;
    for (int i = 0; i < 3; ++i) {
        next_word(&rest);
    }
    const char * root = next_word(&rest);
    const char * mount = next_word(&rest);
    char group[LINE_SIZE];
    if (mount == NULL || type == NULL || options == NULL) {
        return UINT64_MAX;
    }
    const bool is_v2 = strcmp(type, "cgroup2") == 0;
    if ((!is_v2 && (strcmp(type, "cgroup") != 0 || !is_listed(options, "memory"))) ||
        !find_membership(proc, is_v2, group)) {
        return UINT64_MAX;
    }
    // The mount shows the hierarchy from `root` on.
    const size_t length = strcmp(root, "/") == 0 ? 0 : strlen(root);
    const bool is_inside = strncmp(group, root, length) == 0 && (group[length] == '/' || group[length] == '\0');
    char * inside = is_inside ? group + length : group + strlen(group);
    if (strcmp(inside, "/") == 0) {
        inside += 1;
    }
    return left_around(mount, inside, is_v2);
}

uint64_t tsffn_available_memory(const char * proc) {
    static const char * const available[2] = {"MemAvailable:", "MemAvailable:"};
    char path[PATH_SIZE], line[LINE_SIZE];
    proc = proc != NULL ? proc : "/proc";
    uint64_t least = PRINT_PATH(path, "%s/meminfo", proc) ? 1024 * sum_of(path, available) : 0;
    FILE * mounts = PRINT_PATH(path, "%s/self/mountinfo", proc) ? fopen(path, "r") : NULL;
    while (mounts != NULL && fgets(line, sizeof(line), mounts) != NULL) {
        const uint64_t left = left_in_hierarchy(proc, line);
        least = left < least ? left : least;
    }
    if (mounts != NULL) {
        fclose(mounts);
    }
    return least;
}
