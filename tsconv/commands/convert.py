"""`convert`: a dReLU checkpoint to a GGUF model and its predictor sidecar. The command line is a thin shell over it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from tsconv.arch import FAMILIES
from tsconv.arch.family import Family
from tsconv.arch.match import Matched, has_predictors, match, predictor_ranks, refuse_leftovers
from tsconv.checkpoint.config import ModelConfig, read_config
from tsconv.checkpoint.fingerprint import compute_fingerprint
from tsconv.checkpoint.names import refuse_adapter_folder
from tsconv.checkpoint.predictor import external_tensors
from tsconv.checkpoint.safetensors_reader import open_checkpoint
from tsconv.checkpoint.source import CHECKPOINT_FILES, PREDICTOR_FILES, Source, resolve
from tsconv.checkpoint.tied import resolve_tied
from tsconv.checkpoint.tokenizer import Tokenizer, load_tokenizer
from tsconv.errors import CheckpointError, ModelFileError, OutputError, TsconvError
from tsconv.format import keys, layouts
from tsconv.format.order import CHECKPOINT, HOT_FIRST
from tsconv.format.pair import sidecar_path
from tsconv.format.types import (
    FC1,
    FC2,
    Choice,
    choose_types,
    fallback_note,
    parse_override,
    parse_predictor_type,
    parse_type,
)
from tsconv.stats import file as stats_file
from tsconv.stats.counts import Stats
from tsconv.stats.heat import described, hot_order
from tsconv.transform import q3_nl, qkv
from tsconv.transform.bundles import GATE, names_of_layer
from tsconv.transform.neuron_order import Order, by_tensor
from tsconv.transform.quantize import type_name
from tsconv.write.stream import Job, Predictor, write_tensors
from tsconv.write.writer import OutputFiles, StreamedFile, refuse_inputs, sigterm_exits

Progress = Callable[[int, int], None]

AUTO = "auto"
LAYOUTS = (AUTO, layouts.FFN.other, layouts.ROWS)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the conversion, as a dry run shows it. `shape` is slowest dimension first."""

    file: str  # "model" or "sidecar"
    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    source_bytes: int
    bytes: int


@dataclass(frozen=True)
class ConversionResult:
    """What `convert` did, or with `dry_run` would do. Sizes in bytes; file sizes are 0 after a dry run.

    `seconds` is the time from the first read to the last fsync, without a download. `notes` say where the checkpoint's
    files do not agree, or say more than a GGUF file can; `type_notes` which tensors have another type than the one
    asked for.
    """

    model: Path
    sidecar: Path | None
    outtype: str
    predictor_kind: str
    neuron_order: str
    ffn_layout: str  # "rows" or "bundles"
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    type_notes: tuple[str, ...]
    model_bytes: int
    sidecar_bytes: int
    input_bytes: int
    seconds: float
    dry_run: bool


@dataclass(frozen=True)
class _Contents:
    """A checkpoint that was read and checked, but for the values of its weights."""

    source: Source
    config: ModelConfig
    family: Family
    tokenizer: Tokenizer
    kind: keys.PredictorKind
    ranks: list[int]
    model: list[Matched]
    sidecar: list[Matched]
    fingerprint: str
    notes: tuple[str, ...]


