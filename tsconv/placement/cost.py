"""What decoding one token costs under a placement: bytes over bandwidths (docs/placement.md has the formulas).

Everything is an expectation per token at batch 1. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tsconv.checkpoint.config import MAX_DIM
from tsconv.errors import ModelFileError, TsconvError
from tsconv.format import forms
from tsconv.format.header import Header, TensorEntry
from tsconv.format.kv_cache import kv_bytes_per_token, padded
from tsconv.format.order import dimension, neuron_order, shape_of
from tsconv.placement.file import CPU, GPU, Device, LayerPlacement
from tsconv.stats.counts import Counts, Stats, Subject

if TYPE_CHECKING:
    from tsconv.machine.profile import Machine

Floats = npt.NDArray[np.float64]

STATE_ITEM = 4  # bytes of an element of the hidden state between devices: f32


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        attention_bytes: weights of attention, norms and router.
        kv_bytes: KV cache of the whole context.
        kv_read: KV cache read per token: that of half the context, the mean while it fills.
        predictor_bytes: predictors of all its FFNs; 0 in a model that runs without.
        predictor_read: expected bytes read of them per token: those of the routed experts.
        neuron_bytes: gate, up and down row of one neuron.
        heat: float64 [n_ffn, n_ff], expected bytes read of each neuron per token, in the order of the file.
    """

    attention_bytes: int
    kv_bytes: int
    kv_read: float
    predictor_bytes: int
    predictor_read: float
    neuron_bytes: int
    heat: Floats

    @property
    def attention_held(self) -> int:
        """Bytes that the device of the attention holds."""
        return self.attention_bytes + self.kv_bytes

    @property
    def attention_read(self) -> float:
        return self.attention_bytes + self.kv_read

    @property
    def n_neurons(self) -> int:
        return self.heat.size


@dataclass(frozen=True)
class Workload:
    """What a token of a model reads and holds.

    Attributes:
        layers: its layers.
        state_bytes: the hidden state of one token.
        mask_bytes: the predictors' decisions for one token and layer: a bit per neuron of the routed experts.
        logits_bytes: the result of the output matrix.
        has_predictor: whether masks are computed at all.
        embedding_bytes: the token embeddings, always in RAM.
        embedding_read: a row of them.
        output_bytes: output norm and matrix: read per token, and held by the GPU if it computes them.
        output_ram: what of them RAM holds if the CPU does: less where the matrix is the token embeddings.
    """

    layers: tuple[Layer, ...]
    state_bytes: int
    mask_bytes: int
    logits_bytes: int
    has_predictor: bool
    embedding_bytes: int
    embedding_read: float
    output_bytes: int
    output_ram: int


@dataclass(frozen=True)
class Rates:
    """A machine in seconds per byte, latency in seconds. Without a GPU or a disk their rates are 0 and unused.

    `disk` is the whole cost of a byte that is read from disk: into the page cache, and from there by the CPU.
    """

    sequential: float
    random: float
    disk: float
    gpu: float
    pcie: float
    latency: float
    has_gpu: bool
    has_disk: bool

    @classmethod
    def of(cls, machine: Machine) -> Rates:
        gpu, disk, random = machine.gpu, machine.disk, 1e-9 / machine.cpu.random_gbps
        return cls(
            sequential=1e-9 / machine.cpu.sequential_gbps,
            random=random,
            disk=0.0 if disk is None else 1e-9 / disk.random_gbps + random,
            gpu=0.0 if gpu is None else 1e-9 / gpu.memory_gbps,
            pcie=0.0 if gpu is None else 1e-9 / gpu.pcie_gbps,
            latency=0.0 if gpu is None else 1e-6 * gpu.pcie_latency_us,
            has_gpu=gpu is not None,
            has_disk=disk is not None,
        )

    def dense(self, device: Device) -> float:
        """Of weights read from beginning to end."""
        return self.gpu if device == GPU else self.sequential

    def transfer(self, n_bytes: float) -> float:
        """Seconds of one transfer between CPU and GPU."""
        return self.latency + n_bytes * self.pcie


