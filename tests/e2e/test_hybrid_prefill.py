"""Prompts on a GPU and the CPU, end to end; the GPU's kernels are compiled for the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support import tiny
from support.hybrid import FROM_DISK, MAX_NMSE, MODELS, python

# A prompt of n tokens, of whose neurons the GPU has `part` percent.
COMMON = """
import functools, os
path, sparsity, *sizes = sys.argv[1:]
prompt = np.random.default_rng(0).integers(3, 300, 512).tolist()
model = load(path, n_gpu_layers=0, sparsity=sparsity)
shape = model._native._shape
model.close()


def prefill(n, part=None, **options):
    global tokens
    tokens = prompt[:n]
    if part is not None:
        hot = np.full(shape[:2], shape[2] * part // 100, np.int32)
        options |= {"vram_budget": 1 << 29, "gpu_hot": hot}
    return logits_of(path, 512, **{"sparsity": sparsity, "n_ctx": 1024} | options)


@functools.cache
def on_cpu(n):
    return prefill(n, n_gpu_layers=0)
"""

BATCHES = (
    COMMON
    + """
rows = []
for n, part, rows_that_stream in json.loads(sizes[0]):
    os.environ["TSFFN_CUDA_STREAM"] = str(rows_that_stream)
    reference = on_cpu(n)
    found = [prefill(n, part) for _ in range(2)]
    logits, stats, share, complaint, used = found[0]
    rows.append({
        "case": [n, part, rows_that_stream],
        "nmse": float(tiny.nmse(logits, reference[0])),
        "same": bool((logits == found[1][0]).all()),
        "complaint": complaint,
        "bytes": [used, share.n_bytes],
        "neurons": share.neurons / share.n_neurons,
        "predicted": [stats[0]["predicted"], reference[1][0]["predicted"]],
        "total": [stats[0]["n_ff"], reference[1][0]["n_ff"]],
        "on_gpu": [stats[0]["gpu_neurons"], stats[0]["gpu_calls"], stats[0]["calls"]],
        "streamed": sum(layer["bytes_streamed"] for layer in stats),
        "tokens": share.prefill_tokens,
    })
print(json.dumps({"rows": rows}))
"""
)


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Path:
    return tiny.converted(MODELS[request.param], "f16")


# (tokens, percent of the neurons on the GPU, rows of an FFN from which the others are streamed)
CASES = {
    "predictor": [(17, 0, 0), (17, 50, 1), (31, 10, 1), (32, 100, 0), (33, 10, 0), (33, 0, 1), (128, 50, 0)],
    "exact": [(17, 50, 0), (31, 100, 0), (33, 20, 1)],
}


@pytest.mark.parametrize("sparsity", CASES)
def test_batches(model, sparsity):
    """Logits are the CPU's, whatever the GPU has of the model, whether it gets the rest or not; the same bits twice.
    128 tokens are two calls of the GPU."""
    cases = [case for case in CASES[sparsity] if case[0] <= 64 or "mixtral" not in model.name]
    for row in python(BATCHES, model, sparsity, json.dumps(cases), TSFFN_CUDA_PREFILL="64")["rows"]:
        part, rows_that_stream = row["case"][1:]
        assert row["nmse"] <= MAX_NMSE and row["same"] and row["complaint"] is None, row
        assert row["bytes"][0] == row["bytes"][1] and row["tokens"] == 64
        assert row["total"][0] == row["total"][1]
        assert row["predicted"][0] == pytest.approx(row["predicted"][1], abs=1e-9 if sparsity == "exact" else 2)
        neurons, gpu_calls, calls = row["on_gpu"]
        assert gpu_calls == calls == 1
        assert row["neurons"] == pytest.approx(part / 100, abs=0.2) and (part < 100 or row["neurons"] == 1.0)
        assert (row["streamed"] > 0) == (rows_that_stream > 0)
        assert neurons == pytest.approx(row["total"][0] * (1 if rows_that_stream else row["neurons"]))


def test_512_tokens():
    """One call of as many tokens as llama.cpp computes at a time."""
    model = tiny.converted(MODELS["dense"], "f16")
    found = python(BATCHES, model, "predictor", "[[512, 50, 1]]")["rows"][0]
    assert found["nmse"] <= MAX_NMSE and found["same"] and found["complaint"] is None
    assert found["tokens"] == 512 and found["streamed"] > 0


CHOICE = (
    COMMON
    + """
calls = {}
for name, value in (("off", "0"), ("all", "64"), ("auto", "")):
    os.environ["TSFFN_CUDA_PREFILL"] = value
    whole = prefill(1, vram_budget=1 << 29)[2]
    found = prefill(20, vram_budget=whole.n_bytes // 2)
    calls[name] = [found[2].prefill_tokens, found[1][0]["gpu_calls"]]
os.environ["TSFFN_CUDA_PREFILL"] = "64"
streamed = {}
for rows in ("", "0", "20", "21", "1000"):
    os.environ["TSFFN_CUDA_STREAM"] = rows
    streamed[rows] = sum(layer["bytes_streamed"] for layer in prefill(20, 50)[1])
wrong = {}
for name, value in (("TSFFN_CUDA_STREAM", "x"), ("TSFFN_CUDA_PREFILL", "-1")):
    os.environ["TSFFN_CUDA_STREAM"] = os.environ["TSFFN_CUDA_PREFILL"] = ""
    os.environ[name] = value
    wrong[name] = prefill(20, 50)[3]
print(json.dumps({"calls": calls, "streamed": streamed, "wrong": wrong}))
"""
)


def test_what_decides():
    """TSFFN_CUDA_PREFILL and TSFFN_CUDA_STREAM; without them a small part of the budget, and many rows."""
    found = python(CHOICE, tiny.converted(MODELS["dense"], "f16"), "predictor")
    assert found["calls"] == {"off": [0, 0], "all": [64, 1], "auto": [0, 0]}
    assert {rows: n > 0 for rows, n in found["streamed"].items()} == {
        "": False, "0": False, "20": True, "21": False, "1000": False}  # fmt: skip
    assert found["wrong"] == {
        "TSFFN_CUDA_STREAM": "TSFFN_CUDA_STREAM: expected a number of rows from 0 to 2147483647, found 'x'",
        "TSFFN_CUDA_PREFILL": "TSFFN_CUDA_PREFILL: expected a number of tokens from 0 to 65536, found '-1'",
    }


FAILURES = (
    COMMON
    + """
n = 17
reference = on_cpu(n)[0]
gpu.fail(0)
prefill(n, 50)
n_calls, wrong, kinds = gpu.calls, [], {}
for call in range(3, n_calls + 1, int(sizes[0])):
    for for_good in (False, True):
        gpu.fail(call, for_good)
        logits, stats, share, complaint, _ = prefill(n, 50)
        kind = "complaint" if complaint else "share" if share else "none"
        kinds[kind] = kinds.get(kind, 0) + 1
        nmse = float(tiny.nmse(logits, reference))
        if not nmse <= 1e-5:
            wrong.append([call, for_good, nmse])
print(json.dumps({"n_calls": n_calls, "wrong": wrong, "kinds": kinds}))
"""
)


@pytest.mark.sanitized
@pytest.mark.parametrize("stream", ["0", "1"])
def test_every_call_may_fail(model, stream):
    """Any CUDA call, while it is set up, filled or computes a prompt: one line, and the CPU computes."""
    found = python(FAILURES, model, "predictor", 61, TSFFN_CUDA_PREFILL="32", TSFFN_CUDA_STREAM=stream)
    assert found["n_calls"] > 200 and not found["wrong"]
    assert found["kinds"]["share"] > 5


WRONG = (
    COMMON
    + """
reference = on_cpu(17)[0]
model = load(path, vram_budget=1 << 29, verbose=True)
gpu.go_wrong()
print("begins", file=sys.stderr)
logits = model.token_logits(prompt[:17], n_batch=17)
print(json.dumps({"nmse": float(tiny.nmse(logits, reference)), "calls": model.ffn_stats()[0]["gpu_calls"]}))
"""
)


def test_wrong_results_are_not_used(model):
    """Some rows of a layer's first prompt are compared."""
    found = python(WRONG, model, "predictor", TSFFN_CUDA_PREFILL="32")
    assert found["nmse"] <= MAX_NMSE and found["calls"] == 0
    said = [line for line in found["stderr"].partition("begins")[2].splitlines() if "tsffn" in line]
    assert said == ["tsffn: CUDA: layer 0: the GPU's results are wrong: from now on the CPU computes all neurons"]


DISK = (
    FROM_DISK
    + COMMON
    + """
reference = on_cpu(40)[0]
read_from_disk(path)
logits, stats, share, complaint, _ = prefill(40, vram_budget=2 << 20)
print(json.dumps({"nmse": float(tiny.nmse(logits, reference)), "complaint": complaint,
                  "streamed": sum(layer["bytes_streamed"] for layer in stats), "tokens": share.prefill_tokens,
                  "disk": sum(layer["bytes_disk"] for layer in stats), "calls": stats[0]["gpu_calls"]}))
"""
)


@pytest.mark.sanitized
def test_a_model_larger_than_memory(model):
    """Neurons that are read from disk are the CPU's."""
    found = python(DISK, model, "predictor", TSFFN_CUDA_PREFILL="32", TSFFN_CUDA_STREAM="1")
    assert found["nmse"] <= MAX_NMSE and found["complaint"] is None
    assert found["disk"] > 0 == found["streamed"] and found["tokens"] == 32 and found["calls"] > 0
