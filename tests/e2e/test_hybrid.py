"""FFNs that a GPU and the CPU share, end to end; the GPU's kernels are compiled for the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import fake_gpu, host_gpu, tiny
from support.hybrid import FROM_DISK, MAX_NMSE, MODELS, python
from support.placements import placement_for
from support.random_stats import random_stats, save_stats
from support.serving import serving
from tsconv.commands.reorder import reorder
from tsconv.placement import file as placement_file

PROMPT = "And it came to pass"
MIB = 1 << 20


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Path:
    return tiny.converted(MODELS[request.param], "f16")


# ---- the same function


BUDGETS = """
path, sparsity = sys.argv[1:]
reference, counted, *_ = logits_of(path, sparsity=sparsity, n_gpu_layers=0)
whole = logits_of(path, sparsity=sparsity, vram_budget=1 << 29)[2]
rows = []
for part in (1, 10, 50, 100):
    budget = whole.n_bytes * part // 100
    logits, stats, share, complaint, used = logits_of(path, sparsity=sparsity, vram_budget=budget)
    rows.append({
        "part": part,
        "budget": budget,
        "bytes": share and share.n_bytes,
        "used": used,
        "neurons": share and share.neurons / share.n_neurons,
        "complaint": complaint,
        "nmse": float(tiny.nmse(logits, reference)),
        "predicted": [stats[0]["predicted"], counted[0]["predicted"]],
        "total": [stats[0]["n_ff"], counted[0]["n_ff"]],
        "on_gpu": sum(layer["gpu_neurons"] for layer in stats),
        "bytes_gpu": sum(layer["bytes_gpu"] for layer in stats),
    })
print(json.dumps({"rows": rows, "whole": whole.neurons == whole.n_neurons}))
"""


@pytest.mark.parametrize("sparsity", ["predictor", "exact", "predictor:0.5"])
def test_budgets(model, sparsity):
    """Logits are the CPU's, whatever the GPU has of the model; it has as much as the bytes hold, to the byte."""
    found = python(BUDGETS, model, sparsity)
    assert found["whole"]
    before = -1.0
    for row in found["rows"]:
        assert row["nmse"] <= MAX_NMSE, row
        assert row["predicted"][0] == row["predicted"][1] and row["total"][0] == row["total"][1]
        if row["complaint"] is not None:  # too little for a call
            assert "GPU memory: expected at least" in row["complaint"] and row["part"] <= 10
            assert row["used"] == 0 and row["on_gpu"] == 0
            continue
        assert row["used"] == row["bytes"] <= row["budget"]
        assert row["neurons"] >= before
        before = row["neurons"]
        assert (row["on_gpu"] > 0) == (row["neurons"] > 0)
    assert found["rows"][-1]["neurons"] == 1.0
    assert any(0 < row["neurons"] < 1 for row in found["rows"] if row["neurons"])


FORMS = """
path, sidecar = sys.argv[1:]
reference, counted, *_ = logits_of(path, predictor_path=sidecar, n_gpu_layers=0)
logits, stats, share, complaint, used = logits_of(path, predictor_path=sidecar, vram_budget=1 << 29)
print(json.dumps({
    "nmse": float(tiny.nmse(logits, reference)),
    "predicted": [stats[0]["predicted"], counted[0]["predicted"]],
    "predictors": [share.predictors, share.n_predictors],
    "on_gpu": sum(layer["gpu_neurons"] for layer in stats),
    "said": str(share),
}))
"""


@pytest.mark.parametrize("kind", [("sign",), ("quant", "--both"), ("svd",)], ids=" ".join)
def test_predictors_that_the_gpu_has_no_kernels_for(model, kind, tmp_path):
    """The CPU computes their masks, the GPU its neurons; what is said names the predictors that it has."""
    sidecar = tmp_path / "p.predictor.gguf"
    options = ("--kind", *kind, "--calib", "builtin", "--tokens", 128)
    done = tiny.run("predictor", "build", model, "--out", sidecar, *options)
    assert done.returncode == 0, done.stderr
    found = python(FORMS, model, sidecar)
    assert found["nmse"] <= MAX_NMSE and found["predicted"][0] == found["predicted"][1] > 0
    assert found["predictors"][0] == 0 < found["predictors"][1] and found["on_gpu"] > 0
    assert f"predictors of 0 of {found['predictors'][1]} layers" in found["said"]


