// How a function that fails says why: one line that names file, key or tensor, expected and found, and the remedy.
#ifndef TSFFN_ERROR_H
#define TSFFN_ERROR_H

#include <stdbool.h>
#include <stddef.h>

// Writes one line to the caller's error buffer and returns false.
bool tsffn_fail(char * error, size_t error_size, const char * format, ...) __attribute__((format(printf, 3, 4)));

#endif
