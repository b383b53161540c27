"""The cost model against a second calculation, and the workload of a model against its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

import tsconv
from support.edited import edited
from support.random_stats import random_stats, save_stats
from support.refused import sidecar_of
from support.synthetic import SHAPES, random_tensors, save
from support.workloads import MACHINES, held, seconds_of, workload
from tsconv.errors import ModelFileError, TsconvError
from tsconv.format.header import read_header
from tsconv.format.order import neuron_order
from tsconv.machine.profile import Cpu, Disk, Gpu, Machine
from tsconv.placement.cost import Rates, Workload, evaluate, read_workload
from tsconv.placement.file import CPU, GPU, LayerPlacement
from tsconv.stats.counts import Stats


def random_placement(work: Workload, rates: Rates, rng: np.random.Generator) -> list[LayerPlacement]:
    def device(possible: bool) -> str:
        return GPU if possible and rates.has_gpu and rng.integers(2) else CPU

    layers = []
    for layer in work.layers:
        n_ff = layer.heat.shape[1]
        gpu = [int(rng.choice([0, n_ff, rng.integers(n_ff + 1)])) * rates.has_gpu for _ in layer.heat]
        ram = [int(rng.integers(n_ff - g + 1)) if rates.has_disk else n_ff - g for g in gpu]
        layers.append(LayerPlacement(device(True), device(work.has_predictor), tuple(gpu), tuple(ram)))
    return layers


@pytest.mark.parametrize("machine", MACHINES)
def test_time_and_size_of_any_placement(machine: str) -> None:
    rates = MACHINES[machine]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        work = workload(rng, int(rng.integers(1, 4)), int(rng.integers(1, 4)), 3, bool(seed % 2), hot_first=False)
        layers = random_placement(work, rates, rng)
        output = GPU if rates.has_gpu and seed % 3 else CPU
        estimate = evaluate(work, rates, layers, output)
        assert estimate.seconds == pytest.approx(seconds_of(work, rates, layers, output), rel=1e-12)
        assert (estimate.vram, estimate.ram) == held(work, layers, output)
        assert sum(estimate.waited.values()) == pytest.approx(estimate.seconds, rel=1e-12)
        assert min(estimate.waited.values()) >= 0
        for part in (*estimate.layers, estimate.outside):
            assert max(part.gpu, part.cpu) * (1 - 1e-12) <= part.seconds
            assert part.seconds <= (part.gpu + part.cpu + part.transfer) * (1 + 1e-12)


def test_rates_of_a_machine() -> None:
    cpu = Cpu("a CPU", 8, 1, 40.0, 20.0)
    full = Rates.of(Machine("m", cpu, Disk(3.0, 0.5), Gpu("a GPU", 1, 600.0, 12.0, 10.0)))
    assert full.sequential == pytest.approx(1 / 40e9)
    assert full.random == pytest.approx(1 / 20e9)
    assert full.disk == pytest.approx(1 / 0.5e9 + 1 / 20e9)  # into RAM, and from there
    assert full.gpu == pytest.approx(1 / 600e9)
    assert full.transfer(1200) == pytest.approx(10e-6 + 1200 / 12e9)
    bare = Rates.of(Machine("m", cpu, None, None))
    assert (bare.has_gpu, bare.has_disk) == (False, False)


# ---- from files


@pytest.fixture(scope="module", params=["mistral", "mixtral", "bamboo"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A reordered model, and its family; Bamboo's runs without a predictor."""
    folder = tmp_path_factory.mktemp(request.param)
    shape = SHAPES[request.param]
    mixed = ["ffn_up=q8_0", "blk.1.ffn_down=f16"]  # rows of different sizes
    source = save(folder / "c", shape, random_tensors(shape))
    path = tsconv.convert(source, folder / "c.gguf", "q4_0", tensor_types=mixed).model
    stats = save_stats(stats_of(path, request.param), folder / "s.gguf")
    return tsconv.reorder(path, stats, folder / "m.gguf").model, request.param


def stats_of(path: Path, family: str, seed: int = 0) -> Stats:
    return random_stats(path, "exact" if family == "bamboo" else "predictor", seed)


def read(path: Path, stats: Stats, ctx: int = 300) -> Workload:
    sidecar = read_header(sidecar_of(path)) if stats.subject.sparsity == "predictor" else None
    return read_workload(read_header(path), sidecar, stats, ctx)