TOPK = """
path, = sys.argv[1:]
reference = logits_of(path, sparsity="topk:0.9", n_gpu_layers=0)[0]
logits, stats, share, complaint, used = logits_of(path, sparsity="topk:0.9", vram_budget=1 << 29)
model = load(path, sparsity="topk:0.9", n_gpu_layers=0)
try:
    model._native.share_with_gpu(0, 1 << 29, None, None)
except tsconv.errors.BackendError as error:
    refused = str(error)
print(json.dumps({"same": bool((logits == reference).all()), "share": share, "used": used, "refused": refused}))
"""


def test_topk_is_the_cpus_alone(model):
    """Which neurons stay is decided among all of an FFN's."""
    found = python(TOPK, model)
    assert found["same"] and found["share"] is None and found["used"] == 0
    assert "sparsity topk:0.9 is computed by the CPU alone" in found["refused"]


TOGETHER = """
path, = sys.argv[1:]
whole = logits_of(path, vram_budget=1 << 29)[2].n_bytes
tokens += range(50, 62)
found = []
for n_batch in (3, 9, 17):
    reference = logits_of(path, n_batch, n_gpu_layers=0)[0]
    logits, stats, *_ = logits_of(path, n_batch, vram_budget=whole * 3 // 4)
    again = logits_of(path, n_batch, vram_budget=whole * 3 // 4)[0]
    found.append([n_batch, float(tiny.nmse(logits, reference)), bool((logits == again).all()), stats[0]["gpu_calls"]])
print(json.dumps({"found": found}))
"""


def test_several_tokens(model):
    """Of a few tokens the GPU computes its part; of more than 16 rows the CPU computes all, where prompts are not the
    GPU's. The same logits twice."""
    n_used = 2 if "mixtral" in model.name else 1
    for n_batch, nmse, same, gpu_calls in python(TOGETHER, model, TSFFN_CUDA_PREFILL="0")["found"]:
        assert nmse <= MAX_NMSE and same, n_batch
        calls = [min(n_batch, 18 - i) for i in range(0, 18, n_batch)]
        assert gpu_calls == sum(n * n_used <= 16 for n in calls), n_batch


TWO = """
one, other = sys.argv[1:]
alone = [logits_of(path, n_gpu_layers=0)[0] for path in (one, other)]
models = [load(path, vram_budget=1 << 20) for path in (one, other, one)]
models.append(load(one, n_gpu_layers=0))
answers = [model.token_logits(tokens, n_batch=1) for _ in range(2) for model in models]
nmse = [float(tiny.nmse(answer, alone[i % 4 == 1])) for i, answer in enumerate(answers)]
calls = [model.ffn_stats()[0]["gpu_calls"] for model in models]
for model in models:
    model.close()
print(json.dumps({"nmse": nmse, "calls": calls, "left": gpu.allocations}))
"""


@pytest.mark.sanitized
def test_several_models():
    """Models side by side, one of them twice, one without the GPU."""
    found = python(TWO, *(tiny.converted(name, "f16") for name in MODELS.values()))
    assert max(found["nmse"]) <= MAX_NMSE
    assert found["calls"] == [12, 12, 12, 0]
    assert found["left"] == 0


STREAMED = (
    FROM_DISK
    + """
path, = sys.argv[1:]
reference = logits_of(path, n_gpu_layers=0)[0]
read_from_disk(path)
logits, stats, share, complaint, _ = logits_of(path, vram_budget=1 << 20)
print(json.dumps({"nmse": float(tiny.nmse(logits, reference)), "complaint": complaint,
                  "disk": sum(layer["bytes_disk"] for layer in stats),
                  "gpu": sum(layer["gpu_calls"] for layer in stats), "neurons": share.neurons}))
"""
)


@pytest.mark.sanitized
def test_a_model_larger_than_memory(model):
    """Neurons that neither the GPU nor memory has come from disk."""
    found = python(STREAMED, model)
    assert found["nmse"] <= MAX_NMSE and found["disk"] > 0
    assert found["complaint"] is None and found["gpu"] > 0 and found["neurons"] > 0


# ---- what decides where it is computed


