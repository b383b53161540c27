#define _GNU_SOURCE // dladdr
#include "row_types.h"

#include "../ffn/layer.h"
#include "../ggml_iface.h"
#include "ggml-cpu.h"
#include "kernels/kernels.h"

#include <dlfcn.h>
#include <pthread.h>

// x_format: below 0 for own kernels, the number of ggml's vec_dot_type for the others.
enum { X_FORMAT_F32 = -1, X_FORMAT_I16 = -2, X_FORMAT_U14 = -3, X_FORMAT_BITS = -4 };

static struct tsffn_row_type row_types[GGML_TYPE_COUNT];
static struct tsffn_row_type q3_nl, bits1, bits2;

typedef const struct ggml_type_traits_cpu * (*traits_cpu_fn)(enum ggml_type);

// ggml_get_type_traits_cpu lives in the CPU backend. That is libggml-cpu.so in some builds and one of several
// libggml-cpu-<isa>.so, chosen at run time, in others: so it is looked up in the library that the registered CPU
// backend's own functions come from, instead of being linked.
static traits_cpu_fn find_traits_cpu(void) {
    ggml_backend_reg_t cpu = ggml_backend_reg_by_name("CPU");
    Dl_info info;
    if (cpu == NULL || dladdr(*(void **)&cpu->iface.get_name, &info) == 0) {
        return NULL;
    }
    void * library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL) {
        return NULL;
    }
    traits_cpu_fn function;
    *(void **)&function = dlsym(library, "ggml_get_type_traits_cpu");
    dlclose(library);
    return function;
}

// The own format of a ggml type, or TSFFN_FORMAT_COUNT.
static enum tsffn_format own_format(enum ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32:
        return TSFFN_FORMAT_F32;
    case GGML_TYPE_F16:
        return TSFFN_FORMAT_F16;
    case GGML_TYPE_BF16:
        return TSFFN_FORMAT_BF16;
    case GGML_TYPE_Q8_0:
        return TSFFN_FORMAT_Q8_0;
    case GGML_TYPE_Q4_0:
        return TSFFN_FORMAT_Q4_0;
    default:
        return TSFFN_FORMAT_COUNT;
    }
}

static void describe(enum ggml_type type, traits_cpu_fn traits_cpu, const struct tsffn_kernels * kernels) {
    const struct ggml_type_traits * traits = ggml_get_type_traits(type);
    const struct ggml_type_traits_cpu * cpu = traits_cpu(type);
    struct tsffn_row_type * row = &row_types[type];
    const enum tsffn_format format = own_format(type);
    if (format != TSFFN_FORMAT_COUNT) {
        row->own_dots = kernels->dots[format];
        row->own_axpys = kernels->axpys[format];
        row->own_add_rows = kernels->add_rows[format];
        row->own_panel = kernels->panel[format];
        row->gemm = format != TSFFN_FORMAT_F32 ? kernels->gemm : NULL; // gemm.h: f32 weights would lose bits
        row->gemm_format = format;
    }
    row->block_size = traits->blck_size;
    row->block_bytes = traits->type_size;
    if (row->own_dots != NULL && tsffn_x_format(format) == TSFFN_X_I16) {
        row->x_format = X_FORMAT_I16;
        row->x_header_bytes = TSFFN_I16_HEADER;
        row->x_block_size = TSFFN_BLOCK_SIZE;
        row->x_block_bytes = TSFFN_I16_BLOCK_BYTES;
        row->convert_x = tsffn_convert_i16;
    } else if (row->own_dots != NULL) {
        row->x_format = X_FORMAT_F32;
        row->x_block_size = 1;
        row->x_block_bytes = sizeof(float);
    } else {
        const struct ggml_type_traits * x = ggml_get_type_traits(cpu->vec_dot_type);
        row->x_format = (int)cpu->vec_dot_type;
        row->x_block_size = x->blck_size;
        row->x_block_bytes = x->type_size;
        row->host_dot = cpu->vec_dot;
        row->convert_x = traits_cpu(cpu->vec_dot_type)->from_float;
    }
    row->host_to_float = traits->to_float;
    const bool can_dot = row->own_dots != NULL || (row->host_dot != NULL && row->convert_x != NULL);
    const bool can_axpy = row->own_axpys != NULL || row->host_to_float != NULL;
    row->name = can_dot && can_axpy ? traits->type_name : NULL;
}

static void describe_q3_nl(const struct tsffn_kernels * kernels) {
    q3_nl = (struct tsffn_row_type){
        .name = "q3_nl",
        .block_size = TSFFN_BLOCK_SIZE,
        .block_bytes = TSFFN_Q3_NL_BYTES,
        .row_header_bytes = TSFFN_Q3_NL_HEADER,
        .x_format = X_FORMAT_U14,
        .x_header_bytes = TSFFN_U14_HEADER,
        .x_block_size = TSFFN_BLOCK_SIZE,
        .x_block_bytes = TSFFN_U14_BLOCK_BYTES,
        .convert_x = tsffn_convert_u14,
        .own_panel = kernels->panel[TSFFN_FORMAT_Q3_NL],
    };
}

static struct tsffn_row_type bits_type(const char * name, enum tsffn_format format,
                                       const struct tsffn_kernels * kernels) {
    return (struct tsffn_row_type){
        .name = name,
        .block_size = TSFFN_BLOCK_SIZE,
        .block_bytes = (size_t)tsffn_weight_bits(format) * sizeof(uint32_t),
        .x_format = X_FORMAT_BITS,
        .x_header_bytes = TSFFN_BITS_HEADER,
        .x_block_size = TSFFN_BLOCK_SIZE,
        .x_block_bytes = TSFFN_BITS_MAX_BLOCK_BYTES,
        .convert_x_bits = tsffn_convert_bits,
        .own_panel = kernels->panel[format],
    };
}

static bool build_table(void) {
    const traits_cpu_fn traits_cpu = find_traits_cpu();
    if (traits_cpu == NULL) {
        return false;
    }
    const struct tsffn_kernels * kernels = tsffn_kernels_best();
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        if (ggml_get_type_traits((enum ggml_type)type)->blck_size > 0) { // 0: a number that is no longer used
            describe((enum ggml_type)type, traits_cpu, kernels);
        }
    }
    describe_q3_nl(kernels);
    bits1 = bits_type("bits1", TSFFN_FORMAT_BITS1, kernels);
    bits2 = bits_type("bits2", TSFFN_FORMAT_BITS2, kernels);
    return true;
}

bool tsffn_row_types_init(void) {
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static bool built;
    pthread_mutex_lock(&mutex);
    built = built || build_table();
    const bool result = built;
    pthread_mutex_unlock(&mutex);
    return result;
}

const struct tsffn_row_type * tsffn_row_type_for(int type) {
    switch (type) {
    case TSFFN_TYPE_Q3_NL:
        return &q3_nl;
    case TSFFN_TYPE_BITS1:
        return &bits1;
    case TSFFN_TYPE_BITS2:
        return &bits2;
    default:
        break;
    }
    return type >= 0 && type < GGML_TYPE_COUNT && row_types[type].name != NULL ? &row_types[type] : NULL;
}
