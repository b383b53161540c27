"""What a converted model of some shape takes in its files, and what the engines that run it keep in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gguf import GGMLQuantizationType

from tsconv.bench.compare import DENSE_DRELU, ENGINES, NOREPACK, STOCK
from tsconv.bench.synthetic import Shape, tensor_shapes
from tsconv.format.mixes import parse_outtype
from tsconv.format.types import DEFAULTS, parse_predictor_type, predictor_matrix_type
from tsconv.transform.quantize import row_bytes


def predictor_types(outtype: str, predictor_outtype: str | None) -> tuple[GGMLQuantizationType, GGMLQuantizationType]:
    """The type asked for of the predictor's matrices, and convert's default beside `outtype`.

    Raises:
        TsconvError: a type is unknown.
    """
    default = DEFAULTS[parse_outtype(outtype).kind][1]
    return default if predictor_outtype is None else parse_predictor_type(predictor_outtype), default


@dataclass(frozen=True)
class Bytes:
    """Of a converted model: gate, up and down; all other tensors of its file; the predictors of the other file."""

    ffn: int
    other: int
    predictor: int

    @classmethod
    def of(cls, shape: Shape, outtype: str, predictor_outtype: str | None = None) -> Bytes:
        kind = parse_outtype(outtype).kind  # a mix has little more
        output = DEFAULTS[kind][0]
        predictor = predictor_types(outtype, predictor_outtype)[0]
        bytes_ = {"ffn": 0, "other": 0, "predictor": 0}
        for name, dims in tensor_shapes(shape).items():
            is_ffn = ".mlp." in name or ".experts." in name
            part = "predictor" if ".predictor." in name else "ffn" if is_ffn else "other"
            of_predictor = predictor_matrix_type(predictor, is_fc2=".fc2." in name)
            stored = of_predictor if part == "predictor" else output if name == "lm_head.weight" else kind
            is_fixed = len(dims) == 1 or name.endswith("block_sparse_moe.gate.weight")
            stored = GGMLQuantizationType.F32 if is_fixed else stored
            bytes_[part] += prod(dims[:-1]) * row_bytes(stored, dims[-1])
        return cls(**bytes_)

    @property
    def file(self) -> int:
        """Of both files."""
        return self.ffn + self.other + self.predictor

    def resident(self, baselines: Sequence[str]) -> int:
        """What all engines together keep in memory. Ours map the FFNs and predictors, and llama.cpp keeps its own copy
        of the rest, rearranged for this processor; the stock engine keeps such a copy of everything. Without
        rearranged weights both engines map the files."""
        ours = self.ffn + self.predictor + self.other * len({ENGINES[baseline] for baseline in baselines})
        copies = {STOCK: self.ffn + self.other, DENSE_DRELU: self.other, NOREPACK: 0}
        return ours + sum(copies[baseline] for baseline in baselines)
