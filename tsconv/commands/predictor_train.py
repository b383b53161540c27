"""`predictor train`: predictors for a converted model, from what it computes on a text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.arch.family import Output
from tsconv.checkpoint.config import MAX_DIM
from tsconv.errors import OutputError, TsconvError
from tsconv.eval.predictor import down_energies
from tsconv.extras import require
from tsconv.format.header import Header
from tsconv.format.order import dimension, shape_of
from tsconv.format.pair import read_model, read_sidecar, sidecar_path
from tsconv.format.types import DEFAULTS, fitting, predictor_matrix_type
from tsconv.machine.limits import usable_cores
from tsconv.predictor.train import sidecar
from tsconv.predictor.train.calibrate import Figures, together
from tsconv.predictor.train.fit import Fit, Fitted, Recipe, Start, State, use_threads
from tsconv.predictor.train.ranks import PROBE_EXPERTS, Layout, choose_ranks, probe_ranks, probe_tokens
from tsconv.predictor.train.record import groups, record, take_chunks
from tsconv.predictor.train.rounding import Types
from tsconv.predictor.train.samples import BLOCK, HELD, TRAINED, open_samples
from tsconv.predictor.train.work import Work
from tsconv.transform.quantize import TYPES, type_name

if TYPE_CHECKING:
    from tsconv.runtime.model import SparseLlama
    from tsconv.stats.text.corpus import Corpus

DEFAULT_TOKENS = 400_000
DEFAULT_CHUNK = 512
DEFAULT_MISS = 0.01
DEFAULT_DISK = 20 << 30
ROWS_SEEN = 1_600_000  # that an FFN is trained on by default, in MIN_EPOCHS to MAX_EPOCHS passes
MIN_EPOCHS, MAX_EPOCHS = 4, 24
AUTO = "auto"


@dataclass(frozen=True)
class LayerResult:
    """Of a layer: its rank, the bytes of its predictors, what they do, and each expert alone where there are several.

    `neuron_bytes` is what a neuron's weights take.
    """

    layer: int
    rank: int
    n_bytes: int
    neuron_bytes: int
    figures: Figures
    experts: tuple[Figures, ...]
    epochs: int
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        outfile, n_bytes: the sidecar.
        layers: in order.
        n_tokens: of the text; those that were held out are among them.
        seconds: of this run.
        type_fc1, type_fc2: what the matrices are stored in.
        notes: what the user should know.
    """

    outfile: Path
    n_bytes: int
    layers: tuple[LayerResult, ...]
    n_tokens: int
    seconds: float
    type_fc1: str
    type_fc2: str
    notes: tuple[str, ...]


Tell = Callable[[str], None]
Count = Callable[[str, int, int], None]  # what, done, in all


