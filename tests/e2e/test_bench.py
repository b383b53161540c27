"""`tsconv bench`: both engines really run, figures add up, formats can be read back. No speed is asserted."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import tiny
from refused import sidecar_of

import tsconv
from tsconv.bench.generate import PRESETS, generated
from tsconv.bench.synthetic import Shape, write_checkpoint
from tsconv.export.gguf_header import read_header

QUIET = {"OMP_WAIT_POLICY": "passive"}


def bench(*arguments: object):
    model = tiny.converted("tiny-turbosparse-mistral", "q8_0")
    return tiny.run("bench", "-m", model, "-t", 1, "-r", 2, "--test", "pp40", "--test", "tg6", *arguments, env=QUIET)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    done = bench("-o", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_figures_add_up(rows):
    assert [row["test"] for row in rows] == ["pp40", "tg6"]
    for row in rows:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["repetitions"] == 2
        assert 0 < row["active"] < row["predicted"] < 0.5
        step = 40 if row["test"] == "pp40" else 1
        seconds = step / row["avg_ts"]
        assert row["gbps"] == pytest.approx(row["bytes_per_token"] / seconds / 1e9)
        assert row["bandwidth_share"] == pytest.approx(row["gbps"] / row["memory_gbps"])
        parts = row["ms_predictor"] + row["ms_ffn"] + row["ms_rest"]
        assert parts == pytest.approx(1e3 * seconds)
        assert min(row["ms_predictor"], row["ms_ffn"], row["ms_rest"]) > 0
        assert row["peak_bytes"] > row["model_size"]


def test_bytes_of_a_token(rows):
    """Counted from the file: what a dense model reads for a token, and what of it is not the FFN's."""
    row = rows[1]
    model = tiny.converted("tiny-turbosparse-mistral", "q8_0")
    tensors = {tensor.name: tensor.n_bytes for tensor in read_header(model).tensors}
    dense = sum(n for name, n in tensors.items() if name != "token_embd.weight")
    ffn = sum(n for name, n in tensors.items() if name.split(".")[-2] in ("ffn_gate", "ffn_up", "ffn_down"))
    predictor = sum(tensor.n_bytes for tensor in read_header(sidecar_of(model)).tensors if "scale" not in tensor.name)
    assert row["dense_bytes_per_token"] == dense
    assert dense - ffn + predictor < row["bytes_per_token"] < dense + predictor
    assert row["roofline_ratio"] == pytest.approx(dense / row["bytes_per_token"])
    assert row["roofline_reached"] == pytest.approx(row["ratio"] / row["roofline_ratio"])
    assert rows[0]["roofline_ratio"] is None


def test_moe_reads_the_routed_experts(tmp_path):
    model = tiny.converted("tiny-turbosparse-mixtral", "q8_0")
    done = tiny.run("bench", "-m", model, "-t", 1, "-r", 1, "--test", "tg4", "-o", "jsonl", env=QUIET)
    (row,) = map(json.loads, done.stdout.splitlines())
    tensors = read_header(model).tensors
    experts = sum(tensor.n_bytes for tensor in tensors if "_exps" in tensor.name)
    whole = sum(tensor.n_bytes for tensor in tensors if tensor.name != "token_embd.weight")
    assert row["dense_bytes_per_token"] == whole - experts * 6 / 8


def test_formats(rows, tmp_path):
    table = bench().stdout.decode()
    assert table.startswith("| model | size | test | t/s | dense t/s | ratio |")
    assert "1 threads" in table
    found = list(csv.DictReader(io.StringIO(bench("-o", "csv").stdout.decode())))
    assert [row["test"] for row in found] == ["pp40", "tg6"]
    assert set(found[0]) == set(rows[0])
    (tmp_path / "old.json").write_text(json.dumps(rows))
    done = bench("--compare", tmp_path / "old.json")
    assert b"tg6: ratio " in done.stderr and b" -> " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--test", "xx5"), "not a test: expected pp512, tg128"),
        (("--test", "tg0"), "not a test"),
        (("--test", "pp5000"), "1 to 1024 tokens"),
        (("--compare", "nothing.json"), "cannot be read"),
        (("--compare", __file__), "not a result of tsconv bench"),
    ],
)
def test_bad_arguments(arguments, message):
    assert message in tiny.error_line(tiny.run("bench", "-m", tiny.converted(), *arguments))


def test_model_that_is_no_model(tmp_path):
    (tmp_path / "m.gguf").write_text("hello")
    assert "not a GGUF file" in tiny.error_line(tiny.run("bench", "-m", tmp_path / "m.gguf"))


def test_generated_once(tmp_path, monkeypatch):
    shape = Shape(320, 64, 96, 4, 2, 2, ranks=(32, 32))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(PRESETS, "small", type(PRESETS["turbosparse-mistral-7b"])(lambda n: shape, 2, 0.1))
    said: list[str] = []
    path = generated("small", 2, "q4_0", said.append)
    assert said[0].startswith("generating small, 2 layers, q4_0: needs ")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "small-2-layers-q4_0.gguf",
        "small-2-layers-q4_0.predictor.gguf",
    ]
    written = path.stat().st_mtime_ns
    assert generated("small", 2, "q4_0", said.append) == path
    assert path.stat().st_mtime_ns == written
    assert len(said) == 2


@pytest.mark.parametrize("predicted", [0.1, 0.3])
def test_predictors_pass_the_share_asked_for(tmp_path, predicted):
    shape = Shape(320, 512, 2048, 4, 2, 2, ranks=(256, 256))
    write_checkpoint(tmp_path / "checkpoint", shape, predicted=predicted)
    model = tsconv.load(tsconv.convert(tmp_path / "checkpoint", tmp_path / "m.gguf", "q8_0").model, n_threads=1)
    model.eval(np.random.default_rng(0).integers(3, 250, 64).tolist())
    found = [layer["predicted"] / layer["n_ff"] for layer in model.ffn_stats()]
    model.close()
    assert found == pytest.approx([predicted] * 2, abs=0.02)
