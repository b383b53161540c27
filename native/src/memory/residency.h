// Where the memory of the weights is: what is brought into RAM, what is locked there, what is read on demand.
#ifndef TSFFN_RESIDENCY_H
#define TSFFN_RESIDENCY_H

#include "region.h"

// Notes where an FFN weight lies. False: out of memory.
bool tsffn_residency_remember(struct tsffn_region * region, const struct tsffn_weight * weight,
                              const struct tsffn_weights * weights);

// llama.cpp has loaded its models: takes the mappings of their files out of the process, once. What llama.cpp has
// copied (repacked attention and output matrices) is never read there again; the rest comes back when it is touched.
void tsffn_residency_loaded(void);

// Before a buffer goes: unlocks its pages and takes it off its model's list.
void tsffn_residency_forget(struct tsffn_region * region);

#endif
