// Checked reading of a GGUF file's metadata: every getter verifies presence, type and size, and the first failure
// writes one line that names file, key or tensor, expected and found, and the remedy.
#ifndef TSFFN_GGUF_FILE_H
#define TSFFN_GGUF_FILE_H

#include "../error.h"
#include "ggml.h"
#include "gguf.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tsffn_gguf {
    struct gguf_context * ctx;
    const char * path;
    uint64_t file_size;
    int fd;                 // of the opened file, -1 after tsffn_gguf_take_fd
    uint64_t device, inode; // as stat tells them
    char * error;           // the caller's
    size_t error_size;
};

struct tsffn_gguf_tensor {
    enum ggml_type type;
    uint64_t offset; // of its data, from the start of the file
    uint64_t size;
};

// Opens `path`, reads its header, and checks that the data of every tensor lies inside the file. No tensor data is
// read, and the kernel reads none ahead. `path` must outlive `file`.
bool tsffn_gguf_open(struct tsffn_gguf * file, const char * path, char * error, size_t error_size);
void tsffn_gguf_close(struct tsffn_gguf * file);
// The descriptor of the file that was checked; the caller closes it.
int tsffn_gguf_take_fd(struct tsffn_gguf * file);

bool tsffn_gguf_string(const struct tsffn_gguf * file, const char * key, const char ** value);
bool tsffn_gguf_u32(const struct tsffn_gguf * file, const char * key, uint32_t * value);
// A u32 that may be absent, 0 then.
bool tsffn_gguf_optional_u32(const struct tsffn_gguf * file, const char * key, uint32_t * value);
bool tsffn_gguf_f32(const struct tsffn_gguf * file, const char * key, float * value);
// The `n` strings of an array, to be freed by the caller while the strings stay the file's; NULL after a failure.
const char ** tsffn_gguf_strings(const struct tsffn_gguf * file, const char * key, size_t * n);
// An array of exactly `n` elements of `type` (4 bytes each).
bool tsffn_gguf_array(const struct tsffn_gguf * file, const char * key, enum gguf_type type, size_t n,
                      const void ** data);
// A string key that must have the given value.
bool tsffn_gguf_expect(const struct tsffn_gguf * file, const char * key, const char * value);

// A tensor of exactly this shape, fastest dimension first.
bool tsffn_gguf_tensor(const struct tsffn_gguf * file, const char * name, int64_t ne0, int64_t ne1, int64_t ne2,
                       struct tsffn_gguf_tensor * tensor);

#endif
