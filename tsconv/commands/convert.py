"""`convert`: a dReLU checkpoint to a GGUF model and its predictor sidecar. The command line is a thin shell over it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
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
from tsconv.checkpoint.safetensors_reader import SourceTensor, open_checkpoint
from tsconv.checkpoint.source import CHECKPOINT_FILES, PREDICTOR_FILES, Source, resolve
from tsconv.checkpoint.tied import resolve_tied
from tsconv.checkpoint.tokenizer import Tokenizer, load_tokenizer
from tsconv.errors import CheckpointError, ModelFileError, OutputError, TsconvError
from tsconv.format import keys
from tsconv.format.mixes import OutType, mixed, parse_outtype
from tsconv.format.order import CHECKPOINT, HOT_FIRST
from tsconv.format.pair import sidecar_path
from tsconv.format.types import Override, choose_types, parse_override, parse_predictor_type
from tsconv.progress import Progress, counter
from tsconv.signals import sigterm_exits
from tsconv.stats import file as stats_file
from tsconv.stats.counts import Stats
from tsconv.stats.heat import described, hot_order
from tsconv.transform.bundles import GATE
from tsconv.transform.neuron_order import Order, by_tensor
from tsconv.transform.quantize import type_name
from tsconv.write.plan import AUTO, LAYOUTS, FilePlan, Plan, make_plan
from tsconv.write.stream import write_tensors
from tsconv.write.writer import OutputFiles, StreamedFile, refuse_inputs


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
class _Wanted:
    """Types and layout, as asked for: `overrides` as tsconv.format.types.parse_override returns them."""

    outtype: OutType
    predictor_kind: GGMLQuantizationType | None
    overrides: list[Override]
    ffn_layout: str
    fuse_qkv: bool


@dataclass(frozen=True)
class _HotFirst:
    """The order of the neurons, the text whose statistics chose it, and the function that was profiled."""

    order: Order
    profile: str
    sparsity: str


@dataclass(frozen=True)
class _Checkpoint:
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
    tensors: Mapping[str, SourceTensor] | None = None,
) -> ConversionResult:
    """Converts a TurboSparse or Bamboo checkpoint to GGUF (docs/format.md).

    Args:
        src: checkpoint directory, or a repository on the Hugging Face Hub ("OWNER/NAME").
        outfile: the model to write; default NAME-OUTTYPE.gguf in the current directory. The sidecar goes beside it as
            NAME.predictor.gguf.
        outtype: type of the weights, of tsconv.transform.quantize.TYPES or tsconv.format.mixes.MIXES.
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
        tensors: weights by name, instead of those in the safetensors of `src`; read from several threads.

    Raises:
        CheckpointError: the checkpoint is damaged or not one that tsconv converts.
        ModelFileError: the statistics are damaged, or those of another checkpoint.
        HubError: a download failed.
        OutputError: the output exists, or cannot be written.
        TsconvError: an unknown type or a bad override.
    """
    wanted = _parsed(outtype, predictor_outtype, tensor_types, ffn_layout, fuse_qkv)
    stats = stats_file.load(Path(profile)) if profile is not None else None
    source = resolve(src, revision, CHECKPOINT_FILES)
    started = time.perf_counter()

    checkpoint = _read(source, predictor, tensors)
    ordered = None if stats is None or profile is None else _hot_first(stats, checkpoint, Path(profile))
    plan = _plan(checkpoint, wanted, ordered)
    model = _target(outfile, f"{source.name}-{wanted.outtype.name}.gguf", profile)
    sizes = None if dry_run else _write(plan, checkpoint, model, wanted.outtype, ordered, force, progress)
    return _result(checkpoint, plan, model, wanted.outtype, ordered, sizes, time.perf_counter() - started)


def _parsed(
    outtype: str, predictor_outtype: str | None, tensor_types: Iterable[str], ffn_layout: str, fuse_qkv: bool
) -> _Wanted:
    """The arguments of `convert`. Raises TsconvError for one that means nothing."""
    parsed = parse_outtype(outtype)
    predictor_kind = parse_predictor_type(predictor_outtype) if predictor_outtype is not None else None
    overrides = [parse_override(text) for text in tensor_types]
    if ffn_layout not in LAYOUTS:
        raise TsconvError(f"unknown layout {ffn_layout!r}", expected=f"one of {', '.join(LAYOUTS)}")
    return _Wanted(parsed, predictor_kind, overrides, ffn_layout, fuse_qkv)


def read_known_config(directory: Path) -> ModelConfig:
    """`directory`/config.json of a checkpoint of one of FAMILIES. Raises CheckpointError for any other."""
    moe = frozenset(name for name, family in FAMILIES.items() if family.is_moe)
    return read_config(directory, {name: family.model_type for name, family in FAMILIES.items()}, moe)


def _read(
    source: Source, predictor: str | Path | None, weights: Mapping[str, SourceTensor] | None = None
) -> _Checkpoint:
    """Reads and checks everything but the weights' values.

    Args:
        predictor: where external ones are.
        weights: None: those of the checkpoint's own safetensors.
    """
    refuse_adapter_folder(source.directory)
    config = read_known_config(source.directory)
    family = FAMILIES[config.architecture]
    found = open_checkpoint(source.directory) if weights is None else dict(weights)
    config, tensors, notes = resolve_tied(config, found)
    kind: keys.PredictorKind = "embedded" if has_predictors(family, config, tensors) else "none"
    if predictor is not None:
        if kind == "embedded":
            raise CheckpointError(
                "--predictor given, but the checkpoint has its own predictors",
                where=source.directory,
                fix="leave out --predictor",
            )
        directory = resolve(predictor, None, PREDICTOR_FILES).directory
        if family.has_expert_predictors:
            raise CheckpointError("external predictors are for dense (Bamboo) models only", where=directory)
        tensors |= external_tensors(directory, config.n_layer, family.predictor_sources)
        kind = "external"

    ranks = predictor_ranks(family, config, tensors) if kind != "none" else []
    model = match(family.model_outputs(config), tensors)
    sidecar = match(family.predictor_outputs(config, ranks), tensors)
    refuse_leftovers(family, config, tensors, model + sidecar)
    tokenizer = load_tokenizer(source.directory, config.n_vocab)
    gates = (source for item in model if GATE.match(item.output.name) for source in item.sources)
    return _Checkpoint(
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


def _hot_first(stats: Stats, checkpoint: _Checkpoint, path: Path) -> _HotFirst:
    """The order that `stats`, read from `path`, give the neurons of this checkpoint."""
    if stats.subject.fingerprint != checkpoint.fingerprint:
        raise ModelFileError(
            "the statistics are of another checkpoint",
            where=path,
            expected=f"{checkpoint.source.name}, fingerprint {checkpoint.fingerprint[:12]}",
            found=f"{stats.subject.name}, {stats.subject.fingerprint[:12]}",
            fix="name statistics of a model converted from this checkpoint",
        )
    config = checkpoint.config
    order = hot_order(stats, (config.n_layer, max(1, config.n_expert), config.n_ff))
    return _HotFirst(order, described(stats), stats.subject.sparsity)


def _rows(order: Order, family: Family) -> dict[str, Order]:
    """The order of the rows of each tensor whose rows are neurons."""
    model, sidecar = by_tensor(order, family.is_moe)
    return model | sidecar


def _plan(checkpoint: _Checkpoint, wanted: _Wanted, ordered: _HotFirst | None) -> Plan:
    outputs = [item.output for item in checkpoint.model + checkpoint.sidecar]
    return make_plan(
        checkpoint.model,
        checkpoint.sidecar,
        choose_types(
            outputs, wanted.outtype.kind, wanted.predictor_kind, wanted.overrides, mixed(wanted.outtype, outputs)
        ),
        rows={} if ordered is None else _rows(ordered.order, checkpoint.family),
        ffn_layout=wanted.ffn_layout,
        fuse_qkv=wanted.fuse_qkv,
    )


def _target(outfile: str | Path | None, default: str, profile: str | Path | None) -> Path:
    """The model to write.

    Raises:
        OutputError: a name that does not end in .gguf, or the model or its sidecar would replace the profile.
    """
    model = Path(outfile) if outfile is not None else Path(default)
    if model.suffix != ".gguf":
        raise OutputError("bad name of the output", where=model, expected="a name that ends in .gguf")
    refuse_inputs([model, sidecar_path(model)], [Path(profile)] if profile is not None else [])
    return model


def _shown(label: str, file: FilePlan) -> Iterator[PlannedTensor]:
    for tensor in file.tensors:
        yield PlannedTensor(
            file=label,
            name=tensor.name,
            shape=tensor.shape,
            source_type=tensor.source_type,
            type=type_name(tensor.kind),
            source_bytes=tensor.source_bytes,
            bytes=tensor.nbytes,
        )


def _result(
    checkpoint: _Checkpoint,
    plan: Plan,
    model: Path,
    outtype: OutType,
    ordered: _HotFirst | None,
    sizes: tuple[int, int] | None,
    seconds: float,
) -> ConversionResult:
    """What was done; `sizes` are those of the files, None after a dry run."""
    model_bytes, sidecar_bytes = sizes or (0, 0)
    return ConversionResult(
        model=model,
        sidecar=sidecar_path(model) if checkpoint.sidecar else None,
        outtype=outtype.name,
        predictor_kind=checkpoint.kind,
        neuron_order=CHECKPOINT if ordered is None else HOT_FIRST,
        ffn_layout=plan.ffn_layout,
        tensors=(*_shown("model", plan.model), *_shown("sidecar", plan.sidecar)),
        notes=(*checkpoint.notes, *plan.no_gain_notes),
        type_notes=plan.type_notes,
        model_bytes=model_bytes,
        sidecar_bytes=sidecar_bytes,
        input_bytes=plan.input_bytes,
        seconds=seconds,
        dry_run=sizes is None,
    )


def _write(
    plan: Plan,
    checkpoint: _Checkpoint,
    model: Path,
    outtype: OutType,
    ordered: _HotFirst | None,
    force: bool,
    progress: Progress | None,
) -> tuple[int, int]:
    """Writes both files, or none. Returns their sizes in bytes, 0 for a sidecar that there is not."""
    sidecar = sidecar_path(model)
    model_file, sidecar_file = StreamedFile(model, keys.ARCHITECTURE), StreamedFile(sidecar, keys.ARCHITECTURE)
    files = [(model_file, plan.model)]
    if checkpoint.sidecar:
        files.append((sidecar_file, plan.sidecar))
    provenance = keys.Provenance(
        checkpoint.source,
        secrets.token_hex(16),
        checkpoint.fingerprint,
        CHECKPOINT if ordered is None else HOT_FIRST,
        keys.read_card(checkpoint.source.directory),
    )
    for file, planned in files:
        keys.add_common(file.header, provenance, checkpoint.config, checkpoint.family)
        for tensor in planned.tensors:
            file.declare(tensor.name, tensor.declared_shape, tensor.kind, tensor.nbytes)
    keys.add_model(model_file.header, checkpoint.config, checkpoint.kind, outtype, bool(plan.bundles))
    checkpoint.tokenizer.add_to(model_file.header)
    if checkpoint.sidecar:
        version = plan.sidecar.sidecar_version
        keys.add_sidecar(sidecar_file.header, checkpoint.family, checkpoint.kind, checkpoint.ranks, version)
    if ordered is not None:
        keys.add_neuron_order(model_file.header, ordered.order, ordered.profile, ordered.sparsity)
    obsolete = [] if checkpoint.sidecar else [sidecar]
    with sigterm_exits(), OutputFiles([file for file, _ in files], obsolete, force) as output_files:
        for file, _ in files:
            file.begin()
        jobs = [(file, planned.jobs) for file, planned in files]
        write_tensors(jobs, checkpoint.config.head_dim, plan.bundles, counter(progress, plan.input_bytes))
        sizes = output_files.commit()
    return sizes[0], sizes[1] if checkpoint.sidecar else 0
