#include "log.h"

#include "../ggml_iface.h"

#include <stdarg.h>
#include <stdio.h>

static void log_line(enum ggml_log_level level, const char * format, va_list args)
    __attribute__((format(printf, 2, 0)));

static void log_line(enum ggml_log_level level, const char * format, va_list args) {
    char line[2048];
    vsnprintf(line, sizeof(line), format, args);
    ggml_log_internal(level, "tsffn: %s\n", line);
}

void tsffn_log_error(const char * format, ...) {
    va_list args;
    va_start(args, format);
    log_line(GGML_LOG_LEVEL_ERROR, format, args);
    va_end(args);
}

void tsffn_log_info(const char * format, ...) {
    va_list args;
    va_start(args, format);
    log_line(GGML_LOG_LEVEL_WARN, format, args); // llama.cpp's programs show what libraries say from here on
    va_end(args);
}