def exchange(
    work: Workload, rates: Rates, attention: Device, predictor: Device, on_gpu: bool, on_cpu: bool
) -> tuple[int, float]:
    """Transfers within a layer: (their number, seconds).

    The hidden state lives where the attention is. It goes to the other device if that holds the predictor or neurons,
    the mask goes to the device without the predictor if that holds neurons, and their sum comes back.

    Args:
        on_gpu, on_cpu: whether the device computes any neurons of the layer.
    """
    neurons = {GPU: on_gpu, CPU: on_cpu}
    away = CPU if attention == GPU else GPU
    sizes = []
    if neurons[away] or (work.has_predictor and predictor == away):
        sizes.append(work.state_bytes)
    if work.has_predictor and neurons[CPU if predictor == GPU else GPU]:
        sizes.append(work.mask_bytes)
    if neurons[away]:
        sizes.append(work.state_bytes)
    return len(sizes), sum(map(rates.transfer, sizes))


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer. Busy times: `gpu`, `cpu` (disk included), `transfer` (the way from the last layer, too).

    `waited` says what `seconds` was spent on: GPU and CPU compute neurons in parallel, and the slower counts.
    """

    gpu: float
    cpu: float
    transfer: float
    seconds: float
    waited: dict[str, float]


WAITS = ("CPU memory", "GPU memory", "disk", "PCIe")


@dataclass(frozen=True)
class Estimate:
    """What a placement costs: expected seconds per token, and the bytes that it holds."""

    layers: tuple[LayerTime, ...]
    outside: LayerTime  # token embedding, output, logits
    vram: int
    ram: int

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers) + self.outside.seconds

    @property
    def waited(self) -> dict[str, float]:
        """Seconds per token by what was waited for."""
        parts = [*self.layers, self.outside]
        return {name: sum(part.waited[name] for part in parts) for name in WAITS}


def evaluate(work: Workload, rates: Rates, layers: Sequence[LayerPlacement], output: Device) -> Estimate:
    """Expected time per token of a placement, whatever its size."""
    times = []
    before = CPU  # the token embeddings are there
    vram, ram = 0, work.embedding_bytes
    for layer, place in zip(work.layers, layers, strict=True):
        times.append(_layer_time(work, rates, layer, place, before))
        before = place.attention
        held = {GPU: sum(place.gpu) * layer.neuron_bytes, CPU: sum(place.ram) * layer.neuron_bytes}
        held[place.attention] += layer.attention_held
        held[place.predictor] += layer.predictor_bytes
        vram, ram = vram + held[GPU], ram + held[CPU]
    vram += work.output_bytes if output == GPU else 0
    ram += work.output_ram if output == CPU else 0

    moved = rates.transfer(work.state_bytes) if before != output else 0.0
    moved += rates.transfer(work.logits_bytes) if output == GPU else 0.0
    embedding, product = work.embedding_read * rates.random, work.output_bytes * rates.dense(output)
    on_gpu, on_cpu = (product, embedding) if output == GPU else (0.0, embedding + product)
    waited = dict(zip(WAITS, (on_cpu, on_gpu, 0.0, moved), strict=True))
    return Estimate(tuple(times), LayerTime(on_gpu, on_cpu, moved, on_gpu + on_cpu + moved, waited), vram, ram)


def neuron_seconds(rates: Rates, layer: Layer, place: LayerPlacement) -> tuple[float, float, float]:
    """Seconds of a layer's neurons on the GPU, in RAM and on disk."""
    on_gpu, on_disk = 0.0, 0.0
    for heat, g, r in zip(layer.heat, place.gpu, place.ram, strict=True):
        on_gpu += float(heat[:g].sum())
        on_disk += float(heat[g + r :].sum())
    in_ram = max(0.0, float(layer.heat.sum()) - on_gpu - on_disk)
    return on_gpu * rates.gpu, in_ram * rates.random, on_disk * rates.disk