WHERE = """
model = load(sys.argv[1], **json.loads(sys.argv[2]))
model.token_logits(tokens, n_batch=1)
stats = model.ffn_stats()
share = model.gpu_share
print(json.dumps({"neurons": share and share.neurons, "complaint": model.gpu_complaint,
                  "on_gpu": [layer["gpu_neurons"] for layer in stats], "text": share and str(share)}))
"""


def test_nothing_on_the_gpu(model):
    """n_gpu_layers=0 keeps all here; a dense computation is the CPU's."""
    for options in ({"n_gpu_layers": 0}, {"vram_budget": 1 << 29, "sparsity": "dense"}):
        found = python(WHERE, model, json.dumps(options))
        assert found["neurons"] is None and found["complaint"] is None and not any(found["on_gpu"])


def run(model: Path, *options: object, **env: str) -> dict[str, Any]:
    done = tiny.run("run", "-m", model, "-p", PROMPT, "-n", 4, "-t", 1, "--temp", 0, "--json", *options,
                    env=host_gpu.environment() | env)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr.decode()}


def test_command_line(model):
    """-ngl and --vram-budget say what is computed where; run says it in a line, and all of it as JSON."""
    cpu, gpu = run(model, "-ngl", 0), run(model, "--vram-budget", "64MiB")
    assert cpu["text"] == gpu["text"]
    assert cpu["ffn_on_gpu"] is None and cpu["gpu_share"] == 0 and cpu["gpu_overlap"] is None
    assert gpu["ffn_on_gpu"]["neurons"] == gpu["ffn_on_gpu"]["n_neurons"] and gpu["gpu_share"] == 1.0
    assert gpu["vram_bytes"] == gpu["ffn_on_gpu"]["n_bytes"] <= 64 * MIB
    assert f"% of the neurons on {host_gpu.NAME}" in gpu["stderr"] and "the GPU computed 100.0 % of" in gpu["stderr"]
    assert "the GPU" not in cpu["stderr"]


def test_machines_and_placements(tmp_path):
    """A machine's GPU, and the neurons that a placement gives it."""
    original = tiny.converted(MODELS["dense"], "f16")
    model = reorder(original, save_stats(random_stats(original), tmp_path / "stats.gguf"), tmp_path / "hot.gguf").model
    with_gpu = run(model, "--machine", "pc-2080ti")
    assert with_gpu["gpu_share"] == 1.0
    assert run(model, "--machine", "auto")["ffn_on_gpu"] is None
    n_layer = 6
    placement = placement_for(model, [[128]] * n_layer, gpu=64, budgets=dict.fromkeys(placement_file.BUDGETS, 1 << 30))
    placement.save(tmp_path / "some.json")
    placed = run(model, "--machine", "pc-2080ti", "--placement", tmp_path / "some.json")
    assert placed["ffn_on_gpu"]["neurons"] == 64 * n_layer
    assert 0 < placed["gpu_share"] < 1
    assert placed["text"] == with_gpu["text"]


def test_attention_there_too(model):
    """Attention on llama.cpp's GPU, FFNs shared with ours: both take from one budget."""
    found = run(model, "-ngl", "all", "--vram-budget", "64MiB", TSCONV_GPU_BACKEND=str(fake_gpu.library()))
    assert found["n_gpu_layers"] > 1 and found["gpu_share"] == 1.0
    assert found["vram_bytes"] <= 64 * MIB
    assert found["text"] == run(model, "-ngl", 0)["text"]


# ---- x and y in the GPU's memory, where llama.cpp computes attention there

RESIDENT = """
import tsconv.runtime.hybrid
from support import fake_gpu

tsconv.runtime.hybrid.PREFIX = "FAKE"  # takes the place of CUDA, and CUDA0 is FAKE0
path, sparsity, *layers = sys.argv[1:]
reference = logits_of(path, sparsity=sparsity, n_gpu_layers=0)[0]
rows = []
for n in map(int, layers):
    model = load(path, sparsity=sparsity, n_gpu_layers=n, vram_budget=1 << 29)
    whole = model.gpu_share.n_bytes + model.offload.n_bytes
    model.close()
    for budget in (whole, model.offload.n_bytes + model.gpu_share.n_bytes * 3 // 4):
        model = load(path, sparsity=sparsity, n_gpu_layers=n, vram_budget=budget)
        first = model.token_logits(tokens, n_batch=1)
        fake_gpu.take_counts()
        model.reset_ffn_stats()
        second = model.token_logits(tokens, n_batch=1)
        counts = fake_gpu.take_counts()
        together = model.token_logits(tokens, n_batch=len(tokens))
        stats = model.ffn_stats()
        rows.append({
            "n": n,
            "neurons": model.gpu_share.neurons / model.gpu_share.n_neurons,
            "nmse": [float(tiny.nmse(logits, reference)) for logits in (first, second, together)],
            "same": bool((first == second).all()),
            "counts": {name: getattr(counts, name) / len(tokens) for name, _ in counts._fields_},
            "calls": [[layer["calls"], layer["gpu_calls"], layer["n_ff"]] for layer in stats],
        })
        model.close()
        assert gpu.allocations == 0
print(json.dumps({"rows": rows}))
"""