def test_every_byte_of_the_files_is_counted_once(model: tuple[Path, str]) -> None:
    path, family = model
    work = read(path, stats_of(*model))
    tensors = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(path).tensors}
    neurons = sum(layer.heat.size * layer.neuron_bytes for layer in work.layers)
    attention = sum(layer.attention_bytes for layer in work.layers)
    assert work.embedding_bytes + work.output_bytes + attention + neurons == sum(tensors.values())
    assert work.output_ram == work.output_bytes == tensors["output.weight"] + tensors["output_norm.weight"]
    predictors = sum(layer.predictor_bytes for layer in work.layers)
    assert work.has_predictor == (family != "bamboo")
    if work.has_predictor:
        assert predictors == sum(int(t.n_bytes) for t in gguf.GGUFReader(sidecar_of(path)).tensors)
    else:
        assert predictors == 0
    shape = SHAPES[family]
    for layer in work.layers:
        per_token = 2 * 2 * shape.n_embd // shape.n_head * shape.n_head_kv  # keys and values in f16
        assert layer.kv_bytes == 512 * per_token  # 300 tokens, rounded up to a multiple of 256
        assert layer.kv_read == 150 * per_token
    assert work.state_bytes == 4 * shape.n_embd
    assert work.logits_bytes == 4 * shape.n_vocab
    assert work.mask_bytes == shape.n_ff // 8 * (2 if shape.n_expert else 1)


@pytest.mark.parametrize("seed", [0, 1])  # the statistics that the model was ordered by, and others
def test_expected_bytes_of_each_neuron(model: tuple[Path, str], seed: int) -> None:
    path, family = model
    stats = stats_of(path, family, seed)
    work = read(path, stats)
    order = neuron_order(read_header(path))
    shape = SHAPES[family]
    n_ffn = max(1, shape.n_expert)
    sizes = {t.name: int(t.n_bytes) // (n_ffn * shape.n_ff) for t in gguf.GGUFReader(path).tensors}
    counts = stats.total
    names = ("predicted", "predicted_gate", "predicted_active")
    for n, layer in enumerate(work.layers):
        suffix = "_exps" if shape.n_expert else ""
        rows = [sizes[f"blk.{n}.ffn_{part}{suffix}.weight"] for part in ("gate", "up", "down")]
        assert layer.neuron_bytes == sum(rows)
        for e in range(n_ffn):
            for i in range(0, shape.n_ff, 7):
                neuron = order[n, e, i]
                if family == "bamboo":
                    times = [counts.tokens[n, e], *(counts.of(c)[n, e, neuron] for c in ("gate_positive", "active"))]
                else:
                    times = [counts.of(c)[n, e, neuron] for c in names]
                expected = sum(int(t) * row for t, row in zip(times, rows, strict=True)) / stats.n_tokens
                assert layer.heat[e, i] == pytest.approx(expected, rel=1e-12)


def test_predictors_are_read_where_tokens_are_routed(model: tuple[Path, str]) -> None:
    path, family = model
    stats = stats_of(path, family)
    if family == "bamboo":
        assert all(layer.predictor_read == 0 for layer in read(path, stats).layers)
        return
    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(sidecar_of(path)).tensors}
    for n, layer in enumerate(read(path, stats).layers):
        expected = sizes.get(f"blk.{n}.ffn_pred_scale.weight", 0)
        for e, tokens in enumerate(stats.total.tokens[n]):
            infix = f".{e}" if SHAPES[family].n_expert else ""
            both = sum(sizes[f"blk.{n}.ffn_pred_{part}{infix}.weight"] for part in ("fc1", "fc2"))
            expected += both * int(tokens) / stats.n_tokens
        assert layer.predictor_read == pytest.approx(expected, rel=1e-12)


def test_tied_embeddings_are_held_once(model: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = model
    tied = edited(path, tmp_path / "t.gguf", without=["output.weight"])
    sizes = {t.name: int(t.n_bytes) for t in gguf.GGUFReader(tied).tensors}
    stats = stats_of(*model)
    sidecar = read_header(sidecar_of(path)) if stats.subject.sparsity == "predictor" else None
    work = read_workload(read_header(tied), sidecar, stats, 256)
    assert work.output_bytes == sizes["token_embd.weight"] + sizes["output_norm.weight"]
    assert work.output_ram == sizes["output_norm.weight"]


def test_refusals(model: tuple[Path, str], tmp_path: Path) -> None:
    path, family = model
    stats = stats_of(path, family)
    other = dataclasses.replace(stats, subject=dataclasses.replace(stats.subject, fingerprint="0" * 64))
    with pytest.raises(ModelFileError, match="statistics are of another model"):
        read(path, other)
    wrong = random_stats(path, stats.subject.sparsity, n_ff=stats.subject.n_ff - 1)
    with pytest.raises(ModelFileError, match="do not fit the model"):
        read(path, wrong)
    empty = dataclasses.replace(stats, parts=tuple(dataclasses.replace(part, n_tokens=0) for part in stats.parts))
    with pytest.raises(TsconvError, match="no tokens"):
        read(path, empty)
    sidecar = read_header(sidecar_of(path)) if stats.subject.sparsity == "predictor" else None
    for changes, message in (
        ({"without": ["output_norm.weight"]}, "output_norm.weight: tensor is missing"),
        ({"keys": {"llama.attention.head_count_kv": 0}}, "bad llama.attention.head_count_kv"),
        ({"without": ["token_embd.weight"]}, "token_embd.weight: tensor is missing"),
    ):
        broken = read_header(edited(path, tmp_path / "b.gguf", **changes))
        with pytest.raises(ModelFileError, match=message):
            read_workload(broken, sidecar, stats, 256)
