"""Several generated models one after the other, each cut to what memory and time allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tsconv.bench.compare import Row, compare
from tsconv.bench.generate import PRESETS, drop_from_page_cache, generated
from tsconv.bench.gpu import NO_GPU
from tsconv.bench.sizes import Bytes
from tsconv.bench.workload import Workload, parse_workload
from tsconv.machine.limits import available_memory
from tsconv.runtime.offload import Wanted

# KV cache and compute buffers of an engine; this process while it measures memory takes less.
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """A generated model and its tests.

    Attributes:
        n_layer: at most; fewer when memory has no room for all engines.
        until: seconds after the suite's start by which its last turn should have ended; a first one is always run.
        predictor_outtype: type of the predictor's matrices; None: convert's default for `outtype`.
    """

    preset: str
    outtype: str
    n_layer: int
    workloads: tuple[Workload, ...]
    until: float
    predictor_outtype: str | None = None

    @property
    def types(self) -> str:
        """The types as a suite's announcement names them."""
        return self.outtype + (f", predictor {self.predictor_outtype}" if self.predictor_outtype else "")

    def bytes(self, n_layer: int) -> Bytes:
        """Of the model cut to `n_layer` layers."""
        return Bytes.of(PRESETS[self.preset].shape(n_layer), self.outtype, self.predictor_outtype)


def _item(
    preset: str, outtype: str, n_layer: int, tests: str, until: float, predictor_outtype: str | None = None
) -> Item:
    return Item(preset, outtype, n_layer, tuple(map(parse_workload, tests.split())), until, predictor_outtype)


# The predictor of f16 models is q3_nl here: it is read whole for every token, and q3_nl takes 0.22 of the bytes of f16
# where convert's default, q8_0, takes 0.53 (docs/measurements.md has what that costs in accuracy, and the speed).
#
# Two cores that read 20 GB/s generate the models of the full one in about 65, 50 and 75 s; a turn of each takes 100, 50
# and 30 s.
SUITES = {
    "full": (
        _item("turbosparse-mistral-7b", "q4_0", 32, "tg128 pp512 pp32 tg16x2 tg16x4 tg16x8", 360),
        _item("turbosparse-mistral-7b", "f16", 20, "tg32 pp128 pp32 tg16x4", 490, "q3_nl"),
        _item("turbosparse-mixtral-47b", "q4_0", 12, "tg64 pp256 pp32 tg16x4", 590),
    ),
    "quick": (
        _item("turbosparse-mistral-7b", "q4_0", 4, "tg64 pp256 tg16x4", 45),
        _item("turbosparse-mistral-7b", "f16", 4, "tg32 pp64", 80, "q3_nl"),
        _item("turbosparse-mixtral-47b", "q4_0", 2, "tg64 tg16x4", 110),
    ),
}


def layers_that_fit(item: Item, baselines: Sequence[str], available: int) -> int:
    """Most layers, up to the item's, with which all engines fit into `available` bytes of memory; at least 1."""

    def fits(n_layer: int) -> bool:
        return item.bytes(n_layer).resident(baselines) + SPARE_BYTES * (1 + len(baselines)) <= available

    return next((n for n in range(item.n_layer, 1, -1) if fits(n)), 1)


def run_suite(
    name: str,
    *,
    baselines: Sequence[str],
    n_threads: Sequence[int] | None,
    gpu: Wanted = NO_GPU,
    say: Callable[[str], None],
    progress: Callable[[str], None],
) -> Iterator[list[Row]]:
    """Generates and measures the models of SUITES[name]; yields the rows of each when it is done.

    Args:
        baselines, n_threads, gpu, progress: as `compare`.
        say: called with a line for every model before it is generated.

    Raises:
        OutputError: the cache folder cannot be written or has no room.
        BackendError: an engine could not run a model.
    """
    started = time.monotonic()
    for number, item in enumerate(SUITES[name], 1):
        n_layer = layers_that_fit(item, baselines, available_memory())
        preset = PRESETS[item.preset]
        cut = "" if n_layer == item.n_layer else f", for more than {n_layer} of which memory has no room"
        n_bytes = item.bytes(n_layer).file
        say(
            f"model {number} of {len(SUITES[name])}: {item.preset}, {item.types}, {n_bytes / 1e9:.1f} GB: "
            f"{n_layer} of {preset.n_layer} layers{cut}"
        )
        path = generated(item.preset, n_layer, item.outtype, say, predictor_outtype=item.predictor_outtype)
        drop_from_page_cache()
        yield compare(
            path,
            item.workloads,
            baselines=baselines,
            n_threads=n_threads,
            gpu=gpu,
            seconds=started + item.until - time.monotonic(),
            progress=progress,
        )
