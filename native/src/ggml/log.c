#include "log.h"

#include "../ggml_iface.h"

#include <stdarg.h>
#include <stdio.h>

void tsffn_log_error(const char * format, ...) {
    char line[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    ggml_log_internal(GGML_LOG_LEVEL_ERROR, "tsffn: %s\n", line);
}
