"""Predictors for a converted model, made of its weights alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from tsconv.checkpoint.config import MAX_DIM
from tsconv.errors import HubError, TsconvError
from tsconv.format import forms
from tsconv.format.header import Header
from tsconv.format.order import dimension, shape_of
from tsconv.format.pair import read_model, sidecar_path
from tsconv.format.rows import ffn_rows
from tsconv.format.types import parse_type
from tsconv.predictor import TARGET_MISS, sidecar
from tsconv.predictor.from_weights import calibrate, kinds
from tsconv.predictor.from_weights.record import Recorded, group_of, record
from tsconv.runtime.model import SparseLlama, load
from tsconv.signals import sigterm_exits
from tsconv.transform import bits
from tsconv.transform.panels import PANEL_ROWS
from tsconv.transform.quantize import block_size, type_name

Floats = npt.NDArray[np.float32]

KINDS = ("sign", "quant", "svd")
CHUNK = 512  # tokens that are computed together
DEFAULT_TYPES = {"quant": "bits2", "svd": "q8_0"}
DEFAULT_INPUT_BITS = {"sign": 1, "quant": 8}
RANK_STEP = 32  # ranks are a multiple of the blocks of q8_0 and q4_0


@dataclass(frozen=True)
class Kind:
    """What is to be built: as the options of `build`, with their defaults filled in.

    Attributes:
        type_: a ggml type, or "bits1" or "bits2"; None for "sign".
        both: up beside gate.
        rank: of "svd".
        input_bits: for bits1 and bits2.
    """

    name: str
    type_: GGMLQuantizationType | str | None
    both: bool
    rank: int | None
    input_bits: int | None

    def make(self, gate: Floats, up: Floats) -> kinds.Predictor:
        if self.name == "sign":
            return kinds.sign(gate, up, self.input_bits or 1)
        if self.name == "quant":
            assert self.type_ is not None
            return kinds.quant(gate, up, self.type_, self.both, self.input_bits or 0)
        assert isinstance(self.type_, GGMLQuantizationType) and self.rank is not None
        return kinds.svd(gate, self.rank, self.type_)

    def __str__(self) -> str:
        parts = [self.name]
        if self.type_ is not None:
            parts.append(self.type_ if isinstance(self.type_, str) else type_name(self.type_))
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        if self.name == "quant":
            parts.append("gate and up" if self.both else "gate")
        if self.input_bits is not None:
            parts.append(f"{self.input_bits} bits of x")
        return ", ".join(parts)


@dataclass(frozen=True)
class BuildResult:
    """What `build` wrote.

    Attributes:
        sidecar: its path, and n_bytes its size.
        kind: what it has, in words.
        bytes_per_token: that a token reads of it.
        tokens: that the margins were chosen on; 0: they are 0.
        notes: what the user should know.
    """

    sidecar: Path
    n_bytes: int
    kind: str
    bytes_per_token: int
    tokens: int
    seconds: float
    notes: tuple[str, ...]


def build(
    model: str | Path,
    kind: str,
    *,
    out: str | Path | None = None,
    type_: str | None = None,
    both: bool | None = None,
    rank: int | None = None,
    input_bits: int | None = None,
    calib: str | None = None,
    n_tokens: int = 4096,
    target_miss: float = TARGET_MISS,
    n_threads: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildResult:
    """Writes a sidecar whose predictors are made of gate and up of a converted model, without training.

    Args:
        model: `NAME.gguf`; one with predictors of its own keeps them unless they are replaced by `out` and `force`.
        kind: of KINDS (tsconv.predictor.from_weights.kinds).
        out: the sidecar; default NAME.predictor.gguf beside the model.
        type_: of quant: "bits1", "bits2" or a type that `convert` knows; of svd: such a type. Defaults: DEFAULT_TYPES.
        both: of quant: up beside gate, twice the bytes. Default: it is not.
        rank: of svd; a multiple of RANK_STEP. Default: about a quarter of n_embd.
        input_bits: of x beside bits1 and bits2, 1 to 8. Defaults: DEFAULT_INPUT_BITS.
        calib: text on which each neuron's margin is chosen, see tsconv.stats.text.corpus.open_corpus. None: all are 0.
        n_tokens: of that text; fewer where it is shorter.
        target_miss: share of the FFN's output that margins may miss on it (tsconv.predictor.from_weights.calibrate).
        n_threads: as for tsconv.load.
        force: replace an existing sidecar.
        progress: called with (layers done, layers).

    Raises:
        TsconvError: options that do not fit the model or each other, or no text.
        ModelFileError: the model is missing or damaged.
        OutputError: the sidecar exists, or cannot be written.
    """
    started = time.perf_counter()
    path = Path(model)
    header = read_model(path)
    wanted = _wanted(header, kind, type_, both, rank, input_bits)
    target = Path(out) if out is not None else sidecar_path(path)
    sidecar.check_target(target, path, force)
    if not 0 < target_miss < 1:
        raise TsconvError("share that may be missed", expected="above 0 and below 1", found=target_miss)
    n_layer, n_ffn, n_ff = shape_of(header)
    margins = None if calib is None else _Margins(header, wanted, calib, n_tokens, target_miss, n_threads)

    def tensors_of(layer: int) -> list[list[sidecar.Tensor]]:
        made = [wanted.make(*_gate_and_up(header, layer, e)) for e in range(n_ffn)]
        chosen = [None] * n_ffn if margins is None else margins.of(layer, made)
        progress(layer + 1, n_layer)
        return [_tensors(predictor, of) for predictor, of in zip(made, chosen, strict=True)]

    first = wanted.make(*_gate_and_up(header, 0, 0))
    none = np.zeros((len(first.form.neurons), n_ff), np.float32)
    shapes = _tensors(first, None if margins is None else none)
    decision = sidecar.Decision(
        form=first.form,
        thresholds=[0.0] * n_layer,
        about=f"tsconv predictor build: {wanted}; " + ("margins of 0" if margins is None else margins.about),
        ranks=None if wanted.rank is None else [wanted.rank] * n_layer,
        input_bits=wanted.input_bits,
    )
    try:
        with sigterm_exits():
            n_bytes = sidecar.write(target, header, decision, shapes, tensors_of, force)
    finally:
        if margins is not None:
            margins.close()
    n_used = header.keys.get("llama.expert_used_count", 1) if header.keys.get("llama.expert_count") else 1
    return BuildResult(
        sidecar=target,
        n_bytes=n_bytes,
        kind=str(wanted),
        bytes_per_token=n_layer * n_used * sum(tensor.rows.nbytes for tensor in shapes),
        tokens=0 if margins is None else margins.tokens,
        seconds=time.perf_counter() - started,
        notes=tuple(_notes(header, path, target, margins)),
    )


def _wanted(
    header: Header, kind: str, type_: str | None, both: bool | None, rank: int | None, input_bits: int | None
) -> Kind:
    """Raises TsconvError for options that do not fit the kind or the model."""
    if kind not in KINDS:
        raise TsconvError(f"unknown kind {kind!r}", expected=f"one of {', '.join(KINDS)}")
    for option, value, of in (
        ("--type", type_, ("quant", "svd")),
        ("--rank", rank, ("svd",)),
        ("--both", both or None, ("quant",)),
        ("--input-bits", input_bits, ("sign", "quant")),
    ):
        if value is not None and kind not in of:
            raise TsconvError(f"{option} is for --kind {' and '.join(of)}", found=f"--kind {kind}")
    n_embd = dimension(header, "llama.embedding_length", MAX_DIM)
    n_ff = shape_of(header)[2]
    text = type_ or DEFAULT_TYPES.get(kind)
    found = None if text is None else text if kind == "quant" and text in bits.NAMES.values() else parse_type(text)
    is_bits = kind == "sign" or isinstance(found, str)
    if is_bits and (n_embd % bits.BLOCK or n_ff % PANEL_ROWS):
        raise TsconvError(
            "weights of 1 and 2 bits do not fit this model",
            where=header.path,
            expected=f"n_embd a multiple of {bits.BLOCK}, n_ff a multiple of {PANEL_ROWS}",
            found=f"{n_embd}, {n_ff}",
            fix="use --kind quant --type q8_0",
        )
    if input_bits is not None and (not is_bits or not 1 <= input_bits <= bits.MAX_INPUT_BITS):
        raise TsconvError(
            "--input-bits", expected=f"1 to {bits.MAX_INPUT_BITS}, beside bits1 and bits2", found=f"{input_bits}"
        )
    if kind == "svd":
        rank = rank if rank is not None else max(RANK_STEP, n_embd // 4 // RANK_STEP * RANK_STEP)
        if not RANK_STEP <= rank <= min(n_embd, n_ff) or rank % RANK_STEP:
            raise TsconvError(
                "--rank", expected=f"a multiple of {RANK_STEP} up to {min(n_embd, n_ff)}", found=str(rank)
            )
    if isinstance(found, GGMLQuantizationType):
        lengths = (n_embd,) if rank is None else (n_embd, rank)
        if any(n % block_size(found) for n in lengths):
            raise TsconvError(
                f"type {type_name(found)} does not fit this model's predictors",
                where=header.path,
                expected=f"rows of a multiple of {block_size(found)} weights",
                found=" and ".join(map(str, lengths)),
                fix="choose another --type",
            )
    n_bits = (input_bits or DEFAULT_INPUT_BITS[kind]) if is_bits else None
    return Kind(kind, found, bool(both) or kind == "sign", rank, n_bits)


def _gate_and_up(header: Header, layer: int, ffn: int) -> tuple[Floats, Floats]:
    n_ff = shape_of(header)[2]
    gate, up = (ffn_rows(header, layer, part, ffn * n_ff, n_ff) for part in ("gate", "up"))
    return gate, up


def _tensors(predictor: kinds.Predictor, margins: Floats | None) -> list[sidecar.Tensor]:
    """Of an FFN. margins: float32 [matrices with rows of neurons, n_ff]."""
    tensors = []
    for what in predictor.form.matrices:
        matrix = predictor.matrices[what]
        n_rows, n_cols = matrix.values.shape
        n_elements = n_cols // bits.PER_ELEMENT if matrix.kind in bits.NAMES else n_cols
        tensors.append(sidecar.Tensor(what, matrix.rows, matrix.kind, (n_rows, n_elements)))
    if margins is not None:
        shape = (*margins.shape[: len(margins) - 1], margins.shape[1], 1)
        rows = np.ascontiguousarray(margins).view(np.uint8).reshape(margins.size, 4)
        tensors.append(sidecar.Tensor(forms.THRESHOLD, rows, GGMLQuantizationType.F32, shape))
    return tensors


class _Margins:
    """The margins of a model's layers, chosen on a text; layers are asked for in their order."""

    def __init__(
        self, header: Header, kind: Kind, calib: str, n_tokens: int, target_miss: float, n_threads: int | None
    ) -> None:
        self.header, self.target_miss = header, target_miss
        self.n_layer, self.n_ffn, self.n_ff = shape_of(header)
        self.n_embd = dimension(header, "llama.embedding_length", MAX_DIM)
        self._llama = load(
            header.path, sparsity="exact", n_ctx=1, n_batch=1, n_gpu_layers=0, n_threads=n_threads, header=header
        )
        try:
            self.chunks, dataset = _chunks(self._llama, calib, n_tokens)
        except BaseException:
            self._llama.close()
            raise
        self.tokens = sum(map(len, self.chunks))
        self.about = f"margins of neurons on {self.tokens} tokens of {dataset}, {100 * target_miss:g} % missed"
        self._recorded, self._group = Recorded(range(0), 0, 0, 0), range(0)

    def of(self, layer: int, predictors: Sequence[kinds.Predictor]) -> list[Floats]:
        """Of each FFN: float32 [matrices with rows of neurons, n_ff]."""
        if layer not in self._group:
            n_used = self.header.keys.get("llama.expert_used_count", 1) if self.n_ffn > 1 else 1
            self._group = group_of(layer, self.n_layer, self.tokens, n_used, self.n_embd, self.n_ff)
            self._recorded = Recorded(self._group, self.n_ffn, self.n_embd, self.n_ff)
            record(self._llama, self.chunks, self._group, self._recorded)
        seen = [self._recorded.take(layer, e) for e in range(self.n_ffn)]
        downs = [self._down_energies(layer, e) for e in range(self.n_ffn)]
        energies = [calibrate.energies(h, down) for (_, h), down in zip(seen, downs, strict=True)]
        typical = float(np.median(np.concatenate(energies)))
        samples = [
            calibrate.Sample(predictor.logits(x), calibrate.shares(h, down, typical))
            for predictor, (x, h), down in zip(predictors, seen, downs, strict=True)
        ]
        return calibrate.margins(samples, self.target_miss)

    def _down_energies(self, layer: int, ffn: int) -> npt.NDArray[np.float64]:
        rows = ffn_rows(self.header, layer, "down", ffn * self.n_ff, self.n_ff)
        return np.einsum("ij,ij->i", rows, rows, dtype=np.float64)

    def close(self) -> None:
        self._llama.close()