def resident(model: Path, sparsity: str, *layers: int, **env: str) -> list[dict[str, Any]]:
    env = {"TSCONV_GPU_BACKEND": str(fake_gpu.library()), "TSFFN_CUDA_SHARE": "1", "TSFFN_CUDA_PREFILL": "0"} | env
    return python(RESIDENT, model, sparsity, *layers, **env)["rows"]


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
def test_x_and_y_stay_on_the_gpu(model, sparsity):
    """Nothing is copied and nobody waits for llama.cpp's backend of that GPU, for one more layer there: two events
    order the work. (A layer whose attention stays on the CPU costs a copy each way.) The logits are the CPU's."""
    some, some_partly, more, more_partly = resident(model, sparsity, 2, 3)
    for row in (some, some_partly, more, more_partly):
        assert max(row["nmse"]) <= MAX_NMSE and row["same"], row
        assert all(calls == gpu_calls for calls, gpu_calls, _ in row["calls"])
        assert {n_ff for *_, n_ff in row["calls"]} == {192 if "mixtral" in model.name else 512}
    assert more["neurons"] == 1.0 > more_partly["neurons"] > 0
    for a, b in ((some, more), (some_partly, more_partly)):
        per_layer = {name: b["counts"][name] - a["counts"][name] for name in a["counts"]}
        assert per_layer.pop("n_node") > 0 and per_layer.pop("n_graph") == 1
        assert per_layer.pop("n_event_record") == per_layer.pop("n_event_wait") == 1
        assert per_layer.pop("n_upload") == per_layer.pop("n_download") == -1
        assert per_layer.pop("upload_bytes") == per_layer.pop("download_bytes") < 0
        assert not any(per_layer.values()), per_layer


def test_without_sharing_memory(model):
    """Without the switch x and y go through the host's memory as without a GPU of ours; the same bits come of it."""
    n = {"n_synchronize": 4, "n_download": 2, "n_upload": 1} if "mixtral" in model.name else {
        "n_synchronize": 3, "n_download": 1, "n_upload": 1}  # fmt: skip
    some, _, more, _ = resident(model, "predictor", 2, 3, TSFFN_CUDA_SHARE="0")
    assert {name: more["counts"][name] - some["counts"][name] for name in n} == n
    assert max(more["nmse"]) <= MAX_NMSE and more["counts"]["n_event_wait"] == 0
    shared = resident(model, "predictor", 3)[0]
    assert shared["nmse"] == more["nmse"]


RESIDENT_FAILURES = """
import tsconv.runtime.hybrid
from support import fake_gpu
from tsconv.runtime.layers import LayersContext

tsconv.runtime.hybrid.PREFIX = "FAKE"
path, = sys.argv[1:]
reference = logits_of(path, n_gpu_layers=0)[0]
whole = load(path, n_gpu_layers="all", vram_budget=1 << 29)
budget = whole.offload.n_bytes + whole.gpu_share.n_bytes * 3 // 4
whole.close()
found = []
for call in (*range(1, 45), 100, 151):
    model = load(path, n_gpu_layers="all", vram_budget=budget)
    model.token_logits(tokens[:1], n_batch=1)
    gpu.fail(call, True)
    try:
        nmse = float(tiny.nmse(model.token_logits(tokens, n_batch=1), reference))
    except tsconv.errors.TsconvError as error:
        nmse = str(error)
    found.append([call, nmse])
    gpu.fail(0)
    model.close()
model = load(path, n_gpu_layers="all", vram_budget=1 << 29)
with model.profiling() as native, LayersContext(model, len(tokens)) as layers:
    layers.compute(tokens)
    n_layer, n_ffn, n_ff = native._shape
    counts = [np.zeros(shape, np.int64) for shape in ((n_ffn,), (6, n_ffn, n_ff), (3, 130))]
    native.read_profile(0, *counts)
print(json.dumps({"found": found, "profiled": int(counts[0].sum()), "left": gpu.allocations}))
"""


