// The predictor sidecar.
#ifndef TSFFN_SIDECAR_H
#define TSFFN_SIDECAR_H

#include "model_file.h"

// Whether there is NAME.predictor.gguf beside NAME.gguf.
bool tsffn_has_sidecar_beside(const char * model_path);

// Opens, checks and maps the sidecar of a model that was read; path NULL looks for NAME.predictor.gguf beside
// NAME.gguf.
bool tsffn_load_sidecar(struct tsffn_model * model, const char * model_path, const char * sidecar_path,
                        const struct tsffn_identity * id, char * error, size_t error_size);

// Reads the mapped sidecar into memory of its own, which the kernel does not take back for other files. Nothing of the
// model may have been computed with it before.
bool tsffn_keep_sidecar(struct tsffn_model * model, char * error, size_t error_size);

#endif
