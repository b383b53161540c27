"""`reorder`: the hot neurons of a converted model first. The command line is a thin shell over it.

Rows move whole, so nothing is computed: the same bytes in another order, in model and sidecar alike. Panels are taken
apart into rows and put together again; bundles move as they are.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES

from tsconv.checkpoint.config import MAX_DIM
from tsconv.errors import ModelFileError, OutputError
from tsconv.format import checksums, layouts
from tsconv.format.forms import neuron_tensors
from tsconv.format.header import Header, TensorEntry
from tsconv.format.keys import ARCHITECTURE, add_neuron_order
from tsconv.format.order import HOT_FIRST, KEY, dimension, neuron_order
from tsconv.format.pair import fingerprint_of, layout_of, open_pair, sidecar_path
from tsconv.format.types import takes_panels
from tsconv.progress import Progress, counter
from tsconv.signals import sigterm_exits
from tsconv.stats import file as stats_file
from tsconv.stats.heat import described, hot_order
from tsconv.transform.bundles import GATE, PARTS, names_of_layer
from tsconv.transform.neuron_order import Order, between, by_tensor
from tsconv.transform.panels import from_panels, panel_step, to_panels
from tsconv.transform.quantize import type_name
from tsconv.write.writer import OutputFiles, StreamedFile, refuse_inputs

PIECE = 16 << 20  # bytes copied at a time


@dataclass(frozen=True)
class ReorderResult:
    """What `reorder` did. Sizes in bytes; `profile` is the text whose statistics chose the order, for people."""

    model: Path
    sidecar: Path | None
    profile: str
    sparsity: str
    notes: tuple[str, ...]
    model_bytes: int
    sidecar_bytes: int
    seconds: float


def reorder(
    model: str | Path,
    profile: str | Path,
    outfile: str | Path | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> ReorderResult:
    """Writes `model` and its sidecar again with the hottest neurons of each FFN first (docs/format.md).

    Args:
        model: NAME.gguf; its sidecar is taken from beside it.
        profile: statistics of the same checkpoint (tsconv profile), made with this or another conversion of it.
        outfile: the model to write; default NAME-hot.gguf beside the model. The sidecar goes beside it.
        force: replace existing outputs.
        progress: called with (bytes done, bytes in all).

    Raises:
        ModelFileError: model, sidecar or statistics are missing or damaged, or do not belong together.
        OutputError: the output exists, is one of the inputs, or cannot be written.
    """
    started = time.perf_counter()
    model, profile = Path(model), Path(profile)
    stats = stats_file.load(profile)
    headers = open_pair(model).headers
    fingerprint_of(headers[0])
    stats.check_model(headers[0])
    stored = neuron_order(headers[0])
    wanted = hot_order(stats, stored.shape)
    is_moe = bool(headers[0].keys.get("llama.expert_count"))
    parts = by_tensor(between(stored, wanted), is_moe, neuron_tensors(headers[1]) if len(headers) > 1 else {})

    targets = _targets(outfile, model, [*(header.path for header in headers), profile])
    files = [StreamedFile(path, ARCHITECTURE) for path in targets[: len(headers)]]
    pair_id = secrets.token_hex(16)
    for header, file, rows in zip(headers, files, parts, strict=False):
        _check_neuron_tensors(header, rows)
        _copy_header(header, file, pair_id)
    add_neuron_order(files[0].header, wanted, described(stats), stats.subject.sparsity)
    with sigterm_exits(), OutputFiles(files, targets[len(headers) :], force) as output_files:
        _write(headers, files, parts, progress)
        sizes = output_files.commit()
    alone = len(headers) == 1 and headers[0].keys.get("turbosparse.predictor.kind") != "none"
    return ReorderResult(
        model=targets[0],
        sidecar=targets[1] if len(headers) > 1 else None,
        profile=described(stats),
        sparsity=stats.subject.sparsity,
        notes=(f"there was no predictor sidecar beside {model}: the new model runs with exact sparsity only",)
        if alone
        else (),
        model_bytes=sizes[0],
        sidecar_bytes=sizes[1] if len(headers) > 1 else 0,
        seconds=time.perf_counter() - started,
    )


def _targets(outfile: str | Path | None, model: Path, inputs: list[Path]) -> list[Path]:
    """The model to write and its sidecar. Raises OutputError for a bad name, or one of the inputs'."""
    target = Path(outfile) if outfile is not None else model.with_name(f"{model.stem}-hot.gguf")
    if target.suffix != ".gguf":
        raise OutputError("bad name of the output", where=target, expected="a name that ends in .gguf")
    targets = [target, sidecar_path(target)]
    refuse_inputs(targets, inputs)
    return targets


def _write(
    headers: Sequence[Header],
    files: Sequence[StreamedFile],
    parts: Sequence[Mapping[str, Order]],
    progress: Progress | None,
) -> None:
    """All of each file but its end; `parts` are the orders of the model's tensors, then of the sidecar's."""
    count = counter(progress, sum(tensor.n_bytes for header in headers for tensor in header.tensors))
    for file in files:
        file.begin()
    for header, file, rows in zip(headers, files, parts, strict=False):
        for piece in _tensor_data(header, rows):
            file.write_on(piece)
            if count:
                count(piece.nbytes)