def _layer_time(work: Workload, rates: Rates, layer: Layer, place: LayerPlacement, before: Device) -> LayerTime:
    gpu, ram, disk = neuron_seconds(rates, layer, place)
    n_gpu = sum(place.gpu)

    dense = {GPU: 0.0, CPU: 0.0}
    dense[place.attention] += layer.attention_read * rates.dense(place.attention)
    dense[place.predictor] += layer.predictor_read * rates.dense(place.predictor)
    moved = exchange(work, rates, place.attention, place.predictor, n_gpu > 0, n_gpu < layer.n_neurons)[1]
    if before != place.attention:
        moved += rates.transfer(work.state_bytes)

    parallel = (0.0, gpu, 0.0) if gpu > ram + disk else (ram, 0.0, disk)
    waited = (dense[CPU] + parallel[0], dense[GPU] + parallel[1], parallel[2], moved)
    return LayerTime(
        gpu=dense[GPU] + gpu,
        cpu=dense[CPU] + ram + disk,
        transfer=moved,
        seconds=dense[GPU] + dense[CPU] + max(gpu, ram + disk) + moved,
        waited=dict(zip(WAITS, waited, strict=True)),
    )


# ---- from files


def expected_bytes(counts: Counts, sparsity: str, rows: tuple[int, int, int], n_tokens: int, layer: int) -> Floats:
    """Bytes expected to be read of each neuron per token: float64 [n_ffn, n_ff], in the order of `counts`.

        predictor:  gate row of the predicted, up row where gate > 0 too, down row where up > 0 too
        exact:      gate row of all, up row where gate > 0, down row where up > 0 too

    It is `rows_read` of tsconv/stats/heat.py with the bytes of each row.

    Args:
        rows: bytes of a gate, an up and a down row.
        n_tokens: tokens that the model ran.
    """
    gate, up, down = rows
    if sparsity == "predictor":
        names = ("predicted", "predicted_gate", "predicted_active")
        gates, ups, downs = (counts.of(name)[layer] for name in names)
    else:
        gates, ups, downs = counts.tokens[layer][:, None], counts.of("gate_positive")[layer], counts.of("active")[layer]
    return (gates * float(gate) + ups * float(up) + downs * float(down)) / n_tokens


