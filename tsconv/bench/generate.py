"""Models to benchmark: generated at real shapes, written once, kept in the cache folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from tsconv.bench.activity import ActiveWeights
from tsconv.bench.made import made_tensors
from tsconv.bench.sizes import Bytes, predictor_types
from tsconv.bench.synthetic import MIXTRAL_47B, Shape, mistral_7b, write_without_weights
from tsconv.cache import cache_folder
from tsconv.errors import OutputError
from tsconv.transform.quantize import type_name

GENERATION = 5  # in the files' names: models of other weights are not taken for these


@dataclasses.dataclass(frozen=True)
class Preset:
    """A real model: its shape at a number of layers, and the mean share of active neurons (for MoE of each routed
    expert), from Turbo Sparse (arXiv 2406.05955)."""

    shape: Callable[[int], Shape]
    n_layer: int
    active: float


def mixtral_47b(n_layer: int) -> Shape:
    """The first `n_layer` layers of TurboSparse-Mixtral-47B."""
    return dataclasses.replace(MIXTRAL_47B, n_layer=n_layer, ranks=MIXTRAL_47B.ranks[:n_layer])


PRESETS = {
    "turbosparse-mistral-7b": Preset(mistral_7b, 32, 0.10),
    "turbosparse-mixtral-47b": Preset(mixtral_47b, 32, 0.15),
}


def drop_from_page_cache() -> None:
    """Lets the page cache forget all models that are kept, as far as it can: every model is then measured in the same
    state, read into free memory (docs/notes/2026-11-28-pages-and-bundles.md)."""
    for path in (cache_folder() / "bench").glob("*.gguf"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def generated(
    preset: str,
    n_layer: int,
    outtype: str,
    announce: Callable[[str], None],
    *,
    predictor_outtype: str | None = None,
    rank: int | None = None,
    active: float | None = None,
    seed: int = 0,
) -> Path:
    """A converted model of `preset` cut to `n_layer` layers; written on the first call.

    Args:
        predictor_outtype: type of the predictor's matrices; None: convert's default for `outtype`.
        rank: of the predictors of all layers; None: as published.
        active: mean share of active neurons (`activity.ActiveWeights`); None: the preset's.
        seed: of the weights.

    Raises:
        OutputError: the cache folder cannot be written or has no room.
        TsconvError: a type is unknown.
    """
    from tsconv.commands.convert import convert

    folder = cache_folder() / "bench"
    active = PRESETS[preset].active if active is None else active
    kind, default = predictor_types(outtype, predictor_outtype)
    options = f"-pred-{type_name(kind)}" if kind != default else ""
    options += f"-rank{rank}" if rank is not None else ""
    options += (f"-{active:g}" if active != PRESETS[preset].active else "") + (f"-seed{seed}" if seed else "")
    path = folder / f"{preset}-{n_layer}-layers-{outtype}-g{GENERATION}{options}.gguf"
    if os.path.exists(path):
        return path
    shape = PRESETS[preset].shape(n_layer)
    if rank is not None:
        shape = dataclasses.replace(shape, ranks=(rank,) * n_layer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        what = f"cannot keep generated models: {error.strerror}"
        raise OutputError(what, where=folder, fix="set XDG_CACHE_HOME") from None
    needed = Bytes.of(shape, outtype, predictor_outtype).file
    if free < needed:
        raise OutputError(
            "not enough room to generate the model",
            where=folder,
            expected=f"{needed:,} bytes free",
            found=f"{free:,}",
            fix="free some, set XDG_CACHE_HOME, or measure one model with fewer --layers",
        )
    types = outtype if kind == default else f"{outtype}, predictor {type_name(kind)}"
    announce(f"generating {preset}, {n_layer} layers, {types}: {needed / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory(prefix="tsconv-checkpoint-") as checkpoint:
        write_without_weights(Path(checkpoint), shape)
        weights = made_tensors(shape, ActiveWeights(shape, active, seed))
        convert(checkpoint, path, outtype, predictor_outtype=predictor_outtype, tensors=weights)
    kept = sum(file.stat().st_size for file in folder.glob(f"{path.stem}*"))
    announce(f"kept for the next time: {kept / 1e9:.2f} GB in {folder}")
    return path