def train(
    model: str | Path,
    calib: str = "builtin",
    out: str | Path | None = None,
    *,
    rank: int | str = AUTO,
    budget: int | None = None,
    target_miss: float = DEFAULT_MISS,
    outtype: str | None = None,
    refresh: bool = False,
    predictor_path: str | Path | None = None,
    n_tokens: int = DEFAULT_TOKENS,
    chunk: int = DEFAULT_CHUNK,
    text_field: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    work: str | Path | None = None,
    disk: int = DEFAULT_DISK,
    n_threads: int | None = None,
    force: bool = False,
    tell: Tell = lambda line: None,
    count: Count = lambda what, done, total: None,
) -> TrainResult:
    """Trains a predictor for each FFN of a converted model, and writes them as a sidecar of it.

    A run that was cut goes on where it was when it is called again with the same arguments, and ends with the same
    file.

    Args:
        model: `NAME.gguf` written by `convert` or `reorder`.
        calib: the text, see tsconv.stats.text.corpus.open_corpus.
        out: the sidecar; default NAME.predictor.gguf beside the model.
        rank: of all layers, or "auto": that of each layer is chosen.
        budget: bytes that all predictors may take together, with rank "auto"; None: no limit.
        target_miss: share of the output (tsconv.predictor.train.objective) that each predictor may miss on text that
            was held out.
        outtype: of the matrices; None for what `convert` takes beside the model's weights.
        refresh: begin with the predictors that the model has, and keep their ranks unless `rank` is a number.
        predictor_path: those, when they are not beside it.
        n_tokens, chunk, text_field: as for `profile`.
        epochs: passes through the samples at most; None: fewer, the more samples there are.
        seed: of the text's order and of what is drawn.
        device: where torch computes: "cpu", "cuda", "cuda:1", ...
        work: folder for samples and what is ready; default OUT.work beside the sidecar. Removed at the end.
        disk: bytes that samples may take there at a time.
        n_threads: None for the cores this process may use.
        force: replace an existing sidecar.
        tell: called with a line for each FFN that is ready.
        count: called with what is being done and how far it is.

    Raises:
        TsconvError: no torch, no such device, a text that is too short, a folder of another training.
        ModelFileError: the model, or the predictors to begin with, are missing or damaged.
        OutputError: the output exists, or cannot be written; the disk is full. What is ready stays in the folder.
        HubError: the text cannot be reached.
    """
    require("torch", "training predictors", "train")
    from tsconv.stats.text.corpus import open_corpus

    started = time.perf_counter()
    path = Path(model)
    header = read_model(path)
    target = Path(out) if out is not None else sidecar_path(path)
    _check_target(target, path, force)
    _check_device(device)
    shape = _Shape.of(header)
    kinds = _types(header, outtype, shape)
    begin_with = _begin_with(path, predictor_path) if refresh else None
    n_threads = n_threads or usable_cores()
    use_threads(n_threads)
    corpus = open_corpus(calib, seed if Path(calib).exists() else None, text_field)
    task = {
        "pair_id": header.keys["turbosparse.pair_id"],
        "text": [corpus.dataset, corpus.config, corpus.revision],
        "tokens": n_tokens,
        "chunk": chunk,
        "rank": rank,
        "budget": budget,
        "target_miss": target_miss,
        "types": [type_name(kinds.fc1), type_name(kinds.fc2)],
        "refresh": None if begin_with is None else begin_with.keys.get("turbosparse.tensor_crc32"),
        "epochs": epochs,
        "seed": seed,
        "device": device,
        "threads": n_threads,
    }
    folder = Work(Path(work) if work is not None else target.with_name(f"{target.name}.work"), task)
    trainer = _Trainer(path, header, shape, folder, n_threads, target_miss, seed, device, epochs, tell, count)
    tokens = folder.tokens(lambda: trainer.tokens(corpus, chunk, n_tokens))
    if begin_with is not None and rank == AUTO:
        ranks = sidecar.read_ranks(begin_with)
    elif rank == AUTO:
        ranks = trainer.ranks(tokens, kinds, budget, disk)
    else:
        ranks = [int(rank)] * shape.n_layer
    types = [_fit_types(kinds, r, shape) for r in ranks]
    ready = trainer.train(tokens, ranks, types, begin_with, disk)
    about = (
        f"{corpus.dataset} {corpus.config} {corpus.revision}".strip() + f", {tokens.size} tokens, missed {target_miss}"
    )
    stored = [[fitted.stored for fitted, _ in layer] for layer in ready]
    n_bytes = sidecar.write(target, header, ranks, types, stored, about, force)
    folder.close()
    return TrainResult(
        outfile=target,
        n_bytes=n_bytes,
        layers=tuple(_layer_result(n, ranks[n], layer, shape) for n, layer in enumerate(ready)),
        n_tokens=int(tokens.size),
        seconds=time.perf_counter() - started,
        type_fc1=type_name(types[0].fc1),
        type_fc2=type_name(types[0].fc2),
        notes=(*_notes(header, path, target, tokens.size, n_tokens), *_beyond(ready, target_miss), *corpus.notes),
    )


# ---- what is asked for


@dataclass(frozen=True)
class _Shape:
    n_layer: int
    n_ffn: int
    n_embd: int
    n_ff: int
    n_expert: int
    n_used: int
    neuron_bytes: int

    @staticmethod
    def of(header: Header) -> _Shape:
        n_layer, n_ffn, n_ff = shape_of(header)
        n_embd = dimension(header, "llama.embedding_length", MAX_DIM)
        n_expert = header.keys.get("llama.expert_count", 0)
        ffn = [t for t in header.tensors if t.name.startswith("blk.0.ffn_") and ("_gate" in t.name or "_up" in t.name)]
        ffn += [t for t in header.tensors if t.name.startswith("blk.0.ffn_down")]
        n_bytes = sum(t.n_bytes for t in ffn if "_inp" not in t.name) // (n_ffn * n_ff)
        used = header.keys.get("llama.expert_used_count", 1) if n_expert else 1
        return _Shape(n_layer, n_ffn, n_embd, n_ff, n_expert, used, n_bytes)

    @property
    def layout(self) -> Layout:
        return Layout(self.n_layer, self.n_ffn, self.n_used, self.n_embd, self.n_ff, self.neuron_bytes)


