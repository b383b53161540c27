"""The predictors of a model, layer after layer: recording, choosing ranks, training, in a folder to go on in."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.arch.family import Output
from tsconv.checkpoint.config import MAX_DIM
from tsconv.errors import OutputError, TsconvError
from tsconv.eval.predictor import down_energies
from tsconv.format.header import Header
from tsconv.format.order import dimension, shape_of
from tsconv.format.types import fitting
from tsconv.predictor.train import sidecar
from tsconv.predictor.train.calibrate import Figures
from tsconv.predictor.train.fit import Fit, Fitted, Recipe, Start, State
from tsconv.predictor.train.ranks import PROBE_EXPERTS, Layout, choose_ranks, probe_ranks, probe_tokens
from tsconv.predictor.train.record import groups, record, take_chunks
from tsconv.predictor.train.rounding import Types
from tsconv.predictor.train.samples import BLOCK, HELD, TRAINED, Samples, open_samples
from tsconv.predictor.train.work import Work

if TYPE_CHECKING:
    from tsconv.runtime.model import SparseLlama
    from tsconv.stats.text.corpus import Corpus

ROWS_SEEN = 1_600_000  # that an FFN is trained on by default, in MIN_EPOCHS to MAX_EPOCHS passes
MIN_EPOCHS, MAX_EPOCHS = 4, 24

Tell = Callable[[str], None]
Count = Callable[[str, int, int], None]  # what, done, in all
Ready = tuple[Fitted, float]  # a predictor, and the seconds it took


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; n_used: experts of a token, neuron_bytes: of gate, up and down of a neuron."""

    n_layer: int
    n_ffn: int
    n_embd: int
    n_ff: int
    n_expert: int
    n_used: int
    neuron_bytes: int

    @staticmethod
    def of(header: Header) -> Shape:
        n_layer, n_ffn, n_ff = shape_of(header)
        n_embd = dimension(header, "llama.embedding_length", MAX_DIM)
        n_expert = header.keys.get("llama.expert_count", 0)
        ffn = [t for t in header.tensors if t.name.startswith("blk.0.ffn_") and ("_gate" in t.name or "_up" in t.name)]
        ffn += [t for t in header.tensors if t.name.startswith("blk.0.ffn_down")]
        n_bytes = sum(t.n_bytes for t in ffn if "_inp" not in t.name) // (n_ffn * n_ff)
        used = header.keys.get("llama.expert_used_count", 1) if n_expert else 1
        return Shape(n_layer, n_ffn, n_embd, n_ff, n_expert, used, n_bytes)

    @property
    def layout(self) -> Layout:
        return Layout(self.n_layer, self.n_ffn, self.n_used, self.n_embd, self.n_ff, self.neuron_bytes)


def fit_types(kinds: Types, rank: int, shape: Shape) -> Types:
    """The types that rows of fc1 and fc2 can have."""

    def fits(kind: GGMLQuantizationType, matrix: int, n_rows: int, n_cols: int) -> GGMLQuantizationType:
        name, dims = f"blk.0.ffn_pred_fc{matrix}.weight", (n_rows, n_cols)
        return fitting(kind, Output(name, (), dims, dims, "copy"))

    return Types(fits(kinds.fc1, 1, rank, shape.n_embd), fits(kinds.fc2, 2, shape.n_ff, rank))


