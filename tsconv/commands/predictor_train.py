"""`predictor train`: predictors for a converted model, from what it computes on a text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsconv.errors import TsconvError
from tsconv.extras import require
from tsconv.format.header import Header
from tsconv.format.pair import read_model, read_sidecar, sidecar_path
from tsconv.format.types import DEFAULTS, parse_predictor_type, predictor_matrix_type
from tsconv.machine.limits import usable_cores
from tsconv.predictor import TARGET_MISS
from tsconv.predictor.sidecar import check_target
from tsconv.predictor.train import sidecar
from tsconv.predictor.train.calibrate import Figures, together
from tsconv.predictor.train.fit import use_threads
from tsconv.predictor.train.ranks import check_budget
from tsconv.predictor.train.rounding import Types
from tsconv.predictor.train.trainer import Count, Ready, Shape, Tell, Trainer, fit_types
from tsconv.predictor.train.work import Work
from tsconv.transform.quantize import TYPES, type_name

DEFAULT_TOKENS = 400_000
DEFAULT_CHUNK = 512
DEFAULT_DISK = 20 << 30
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


def train(
    model: str | Path,
    calib: str = "builtin",
    out: str | Path | None = None,
    *,
    rank: int | str = AUTO,
    budget: int | None = None,
    target_miss: float = TARGET_MISS,
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
        epochs: passes through the samples at most, several for one where they are few; None: fewer, the more there are.
        seed: of the text's order and of what is drawn.
        device: where torch computes: "cpu", "cuda", "cuda:1", ...
        work: folder for samples and what is ready; default OUT.work beside the sidecar. Removed at the end.
        disk: bytes that samples may take there at a time.
        n_threads: None for the cores this process may use.
        force: replace an existing sidecar.
        tell: called with a line for each FFN that is ready.
        count: called with what is being done and how far it is.

    Raises:
        TsconvError: no torch, no such device, a budget that is too small, a text that is too short, a folder of another
            training.
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
    check_target(target, path, force)
    _check_device(device)
    shape = Shape.of(header)
    kinds = _types(header, outtype)
    begin_with = _begin_with(path, predictor_path) if refresh else None
    if budget is not None:
        _check_budget(budget, rank, refresh, shape, kinds)
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
    trainer = Trainer(path, header, shape, folder, n_threads, target_miss, seed, device, epochs, tell, count)
    tokens = folder.tokens(lambda: trainer.tokens(corpus, chunk, n_tokens))
    if begin_with is not None and rank == AUTO:
        ranks = sidecar.read_ranks(begin_with)
    elif rank == AUTO:
        ranks = trainer.ranks(tokens, kinds, budget, disk)
    else:
        ranks = [int(rank)] * shape.n_layer
    types = [fit_types(kinds, r, shape) for r in ranks]
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


def _check_budget(budget: int, rank: int | str, refresh: bool, shape: Shape, kinds: Types) -> None:
    if rank != AUTO or refresh:
        raise TsconvError("a budget chooses ranks", expected="--budget with --rank auto, without --refresh")
    check_budget(shape.layout, lambda r: fit_types(kinds, r, shape), budget)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TsconvError(f"torch cannot compute on {device!r} ({reason})", fix="take --device cpu") from None


def _types(header: Header, outtype: str | None) -> Types:
    """The type of the predictors that was asked for, or that `convert` takes beside the model's weights."""
    if outtype is not None:
        kind = parse_predictor_type(outtype)
    else:
        ffn = next(t.kind for t in header.tensors if t.name.startswith("blk.0.ffn_gate") and "_inp" not in t.name)
        kind = DEFAULTS[ffn][1] if ffn in DEFAULTS else TYPES["q8_0"]
    return Types(predictor_matrix_type(kind, is_fc2=False), predictor_matrix_type(kind, is_fc2=True))


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


def _beyond(ready: Sequence[Sequence[Ready]], target_miss: float) -> list[str]:
    """A line where predictors miss more than they were to."""
    missed = [fitted.figures.missed for layer in ready for fitted, _ in layer]
    beyond = [share for share in missed if share > target_miss * 1.001]
    if not beyond:
        return []
    return [
        f"{len(beyond)} of {len(missed)} predictors miss more than {target_miss:.3%}, up to {max(beyond):.3%}:"
        " give more --tokens, more --epochs, or a higher --rank"
    ]


def _layer_result(n: int, rank: int, layer: Sequence[Ready], shape: Shape) -> LayerResult:
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
