"""`tsconv eval sweep`: every point is PyTorch's, nothing is lost down to the model's own sparsity, and what is stopped
continues."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch
from PIL import Image
from reference import Reference

import tsconv
from support import CHECKPOINTS, synthetic, tiny
from tsconv.eval.sweep.file import identity_of, open_file
from tsconv.eval.sweep.measure import sweep as run_sweep
from tsconv.eval.sweep.points import FIELDS, Point, wanted_sparsities
from tsconv.eval.windows import windows
from tsconv.format.header import read_header

NAMES = ("tiny-turbosparse-mistral", "tiny-turbosparse-mixtral")
HELDOUT = CHECKPOINTS / "heldout.txt"
N_CTX, CHUNKS = 128, 4
OPTIONS = ("-c", N_CTX, "--chunks", CHUNKS, "-t", 1)
TOPK = ("0", "0.5", "0.9", "0.95", "0.98")


def sweep(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    done = tiny.run("eval", "sweep", *arguments, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module", params=NAMES)
def swept(request, tmp_path_factory) -> tuple[str, Path, dict]:
    """A model, the folder with all outputs of its sweep, and what was printed."""
    folder = tmp_path_factory.mktemp("sweep")
    model = tiny.converted(request.param)
    outputs = ("--points", folder / "points.json", "--csv", folder / "points.csv")
    outputs += ("--plot", folder / "plot.png", "--report", folder / "report")
    topk = ",".join(TOPK)
    done = sweep(model, "--text", HELDOUT, "--sparsity", topk, "--threshold", "1,-1", *outputs, "--json")
    return request.param, folder, json.loads(done.stdout)


def by_pytorch(name: str, rows: list[list[int]], sparsity: str) -> np.ndarray:
    """Log probabilities of the scored positions, float64 [n, n_vocab]."""
    reference = Reference.load(CHECKPOINTS / name)
    kind, _, value = sparsity.partition(":")
    if kind == "topk":
        n_ff = reference.config.n_ff
        reference.keep_largest(max(1, n_ff - int(np.floor(float(value) * n_ff + 0.5))))
    masks = "predictor" if kind == "predictor" else "exact"
    half = len(rows[0]) // 2
    logits = [reference.logits(row, sparsity=masks).double()[half:-1] for row in rows]
    return torch.log_softmax(torch.cat(logits), dim=1).numpy()


@pytest.fixture(scope="module")
def measured(swept, tmp_path_factory) -> dict[str, Point]:
    """The points, with keys and values in f32: in f16 they move |h| of some neurons across the edge of top-k."""
    header = read_header(tiny.converted(swept[0]))
    identity = identity_of(header, HELDOUT.read_bytes(), N_CTX, CHUNKS, 2048)
    kept = open_file(tmp_path_factory.mktemp("measured") / "points.json", identity)
    wanted = wanted_sparsities(TOPK, (), has_predictor=True)
    f32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    run_sweep(header.path, HELDOUT.read_bytes(), wanted, kept, n_threads=1, **f32)
    assert list(kept.points) == wanted
    return kept.points


@pytest.fixture(scope="module")
def rows(swept) -> list[list[int]]:
    """The windows, each behind a begin-of-text token."""
    model = tsconv.load(tiny.converted(swept[0]), n_threads=1)
    found = windows(model, HELDOUT.read_bytes(), N_CTX, CHUNKS)
    bos = model.token_bos()
    model.close()
    return [[bos, *row[1:]] for row in found.tokens.tolist()]


@pytest.mark.parametrize("sparsity", ["exact", *(f"topk:{value}" for value in TOPK), "predictor"])
def test_points_are_pytorchs(swept, measured, rows, sparsity):
    name, _, result = swept
    point = measured[sparsity].as_dict()
    (printed,) = (point for point in result["points"] if point["sparsity"] == sparsity)
    log_p, log_q = by_pytorch(name, rows, "exact"), by_pytorch(name, rows, sparsity)
    targets = np.concatenate([row[N_CTX // 2 + 1 :] for row in rows])
    at = np.arange(len(targets))
    nll, nll_base = -log_q[at, targets], -log_p[at, targets]
    perplexity = np.exp(nll.mean())
    assert point["n_tokens"] == len(targets) == CHUNKS * (N_CTX - 1 - N_CTX // 2)
    assert point["perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert printed["perplexity"] == pytest.approx(perplexity, rel=1e-2)
    assert point["error"] == pytest.approx(perplexity * nll.std() / np.sqrt(len(nll) - 1), rel=1e-3)
    assert point["ratio"] == pytest.approx(np.exp((nll - nll_base).mean()), rel=1e-3)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    assert point["kl"] == pytest.approx(kl.mean(), rel=5e-3, abs=1e-5)
    assert point["kl_error"] == pytest.approx(kl.std() / np.sqrt(len(kl) - 1), rel=1e-2, abs=1e-5)
    assert point["same_top"] == pytest.approx((log_p.argmax(1) == log_q.argmax(1)).mean(), abs=2.1 / len(kl))


def test_shape_of_table_3(swept):
    """Nothing is lost where no layer has to drop more than what is zero; from there on it grows."""
    _, _, result = swept
    points = {point["sparsity"]: point for point in result["points"]}
    exact = points["exact"]
    for value in TOPK:
        point = points[f"topk:{value}"]
        assert point["reached"] >= max(float(value), exact["reached"]) - 0.01
        if all(1 - active > float(value) + 0.1 for active in exact["layers_active"]):
            assert point["kl"] < 1e-4 and point["ratio"] == pytest.approx(1, abs=1e-3)
            assert point["active"] == pytest.approx(exact["active"], rel=1e-2)
    grown = [points[f"topk:{value}"] for value in TOPK[-3:]]
    assert [p["kl"] for p in grown] == sorted(p["kl"] for p in grown) and grown[-1]["kl"] > 0.05
    assert grown[-1]["perplexity"] > grown[0]["perplexity"] > 0
    moved = [points[name]["reached"] for name in ("predictor:-1", "predictor", "predictor:1")]
    assert moved == sorted(moved) and len(set(moved)) == 3


def test_outputs(swept):
    _, folder, result = swept
    sparsities = ["exact", *(f"topk:{value}" for value in TOPK), "predictor:-1", "predictor", "predictor:1"]
    assert [point["sparsity"] for point in result["points"]] == sparsities
    lines = list(csv.DictReader(io.StringIO((folder / "points.csv").read_text())))
    assert [line["sparsity"] for line in lines] == sparsities
    assert [float(line["perplexity"]) for line in lines] == [p["perplexity"] for p in result["points"]]
    assert all(float(p[speed]) > 0 for p in lines for speed in ("prefill_tokens_per_s", "decode_tokens_per_s"))
    with Image.open(folder / "plot.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 20
    names = {f"{name}.{kind}" for name in ("quality", "speed", "layers") for kind in ("svg", "png")}
    assert {path.name for path in (folder / "report").iterdir()} == {"index.html", *names}
    page = (folder / "report" / "index.html").read_text()
    assert page.count("<svg") == 3 and all(sparsity in page for sparsity in sparsities)
    assert sorted(path.name for path in folder.iterdir()) == ["plot.png", "points.csv", "points.json", "report"]


def test_points_that_are_there_are_not_measured_again(swept):
    """More points may be asked for; those before are the same to the digit."""
    name, folder, result = swept
    arguments = (tiny.converted(name), "--text", HELDOUT, "--points", folder / "points.json")
    done = sweep(*arguments, "--sparsity", "0.5,0.99", "--json")
    assert b"points.json: 3 of 4 points are there already" in done.stderr
    found = {point["sparsity"]: point for point in json.loads(done.stdout)["points"]}
    assert found.keys() == {"exact", "topk:0.5", "topk:0.99", "predictor"}
    for point in result["points"]:
        assert found.get(point["sparsity"], point) == point
    table = sweep(*arguments, "--sparsity", "0.5,0.99").stdout.decode().splitlines()
    assert [line.split()[0] for line in table] == ["sparsity", "exact", "topk:0.5", "topk:0.99", "predictor"]
    assert f"{found['topk:0.99']['perplexity']:.4f}" in table[3]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_and_continued(tmp_path, how):
    """Points that were there stay; the base is not computed again where it was complete."""
    model, kept = tiny.converted(), tmp_path / "kept.json"
    arguments = ("eval", "sweep", model, "--text", HELDOUT, "--points", kept, *OPTIONS, "--sparsity")
    many = ",".join(f"{k / 100}" for k in range(99))  # more than it gets to
    command = [*tiny.TSCONV, *map(str, arguments), many]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while b"topk:0.0:" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(how)
        errors = process.communicate(timeout=tiny.TIMEOUT_S)[1]
    assert process.returncode in (-how, 128 + how) and b"Traceback" not in errors
    before = {point["sparsity"]: point for point in json.loads(kept.read_text())["points"]}
    assert {"exact", "topk:0.0"} <= before.keys() and "topk:0.98" not in before
    base = kept.with_name("kept.json.base").stat()
    done = tiny.run(*arguments, "0.0,0.98", "--json")
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert [point["sparsity"] for point in points] == ["exact", "topk:0.0", "topk:0.98", "predictor"]
    assert [before.get(point["sparsity"], point) for point in points] == points
    assert b"exact:" not in done.stderr and base.st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_base_that_was_damaged_is_computed_again(tmp_path):
    model, kept = tiny.converted(), tmp_path / "kept.json"
    arguments = (model, "--text", HELDOUT, "--points", kept, "--sparsity")
    first = {p["sparsity"]: p for p in json.loads(sweep(*arguments, "0.9", "--json").stdout)["points"]}
    base = tmp_path / "kept.json.base"
    base.write_bytes(b"_logits_ of something else")
    values = json.loads(kept.read_text())
    values["points"] = [point for point in values["points"] if point["sparsity"] == "exact"]
    values["base"] = [base.stat().st_size, base.stat().st_mtime_ns]
    kept.write_text(json.dumps(values))
    done = sweep(*arguments, "0.9", "--json")
    assert b"the base is computed again" in done.stderr
    again = {p["sparsity"]: p for p in json.loads(done.stdout)["points"]}
    for name in ("perplexity", "kl", "active"):
        assert again["topk:0.9"][name] == pytest.approx(first["topk:0.9"][name], rel=1e-6)


# ---- what cannot be


def refused(*arguments: object) -> str:
    return tiny.error_line(tiny.run("eval", "sweep", *arguments, "-t", 1))


@pytest.fixture
def few(tmp_path) -> Path:
    """The file of a sweep of two points."""
    kept = tmp_path / "kept.json"
    sweep(tiny.converted(), "--text", HELDOUT, "--points", kept, "--sparsity", "")
    return kept


def spoilt(**changes: object):
    """A point of the file, changed."""

    def spoil(data: bytes) -> bytes:
        values = json.loads(data)
        values["points"][0] |= changes
        return json.dumps(values).encode()

    return spoil


def without(name: str):
    def spoil(data: bytes) -> bytes:
        values = json.loads(data)
        del values["points"][0][name]
        return json.dumps(values).encode()

    return spoil


DAMAGES = [lambda data: data[:-30], lambda data: b"[]", lambda data: b"\xff\xfe", lambda data: b"[" * 100_000]
DAMAGES += [lambda data: data.replace(b'"tsconv_sweep": 1', b'"tsconv_sweep": 2')]
DAMAGES += [
    lambda data: data.replace(b'"points"', b'"pints"'),
    lambda data: data.replace(b'"base": null', b'"base": 7'),
]
DAMAGES += [spoilt(perplexity="x"), spoilt(kl=None), spoilt(active=True), spoilt(sparsity="topk:2")]
DAMAGES += [spoilt(layers_active=[0.1, "x"]), spoilt(n_tokens=1.5), spoilt(error=float("nan")), without("ratio")]


def test_damaged_points(few):
    good = few.read_bytes()
    for spoil in DAMAGES:
        bad = spoil(good)
        few.write_bytes(bad)
        line = refused(tiny.converted(), "--text", HELDOUT, "--points", few, *OPTIONS[:4])
        assert f"{few}: not the points of a sweep, or damaged: found " in line
        assert line.endswith("; delete it, or name another --points") and "\n" not in line
        assert few.read_bytes() == bad


def test_points_of_something_else(few, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(HELDOUT.read_bytes()[100:])
    model = tiny.converted()
    for arguments, message in (
        ((tiny.converted(NAMES[1]), "--text", HELDOUT, *OPTIONS[:4]), "points of another model: expected"),
        (
            (tiny.converted(NAMES[0], "q4_0"), "--text", HELDOUT, *OPTIONS[:4]),
            "points of another conversion of the model",
        ),
        ((model, "--text", other, *OPTIONS[:4]), "points of another text; name another --points"),
        ((model, "--text", HELDOUT, "-c", 64, "--chunks", CHUNKS), "points with another -c: expected 64, found 128"),
        ((model, "--text", HELDOUT, "-c", N_CTX), "points with another --chunks: expected all, found 4"),
    ):
        assert message in refused(*arguments, "--points", few)


def test_bad_input(tmp_path):
    model, short = tiny.converted(), tmp_path / "short.txt"
    short.write_text("And it came to pass")
    kept = ("--points", tmp_path / "kept.json")
    text = ("--text", HELDOUT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "index.html").write_text("mine")
    for arguments, message in (
        ((model, "--text", short, *kept), "the text is too short: expected at least 1024 tokens"),
        ((model, *text, *kept, "--sparsity", "0.5,1.5"), "sparsity: expected 'predictor', 'exact'"),
        ((model, *text, *kept, "--sparsity", "half"), "found 'topk:half'"),
        ((model, *text, *kept, "--threshold", "much"), "found 'predictor:much'"),
        ((model, *text, "--points", tmp_path / "none" / "kept.json"), "folder of the output does not exist"),
        ((model, *text, "--points", tmp_path), "output is a directory"),
        ((model, *text, *kept, "--csv", tmp_path / "none" / "x.csv"), "folder of the output does not exist"),
        ((model, *text, *kept, "--plot", tmp_path / "x.pdf"), "ends neither in .png nor in .svg"),
        ((model, *text, *kept, "--report", tmp_path / "full"), "not a file of a report"),
        ((model, "--text", tmp_path / "none.txt"), "is neither a file nor one of"),
    ):
        assert message in refused(*arguments), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "short.txt"]


def test_no_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    line = refused(tiny.converted(), "--text", HELDOUT, "--points", folder / "kept.json")
    assert "folder of the output is not writable" in line


def test_model_without_predictors(tmp_path):
    shape = synthetic.SHAPES["bamboo"]
    checkpoint = synthetic.save(tmp_path / "checkpoint", shape, synthetic.random_tensors(shape))
    model = tsconv.convert(checkpoint, tmp_path / "m.gguf", "f32").model
    text = tmp_path / "text.txt"
    text.write_text("And it came to pass in those days. " * 40)
    options = ("-c", 64, "--chunks", 2, "-t", 1)
    assert "the model has no predictor" in refused(model, "--text", text, "--threshold", "1", *options[:4])
    done = tiny.run("eval", "sweep", model, "--text", text, "--sparsity", "0.9", *options, "--report", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.decode().splitlines()] == ["sparsity", "exact", "topk:0.9"]
    assert (tmp_path / "m.sweep.json").exists() and (tmp_path / "r" / "layers.svg").exists()


def test_every_field_is_described():
    assert all(name in (Point.__doc__ or "") for name in FIELDS if name != "n_tokens")
