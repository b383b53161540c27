#include "gguf_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { READ_BYTES = 64 << 10 }; // of the header, at a time

static const char CONVERT_AGAIN[] = "the file is damaged or was edited: convert or download it again";

static bool check_bounds(const struct tsffn_gguf * file) {
    const uint64_t data = gguf_get_data_offset(file->ctx);
    const int64_t n = gguf_get_n_tensors(file->ctx);
    for (int64_t i = 0; i < n; ++i) {
        const uint64_t offset = gguf_get_tensor_offset(file->ctx, i);
        const uint64_t size = gguf_get_tensor_size(file->ctx, i);
        if (data > file->file_size || offset > file->file_size - data || size > file->file_size - data - offset) {
            return tsffn_fail(file->error, file->error_size,
                              "%s: %s: the file is truncated: expected at least %" PRIu64 " bytes, found %" PRIu64
                              "; convert or download it again",
                              file->path, gguf_get_tensor_name(file->ctx, i), data + offset + size, file->file_size);
        }
    }
    return true;
}

// Weights are multiplied where the file has them: at GGUF's default alignment.
static bool check_alignment(const struct tsffn_gguf * file) {
    const size_t alignment = gguf_get_alignment(file->ctx);
    if (alignment % GGUF_DEFAULT_ALIGNMENT != 0) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: key general.alignment: expected a multiple of %d, found %zu; %s", file->path,
                          GGUF_DEFAULT_ALIGNMENT, alignment, CONVERT_AGAIN);
    }
    return true;
}

// Says what is wrong before ggml parses anything: its own parser only tells that something is.
static bool check_start(const struct tsffn_gguf * file, FILE * stream) {
    char magic[4];
    const size_t n = fread(magic, 1, sizeof(magic), stream);
    if (n != sizeof(magic) || memcmp(magic, GGUF_MAGIC, sizeof(magic)) != 0) {
        char found[sizeof(magic) + 1] = "";
        for (size_t i = 0; i < n; ++i) {
            found[i] = magic[i] > ' ' && magic[i] <= '~' ? magic[i] : '?';
        }
        return tsffn_fail(
            file->error, file->error_size,
            "%s: is not a GGUF file: expected its first bytes to be '%s', found '%s' in a file of %" PRIu64
            " bytes; name the NAME.gguf that tsconv convert wrote",
            file->path, GGUF_MAGIC, found, file->file_size);
    }
    rewind(stream);
    return true;
}

