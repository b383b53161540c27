// Versions, and whether the running ggml is the one this library was built for.
#include "../cpu/kernels/kernels.h"
#include "../ggml_iface.h"
#include "../model/gguf_file.h"
#include "tsffn.h"

#include <string.h>

const char * tsffn_isa_name(void) {
    return tsffn_kernels_best()->name;
}

const char * tsffn_ggml_version(void) {
    return TSFFN_GGML_VERSION;
}

bool tsffn_check_abi(char * error, size_t error_size) {
    static const char remedy[] = "install llama-cpp-python==" TSFFN_LLAMA_CPP_PYTHON " or rebuild tsconv for this ggml";
    if (strcmp(ggml_version(), TSFFN_GGML_VERSION) != 0) {
        return tsffn_fail(error, error_size, "libggml-tsffn.so: built for another ggml: expected ggml %s, found %s; %s",
                          TSFFN_GGML_VERSION, ggml_version(), remedy);
    }
    // ggml_tensor_overhead counts the tensor and its struct ggml_object: two sizes, a pointer, an enum and padding
    // (ggml.c).
    const size_t tensor_size = ggml_tensor_overhead() - 4 * sizeof(void *);
    if (tensor_size != sizeof(tsffn_tensor)) {
        return tsffn_fail(error, error_size,
                          "libggml-tsffn.so: struct ggml_tensor differs: expected %zu bytes, found %zu; %s",
                          sizeof(tsffn_tensor), tensor_size, remedy);
    }
    static const struct {
        enum ggml_op op;
        const char * name;
    } ops[] = {
        {GGML_OP_MUL_MAT, "MUL_MAT"}, {GGML_OP_MUL_MAT_ID, "MUL_MAT_ID"}, {GGML_OP_GLU, "GLU"}, {GGML_OP_ADD, "ADD"}};
    for (size_t i = 0; i < sizeof(ops) / sizeof(ops[0]); ++i) {
        if (strcmp(ggml_op_name(ops[i].op), ops[i].name) != 0) {
            return tsffn_fail(error, error_size,
                              "libggml-tsffn.so: operation numbers differ: expected %s as number %d, found %s; %s",
                              ops[i].name, (int)ops[i].op, ggml_op_name(ops[i].op), remedy);
        }
    }
    return true;
}
