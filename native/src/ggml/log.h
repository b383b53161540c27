// Messages of this backend. They go where ggml's own go, so that whoever collects those can quote them.
#ifndef TSFFN_LOG_H
#define TSFFN_LOG_H

// One line, without the newline; "tsffn: " goes before it.
void tsffn_log_error(const char * format, ...) __attribute__((format(printf, 1, 2)));
void tsffn_log_info(const char * format, ...) __attribute__((format(printf, 1, 2)));

#endif