def _chunks(llama: SparseLlama, calib: str, n_tokens: int) -> tuple[list[list[int]], str]:
    """At most n_tokens tokens in chunks, and the name of the text. Raises TsconvError without a whole chunk."""
    from tsconv.stats.text.chunks import chunks
    from tsconv.stats.text.corpus import open_corpus

    corpus = open_corpus(calib)
    bos = llama.token_bos() if llama.token_bos() >= 0 else None
    size = min(CHUNK, n_tokens)
    found: list[list[int]] = []
    try:
        for chunk in chunks(lambda text: llama.tokenize(text, add_bos=False, special=False), bos, corpus, size):
            found.append(list(chunk))
            if len(found) * size >= n_tokens:
                break
    except TsconvError as error:
        if corpus.incomplete is None:
            raise
        raise HubError(f"{corpus.incomplete}; {error}", where=corpus.dataset) from None
    return found, corpus.dataset


def _notes(header: Header, model: Path, target: Path, margins: _Margins | None) -> Iterator[str]:
    if margins is None:
        yield "all margins are 0, which no text was asked about: --calib builtin chooses them"
    if header.keys.get("turbosparse.predictor.kind") == "embedded":
        yield "the model was trained with the predictors of its checkpoint as part of it: with these it differs"
    if target != sidecar_path(model):
        yield f"run it with --predictor {target}"
