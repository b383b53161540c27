"""`tsconv place` on small models: what it prints and writes, and what it refuses."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import tsconv
from support.edited import edited
from support.random_stats import random_stats, save_stats
from support.refused import sidecar_of
from support.synthetic import SHAPES, random_tensors, save
from support.workloads import held, seconds_of
from tsconv.cli.place import Size
from tsconv.errors import OutputError
from tsconv.format.header import read_header
from tsconv.format.order import neuron_order
from tsconv.machine.profile import GIB, load_machine
from tsconv.placement.cost import Rates, read_workload
from tsconv.placement.file import Placement
from tsconv.stats import file as stats_file

Run = Callable[..., tuple[int, str, str]]
USAGE, MODEL_FILE, OUTPUT = 2, OutputError.exit_code - 2, OutputError.exit_code

# Slow and near enough that small models are worth splitting.
MACHINE = """
name = "toy"
[cpu]
model = "slow"
cores = 1
memory_gib = 8
memory_gbps = 0.1
random_gbps = 0.1
[disk]
sequential_gbps = 0.1
[gpu]
model = "small"
memory_gib = 2
memory_gbps = 2
pcie_gbps = 10
pcie_latency_us = 1
"""
WITHOUT_GPU = MACHINE[: MACHINE.index("[gpu]")]


@dataclass(frozen=True)
class Files:
    original: Path  # in the checkpoint's order
    model: Path
    stats: Path
    machine: Path
    family: str

    @property
    def output(self) -> Path:
        return self.model.with_suffix(".placement.json")


@functools.cache
def built(folder: Path, family: str) -> tuple[Path, Path]:
    shape = SHAPES[family]
    original = tsconv.convert(save(folder / "c", shape, random_tensors(shape)), folder / "o.gguf", "q4_0").model
    sparsity = "exact" if family == "bamboo" else "predictor"
    return original, save_stats(random_stats(original, sparsity), folder / "m.stats.gguf")


@pytest.fixture(params=["mistral", "mixtral", "bamboo"])
def files(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return _files(request.param, tmp_path, tmp_path_factory)


@pytest.fixture
def mixtral(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return _files("mixtral", tmp_path, tmp_path_factory)


def _files(family: str, tmp_path: Path, factory: pytest.TempPathFactory) -> Files:
    original, stats = built(factory.getbasetemp() / f"place-{family}", family)
    model = tsconv.reorder(original, stats, tmp_path / "m.gguf").model
    machine = tmp_path / "toy.toml"
    machine.write_text(MACHINE)
    return Files(original, model, stats, machine, family)


def arguments(files: Files, **changes: object) -> list[object]:
    """The command line; `changes` replace options, None leaves them out, "" are flags."""
    options = {"--profile": files.stats, "--machine": files.machine, "--vram-budget": "60kB", "--ram-budget": "100 kB"}
    options |= {"--ctx-size": 256} | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    flat: list[object] = ["place", files.model]
    for name, value in options.items():
        flat += [] if value is None else [name] if value == "" else [name, value]
    return flat


def test_the_old_name_of_the_context(files: Files, run: Run) -> None:
    code, _, stderr = run(*arguments(files, ctx_size=4096, ctx=256))
    assert code == 0, stderr
    assert Placement.load(files.output).ctx == 256


def test_writes_what_it_says(files: Files, run: Run) -> None:
    code, stdout, stderr = run(*arguments(files, json=""))
    assert code == 0, stderr
    shown = json.loads(stdout)
    placement = Placement.load(files.output)
    placement.check_model(read_header(files.model))
    assert shown["outfile"] == str(files.output)
    assert shown["budgets"] == placement.budgets
    assert shown["predicted"] == placement.predicted
    assert (placement.budgets["vram"], placement.budgets["ram"]) == (60_000, 100_000)
    assert (placement.machine, placement.ctx) == ("toy", 256)
    assert placement.sparsity == ("exact" if files.family == "bamboo" else "predictor")

    header = read_header(files.model)
    sidecar = read_header(sidecar_of(files.model)) if placement.sparsity == "predictor" else None
    work = read_workload(header, sidecar, stats_file.load(files.stats), 256)
    rates = Rates.of(load_machine(files.machine))
    vram, ram = held(work, placement.layers, placement.output)
    assert (vram, ram) == (placement.budgets["vram_used"], placement.budgets["ram_used"])
    assert 0 < vram <= 60_000
    assert ram <= 100_000
    assert sum(sum(layer.gpu) for layer in placement.layers) > 0
    seconds = seconds_of(work, rates, placement.layers, placement.output)
    assert placement.predicted["ms_per_token"] == pytest.approx(1e3 * seconds, rel=1e-12)
    assert placement.predicted["tokens_per_s"] == pytest.approx(1 / seconds, rel=1e-12)
    assert placement.predicted["lower_bound_ms_per_token"] <= 1e3 * seconds * (1 + 1e-12)
    gap = 1 - placement.predicted["lower_bound_ms_per_token"] / placement.predicted["ms_per_token"]
    assert shown["gap"] == pytest.approx(gap, abs=1e-12)
    times = [layer["ms"]["total"] for layer in shown["layers"]] + [shown["outside_layers"]["ms"]["total"]]
    assert sum(times) == pytest.approx(1e3 * seconds)
    assert sum(shown["waited_ms"].values()) == pytest.approx(1e3 * seconds)
    assert shown["notes"] == [line.removeprefix("note: ") for line in stderr.splitlines()]


def test_table(files: Files, run: Run) -> None:
    code, stdout, stderr = run(*arguments(files, ram_budget=None, vram_budget="40kB"))
    assert code == 0, stderr
    placement = Placement.load(files.output)
    predicted = placement.predicted
    lines = stdout.splitlines()
    assert lines[0].startswith("m.gguf on toy: ")
    rows = [line.split() for line in lines[3 : 3 + len(placement.layers) + 1]]
    for n, (row, layer) in enumerate(zip(rows, placement.layers, strict=False)):
        predictor = "-" if files.family == "bamboo" else layer.predictor
        assert row[:4] == [str(n), layer.attention, predictor, f"{sum(layer.gpu):,}"]
        assert f"{sum(layer.ram):,}" in row
    assert rows[-1][:2] == ["output", placement.output]
    for text in (
        f"{predicted['tokens_per_s']:,.1f} tokens/s expected",
        f"CPU only: {predicted['cpu_only_tokens_per_s']:,.1f} tokens/s",
        f"all on the GPU: {predicted['all_gpu_tokens_per_s']:,.1f} tokens/s (does not fit",
        "bound by ",
        "assumed of the machine: disk.random_gbps",
        f"next: tsconv run -m {files.model} -c 256 --machine {files.machine} --placement {files.output}",
    ):
        assert text in stdout
    assert "RAM budget: 8 GiB less 4 GiB" in stderr
    assert placement.budgets["ram"] == 4 * GIB
    assert "disk.random_gbps is assumed: 10% of sequential_gbps" in stderr
    assert "VRAM budget" not in stderr


def test_default_budgets_and_everything_fits(mixtral: Files, run: Run) -> None:
    code, stdout, stderr = run(*arguments(mixtral, vram_budget=None, ram_budget=None))
    assert code == 0, stderr
    placement = Placement.load(mixtral.output)
    assert (placement.budgets["vram"], placement.budgets["ram"]) == (GIB, 4 * GIB)
    assert "(fits)" in stdout
    assert "no placement is faster" in stdout
    assert placement.predicted["tokens_per_s"] == pytest.approx(placement.predicted["all_gpu_tokens_per_s"])


def test_without_a_gpu(mixtral: Files, run: Run) -> None:
    mixtral.machine.write_text(WITHOUT_GPU)
    code, stdout, stderr = run(*arguments(mixtral, vram_budget=None, ram_budget="200kB"))
    assert code == 0, stderr
    assert "no GPU" in stdout
    placement = Placement.load(mixtral.output)
    assert placement.budgets["vram"] == placement.budgets["vram_used"] == 0
    assert placement.predicted["all_gpu_tokens_per_s"] is None
    assert placement.predicted["tokens_per_s"] == placement.predicted["cpu_only_tokens_per_s"]
    assert "read from disk" in stderr
    code, _, stderr = run(*arguments(mixtral, force=""))
    assert code == 1
    assert "the VRAM budget is more than the machine has" in stderr


def test_no_memory_on_the_gpu_is_cpu_only(mixtral: Files, run: Run) -> None:
    assert run(*arguments(mixtral, vram_budget="0", ram_budget="200kB"))[0] == 0
    predicted = Placement.load(mixtral.output).predicted
    assert predicted["tokens_per_s"] == predicted["cpu_only_tokens_per_s"]


def test_other_statistics_than_those_it_was_ordered_by(mixtral: Files, run: Run, tmp_path: Path) -> None:
    other = save_stats(random_stats(mixtral.original, seed=5), tmp_path / "other.gguf")
    code, _, stderr = run(*arguments(mixtral, profile=other))
    assert code == 0, stderr
    assert "ordered by other statistics" in stderr
    assert "ordered by other statistics" not in run(*arguments(mixtral, force=""))[2]


def test_shipped_machine(mixtral: Files, run: Run) -> None:
    code, stdout, stderr = run(*arguments(mixtral, machine="pc-2080ti", vram_budget="9GiB", ram_budget="24GiB"))
    assert code == 0, stderr
    assert "on pc-2080ti" in stdout
    assert Placement.load(mixtral.output).budgets["vram"] == 9 * GIB


def test_existing_output_stays(mixtral: Files, run: Run) -> None:
    mixtral.output.write_text("mine")
    code, stdout, stderr = run(*arguments(mixtral))
    assert (code, stdout) == (OUTPUT, "")
    assert "output exists" in stderr
    assert mixtral.output.read_text() == "mine"
    assert run(*arguments(mixtral, force=""))[0] == 0
    Placement.load(mixtral.output)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"vram_budget": "9"}, USAGE, "'9' is not a size"),
        ({"vram_budget": "-1GiB"}, USAGE, "is not a size"),
        ({"ram_budget": "many"}, USAGE, "is not a size"),
        ({"ctx_size": 0}, USAGE, "--ctx-size"),
        ({"ram_budget": "20kB", "vram_budget": "10kB"}, 1, "budgets do not hold what every token reads"),
        ({"vram_budget": "3GiB"}, 1, "the VRAM budget is more than the machine has"),
        ({"ram_budget": "9GiB"}, 1, "the RAM budget is more than the machine has"),
        ({"machine": "pc-2080"}, 1, "no machine profile 'pc-2080'"),
        ({"machine": "none.toml"}, 1, "none.toml: machine profile cannot be read"),
        ({"profile": "none.gguf"}, MODEL_FILE, "none.gguf: cannot be read"),
        ({"outfile": "none/p.json"}, OUTPUT, "folder of the output does not exist"),
        ({"outfile": "p.gguf"}, OUTPUT, "expected a name that ends in .json"),
    ],
)
def test_refused_options(changes: dict[str, object], code: int, message: str, mixtral: Files, run: Run) -> None:
    found, stdout, stderr = run(*arguments(mixtral, **changes))
    assert (found, stdout) == (code, "")
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert not mixtral.output.exists()


def test_refused_files(mixtral: Files, run: Run, tmp_path: Path) -> None:
    model, sidecar = mixtral.model, sidecar_of(mixtral.model)
    kept = sidecar.read_bytes()

    def refused(model: Path = model, **changes: object) -> str:
        line = arguments(mixtral, **changes)
        line[1] = model
        code, stdout, stderr = run(*line)
        assert (code, stdout) == (MODEL_FILE, "")
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1
        assert not list(tmp_path.glob("*.json*"))
        return stderr

    unordered = refused(mixtral.original)
    assert f"tsconv reorder {mixtral.original} --profile {mixtral.stats}" in unordered
    assert "not a converted model" in refused(sidecar)
    assert "cannot be read" in refused(tmp_path / "none.gguf")
    assert "not activation statistics" in refused(profile=model)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:5000])
    assert str(cut) in refused(cut)
    other = save_stats(random_stats(mixtral.original, fingerprint="0" * 64), tmp_path / "other.gguf")
    assert "statistics are of another model" in refused(profile=other)
    sidecar.unlink()
    assert f"{sidecar}: cannot be read" in refused()
    shutil.copy(mixtral.stats, sidecar)
    assert "not a predictor sidecar" in refused()
    shutil.copy(sidecar_of(mixtral.original), sidecar)
    assert "is the sidecar of another model" in refused()
    sidecar.write_bytes(kept)
    copy = edited(sidecar, tmp_path / "e.gguf", without=["blk.1.ffn_pred_fc2.3.weight"])
    shutil.copy(copy, sidecar)
    assert "blk.1.ffn_pred_fc2.3.weight: tensor is missing" in refused()


def test_output_may_be_no_input(mixtral: Files, run: Run, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    shutil.copy(mixtral.stats, stats)
    code, _, stderr = run(*arguments(mixtral, profile=stats, outfile=stats, force=""))
    assert code == OUTPUT
    assert "would replace an input" in stderr
    assert stats.read_bytes() == mixtral.stats.read_bytes()


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("0B", 0),
        ("17 B", 17),
        ("9GiB", 9 << 30),
        ("9GB", 9 * 10**9),
        ("500MiB", 500 << 20),
        ("1.5gib", 3 << 29),
        ("2 kB", 2000),
        ("2TiB", 2 << 40),
        ("9G", 9 << 30),
        ("500m", 500 << 20),
    ],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert Size().convert(text, None, None) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "9", "9Gi", "GiB", "-1GB", "+1GB", "1e3GB", "9GiBs", "1,5GiB", "nanGB", "٣GB", "9 9GB", "9" * 18 + "TB"],
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        Size().convert(text, None, None)


def test_order_is_the_models_own(mixtral: Files) -> None:
    """The prefixes of a placement are of the stored order, whatever the statistics would have preferred."""
    header = read_header(mixtral.model)
    order = neuron_order(header)
    stats = random_stats(mixtral.original, seed=5)
    work = read_workload(header, read_header(sidecar_of(mixtral.model)), stats, 256)
    rows = work.layers[0].neuron_bytes // 3
    counts = stats.total
    for position in (0, 1, 50):
        neuron = order[0, 2, position]
        times = sum(int(counts.of(name)[0, 2, neuron]) for name in ("predicted", "predicted_gate", "predicted_active"))
        assert work.layers[0].heat[2, position] == pytest.approx(times * rows / stats.n_tokens)