static bool parse(struct tsffn_gguf * file, FILE * stream) {
    struct stat info;
    if (fstat(fileno(stream), &info) != 0) {
        return tsffn_fail(file->error, file->error_size, "%s: cannot be opened: %s", file->path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) {
        return tsffn_fail(file->error, file->error_size, "%s: is not a file: expected a GGUF file written by tsconv",
                          file->path);
    }
    file->file_size = (uint64_t)info.st_size;
    file->device = (uint64_t)info.st_dev;
    file->inode = (uint64_t)info.st_ino;
    if (!check_start(file, stream)) {
        return false;
    }
    file->ctx = gguf_init_from_file_ptr(stream, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
    if (file->ctx == NULL) {
        return tsffn_fail(file->error, file->error_size, "%s: the header cannot be read; %s", file->path,
                          CONVERT_AGAIN);
    }
    return check_alignment(file) && check_bounds(file);
}

bool tsffn_gguf_open(struct tsffn_gguf * file, const char * path, char * error, size_t error_size) {
    *file = (struct tsffn_gguf){.path = path, .fd = -1, .error = error, .error_size = error_size};
    // O_NONBLOCK: a pipe is refused below instead of being waited for.
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    FILE * stream = fd >= 0 ? fdopen(fd, "rb") : NULL;
    if (stream == NULL) {
        const int reason = errno;
        if (fd >= 0) {
            close(fd);
        }
        return tsffn_fail(error, error_size, "%s: cannot be opened: %s", path, strerror(reason));
    }
    posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM); // no read-ahead into the tensor data
    setvbuf(stream, NULL, _IOFBF, READ_BYTES);
    bool ok = parse(file, stream);
    if (ok) {
        file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        ok = file->fd >= 0 || tsffn_fail(error, error_size, "%s: cannot be kept open: %s", path, strerror(errno));
        posix_fadvise(fd, 0, 0, POSIX_FADV_NORMAL); // the two share it
    }
    fclose(stream);
    if (!ok) {
        tsffn_gguf_close(file);
    }
    return ok;
}

void tsffn_gguf_close(struct tsffn_gguf * file) {
    if (file->ctx != NULL) {
        gguf_free(file->ctx);
        file->ctx = NULL;
    }
    if (file->fd >= 0) {
        close(file->fd);
        file->fd = -1;
    }
}

int tsffn_gguf_take_fd(struct tsffn_gguf * file) {
    const int fd = file->fd;
    file->fd = -1;
    return fd;
}

// Finds `key`, which must have `type`; returns its number or -1.
static int64_t find(const struct tsffn_gguf * file, const char * key, enum gguf_type type) {
    const int64_t id = gguf_find_key(file->ctx, key);
    if (id < 0) {
        tsffn_fail(file->error, file->error_size,
                   "%s: key %s is missing: expected a file written by tsconv convert; %s", file->path, key,
                   CONVERT_AGAIN);
        return -1;
    }
    if (gguf_get_kv_type(file->ctx, id) != type) {
        tsffn_fail(file->error, file->error_size, "%s: key %s has the wrong type: expected %s, found %s; %s",
                   file->path, key, gguf_type_name(type), gguf_type_name(gguf_get_kv_type(file->ctx, id)),
                   CONVERT_AGAIN);
        return -1;
    }
    return id;
}

bool tsffn_gguf_string(const struct tsffn_gguf * file, const char * key, const char ** value) {
    const int64_t id = find(file, key, GGUF_TYPE_STRING);
    *value = id >= 0 ? gguf_get_val_str(file->ctx, id) : NULL;
    return id >= 0;
}

bool tsffn_gguf_u32(const struct tsffn_gguf * file, const char * key, uint32_t * value) {
    const int64_t id = find(file, key, GGUF_TYPE_UINT32);
    *value = id >= 0 ? gguf_get_val_u32(file->ctx, id) : 0;
    return id >= 0;
}

bool tsffn_gguf_optional_u32(const struct tsffn_gguf * file, const char * key, uint32_t * value) {
    *value = 0;
    return gguf_find_key(file->ctx, key) < 0 || tsffn_gguf_u32(file, key, value);
}

bool tsffn_gguf_f32(const struct tsffn_gguf * file, const char * key, float * value) {
    const int64_t id = find(file, key, GGUF_TYPE_FLOAT32);
    *value = id >= 0 ? gguf_get_val_f32(file->ctx, id) : 0.0f;
    return id >= 0;
}

const char ** tsffn_gguf_strings(const struct tsffn_gguf * file, const char * key, size_t * n) {
    const int64_t id = find(file, key, GGUF_TYPE_ARRAY);
    if (id < 0) {
        return NULL;
    }
    if (gguf_get_arr_type(file->ctx, id) != GGUF_TYPE_STRING) {
        tsffn_fail(file->error, file->error_size, "%s: key %s: expected an array of str, found one of %s; %s",
                   file->path, key, gguf_type_name(gguf_get_arr_type(file->ctx, id)), CONVERT_AGAIN);
        return NULL;
    }
    *n = gguf_get_arr_n(file->ctx, id);
    const char ** strings = malloc((*n > 0 ? *n : 1) * sizeof(*strings));
    if (strings == NULL) {
        tsffn_fail(file->error, file->error_size, "out of memory");
        return NULL;
    }
    for (size_t i = 0; i < *n; ++i) {
        strings[i] = gguf_get_arr_str(file->ctx, id, i);
    }
    return strings;
}

bool tsffn_gguf_array(const struct tsffn_gguf * file, const char * key, enum gguf_type type, size_t n,
                      const void ** data) {
    const int64_t id = find(file, key, GGUF_TYPE_ARRAY);
    if (id < 0) {
        return false;
    }
    if (gguf_get_arr_type(file->ctx, id) != type || gguf_get_arr_n(file->ctx, id) != n) {
        return tsffn_fail(file->error, file->error_size, "%s: key %s: expected %s[%zu], found %s[%zu]; %s", file->path,
                          key, gguf_type_name(type), n, gguf_type_name(gguf_get_arr_type(file->ctx, id)),
                          gguf_get_arr_n(file->ctx, id), CONVERT_AGAIN);
    }
    *data = gguf_get_arr_data(file->ctx, id);
    return true;
}

bool tsffn_gguf_expect(const struct tsffn_gguf * file, const char * key, const char * value) {
    const char * found;
    if (!tsffn_gguf_string(file, key, &found)) {
        return false;
    }
    if (strcmp(found, value) != 0) {
        return tsffn_fail(file->error, file->error_size, "%s: key %s: expected '%s', found '%s'; %s", file->path, key,
                          value, found, CONVERT_AGAIN);
    }
    return true;
}

bool tsffn_gguf_tensor(const struct tsffn_gguf * file, const char * name, int64_t ne0, int64_t ne1, int64_t ne2,
                       struct tsffn_gguf_tensor * tensor) {
    const int64_t id = gguf_find_tensor(file->ctx, name);
    if (id < 0) {
        return tsffn_fail(file->error, file->error_size, "%s: %s: the tensor is missing; %s", file->path, name,
                          CONVERT_AGAIN);
    }
    const int64_t * ne = gguf_get_tensor_ne(file->ctx, id);
    if (ne[0] != ne0 || ne[1] != ne1 || ne[2] != ne2 || ne[3] != 1) {
        return tsffn_fail(file->error, file->error_size,
                          "%s: %s: wrong shape: expected [%" PRId64 ", %" PRId64 ", %" PRId64 "], found [%" PRId64
                          ", %" PRId64 ", %" PRId64 "]; %s",
                          file->path, name, ne0, ne1, ne2, ne[0], ne[1], ne[2], CONVERT_AGAIN);
    }
    tensor->type = gguf_get_tensor_type(file->ctx, id);
    tensor->offset = gguf_get_data_offset(file->ctx) + gguf_get_tensor_offset(file->ctx, id);
    tensor->size = gguf_get_tensor_size(file->ctx, id);
    return true;
}