def read_workload(model: Header, sidecar: Header | None, stats: Stats, ctx: int) -> Workload:
    """The workload of a converted model with the activity of `stats`.

    Args:
        model: a model file, in any neuron order.
        sidecar: its predictors; None where `stats` are of exact sparsity.
        stats: of the model's checkpoint.
        ctx: tokens of the KV cache.

    Raises:
        ModelFileError: a key or tensor is missing or of an unexpected size, or the statistics do not fit the model.
        TsconvError: the statistics are of no tokens.
    """
    _check_stats(stats, model)
    tensors = _Tensors(model)
    predictors = _Tensors(sidecar) if sidecar is not None else None
    n_embd = dimension(model, "llama.embedding_length", MAX_DIM)
    layers = _layers(stats, tensors, predictors, n_embd, ctx)
    embedding = tensors.one("token_embd.weight")
    n_vocab = max(1, embedding.n_weights // n_embd)
    norm, matrix = tensors.one("output_norm.weight"), tensors.named.get("output.weight")
    return Workload(
        layers=layers,
        state_bytes=STATE_ITEM * n_embd,
        mask_bytes=-(-stats.subject.n_ff // 8) * max(1, stats.subject.n_expert_used),
        logits_bytes=STATE_ITEM * n_vocab,
        has_predictor=sidecar is not None,
        embedding_bytes=embedding.n_bytes,
        embedding_read=embedding.n_bytes / n_vocab,
        output_bytes=norm.n_bytes + (matrix or embedding).n_bytes,
        output_ram=norm.n_bytes + (matrix.n_bytes if matrix is not None else 0),
    )


def _check_stats(stats: Stats, model: Header) -> None:
    """Raises ModelFileError for statistics of another model, TsconvError for those of nothing."""
    stats.check_model(model)
    n_layer, n_ffn, n_ff = shape_of(model)
    subject = stats.subject
    if (subject.n_layer, subject.n_ffn, subject.n_ff) != (n_layer, n_ffn, n_ff):
        raise ModelFileError(
            "the statistics do not fit the model",
            where=model.path,
            expected=f"{subject.n_layer} layers of {subject.n_ffn} x {subject.n_ff} neurons",
            found=f"{n_layer} of {n_ffn} x {n_ff}",
        )
    if not stats.n_tokens:
        raise TsconvError("the statistics are of no tokens", fix="profile more text")


def _layers(stats: Stats, tensors: _Tensors, predictors: _Tensors | None, n_embd: int, ctx: int) -> tuple[Layer, ...]:
    """The layers of the model that `stats` are of, whose tensors and predictors these are."""
    subject = stats.subject
    kv_token = kv_bytes_per_token(tensors.header)
    order = neuron_order(tensors.header)
    layers = []
    for n in range(subject.n_layer):
        neurons = tensors.neurons(n, subject, n_embd)
        gate, up, down = (tensor.n_bytes // (subject.n_ff * subject.n_ffn) for tensor in neurons)
        heat = expected_bytes(stats.total, subject.sparsity, (gate, up, down), stats.n_tokens, n)
        share = stats.total.tokens[n] / stats.n_tokens
        predictor_bytes, predictor_read = (
            (0, 0.0) if predictors is None else predictors.predictor(n, share, subject.n_expert > 0)
        )
        layers.append(
            Layer(
                attention_bytes=tensors.total(f"blk.{n}.") - sum(tensor.n_bytes for tensor in neurons),
                kv_bytes=kv_token * padded(ctx),
                kv_read=kv_token * ctx / 2,
                predictor_bytes=predictor_bytes,
                predictor_read=predictor_read,
                neuron_bytes=gate + up + down,
                heat=np.take_along_axis(heat, order[n], axis=-1),
            )
        )
    return tuple(layers)


_NEURON_PARTS = ("gate", "up", "down")


class _Tensors:
    """Sizes of the tensors of one file."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.named = {tensor.name: tensor for tensor in header.tensors}
        self.totals: dict[str, int] = {}  # "blk.N." -> bytes
        for tensor in header.tensors:
            prefix = ".".join(tensor.name.split(".")[:2]) + "."
            self.totals[prefix] = self.totals.get(prefix, 0) + tensor.n_bytes

    def one(self, name: str) -> TensorEntry:
        if name not in self.named:
            raise ModelFileError("tensor is missing", where=f"{self.header.path}: {name}", fix="convert again")
        return self.named[name]

    def neurons(self, n: int, subject: Subject, n_embd: int) -> list[TensorEntry]:
        """Gate, up and down of a layer. Raises ModelFileError when one is missing or of another size."""
        infix = "_exps" if subject.n_expert else ""
        found = [self.one(f"blk.{n}.ffn_{part}{infix}.weight") for part in _NEURON_PARTS]
        for tensor in found:
            if tensor.n_weights != n_embd * subject.n_ff * subject.n_ffn:
                raise ModelFileError(
                    "bad tensor",
                    where=f"{self.header.path}: {tensor.name}",
                    expected=f"{n_embd} x {subject.n_ff} x {subject.n_ffn} weights",
                    found=tensor.n_weights,
                )
        return found

    def total(self, prefix: str) -> int:
        """Bytes of all tensors of a layer."""
        return self.totals.get(prefix, 0)

    def predictor(self, n: int, share: Floats, is_moe: bool) -> tuple[int, float]:
        """(bytes, expected bytes read per token) of a layer's predictors; `share` of the tokens see each FFN."""
        scale = self.named.get(f"blk.{n}.ffn_pred_scale.weight")
        fixed = 0 if scale is None else scale.n_bytes
        experts = range(len(share)) if is_moe else [None]
        parts = [sum(self.one(name).n_bytes for name in forms.tensors_of(self.header, n, e)) for e in experts]
        return fixed + sum(parts), fixed + float(np.dot(parts, share))
