// Prints the layout of ggml's private backend structs: compiled once with our declaration of them and once, with
// TSFFN_UPSTREAM_HEADER, with upstream's.
#ifdef TSFFN_UPSTREAM_HEADER
#include "ggml-backend-impl.h"
#else
#include "ggml_iface.h"
#endif

#include <stddef.h>
#include <stdio.h>

#define SIZE(type) printf("sizeof " #type " %zu\n", sizeof(struct type))
#define FIELD(type, field)                                                                                             \
    printf(#type "." #field " %zu %zu\n", offsetof(struct type, field), sizeof(((struct type *)0)->field))

int main(void) {
#ifdef TSFFN_UPSTREAM_HEADER
    printf("api version %d\n", GGML_BACKEND_API_VERSION);
#else
    printf("api version %d\n", TSFFN_GGML_BACKEND_API_VERSION);
#endif
    SIZE(ggml_tensor);
    SIZE(ggml_backend_buffer_type_i);
    FIELD(ggml_backend_buffer_type_i, get_name);
    FIELD(ggml_backend_buffer_type_i, alloc_buffer);
    FIELD(ggml_backend_buffer_type_i, get_alignment);
    FIELD(ggml_backend_buffer_type_i, get_max_size);
    FIELD(ggml_backend_buffer_type_i, get_alloc_size);
    FIELD(ggml_backend_buffer_type_i, is_host);
    SIZE(ggml_backend_buffer_type);
    FIELD(ggml_backend_buffer_type, iface);
    FIELD(ggml_backend_buffer_type, device);
    FIELD(ggml_backend_buffer_type, context);
    SIZE(ggml_backend_buffer_i);
    FIELD(ggml_backend_buffer_i, free_buffer);
    FIELD(ggml_backend_buffer_i, get_base);
    FIELD(ggml_backend_buffer_i, init_tensor);
    FIELD(ggml_backend_buffer_i, memset_tensor);
    FIELD(ggml_backend_buffer_i, set_tensor);
    FIELD(ggml_backend_buffer_i, get_tensor);
    FIELD(ggml_backend_buffer_i, set_tensor_2d);
    FIELD(ggml_backend_buffer_i, get_tensor_2d);
    FIELD(ggml_backend_buffer_i, cpy_tensor);
    FIELD(ggml_backend_buffer_i, clear);
    FIELD(ggml_backend_buffer_i, reset);
    SIZE(ggml_backend_buffer);
    FIELD(ggml_backend_buffer, iface);
    FIELD(ggml_backend_buffer, buft);
    FIELD(ggml_backend_buffer, context);
    FIELD(ggml_backend_buffer, size);
    FIELD(ggml_backend_buffer, usage);
    SIZE(ggml_backend_i);
    FIELD(ggml_backend_i, get_name);
    FIELD(ggml_backend_i, free);
    FIELD(ggml_backend_i, set_tensor_async);
    FIELD(ggml_backend_i, get_tensor_async);
    FIELD(ggml_backend_i, set_tensor_2d_async);
    FIELD(ggml_backend_i, get_tensor_2d_async);
    FIELD(ggml_backend_i, cpy_tensor_async);
    FIELD(ggml_backend_i, synchronize);
    FIELD(ggml_backend_i, graph_plan_create);
    FIELD(ggml_backend_i, graph_plan_free);
    FIELD(ggml_backend_i, graph_plan_update);
    FIELD(ggml_backend_i, graph_plan_compute);
    FIELD(ggml_backend_i, graph_compute);
    FIELD(ggml_backend_i, event_record);
    FIELD(ggml_backend_i, event_wait);
    FIELD(ggml_backend_i, graph_optimize);
    SIZE(ggml_backend);
    FIELD(ggml_backend, guid);
    FIELD(ggml_backend, iface);
    FIELD(ggml_backend, device);
    FIELD(ggml_backend, context);
    SIZE(ggml_backend_event);
    FIELD(ggml_backend_event, device);
    FIELD(ggml_backend_event, context);
    SIZE(ggml_backend_device_i);
    FIELD(ggml_backend_device_i, get_name);
    FIELD(ggml_backend_device_i, get_description);
    FIELD(ggml_backend_device_i, get_memory);
    FIELD(ggml_backend_device_i, get_type);
    FIELD(ggml_backend_device_i, get_props);
    FIELD(ggml_backend_device_i, init_backend);
    FIELD(ggml_backend_device_i, get_buffer_type);
    FIELD(ggml_backend_device_i, get_host_buffer_type);
    FIELD(ggml_backend_device_i, buffer_from_host_ptr);
    FIELD(ggml_backend_device_i, supports_op);
    FIELD(ggml_backend_device_i, supports_buft);
    FIELD(ggml_backend_device_i, offload_op);
    FIELD(ggml_backend_device_i, event_new);
    FIELD(ggml_backend_device_i, event_free);
    FIELD(ggml_backend_device_i, event_synchronize);
    SIZE(ggml_backend_device);
    FIELD(ggml_backend_device, iface);
    FIELD(ggml_backend_device, reg);
    FIELD(ggml_backend_device, context);
    SIZE(ggml_backend_reg_i);
    FIELD(ggml_backend_reg_i, get_name);
    FIELD(ggml_backend_reg_i, get_device_count);
    FIELD(ggml_backend_reg_i, get_device);
    FIELD(ggml_backend_reg_i, get_proc_address);
    SIZE(ggml_backend_reg);
    FIELD(ggml_backend_reg, api_version);
    FIELD(ggml_backend_reg, iface);
    FIELD(ggml_backend_reg, context);
    return 0;
}