def _check_neuron_tensors(header: Header, parts: Mapping[str, Order]) -> None:
    """Refuses a file without one of the tensors that are to be reordered, or with one of another shape."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    n_embd = dimension(header, "llama.embedding_length", MAX_DIM)
    for name, order in parts.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise ModelFileError("the tensor is missing", where=f"{header.path}: {name}", fix="convert again")
        n_ffn, n_ff = order.shape
        # fastest dimension first; fc2 has the layer's rank
        width = tensor.shape[0] if ".ffn_pred_" in name else n_embd
        expected = (n_ff, width, n_ffn) if ".ffn_down" in name else (width, n_ff, n_ffn)
        found = (*tensor.shape, 1, 1)
        if found[:3] != expected or any(n != 1 for n in found[3:]) or width % GGML_QUANT_SIZES[tensor.kind][0]:
            raise ModelFileError(
                "wrong shape",
                where=f"{header.path}: {name}",
                expected=f"{list(expected)} in whole blocks of {GGML_QUANT_SIZES[tensor.kind][0]}",
                found=list(found[:3]),
                fix="convert again",
            )


def _copy_header(header: Header, file: StreamedFile, pair_id: str) -> None:
    """All keys with their types, but those that say the order; and the tensor table."""
    changed = {"turbosparse.pair_id": pair_id, KEY: HOT_FIRST}
    for key, value in header.keys.items():
        kind = header.types[key]
        if key in ("general.architecture", checksums.KEY) or key.startswith(f"{KEY}."):
            continue  # the first is there already, the others are written anew
        if kind.element is not None and not value:
            raise ModelFileError(f"key {key} is an empty array, which cannot be written", where=header.path)
        file.header.add_key_value(key, changed.get(key, value), kind.kind, kind.element)
    file.header.data_alignment = header.keys.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    for tensor in header.tensors:
        file.declare(tensor.name, tensor.shape[::-1], tensor.kind, tensor.n_bytes)


def _tensor_data(header: Header, parts: Mapping[str, Order]) -> Iterator[np.ndarray]:
    """The bytes of all tensors in the order of the table, uint8, at most PIECE, one row or one panel at a time.

    In memory is no more than the matrix of one FFN (in bundles: the three matrices) and, for panels, some pieces. The
    bytes of a layer's bundles come as if its three tensors were one.
    """
    layout = layout_of(header)
    panels, bundles = layout == layouts.PREDICTOR.other, layout == layouts.FFN.other
    try:
        with open(header.path, "rb", buffering=0) as file:
            for tensor in header.tensors:
                file.seek(tensor.offset)
                if tensor.name not in parts:
                    for start in range(0, max(1, tensor.n_bytes), PIECE):
                        yield _read(file, min(PIECE, tensor.n_bytes - start), header.path)
                elif panels and takes_panels(tensor.name, tensor.kind):
                    yield from _permuted_panels(file, tensor, parts[tensor.name], header.path)
                elif not bundles:
                    yield from _permuted(file, [tensor], parts[tensor.name], header.path)
                elif GATE.match(tensor.name):  # up and down of the bundles come with it
                    yield from _permuted(file, _bundle(header, tensor.name), parts[tensor.name], header.path)
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}", where=header.path) from None


def _bundle(header: Header, first: str) -> Sequence[TensorEntry]:
    """The tensors that hold the bundles of a layer, whose gate is `first`."""
    at = [tensor.name for tensor in header.tensors].index(first)
    pieces = header.tensors[at : at + len(PARTS)]
    if [piece.name for piece in pieces] != list(names_of_layer(first)) or len({piece.kind for piece in pieces}) != 1:
        raise ModelFileError(
            "bundles that cannot be reordered",
            where=f"{header.path}: {first}",
            expected=f"{', '.join(names_of_layer(first))} one behind the other, of one type",
            found=", ".join(f"{piece.name} {type_name(piece.kind)}" for piece in pieces),
            fix="convert again",
        )
    return pieces


def _permuted(file: FileIO, pieces: Sequence[TensorEntry], order: Order, path: Path) -> Iterator[np.ndarray]:
    """The rows (bundles) of a matrix that lies in `pieces`, one behind the other."""
    row_bytes = sum(piece.n_bytes for piece in pieces) // order.size
    step = max(1, PIECE // row_bytes)
    for ffn, neurons in enumerate(order):
        n_bytes = len(neurons) * row_bytes
        rows = _read_across(file, pieces, ffn * n_bytes, n_bytes, path).reshape(len(neurons), row_bytes)
        for start in range(0, len(neurons), step):
            yield rows[neurons[start : start + step]]


def _read_across(file: FileIO, pieces: Sequence[TensorEntry], start: int, n_bytes: int, path: Path) -> np.ndarray:
    """Bytes [start, start + n_bytes) of the pieces as if they were one tensor."""
    data = np.empty(n_bytes, np.uint8)
    before = 0
    for piece in pieces:
        begin, end = max(start, before), min(start + n_bytes, before + piece.n_bytes)
        if begin < end:
            file.seek(piece.offset + begin - before)
            data[begin - start : end - start] = _read(file, end - begin, path)
        before += piece.n_bytes
    return data


def _permuted_panels(file: FileIO, tensor: TensorEntry, order: Order, path: Path) -> Iterator[np.ndarray]:
    row_bytes = tensor.n_bytes // order.size
    step = panel_step(PIECE // row_bytes)
    for neurons in order:
        rows = np.empty((len(neurons), row_bytes), np.uint8)
        for start in range(0, len(neurons), step):
            n = min(step, len(neurons) - start)
            stored = _read(file, n * row_bytes, path).reshape(n, row_bytes)
            rows[start : start + n] = from_panels(stored, tensor.kind)
        for start in range(0, len(neurons), step):
            yield to_panels(rows[neurons[start : start + step]], tensor.kind)


def _read(file: FileIO, n_bytes: int, path: Path) -> np.ndarray:
    """The next bytes, uint8 [n_bytes]."""
    data = np.empty(n_bytes, np.uint8)
    view, done = data.data, 0
    while done < n_bytes:
        n = file.readinto(view[done:])
        if not n:
            raise ModelFileError("became shorter while it was read", where=path, fix="start again")
        done += n
    return data
