"""Forms of predictors, as a sidecar says them (docs/format.md): which matrices make a neuron's logit, and how."""

from __future__ import annotations

from dataclasses import dataclass

from tsconv.errors import ModelFileError
from tsconv.format import layouts
from tsconv.format.header import Header

KEY = "turbosparse.predictor.form"
INPUT_BITS = "turbosparse.predictor.input_bits"  # of p, where matrices are of bits1 or bits2
THRESHOLD = "threshold"  # in tensors' names: the thresholds of neurons


@dataclass(frozen=True)
class Form:
    """`first` are the matrices of [n_embd] columns that go before those with a row for each neuron, `neurons`."""

    name: str
    first: tuple[str, ...]
    neurons: tuple[str, ...]

    @property
    def matrices(self) -> tuple[str, ...]:
        """As they are called in tensors' names: "fc1" is blk.N.ffn_pred_fc1.weight."""
        return self.first + self.neurons


MLP = Form("mlp", ("fc1",), ("fc2",))  # fc2 . relu(fc1 . p)
LINEAR = Form("linear", ("fc1",), ("fc2",))  # fc2 . (fc1 . p)
GATE = Form("gate", (), ("gate",))  # gate . p
GATE_UP = Form("gate_up", (), ("gate", "up"))  # the lesser of gate . p and up . p
FORMS = {form.name: form for form in (MLP, LINEAR, GATE, GATE_UP)}


def tensor_name(layer: int, what: str, expert: int | None = None) -> str:
    """Of a matrix, or of what a sidecar has beside them; `expert` None in a dense model."""
    return f"blk.{layer}.ffn_pred_{what}{'' if expert is None else f'.{expert}'}.weight"


def form_of(sidecar: Header) -> Form:
    """That of all predictors of a sidecar.

    Raises:
        ModelFileError: an unknown one, none in a version that has forms, or one in a version that has none.
    """
    found = sidecar.keys.get(KEY)
    has_forms = sidecar.keys.get("turbosparse.format_version") == layouts.FORM_VERSION
    if not has_forms and found is None:
        return MLP
    if not has_forms or found not in FORMS:
        raise ModelFileError(
            f"bad {KEY}",
            where=sidecar.path,
            expected=" or ".join(map(repr, FORMS)) if has_forms else f"nothing before version {layouts.FORM_VERSION}",
            found="nothing" if found is None else repr(found),
            fix="install the tsconv that wrote the file",
        )
    return FORMS[found]


def tensors_of(sidecar: Header, layer: int, expert: int | None = None) -> list[str]:
    """The names of the matrices of one FFN's predictor, and of its thresholds if the sidecar has some."""
    names = [*form_of(sidecar).matrices, *((THRESHOLD,) if has_thresholds(sidecar) else ())]
    return [tensor_name(layer, what, expert) for what in names]


def neuron_tensors(sidecar: Header) -> dict[str, int]:
    """What the sidecar has rows of neurons of -> for each neuron so many: its matrices, and thresholds of all those."""
    found = dict.fromkeys(form_of(sidecar).neurons, 1)
    if has_thresholds(sidecar):
        found[THRESHOLD] = len(found)
    return found


def has_thresholds(sidecar: Header) -> bool:
    return any(f".ffn_pred_{THRESHOLD}." in tensor.name for tensor in sidecar.tensors)


def check_is_mlp(sidecar: Header) -> None:
    """Refuses predictors that are more, or something else, than fc1 and fc2 with a ReLU between.

    Raises:
        ModelFileError: they have another form, or thresholds of neurons.
    """
    form, more = form_of(sidecar), has_thresholds(sidecar)
    if form is not MLP or more:
        raise ModelFileError(
            "predictors of another form",
            where=sidecar.path,
            expected=f"{KEY} {MLP.name!r}, without thresholds of neurons",
            found=f"{form.name!r}, {'with' if more else 'without'} them",
        )
