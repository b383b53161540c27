"""The plan of a conversion: which tensors the files hold, made of what, in which types and layouts. Nothing is read.

A plan is for `tsconv.write.stream`; a dry run shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from tsconv.arch.match import Matched
from tsconv.errors import TsconvError
from tsconv.format import layouts
from tsconv.format.types import FC1, FC2, Choice, fallback_note, no_gain_notes
from tsconv.transform import q3_nl, qkv
from tsconv.transform.bundles import GATE, names_of_layer
from tsconv.transform.neuron_order import Order
from tsconv.transform.quantize import type_name
from tsconv.write.stream import Job, Predictor

AUTO = "auto"
LAYOUTS = (AUTO, layouts.FFN.other, layouts.ROWS)


@dataclass(frozen=True)
class Tensor:
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights, slowest dimension first."""
        return _one_behind_the_other(job.output.shape for job in self.jobs)

    @property
    def source_type(self) -> str:
        return self.jobs[0].matched.sources[0].dtype.lower()

    @property
    def source_bytes(self) -> int:
        return sum(job.input_bytes for job in self.jobs)


def _one_behind_the_other(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    first, *others = shapes
    return (first[0] + sum(shape[0] for shape in others), *first[1:])


@dataclass(frozen=True)
class FilePlan:
    """A model or a sidecar: the tensors of its table and the jobs that make their data, in the order of the file."""

    jobs: list[Job]
    tensors: list[Tensor]

    @property
    def sidecar_version(self) -> int:
        """The lowest format version that a sidecar of these matrices can have."""
        if any(job.kind == q3_nl.KIND for job in self.jobs):
            return layouts.Q3_NL_VERSION
        return layouts.LAYOUT_VERSION if any(job.in_panels for job in self.jobs) else layouts.PLAIN_VERSION


@dataclass(frozen=True)
class Plan:
    """Both files.

    Attributes:
        sidecar: without jobs where the checkpoint has no predictors.
        bundles: gate, up and down of each layer by the name of the gate; empty where they are plain rows.
        type_notes: a line for each tensor that has another type than the one asked for.
        no_gain_notes: a line for each type that no tensor has.
    """

    model: FilePlan
    sidecar: FilePlan
    bundles: dict[str, tuple[Job, Job, Job]]
    type_notes: tuple[str, ...]
    no_gain_notes: tuple[str, ...]

    @property
    def ffn_layout(self) -> str:
        return layouts.FFN.other if self.bundles else layouts.ROWS

    @property
    def input_bytes(self) -> int:
        return sum(job.input_bytes for job in self.model.jobs + self.sidecar.jobs)


def make_plan(
    model: list[Matched],
    sidecar: list[Matched],
    choices: list[Choice],
    *,
    rows: Mapping[str, Order],
    ffn_layout: str,
    fuse_qkv: bool,
) -> Plan:
    """The plan of a checkpoint's tensors.

    Args:
        choices: the types of the model's tensors, then of the sidecar's.
        rows: tensor -> the order of its rows, where they are not to stay where they are.
        ffn_layout: of LAYOUTS.
        fuse_qkv: q, k and v of a layer become one matrix where they have one type.

    Raises:
        TsconvError: bundles are asked for, and a layer's matrices have several types.
    """
    matched, n_model = model + sidecar, len(model)
    balanced = _balanced(sidecar, choices[n_model:])
    jobs = [
        Job(item, choice.kind, rows.get(item.output.name), balanced.get(item.output.name))
        for item, choice in zip(matched, choices, strict=True)
    ]
    notes = (fallback_note(item.output, choice) for item, choice in zip(matched, choices, strict=True))
    return Plan(
        model=FilePlan(jobs[:n_model], _tensors(jobs[:n_model], fuse_qkv)),
        sidecar=FilePlan(jobs[n_model:], _tensors(jobs[n_model:], fuse_qkv)),
        bundles=_bundles(jobs, ffn_layout, has_predictor=bool(sidecar)),
        type_notes=tuple(note for note in notes if note),
        no_gain_notes=(*no_gain_notes(choices[:n_model]), *no_gain_notes(choices[n_model:])),
    )


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


def _tensors(jobs: list[Job], fuse_qkv: bool) -> list[Tensor]:
    """The tensors that `jobs` make, in their order."""
    by_name = {job.output.name: job for job in jobs}
    tensors = {}
    for name, job in by_name.items():
        tensor = Tensor(name, (job,))
        if fuse_qkv and qkv.PART.match(name):
            matrix = qkv.together(name)
            parts = tuple(by_name[part] for part in qkv.parts_of(matrix))
            if len({part.kind for part in parts}) == 1:
                tensor = Tensor(matrix, parts)
        tensors[tensor.name] = tensor
    return list(tensors.values())
