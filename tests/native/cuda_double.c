// A stand-in for libcuda.so.1 over plain memory, to test the code that calls the driver; it computes nothing and its
// speed means nothing. It refuses what the driver refuses: calls before cuInit or without a context, unknown addresses.
// Where the real cuda.h is at hand, the compiler checks these prototypes against it.
#include <stdlib.h>
#include <string.h>
#if __has_include(<cuda.h>)
#include <cuda.h>
#else
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st * CUcontext;
#endif

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201 };
enum { N_BLOCKS = 8, UNNAMED_ERROR = 98765 };

static const char * failing = "";
static int code, n_devices, initialized, retained;
static size_t total_bytes, free_bytes;
static CUcontext current;
static struct {
    char * address;
    size_t size;
    int is_host;
} blocks[N_BLOCKS];

// Starts anew: `name` (or nothing) fails with `error`.
void double_reset(const char * name, int error, int devices, size_t total, size_t available);
void double_reset(const char * name, int error, int devices, size_t total, size_t available) {
    static char copy[64];
    strncpy(copy, name, sizeof(copy) - 1);
    failing = copy;
    code = error;
    n_devices = devices;
    total_bytes = total;
    free_bytes = available;
    initialized = retained = 0;
    current = NULL;
    memset(blocks, 0, sizeof(blocks));
}

// Blocks and contexts that were not given back.
int double_held(void);
int double_held(void) {
    int held = retained;
    for (int i = 0; i < N_BLOCKS; ++i) {
        held += blocks[i].address != NULL;
    }
    return held;
}

static CUresult result(const char * name, int needs_context) {
    if (strcmp(name, failing) == 0) {
        return (CUresult)code;
    }
    if (!initialized) {
        return (CUresult)NOT_INITIALIZED;
    }
    return (CUresult)(needs_context && current == NULL ? INVALID_CONTEXT : OK);
}

#define CHECKED(needs_context)                                                                                         \
    do {                                                                                                               \
        const CUresult checked = result(__func__, needs_context);                                                      \
        if ((int)checked != OK) {                                                                                           \
            return checked;                                                                                            \
        }                                                                                                              \
    } while (0)

static CUresult take(void * address, size_t size, int is_host) {
    if (size == 0) {
        return (CUresult)INVALID_VALUE;
    }
    for (int i = 0; i < N_BLOCKS; ++i) {
        if (blocks[i].address == NULL) {
            char * memory = calloc(1, size);
            blocks[i].address = memory;
            blocks[i].size = size;
            blocks[i].is_host = is_host;
            memcpy(address, &memory, sizeof(memory));
            return (CUresult)OK;
        }
    }
    return (CUresult)OUT_OF_MEMORY;
}

static CUresult give(const void * address, int is_host) {
    for (int i = 0; i < N_BLOCKS; ++i) {
        if (address != NULL && blocks[i].address == address && blocks[i].is_host == is_host) {
            free(blocks[i].address);
            blocks[i].address = NULL;
            return (CUresult)OK;
        }
    }
    return (CUresult)INVALID_VALUE;
}

static int inside(const void * address, size_t size, int is_host) {
    for (int i = 0; i < N_BLOCKS; ++i) {
        if (blocks[i].address == address && blocks[i].is_host == is_host && size <= blocks[i].size) {
            return 1;
        }
    }
    return 0;
}

CUresult cuInit(unsigned int flags) {
    if (strcmp(failing, "cuInit") == 0) {
        return (CUresult)code;
    }
    initialized = flags == 0;
    return (CUresult)(flags == 0 ? OK : INVALID_VALUE);
}
CUresult cuDeviceGetCount(int * count) {
    CHECKED(0);
    *count = n_devices;
    return (CUresult)OK;
}
CUresult cuDeviceGet(CUdevice * device, int ordinal) {
    CHECKED(0);
    *device = 70 + ordinal;
    return (CUresult)(ordinal < n_devices ? OK : INVALID_DEVICE);
}
CUresult cuDeviceGetName(char * name, int length, CUdevice device) {
    CHECKED(0);
    strncpy(name, "Double of a GPU", (size_t)length);
    return (CUresult)(device == 70 ? OK : INVALID_DEVICE);
}
CUresult cuDeviceTotalMem_v2(size_t * bytes, CUdevice device) {
    CHECKED(0);
    *bytes = total_bytes;
    return (CUresult)(device == 70 ? OK : INVALID_DEVICE);
}
CUresult cuDevicePrimaryCtxRetain(CUcontext * context, CUdevice device) {
    CHECKED(0);
    *context = (CUcontext)&retained;
    ++retained;
    return (CUresult)(device == 70 ? OK : INVALID_DEVICE);
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    CHECKED(0);
    --retained;
    return (CUresult)(device == 70 ? OK : INVALID_DEVICE);
}
CUresult cuCtxSetCurrent(CUcontext context) {
    CHECKED(0);
    current = context;
    return (CUresult)(context == NULL || context == (CUcontext)&retained ? OK : INVALID_CONTEXT);
}
CUresult cuCtxSynchronize(void) {
    CHECKED(1);
    return (CUresult)OK;
}
CUresult cuMemGetInfo_v2(size_t * available, size_t * total) {
    CHECKED(1);
    *available = free_bytes;
    *total = total_bytes;
    return (CUresult)OK;
}
CUresult cuMemAlloc_v2(CUdeviceptr * address, size_t size) {
    CHECKED(1);
    return size > free_bytes ? (CUresult)OUT_OF_MEMORY : take(address, size, 0);
}
CUresult cuMemFree_v2(CUdeviceptr address) {
    CHECKED(1);
    return give((const void *)address, 0);
}
CUresult cuMemAllocHost_v2(void ** address, size_t size) {
    CHECKED(1);
    return take(address, size, 1);
}
CUresult cuMemFreeHost(void * address) {
    CHECKED(1);
    return give(address, 1);
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void * from, size_t size) {
    CHECKED(1);
    if (!inside((const void *)to, size, 0) || !inside(from, size, 1)) {
        return (CUresult)INVALID_VALUE;
    }
    memcpy((void *)to, from, size);
    return (CUresult)OK;
}
CUresult cuMemcpyDtoH_v2(void * to, CUdeviceptr from, size_t size) {
    CHECKED(1);
    if (!inside(to, size, 1) || !inside((const void *)from, size, 0)) {
        return (CUresult)INVALID_VALUE;
    }
    memcpy(to, (const void *)from, size);
    return (CUresult)OK;
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t size) {
    CHECKED(1);
    if (!inside((const void *)to, size, 0) || !inside((const void *)from, size, 0)) {
        return (CUresult)INVALID_VALUE;
    }
    memcpy((void *)to, (const void *)from, size);
    return (CUresult)OK;
}
CUresult cuGetErrorName(CUresult error, const char ** name) {
    if ((int)error == UNNAMED_ERROR) {
        return (CUresult)INVALID_VALUE;
    }
    *name = (int)error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
    return (CUresult)OK;
}