@dataclass(frozen=True)
class Trainer:
    """
    Attributes:
        path, header: of the model.
        folder: of what is ready.
        target_miss, seed, device, epochs: as `tsconv.commands.predictor_train.train` takes them.
        tell: called with a line for each FFN that is ready.
        count: called with what is being done and how far it is.
    """

    path: Path
    header: Header
    shape: Shape
    folder: Work
    n_threads: int
    target_miss: float
    seed: int
    device: str
    epochs: int | None
    tell: Tell
    count: Count

    def tokens(self, corpus: Corpus, chunk: int, n_tokens: int) -> npt.NDArray[np.int32]:
        """Chunks of the text."""
        with _Model(self.path, self.n_threads) as llama:
            return take_chunks(llama, corpus, chunk, n_tokens, self.seed)

    def record(self, tokens: npt.NDArray[np.int32], layers: range) -> None:
        """The samples of some layers, and of no others."""
        if self.folder.recorded() == list(layers):
            return
        self.folder.forget_samples()
        shape = self.shape
        needed = tokens.size * len(layers) * shape.layout.sample_bytes
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise OutputError(
                "not enough room for samples",
                where=self.folder.path,
                expected=f"{needed:,} bytes free",
                found=f"{free:,}",
                fix="free some, lower --tokens or --disk, or name another folder with --work",
            )
        what = f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start}-{layers.stop - 1}"
        with _Model(self.path, self.n_threads) as llama:
            record(
                llama,
                tokens,
                layers,
                (shape.n_ffn, shape.n_embd, shape.n_ff),
                self.folder.path,
                lambda done: self.count(f"recording {what}", done, tokens.size),
            )
        self.folder.note_recorded(layers)

    def ranks(self, tokens: npt.NDArray[np.int32], kinds: Types, budget: int | None, disk: int) -> list[int]:
        """Chosen for each layer, from short trainings at some ranks."""
        there = self.folder.ranks()
        if there is not None:
            return there
        shape, layout, part = self.shape, self.shape.layout, probe_tokens(tokens)
        energies = list(down_energies(self.header))
        probes = []
        for layers in groups(shape.n_layer, part.size * layout.sample_bytes, disk):
            self.record(part, layers)
            for n in layers:
                self.count("trying ranks", n, shape.n_layer)
                experts = [(*self._samples(n, e), energies[n][e]) for e in range(min(PROBE_EXPERTS, shape.n_ffn))]
                probes.append(probe_ranks(experts, shape.n_embd, self.target_miss, self.seed, self.device))
        ranks = choose_ranks(probes, layout, lambda r: fit_types(kinds, r, shape), budget)
        self.folder.forget_samples()
        self.folder.keep_ranks(ranks)
        return ranks

    def train(
        self,
        tokens: npt.NDArray[np.int32],
        ranks: Sequence[int],
        types: Sequence[Types],
        begin_with: Header | None,
        disk: int,
    ) -> list[list[Ready]]:
        """All predictors, layer after layer."""
        shape, ready = self.shape, []
        energies = list(down_energies(self.header))
        for layers in groups(shape.n_layer, tokens.size * shape.layout.sample_bytes, disk):
            for n in layers:
                done = [self.folder.result(n, e) for e in range(shape.n_ffn)]
                if any(found is None for found in done) and self.folder.recorded() != list(layers):
                    self.record(tokens, layers)
                layer = []
                for e, found in enumerate(done):
                    start = None if begin_with is None else self._start(begin_with, n, e, ranks[n])
                    layer.append(found or self._fit(n, e, energies[n][e], ranks[n], types[n], start))
                ready.append(layer)
                self.folder.forget_layer(n)
        return ready

    def _start(self, begin_with: Header, n: int, e: int, rank: int) -> Start | None:
        """The predictor to begin with, where it has the rank that is wanted."""
        if sidecar.read_ranks(begin_with)[n] != rank:
            return None
        return sidecar.read_start(begin_with, n, e)

    def _samples(self, n: int, e: int) -> tuple[Samples, Samples]:
        shape = self.shape
        pair = tuple(open_samples(self.folder.path, n, e, split, shape.n_embd, shape.n_ff) for split in (TRAINED, HELD))
        if min(samples.n for samples in pair) < BLOCK:
            which = f"expert {e} of layer {n}" if shape.n_expert else f"layer {n}"
            raise TsconvError(
                f"the text has too few tokens for {which}",
                expected=f"at least {BLOCK} to train on, and as many held out",
                found=f"{pair[0].n} and {pair[1].n}",
                fix="raise --tokens, or take a longer text",
            )
        return pair[0], pair[1]

    def _fit(
        self, n: int, e: int, down: npt.NDArray[np.float64], rank: int, types: Types, start: Start | None
    ) -> Ready:
        began = time.perf_counter()
        trained, held = self._samples(n, e)
        epochs = self.epochs or max(MIN_EPOCHS, min(MAX_EPOCHS, round(ROWS_SEEN / trained.n)))
        recipe = Recipe(rank, types, self.target_miss, epochs, self.seed * 1_000_003 + n * 1009 + e, self.device)
        what = f"layer {n}" + (f" expert {e}" if self.shape.n_expert else "")

        def keep(state: State, figures: Figures) -> None:
            self.folder.keep_state(n, e, state)
            self.count(f"training {what}", state.epoch, epochs)

        fitted = Fit(trained, held, down, recipe, start, self.folder.state(n, e)).run(keep)
        seconds = time.perf_counter() - began
        self.folder.keep_result(n, e, fitted, seconds)
        self.tell(f"{what}: {_line(fitted, rank)}, {seconds:.0f} s")
        return fitted, seconds


def _line(fitted: Fitted, rank: int) -> str:
    f = fitted.figures
    return (
        f"rank {rank}, {fitted.stored.n_bytes:,} bytes, missed {f.missed:.3%}, recall {f.recall:.1%}, precision"
        f" {f.precision:.1%}, predicted/active {f.predicted / max(f.active, 1e-9):.2f}, {fitted.epochs} epochs"
    )


class _Model:
    """The model with exact sparsity, for computing its layers."""

    def __init__(self, path: Path, n_threads: int) -> None:
        self.path, self.n_threads = path, n_threads

    def __enter__(self) -> SparseLlama:
        from tsconv.runtime.model import load

        self.llama = load(self.path, sparsity="exact", n_threads=self.n_threads, n_ctx=1, n_batch=1)
        return self.llama

    def __exit__(self, *_: object) -> None:
        self.llama.close()
