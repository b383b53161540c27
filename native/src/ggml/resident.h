// A context whose other operations a GPU's backend computes, and whose FFNs use that GPU too: what goes in and out of
// an FFN stays in the GPU's memory. It is done with ggml's own interface:
//
// - Results lie in buffers of the GPU, of a type that is a copy of its own: its backend takes them for its own
//   (ggml-cuda compares names and devices), and the scheduler, which compares addresses, keeps operations apart.
// - What comes from the GPU is refused where it lies, so that the scheduler calls cpy_tensor_async. Nothing is copied
//   then; only where it is, and which backend computes it, is noted.
// - Events of the GPU's backend order its work and ours.
//
// What is computed by the CPU all the same goes through copies in the host's memory.
#ifndef TSFFN_RESIDENT_H
#define TSFFN_RESIDENT_H

#include "../ggml_iface.h"

#include <stdbool.h>

struct tsffn_resident;

// For a backend on `device`, beside the GPU of that name. NULL where there is none, or without memory.
struct tsffn_resident * tsffn_resident_new(const char * gpu, ggml_backend_dev_t device);
void tsffn_resident_free(struct tsffn_resident * resident);
// What stands for `device` in such a backend.
ggml_backend_dev_t tsffn_resident_device(struct tsffn_resident * resident);

// Notes that `copy` stands for a tensor that another backend computes. False: it is not in the GPU's memory.
bool tsffn_resident_note(struct tsffn_resident * resident, ggml_backend_t from, const tsffn_tensor * tensor,
                         const tsffn_tensor * copy);
// The tensor that `t` stands for, or itself.
const tsffn_tensor * tsffn_resident_real(const struct tsffn_resident * resident, const tsffn_tensor * t);
bool tsffn_resident_has(const struct tsffn_resident * resident, const tsffn_tensor * t);

// Records an event after what the GPU's backend was told to compute, and returns it (a cudaEvent_t).
void * tsffn_resident_ready(struct tsffn_resident * resident);
// An event for our results, and that the GPU's backend waits for it, once it is recorded.
void * tsffn_resident_done(struct tsffn_resident * resident);
void tsffn_resident_wait(struct tsffn_resident * resident);

// A copy of `t` with memory of the host, which holds what is in the GPU's where `reads`; `t` itself where it is the
// host's already. `slot`: a number below TSFFN_RESIDENT_SLOTS, one of each at a time. False: out of memory.
enum { TSFFN_RESIDENT_SLOTS = 4 };
bool tsffn_resident_to_host(struct tsffn_resident * resident, int slot, const tsffn_tensor * t, bool reads,
                            tsffn_tensor * copy);
// Writes the copy back.
void tsffn_resident_from_host(struct tsffn_resident * resident, const tsffn_tensor * copy, tsffn_tensor * t);

#endif
