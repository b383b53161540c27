"""Suites of models: what they need of memory, how they are cut, and a small one from beginning to end."""

from __future__ import annotations

import dataclasses

import pytest

from tsconv.bench import suite
from tsconv.bench.generate import PRESETS, Preset
from tsconv.bench.sizes import Bytes
from tsconv.bench.suite import SPARE_BYTES, SUITES, Item, layers_that_fit, run_suite
from tsconv.bench.synthetic import Shape, write_checkpoint
from tsconv.bench.workload import Workload
from tsconv.commands.convert import convert
from tsconv.format.header import read_header
from tsconv.format.pair import sidecar_path

DENSE = Shape(320, 256, 512, 4, 2, 2, ranks=(64, 128))
MOE = Shape(320, 256, 512, 4, 2, 2, ranks=(64, 64), n_expert=4)
BOTH = ("llama.cpp", "dense-drelu")


@pytest.mark.parametrize(
    ("outtype", "predictor_outtype"), [("q4_0", None), ("f16", None), ("q8_0", None), ("f16", "f16"), ("q4_0", "f16")]
)
@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "moe"])
def test_bytes_are_those_of_the_files(tmp_path, shape, outtype, predictor_outtype):
    write_checkpoint(tmp_path / "checkpoint", shape)
    model = convert(tmp_path / "checkpoint", tmp_path / "m.gguf", outtype, predictor_outtype=predictor_outtype).model
    found = Bytes.of(shape, outtype, predictor_outtype)
    tensors = {tensor.name: tensor.n_bytes for tensor in read_header(model).tensors}
    ffn = sum(
        n
        for name, n in tensors.items()
        if name.split(".")[-2].removesuffix("_exps") in ("ffn_gate", "ffn_up", "ffn_down")
    )
    assert found.ffn == ffn
    assert found.other == sum(tensors.values()) - ffn
    predictor = [tensor for tensor in read_header(sidecar_path(model)).tensors if "fc" in tensor.name]
    assert found.predictor == sum(tensor.n_bytes for tensor in predictor) > 0


@pytest.mark.parametrize("baselines", [("llama.cpp",), BOTH])
@pytest.mark.parametrize("predictor_outtype", [None, "f16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_cut_to_memory(preset, predictor_outtype, baselines):
    item = Item(preset, "f16", 8, (), 0, predictor_outtype)
    spare = (1 + len(baselines)) * SPARE_BYTES
    sizes = [Bytes.of(PRESETS[preset].shape(n), "f16", predictor_outtype) for n in range(1, 9)]
    need = [size.resident(baselines) + spare for size in sizes]
    assert layers_that_fit(item, baselines, 1 << 50) == 8
    assert layers_that_fit(item, baselines, need[7]) == 8
    assert layers_that_fit(item, baselines, need[7] - 1) == 7
    assert layers_that_fit(item, baselines, need[2]) == 3
    assert layers_that_fit(item, baselines, 0) == 1


def test_both_dense_copies_count():
    found = Bytes(ffn=100, other=10, predictor=1)
    assert found.file == 111
    assert found.resident(("llama.cpp",)) == 111 + 110
    assert found.resident(BOTH) == 111 + 110 + 10
    assert found.resident(("llama.cpp-norepack",)) == 111, "mapped by both"
    assert found.resident((*BOTH, "llama.cpp-norepack")) == 111 + 110 + 10 + 10


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_possible(name):
    items = SUITES[name]
    for item in items:
        assert 1 <= item.n_layer <= PRESETS[item.preset].n_layer
        default = Bytes.of(PRESETS[item.preset].shape(item.n_layer), item.outtype)
        found = item.bytes(item.n_layer)
        assert 0 < found.file <= default.file
        assert (found.predictor < 0.6 * default.predictor) == (item.outtype == "f16"), "q3_nl beside f16"
    assert [item.until for item in items] == sorted(item.until for item in items)


def test_small_suite(tmp_path, monkeypatch):
    """Every model is announced, generated, cut and measured; a late one has a single turn."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    for name, shape in (("small", DENSE), ("experts", MOE)):
        made = lambda n, shape=shape: dataclasses.replace(shape, n_layer=n, ranks=(64,) * n)  # noqa: E731
        monkeypatch.setitem(PRESETS, name, Preset(made, 4, 0.1))
    late = (Workload("tg", 2), Workload("pp", 4))
    items = (Item("small", "q4_0", 3, (Workload("tg", 2, 2),), 1e6, "q8_0"), Item("experts", "q8_0", 2, late, 0))
    monkeypatch.setitem(SUITES, "small", items)
    monkeypatch.setattr(suite, "available_memory", lambda: 3 * SPARE_BYTES + 2 * Bytes.of(DENSE, "q8_0").resident(BOTH))
    said: list[str] = []
    first, second = run_suite("small", baselines=BOTH, n_threads=[1], say=said.append, progress=lambda line: None)
    assert [(row.test, row.baseline, row.repetitions) for row in first] == [("tg2x2", name, 3) for name in BOTH]
    assert [(row.test, row.repetitions) for row in second] == [("tg2", 1), ("tg2", 1), ("pp4", 1), ("pp4", 1)]
    assert first[0].model_filename.startswith("small-3-layers-q4_0")
    assert "-pred-q8_0" in first[0].model_filename
    assert {row.predictor_type for row in (*first, *second)} == {"q8_0"}, "of experts it is the default"
    announced = [line for line in said if line.startswith("model ")]
    n_bytes = Bytes.of(PRESETS["small"].shape(3), "q4_0", "q8_0").file
    assert announced[0] == f"model 1 of 2: small, q4_0, predictor q8_0, {n_bytes / 1e9:.1f} GB: 3 of 4 layers"
    assert announced[1].startswith("model 2 of 2: experts, q8_0, ")


def test_what_memory_cuts_is_said(tmp_path, monkeypatch):
    """The announcement comes before anything is generated, and says why layers are missing."""
    monkeypatch.setattr(suite, "available_memory", lambda: 0)
    monkeypatch.setattr(suite, "generated", lambda *arguments: pytest.fail("too early"))
    said: list[str] = []

    class AnnouncedError(Exception):
        pass

    def say(line: str) -> None:
        said.append(line)
        raise AnnouncedError

    with pytest.raises(AnnouncedError):
        next(run_suite("full", baselines=BOTH, n_threads=None, say=say, progress=lambda line: None))
    assert said[0].endswith("1 of 32 layers, for more than 1 of which memory has no room")