def _check_target(target: Path, model: Path, force: bool) -> None:
    from tsconv.write.writer import check_output, refuse_inputs

    if target.suffix != ".gguf":
        raise OutputError("bad name of the output", where=target, expected="a name that ends in .predictor.gguf")
    refuse_inputs([target], [model])
    check_output(target, force)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TsconvError(f"torch cannot compute on {device!r} ({reason})", fix="take --device cpu") from None


def _types(header: Header, outtype: str | None, shape: _Shape) -> Types:
    """The type of the predictors that was asked for, or that `convert` takes beside the model's weights."""
    from tsconv.format.types import parse_predictor_type

    if outtype is not None:
        kind = parse_predictor_type(outtype)
    else:
        ffn = next(t.kind for t in header.tensors if t.name.startswith("blk.0.ffn_gate") and "_inp" not in t.name)
        kind = DEFAULTS[ffn][1] if ffn in DEFAULTS else TYPES["q8_0"]
    return Types(predictor_matrix_type(kind, is_fc2=False), predictor_matrix_type(kind, is_fc2=True))


def _fit_types(kinds: Types, rank: int, shape: _Shape) -> Types:
    """The types that rows of fc1 and fc2 can have."""

    def fits(kind: GGMLQuantizationType, matrix: int, n_rows: int, n_cols: int) -> GGMLQuantizationType:
        name, dims = f"blk.0.ffn_pred_fc{matrix}.weight", (n_rows, n_cols)
        return fitting(kind, Output(name, (), dims, dims, "copy"))

    return Types(fits(kinds.fc1, 1, rank, shape.n_embd), fits(kinds.fc2, 2, shape.n_ff, rank))


def _begin_with(model: Path, predictor_path: str | Path | None) -> Header:
    """The header of the predictors that the model has."""
    return read_sidecar(read_model(model), Path(predictor_path) if predictor_path else None)


def _notes(header: Header, model: Path, target: Path, n_tokens: int, wanted: int) -> list[str]:
    notes = []
    if n_tokens < wanted:
        notes.append(f"the text has {n_tokens:,} tokens in whole chunks, {wanted:,} were asked for")
    if header.keys.get("turbosparse.predictor.kind") == "embedded":
        notes.append(
            "the checkpoint's own predictors are a part of its function: its mask is what it was trained with. The new"
            " ones approximate the FFN without a mask (--sparsity exact), which is another function"
        )
    if target != sidecar_path(model):
        notes.append(f"the model finds these predictors with --predictor {target}")
    return notes


def _beyond(ready: Sequence[Sequence[tuple[Fitted, float]]], target_miss: float) -> list[str]:
    """A line where predictors miss more than they were to."""
    missed = [fitted.figures.missed for layer in ready for fitted, _ in layer]
    beyond = [share for share in missed if share > target_miss * 1.001]
    if not beyond:
        return []
    return [
        f"{len(beyond)} of {len(missed)} predictors miss more than {target_miss:.2%}, up to {max(beyond):.2%}:"
        " give more --tokens, more --epochs, or a higher --rank"
    ]


def _layer_result(n: int, rank: int, layer: Sequence[tuple[Fitted, float]], shape: _Shape) -> LayerResult:
    parts = [fitted.figures for fitted, _ in layer]
    return LayerResult(
        layer=n,
        rank=rank,
        n_bytes=sum(fitted.stored.n_bytes for fitted, _ in layer),
        neuron_bytes=shape.neuron_bytes,
        figures=together(parts),
        experts=tuple(parts) if shape.n_expert else (),
        epochs=max(fitted.epochs for fitted, _ in layer),
        seconds=sum(seconds for _, seconds in layer),
    )


# ---- the work


@dataclass(frozen=True)
class _Trainer:
    path: Path
    header: Header
    shape: _Shape
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
        ranks = choose_ranks(probes, layout, lambda r: _fit_types(kinds, r, self.shape), budget)
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
    ) -> list[list[tuple[Fitted, float]]]:
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

    def _samples(self, n: int, e: int) -> tuple[Any, Any]:
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

    def _fit(self, n: int, e: int, down: npt.NDArray[np.float64], rank: int, types: Types, start: Start | None) -> Any:
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
        f"rank {rank}, {fitted.stored.n_bytes:,} bytes, missed {f.missed:.2%}, recall {f.recall:.1%}, precision"
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