@pytest.mark.sanitized
def test_failures_with_shared_memory(model):
    """The CPU computes the call that failed, from what is in the GPU's memory; where it failed when the result was
    already used, the graph fails. Activation statistics are the CPU's, too."""
    found = python(RESIDENT_FAILURES, model, TSCONV_GPU_BACKEND=str(fake_gpu.library()), TSFFN_CUDA_SHARE="1")
    for call, nmse in found["found"]:
        said = "from now on the CPU computes all neurons", "the GPU failed while the last tokens were computed"
        assert nmse <= MAX_NMSE if isinstance(nmse, float) else any(line in nmse for line in said), call
    assert {type(nmse) for _, nmse in found["found"]} == {float, str}
    assert found["profiled"] == 6 * (2 if "mixtral" in model.name else 1)


def test_server(tmp_path, model):
    """llama-server gives the GPU its share before the first answer."""
    stats = tmp_path / "stats.json"
    env = host_gpu.environment() | {"TSFFN_STATS": str(stats)}
    texts = []
    for options in (["--vram-budget", "64MiB"], ["-ngl", "0"]):
        with serving(*options, "-v", model=model, env=env) as server:
            answer = server.client().completions.create(model="m", prompt=PROMPT, max_tokens=8, temperature=0)
            texts.append(answer.choices[0].text)
            _, log = server.stop()
        layers = json.loads(stats.read_text())["layers"]
        on_gpu = all(layer["gpu_calls"] > 0 for layer in layers)
        assert on_gpu == (options[0] == "--vram-budget")
        assert (f"tsffn: {host_gpu.NAME}: " in log) == on_gpu
    assert texts[0] == texts[1]


# ---- what goes wrong


FAILURES = """
path, = sys.argv[1:]
tokens = tokens[:2]
reference = logits_of(path, n_gpu_layers=0)[0]
budget = logits_of(path, vram_budget=1 << 29)[2].n_bytes * 3 // 4
gpu.fail(0)
logits_of(path, vram_budget=budget)
n_calls, wrong, kinds = gpu.calls, [], {}
for call in range(1, n_calls + 1, 7):
    for for_good in (False, True):
        gpu.fail(call, for_good)
        model = load(path, vram_budget=budget)
        logits = model.token_logits(tokens, n_batch=1)
        kind = "complaint" if model.gpu_complaint else "share" if model.gpu_share else "none"
        kinds[kind] = kinds.get(kind, 0) + 1
        nmse = float(tiny.nmse(logits, reference))
        model.close()
        if not nmse <= 1e-5 or gpu.allocations:
            wrong.append([call, for_good, nmse, gpu.allocations])
print(json.dumps({"n_calls": n_calls, "wrong": wrong, "kinds": kinds}))
"""


@pytest.mark.sanitized
def test_every_call_may_fail(model):
    """Any CUDA call, while it is set up, filled or computes: one line, and the CPU computes; nothing is left behind."""
    found = python(FAILURES, model)
    assert found["n_calls"] > 100 and not found["wrong"]
    assert found["kinds"]["complaint"] > 5 and found["kinds"]["share"] > 5


ONE_LINE = """
path, = sys.argv[1:]
model = load(path, vram_budget=1 << 29, verbose=True)
model.token_logits(tokens[:2], n_batch=1)
print("begins", file=sys.stderr)
gpu.fail(9, True)
model.token_logits(tokens, n_batch=1)
stats = model.ffn_stats()
print(json.dumps({"calls": [[layer["calls"], layer["gpu_calls"]] for layer in stats]}))
"""


def test_a_lost_gpu_is_said_once(model):
    found = python(ONE_LINE, model)
    said = [line for line in found["stderr"].partition("begins")[2].splitlines() if "tsffn" in line]
    assert len(said) == 1
    assert said[0].startswith("tsffn: CUDA: ") and "from now on the CPU computes all neurons" in said[0]
    assert found["calls"][0] == [8, 2]


