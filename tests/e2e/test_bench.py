"""`tsconv bench`: both engines really run, figures add up, formats can be read back. No speed is asserted."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from llama_cpp import llama_cpp as library

import tsconv
from support import CHECKPOINTS, tiny
from support.refused import sidecar_of
from tsconv.bench.generate import GENERATION, PRESETS, generated
from tsconv.bench.synthetic import Shape, write_checkpoint
from tsconv.bench.worker import ENGINES
from tsconv.errors import TsconvError
from tsconv.format.header import read_header

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
        parts = [row[f"ms_{part}"] for part in ("attention", "predictor", "ffn", "rest")]
        assert sum(parts) == pytest.approx(1e3 * seconds)
        assert min(parts[:-1]) > 0  # the rest is what is left, with the first layer's attention from the others
        assert row["model_size"] < row["peak_bytes"] < 1 << 30, "not that of measuring memory before"


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


def test_norepack_and_another_predictor(tmp_path):
    """Our backend still computes the FFNs, and reads the predictor that is there: of f16 nearly twice the bytes."""
    checkpoint = CHECKPOINTS / "tiny-turbosparse-mistral"
    wide = tsconv.convert(checkpoint, tmp_path / "m.gguf", "q8_0", predictor_outtype="f16").model
    n_bytes, read = {}, {}
    for kind, model in (("q8_0", tiny.converted("tiny-turbosparse-mistral", "q8_0")), ("f16", wide)):
        arguments = ("-m", model, "-t", 1, "-r", 1, "--test", "tg6", "--baseline", "llama.cpp-norepack")
        done = tiny.run("bench", *arguments, "--save", tmp_path / "o.json", env=QUIET)
        assert done.returncode == 0, done.stderr
        assert "tsconv-norepack: neither has" in done.stdout.decode()
        (row,) = json.loads((tmp_path / "o.json").read_text())
        assert (row["baseline"], row["engine"]) == ("llama.cpp-norepack", "tsconv-norepack")
        assert row["predictor_type"] == kind
        assert 0 < row["active"] < row["predicted"] < 0.5
        assert row["roofline_ratio"] == pytest.approx(row["dense_bytes_per_token"] / row["bytes_per_token"])
        n_bytes[kind] = sum(t.n_bytes for t in read_header(sidecar_of(model)).tensors if "fc" in t.name)
        read[kind] = row["bytes_per_token"]
    assert n_bytes["f16"] > 1.8 * n_bytes["q8_0"]
    # Both predict nearly the same neurons.
    assert read["f16"] - read["q8_0"] == pytest.approx(n_bytes["f16"] - n_bytes["q8_0"], rel=0.02)


def test_extra_buffers_are_left_out(monkeypatch):
    """The parameter reaches llama.cpp for both engines, and is its default again afterwards."""
    asked: list[bool] = []
    load_file = library.llama_model_load_from_file

    def load(path, params):
        asked.append(params.use_extra_bufts)
        return load_file(path, params)

    monkeypatch.setattr(library, "llama_model_load_from_file", load)
    model = tiny.converted("tiny-turbosparse-mistral", "q4_0")
    for engine in ("llama.cpp-norepack", "llama.cpp", "tsconv-norepack", "tsconv"):
        loaded = ENGINES[engine](str(model), 1)
        loaded.eval([3])
        if engine.startswith("tsconv"):
            assert all(layer["calls"] > 0 and layer["bytes_read"] > 0 for layer in loaded.ffn_stats())
        loaded.close()
    assert asked == [False, True, False, True]


def test_moe_reads_the_routed_experts(tmp_path):
    model = tiny.converted("tiny-turbosparse-mixtral", "q8_0")
    done = tiny.run("bench", "-m", model, "-t", 1, "-r", 1, "--test", "tg4", "-o", "jsonl", env=QUIET)
    (row,) = map(json.loads, done.stdout.splitlines())
    tensors = read_header(model).tensors
    experts = sum(tensor.n_bytes for tensor in tensors if "_exps" in tensor.name)
    whole = sum(tensor.n_bytes for tensor in tensors if tensor.name != "token_embd.weight")
    assert row["dense_bytes_per_token"] == whole - experts * 6 / 8


def test_everything_at_once(tmp_path):
    """All kinds of tests, several numbers of threads, more of them than processors too, beside both baselines."""
    arguments = ("-m", tiny.converted("tiny-turbosparse-mixtral", "q4_0"), "-r", 1, "--baseline", "dense-drelu")
    tests = ("--test", "pp40", "--test", "tg6", "--test", "tg6x4", "--test", "tg6x1", "-t", "1,3")
    done = tiny.run("bench", *arguments, *tests, "--save", tmp_path / "new.json", env=QUIET)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "new.json").read_text())
    assert [(row["n_threads"], row["test"], row["baseline"]) for row in rows] == [
        (n, test, baseline)
        for n in (1, 3)
        for test in ("pp40", "tg6", "tg6x4")
        for baseline in ("llama.cpp", "dense-drelu")
    ]
    for row in rows:
        n_tokens, n_steps = {"pp40": (40, 1), "tg6": (6, 6), "tg6x4": (24, 6)}[row["test"]]
        parts = row["ms_attention"] + row["ms_predictor"] + row["ms_ffn"] + row["ms_rest"]
        assert parts == pytest.approx(1e3 * n_tokens / n_steps / row["avg_ts"])
        assert row["ratio"] == pytest.approx(row["avg_ts"] / row["dense_avg_ts"])
        assert 0 < row["bytes_per_token"] < row["dense_bytes_per_token"]
    one, together = (next(row for row in rows if row["test"] == test) for test in ("tg6", "tg6x4"))
    # Four tokens share the weights outside the FFNs, and some of the experts.
    assert one["dense_bytes_per_token"] < together["dense_bytes_per_token"] < 4 * one["dense_bytes_per_token"]
    assert len(re.findall(r"\| tg6x4 +\| +3 \|.*dense-drelu", done.stdout.decode())) == 1


def test_model_of_one_layer(tmp_path):
    """Nothing lies between two FFNs, so that attention cannot be told from the rest."""
    shape = Shape(320, 64, 96, 4, 2, 1, ranks=(32,))
    write_checkpoint(tmp_path / "checkpoint", shape)
    model = tsconv.convert(tmp_path / "checkpoint", tmp_path / "m.gguf", "q8_0").model
    done = tiny.run("bench", "-m", model, "-t", 1, "-r", 1, "--test", "tg4", "--save", tmp_path / "o.json", env=QUIET)
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert row["ms_attention"] is None
    assert row["ms_predictor"] + row["ms_ffn"] + row["ms_rest"] == pytest.approx(1e3 / row["avg_ts"])
    assert re.search(r"\| tg4 +\| +1 \| +[0-9.]+ \| +- \|", done.stdout.decode())


def test_formats(rows, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(rows))
    done = bench("--compare", tmp_path / "old.json")
    table = done.stdout.decode()
    assert re.match(
        r"\| model +\| size +\| predictor \| test \| threads \| +t/s \| baseline +\| +its t/s \| ratio", table
    )
    found = list(csv.DictReader(io.StringIO(bench("-o", "csv").stdout.decode())))
    assert [row["test"] for row in found] == ["pp40", "tg6"]
    assert set(found[0]) == set(rows[0])
    assert re.search(rb"tg6, 1 threads: \S+ -> \S+ tokens/s \(\S+%\), ratio to llama.cpp \S+ -> ", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--test", "xx5"), "not a test: expected pp512, tg128, tg32x4"),
        (("--test", "tg0"), "not a test"),
        (("--test", "pp5000"), "1 to 1024 tokens"),
        (("--test", "tg8x17"), "1 to 16 sequences"),
        (("-t", "1,zwei"), "threads: expected numbers from 1 to 512, such as 2 or 1,2, found '1,zwei'"),
        (("--suite", "quick"), "--suite decides about --model itself"),
        (("--baseline", "sparse"), "llama.cpp-norepack"),
        (("--predictor-rank", "33"), "'33' is not a multiple of 32"),
        (("--active", "0.8"), "0<x<0.8"),
        (("--save", "nowhere/o.json"), "nowhere: folder of the output does not exist"),
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
    assert said[0].startswith("generating small, 2 layers, q4_0: 0.0 GB")
    stem = f"small-2-layers-q4_0-g{GENERATION}"
    assert sorted(file.name for file in path.parent.iterdir()) == [f"{stem}.gguf", f"{stem}.predictor.gguf"]
    written = path.stat().st_mtime_ns
    assert generated("small", 2, "q4_0", said.append) == path
    assert path.stat().st_mtime_ns == written
    assert len(said) == 2
    assert generated("small", 2, "q4_0", said.append, predictor_outtype="Q3_NL") == path, "the default"
    wide = generated("small", 2, "q4_0", said.append, predictor_outtype="q8_0")
    assert said[2].startswith("generating small, 2 layers, q4_0, predictor q8_0: 0.0 GB")
    assert wide.name == f"{stem}-pred-q8_0.gguf"
    kinds = {tensor.kind.name for tensor in read_header(sidecar_of(wide)).tensors if "fc" in tensor.name}
    assert kinds == {"Q8_0"}
    with pytest.raises(TsconvError, match="unknown predictor type 'q3'"):
        generated("small", 2, "q4_0", said.append, predictor_outtype="q3")
    narrow = generated("small", 2, "q4_0", said.append, rank=64)
    assert narrow.name == f"{stem}-rank64.gguf"
    assert read_header(sidecar_of(narrow)).keys["turbosparse.predictor.rank"] == [64, 64]
    other = generated("small", 2, "q4_0", said.append, active=0.2, seed=3)
    assert other.name == f"{stem}-0.2-seed3.gguf"
    assert other.read_bytes()[-4096:] != path.read_bytes()[-4096:]  # weights, after the header with its random id


def test_clients():
    result = tiny.run("bench", "-m", tiny.converted(), "--clients", "1,3", "-r", 1, "-t", 1, "-o", "json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["n_clients"] for row in rows] == [1, 3]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["avg_ts"] / row["dense_avg_ts"])
        assert 0 < row["active"] < 0.5  # it is the sparse backend that answered
        assert 0 < row["bytes_share"] < 1
    assert rows[1]["bytes_share"] > rows[0]["bytes_share"]  # a batch needs more neurons than a token


def test_clients_go_with_one_model():
    line = tiny.error_line(tiny.run("bench", "--suite", "quick", "--clients", "1"))
    assert line == "error: --clients goes with one model, without --test and --baseline."
