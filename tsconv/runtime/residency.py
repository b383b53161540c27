"""Where the memory of a loaded model's weights is: brought into RAM, locked there, or read on demand.

The FFN weights stay mapped from the file; hot neurons are a prefix of each FFN (a model in hot_first order), so that
what belongs in RAM is one range of pages per matrix. The native side (native/src/memory/residency.c) does the work.

All other weights are llama.cpp's. It maps the file with MAP_POPULATE, which reads all of it once, and then either uses
them in place or repacks them into memory of its own; only computing a token touches exactly what it uses of them
(`SparseLlama.warm_up`).
`Llama(use_mlock=True)` is no help: it locks the whole file, cold neurons included.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tsconv.runtime.binding import PLACE_LOCK, PLACE_PREFAULT, PLACE_RANDOM_REST, NativeModel


@dataclass(frozen=True)
class Residency:
    """What was done, in bytes. All but `ffn_bytes` are of whole pages.

    Attributes:
        ffn_bytes: gate, up and down weights of the model.
        hot_bytes: pages of the hot neurons; of these hot_resident_bytes were in this process's memory afterwards and
            hot_locked_bytes are locked there.
        sidecar_bytes, sidecar_resident_bytes, sidecar_locked_bytes: the same of the predictors; 0 in exact mode.
        random_bytes: pages of the other neurons, which are read on demand without read-ahead.
        lock_limit_bytes: RLIMIT_MEMLOCK when it kept something from being locked.
        failures: what the kernel refused ("locking: Cannot allocate memory"), the first of each kind.
    """

    ffn_bytes: int
    hot_bytes: int
    hot_resident_bytes: int
    hot_locked_bytes: int
    sidecar_bytes: int
    sidecar_resident_bytes: int
    sidecar_locked_bytes: int
    random_bytes: int
    lock_limit_bytes: int | None
    failures: tuple[str, ...]

    @property
    def locked_bytes(self) -> int:
        return self.hot_locked_bytes + self.sidecar_locked_bytes


def place_in_memory(
    native: NativeModel, hot: npt.ArrayLike, *, prefault: bool = True, lock: bool = False, read_ahead: bool = True
) -> Residency:
    """Decides which weights are in RAM. Replaces what an earlier call decided; ends when the model is closed.

    Args:
        hot: [n_layer, n_ffn] numbers of neurons at the front of each FFN (expert, or 1 per dense layer) that belong
            in RAM. The predictors always do.
        prefault: bring them in now, from disk where need be.
        lock: keep them there as far as RLIMIT_MEMLOCK allows: the predictors first, then an equal share of each FFN.
        read_ahead: of the other neurons. With it the kernel reads some 100 kB around every row that is not in memory,
            without it the pages of the row.

    Raises:
        BackendError: `hot` does not fit the model, or it is closed.
    """
    flags = (prefault and PLACE_PREFAULT) | (lock and PLACE_LOCK) | (not read_ahead and PLACE_RANDOM_REST)
    placed = native.place(np.asarray(hot, dtype=np.int32), flags)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limited = placed.lock_errno != 0 and limit != resource.RLIM_INFINITY
    kinds = {"prefaulting": placed.prefault_errno, "locking": placed.lock_errno, "advice": placed.advice_errno}
    return Residency(
        ffn_bytes=placed.ffn,
        hot_bytes=placed.hot,
        hot_resident_bytes=placed.hot_resident,
        hot_locked_bytes=placed.hot_locked,
        sidecar_bytes=placed.sidecar,
        sidecar_resident_bytes=placed.sidecar_resident,
        sidecar_locked_bytes=placed.sidecar_locked,
        random_bytes=placed.random,
        lock_limit_bytes=limit if limited else None,
        failures=tuple(f"{kind}: {os.strerror(errno)}" for kind, errno in kinds.items() if errno),
    )
