"""What training one predictor of the 7B shape costs: CPU seconds of an epoch and of judging it, memory, bytes on disk.

usage, in tests/: python -m experiments.train_cost ROWS RANK THREADS

Samples are random, a tenth of the neurons active. ROWS: of the samples; the time goes with them.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tsconv.predictor.train.fit import Fit, Recipe, use_threads
from tsconv.predictor.train.rounding import Types
from tsconv.predictor.train.samples import HELD, TRAINED, open_samples, sample_path
from tsconv.transform import q3_nl

N_EMBD, N_FF = 4096, 14336
HELD_ROWS = 512


def main(n_rows: int, rank: int, n_threads: int) -> None:
    use_threads(n_threads)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, n in ((TRAINED, n_rows), (HELD, HELD_ROWS)):
            path = sample_path(folder, 0, 0, split)
            with open(f"{path}.x", "wb") as x, open(f"{path}.h", "wb") as h:
                for _ in range(0, n, 64):
                    x.write(rng.normal(size=(64, N_EMBD)).astype(np.float16).tobytes())
                    codes = rng.integers(100, 160, (64, N_FF)) * (rng.random((64, N_FF)) < 0.1)
                    h.write(codes.astype(np.uint8).tobytes())
        print(f"samples: {N_EMBD * 2 + N_FF:,} bytes a row", flush=True)
        trained, held = (open_samples(folder, 0, 0, split, N_EMBD, N_FF) for split in (TRAINED, HELD))
        types = Types(GGMLQuantizationType.Q4_0, q3_nl.KIND)
        began = [time.process_time()]

        def told(state, figures) -> None:
            seconds = time.process_time() - began[0]
            rounded = "rounded" if state.rounds else "float"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
            print(f"epoch {state.epoch}, {rounded}: {seconds:.1f} s of CPU, peak memory {peak:.2f} GiB", flush=True)
            began[0] = time.process_time()

        Fit(trained, held, rng.random(N_FF), Recipe(rank, types, 0.01, 3, 0)).run(told)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