def convert(
    src: str | Path,
    outfile: str | Path | None = None,
    outtype: str = "q4_0",
    *,
    predictor_outtype: str | None = None,
    predictor: str | Path | None = None,
    profile: str | Path | None = None,
    revision: str | None = None,
    tensor_types: Iterable[str] = (),
    ffn_layout: str = AUTO,
    fuse_qkv: bool = True,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Converts a TurboSparse or Bamboo checkpoint to GGUF (docs/format.md).

    Args:
        src: checkpoint directory, or a repository on the Hugging Face Hub ("OWNER/NAME").
        outfile: the model to write; default NAME-OUTTYPE.gguf in the current directory. The sidecar goes beside it as
            NAME.predictor.gguf.
        outtype: ggml type of the weights, see tsconv.transform.quantize.TYPES.
        predictor_outtype: type of the predictor's matrices, or "q3_nl" for fc2, fc1 being q4_0 then; by default it
            depends on `outtype`.
        predictor: directory or repository with Bamboo's separate predictors (model_N.pt).
        profile: statistics of this checkpoint (tsconv profile); its hot neurons come first then, as after
            tsconv.commands.reorder.reorder. Default: the neurons stay in the checkpoint's order.
        revision: branch, tag or commit of `src` on the Hub.
        tensor_types: "REGEX=TYPE" strings, overriding the type of tensors whose name the expression finds.
        ffn_layout: "bundles" puts gate, up and down of a neuron side by side, with which a predictor's few neurons are
            read faster; "rows" leaves each matrix in a piece, with which exact sparsity is faster; "auto": bundles for
            a model with predictors whose gate, up and down have one type in each layer.
        fuse_qkv: q, k and v of a layer become one matrix where they have one type, which makes attention faster;
            adapters (LoRA) for them need False.
        dry_run: plan and check everything but the weights' values, and write nothing.
        force: replace existing outputs.
        progress: called with (input bytes done, input bytes in all).

    Raises:
        CheckpointError: the checkpoint is damaged or not one that tsconv converts.
        ModelFileError: the statistics are damaged, or those of another checkpoint.
        HubError: a download failed.
        OutputError: the output exists, or cannot be written.
        TsconvError: an unknown type or a bad override.
    """
    kind = parse_type(outtype)
    predictor_kind = parse_predictor_type(predictor_outtype) if predictor_outtype is not None else None
    overrides = [parse_override(text) for text in tensor_types]
    if ffn_layout not in LAYOUTS:
        raise TsconvError(f"unknown layout {ffn_layout!r}", expected=f"one of {', '.join(LAYOUTS)}")
    stats = stats_file.load(Path(profile)) if profile is not None else None
    source = resolve(src, revision, CHECKPOINT_FILES)
    started = time.perf_counter()

    contents = _read(source, predictor)
    outputs = [item.output for item in contents.model + contents.sidecar]
    choices = choose_types(outputs, kind, predictor_kind, overrides)
    order = None if stats is None else _hot_order(stats, contents, Path(profile))
    rows = {} if order is None else {k: v for part in by_tensor(order, contents.family.is_moe) for k, v in part.items()}
    balanced = _balanced(contents.sidecar, choices[len(contents.model) :])
    jobs = [
        Job(item, choice.kind, rows.get(item.output.name), balanced.get(item.output.name))
        for item, choice in zip(contents.model + contents.sidecar, choices, strict=True)
    ]
    bundles = _bundles(jobs, ffn_layout, has_predictor=bool(contents.sidecar))
    n_model = len(contents.model)
    tensors = _tensors(jobs[:n_model], fuse_qkv), _tensors(jobs[n_model:], fuse_qkv)
    input_bytes = sum(job.input_bytes for job in jobs)
    type_notes = (fallback_note(output, choice) for output, choice in zip(outputs, choices, strict=True))

    model = Path(outfile) if outfile is not None else Path(f"{source.name}-{type_name(kind)}.gguf")
    if model.suffix != ".gguf":
        raise OutputError("bad name of the output", where=model, expected="a name that ends in .gguf")
    sidecar = sidecar_path(model)
    refuse_inputs([model, sidecar], [Path(profile)] if profile is not None else [])
    files = [(StreamedFile(model, keys.ARCHITECTURE), jobs[:n_model])]
    if contents.sidecar:
        files.append((StreamedFile(sidecar, keys.ARCHITECTURE), jobs[n_model:]))

    neuron_order = CHECKPOINT if order is None else HOT_FIRST
    sizes = [0, 0]
    if not dry_run:
        _fill_headers(files, tensors, contents, kind, neuron_order, bool(bundles))
        if order is not None:
            keys.add_neuron_order(files[0][0].header, order, described(stats), stats.subject.sparsity)
        obsolete = [] if contents.sidecar else [sidecar]
        with sigterm_exits(), OutputFiles([file for file, _ in files], obsolete, force) as output_files:
            for file, _ in files:
                file.begin()
            write_tensors(files, contents.config.head_dim, bundles, counter(progress, input_bytes))
            sizes = output_files.commit()
    return ConversionResult(
        model=model,
        sidecar=sidecar if contents.sidecar else None,
        outtype=type_name(kind),
        predictor_kind=contents.kind,
        neuron_order=neuron_order,
        ffn_layout=layouts.FFN.other if bundles else layouts.ROWS,
        tensors=tuple(
            tensor.planned(file)
            for file, of_file in zip(("model", "sidecar"), tensors, strict=True)
            for tensor in of_file
        ),
        notes=contents.notes,
        type_notes=tuple(note for note in type_notes if note),
        model_bytes=sizes[0],
        sidecar_bytes=sizes[1] if contents.sidecar else 0,
        input_bytes=input_bytes,
        seconds=time.perf_counter() - started,
        dry_run=dry_run,
    )


def _read(source: Source, predictor: str | Path | None) -> _Contents:
    """Reads and checks everything but the weights' values. `predictor` is where external ones are."""
    refuse_adapter_folder(source.directory)
    moe = frozenset(name for name, family in FAMILIES.items() if family.is_moe)
    config = read_config(source.directory, {name: family.model_type for name, family in FAMILIES.items()}, moe)
    family = FAMILIES[config.architecture]
    config, tensors, notes = resolve_tied(config, open_checkpoint(source.directory))
    kind: keys.PredictorKind = "embedded" if has_predictors(family, config, tensors) else "none"
    if predictor is not None:
        if kind == "embedded":
            raise CheckpointError(
                "--predictor given, but the checkpoint has its own predictors",
                where=source.directory,
                fix="leave out --predictor",
            )
        directory = resolve(predictor, None, PREDICTOR_FILES).directory
        if family.n_expert_predictors:
            raise CheckpointError("external predictors are for dense (Bamboo) models only", where=directory)
        tensors |= external_tensors(directory, config.n_layer, family.predictor_sources)
        kind = "external"

    ranks = predictor_ranks(family, config, tensors) if kind != "none" else []
    model = match(family.model_outputs(config), tensors)
    sidecar = match(family.predictor_outputs(config, ranks), tensors)
    refuse_leftovers(family, config, tensors, model + sidecar)
    tokenizer = load_tokenizer(source.directory, config.n_vocab)
    gates = (source for item in model if GATE.match(item.output.name) for source in item.sources)
    return _Contents(
        source=source,
        config=config,
        family=family,
        tokenizer=tokenizer,
        kind=kind,
        ranks=ranks,
        model=model,
        sidecar=sidecar,
        fingerprint=compute_fingerprint(config, gates),
        notes=(*notes, *tokenizer.notes),
    )


def _hot_order(stats: Stats, contents: _Contents, path: Path) -> Order:
    """The order that `stats`, read from `path`, give the neurons of this checkpoint."""
    if stats.subject.fingerprint != contents.fingerprint:
        raise ModelFileError(
            "the statistics are of another checkpoint",
            where=path,
            expected=f"{contents.source.name}, fingerprint {contents.fingerprint[:12]}",
            found=f"{stats.subject.name}, {stats.subject.fingerprint[:12]}",
            fix="name statistics of a model converted from this checkpoint",
        )
    config = contents.config
    return hot_order(stats, (config.n_layer, max(1, config.n_expert), config.n_ff))


def _balanced(sidecar: list[Matched], choices: list[Choice]) -> dict[str, Predictor]:
    """Each predictor whose fc2 is q3_nl, by the names of both matrices."""
    by_name = {item.output.name: item for item in sidecar}
    predictors = {}
    for fc2, choice in zip(sidecar, choices, strict=True):
        if choice.kind == q3_nl.KIND:
            fc1 = by_name[fc2.output.name.replace(FC2, FC1)]
            predictor = Predictor(*fc1.sources, *fc2.sources)  # one each
            predictors[fc1.output.name] = predictors[fc2.output.name] = predictor
    return predictors


def _bundles(jobs: list[Job], layout: str, has_predictor: bool) -> dict[str, tuple[Job, Job, Job]]:
    """Gate, up and down of each layer by the name of the gate, if they are to be in bundles; else nothing."""
    if layout == layouts.ROWS or (layout == AUTO and not has_predictor):
        return {}
    by_name = {job.output.name: job for job in jobs}
    bundles = {}
    for first in filter(GATE.match, by_name):
        gate, up, down = (by_name[name] for name in names_of_layer(first))
        if not gate.kind == up.kind == down.kind:
            if layout == AUTO:
                return {}
            raise TsconvError(
                f"{first} cannot be in bundles",
                expected="one type for gate, up and down of a layer",
                found=", ".join(type_name(job.kind) for job in (gate, up, down)),
                fix="leave out the --tensor-type that changes one of them, or --ffn-layout",
            )
        bundles[first] = gate, up, down
    return bundles


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file and the jobs whose rows it holds one behind the other: one, or those of q, k and v.

    They follow one another among the jobs too: that is the order in which they are written.
    """

    name: str
    jobs: tuple[Job, ...]

    @property
    def kind(self) -> GGMLQuantizationType:
        return self.jobs[0].kind

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def declared_shape(self) -> tuple[int, ...]:
        return _one_behind_the_other(job.declared_shape for job in self.jobs)

    def planned(self, file: str) -> PlannedTensor:
        return PlannedTensor(
            file=file,
            name=self.name,
            shape=_one_behind_the_other(job.output.shape for job in self.jobs),
            source_type=self.jobs[0].matched.sources[0].dtype.lower(),
            type=type_name(self.kind),
            source_bytes=sum(job.input_bytes for job in self.jobs),
            bytes=self.nbytes,
        )


def _one_behind_the_other(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    first, *others = shapes
    return (first[0] + sum(shape[0] for shape in others), *first[1:])


def _tensors(jobs: list[Job], fuse_qkv: bool) -> list[_Tensor]:
    """The tensors that `jobs` make, in their order."""
    by_name = {job.output.name: job for job in jobs}
    tensors = {}
    for name, job in by_name.items():
        tensor = _Tensor(name, (job,))
        if fuse_qkv and qkv.PART.match(name):
            matrix = qkv.together(name)
            parts = tuple(by_name[part] for part in qkv.parts_of(matrix))
            if len({part.kind for part in parts}) == 1:
                tensor = _Tensor(matrix, parts)
        tensors[tensor.name] = tensor
    return list(tensors.values())


def _fill_headers(
    files: list[tuple[StreamedFile, list[Job]]],
    tensors: tuple[list[_Tensor], list[_Tensor]],
    contents: _Contents,
    outtype: GGMLQuantizationType,
    neuron_order: str,
    in_bundles: bool,
) -> None:
    """Keys and tensor tables of the model, files[0], and the sidecar, files[1] if there is one; `tensors` likewise."""
    source = contents.source
    provenance = keys.Provenance(
        source, secrets.token_hex(16), contents.fingerprint, neuron_order, keys.read_card(source.directory)
    )
    for (file, _), of_file in zip(files, tensors, strict=False):
        keys.add_common(file.header, provenance, contents.config, contents.family)
        for tensor in of_file:
            file.declare(tensor.name, tensor.declared_shape, tensor.kind, tensor.nbytes)
    keys.add_model(files[0][0].header, contents.config, contents.kind, outtype, in_bundles)
    contents.tokenizer.add_to(files[0][0].header)
    if len(files) > 1:
        sidecar, jobs = files[1]
        version = layouts.LAYOUT_VERSION if any(job.in_panels for job in jobs) else layouts.PLAIN_VERSION
        if any(job.kind == q3_nl.KIND for job in jobs):
            version = layouts.Q3_NL_VERSION
        keys.add_sidecar(sidecar.header, contents.family, contents.kind, contents.ranks, version)


def counter(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """Turns increments into (done, total)."""
    if progress is None:
        return None
    done = 0

    def count(increment: int) -> None:
        nonlocal done
        done += increment
        progress(done, total)

    return count