@pytest.mark.sanitized
def test_wrong_results_are_not_used(model):
    """A GPU whose kernels do not work there: the first call of a layer shows it."""
    program = """
path, = sys.argv[1:]
reference = logits_of(path, n_gpu_layers=0)[0]
model = load(path, vram_budget=1 << 29, verbose=True)
gpu.go_wrong()
print("begins", file=sys.stderr)
logits = model.token_logits(tokens, n_batch=1)
print(json.dumps({"nmse": float(tiny.nmse(logits, reference)), "calls": model.ffn_stats()[1]["gpu_calls"]}))
"""
    found = python(program, model)
    assert found["nmse"] <= MAX_NMSE and found["calls"] == 0
    said = [line for line in found["stderr"].partition("begins")[2].splitlines() if "tsffn" in line]
    assert said == ["tsffn: CUDA: layer 0: the GPU's results are wrong: from now on the CPU computes all neurons"]


def test_out_of_memory():
    """A GPU with less memory than the budget takes less."""
    program = """
path, = sys.argv[1:]
whole = logits_of(path, vram_budget=1 << 29)[2].n_bytes
gpu.limit(whole * 3 // 5)
logits, _, share, complaint, used = logits_of(path, vram_budget=whole)
reference = logits_of(path, n_gpu_layers=0)[0]
gpu.limit(1000)
nothing = logits_of(path, vram_budget=whole)
print(json.dumps({"nmse": float(tiny.nmse(logits, reference)), "complaint": complaint, "used": used,
                  "limit": whole * 3 // 5, "neurons": share.neurons, "nothing": [nothing[2], nothing[3]]}))
"""
    found = python(program, tiny.converted(MODELS["dense"], "f16"), TSFFN_CUDA_PREFILL="0")
    assert found["nmse"] <= MAX_NMSE and found["complaint"] is None
    assert found["limit"] * 3 // 4 <= found["used"] <= found["limit"] and found["neurons"] > 0
    assert found["nothing"][0] is None and "out of memory" in found["nothing"][1]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("off", "TSFFN_CUDA_MODULE is off"),
        ("/nonexistent.so", "/nonexistent.so: cannot open shared object file"),
    ],
)
def test_no_module(value, line):
    model = tiny.converted(MODELS["dense"], "f16")
    asked, silent = (run(model, *options, TSFFN_CUDA_MODULE=value) for options in (["--vram-budget", "64MiB"], []))
    assert f"warning: FFNs stay on the CPU: CUDA module: {line}" in asked["stderr"].replace("CUDA module: off", "")
    assert "warning" not in silent["stderr"]
    assert asked["text"] == silent["text"]


def test_types_without_kernels():
    """A model whose rows the GPU cannot multiply stays on the CPU."""
    found = run(tiny.converted(MODELS["dense"], "q5_0"), "--vram-budget", "64MiB")
    assert found["ffn_on_gpu"] is None
    assert "warning: FFNs stay on the CPU: CUDA: no kernel for gate, up, down of types" in found["stderr"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--device", "CUDA7"], "no such GPU: expected some of CUDA0, found CUDA7"),
        (["--device", "Radeon"], "no such GPU: expected some of CUDA0, found Radeon"),
        (["--main-gpu", "3"], "no such GPU: expected some of CUDA0, found CUDA3"),
    ],
)
def test_no_such_gpu(options, line):
    model = tiny.converted(MODELS["dense"], "f16")
    for command in (["run", "-p", PROMPT], ["serve", "--port", "0"]):
        done = tiny.run(*command, "-m", model, *options, env=host_gpu.environment())
        assert done.returncode == 1
        assert line in tiny.error_line(done)


def test_environment_is_checked():
    """The variables of programs: one line each."""
    model = tiny.converted(MODELS["dense"], "f16")
    for name, value, line in (
        ("TSFFN_GPU", "x", "TSFFN_GPU: expected a number of a GPU, found 'x'"),
        ("TSFFN_VRAM_BUDGET", "-1", "TSFFN_VRAM_BUDGET: expected a number of bytes, found '-1'"),
        ("TSFFN_GPU_HOT", "1,2", "TSFFN_GPU_HOT: expected 6 numbers, one for each FFN, found 2"),
    ):
        load = "from tsconv.native.library import load_backend; load_backend()"
        env = os.environ | {"TSFFN_MODEL": str(model), name: value}
        done = subprocess.run([sys.executable, "-c", load], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and line in done.stderr
