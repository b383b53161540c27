"""Attention on a GPU, FFNs here: through a device that behaves as ggml-cuda does (native/tests/fake_gpu.c)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import ROOT, fake_gpu, tiny
from support.serving import serving
from support.synthetic import save_random_adapter
from tsconv.bench.gpu import CPU_FFN, WHOLE_LAYERS, described, shares
from tsconv.bench.workload import MAX_TOKENS
from tsconv.format.header import read_header
from tsconv.native.devices import Gpu
from tsconv.runtime import offload
from tsconv.runtime.offload import Wanted
from tsconv.stats import file as stats_file

MODELS = {"dense": "tiny-turbosparse-mistral", "moe": "tiny-turbosparse-mixtral"}
TOKENS = [1, *range(20, 60), 7, 300, 41]
STEPS = 10
PROMPT = "And it came to pass"
MAX_NMSE = 1e-6

# argv: JSON of what to do; prints JSON of what came out. One model after the other, all kept loaded.
PROGRAM = """
import json, sys
import numpy as np
import tsconv
from support import fake_gpu

task = json.loads(sys.argv[1])
models, answers = [], []
for job in task["jobs"]:
    model = tsconv.load(job["model"], n_threads=1, **job["load"])
    models.append(model)
for job, model in zip(task["jobs"], models):
    logits = model.token_logits(task["tokens"])
    fake_gpu.take_counts()
    for token in range(30, 30 + task["steps"]):
        model.eval([token])
    counts = fake_gpu.take_counts()
    np.save(job["out"], logits)
    stats = model.ffn_stats()
    answers.append({
        "counts": {name: getattr(counts, name) for name, _ in counts._fields_},
        "offload": {"n": model.offload.n_gpu_layers, "bytes": model.offload.n_bytes, "text": str(model.offload),
                    "gpus": [gpu.name for gpu in model.offload.gpus]},
        "single_ops": sum(layer["single_ops"] for layer in stats),
        "calls": [layer["calls"] for layer in stats],
    })
print(json.dumps(answers))
"""


def python(program: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"TSCONV_GPU_BACKEND": str(fake_gpu.library()), "PYTHONPATH": str(ROOT / "tests")} | env,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )


def compute(folder: Path, *jobs: dict[str, Any], **env: str) -> list[dict[str, Any]]:
    """What each job computed: its logits [n_tokens, n_vocab], and what `PROGRAM` says."""
    outs = [folder / f"{i}.npy" for i in range(len(jobs))]
    task = {
        "tokens": TOKENS,
        "steps": STEPS,
        "jobs": [
            {"model": str(job.pop("model")), "out": str(out), "load": job} for job, out in zip(jobs, outs, strict=True)
        ],
    }
    done = python(PROGRAM, json.dumps(task), **env)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return [answer | {"logits": np.load(out)} for answer, out in zip(answers, outs, strict=True)]


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Path:
    return tiny.converted(MODELS[request.param])


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("n_gpu_layers", ["all", 3, 1])
def test_logits(tmp_path, model, sparsity, n_gpu_layers):
    """They are those of the CPU, with all layers on the GPU, some, or the output alone; every FFN is computed here,
    as a whole."""
    cpu, gpu = (
        compute(tmp_path, {"model": model, "sparsity": sparsity, "n_gpu_layers": n})[0] for n in (0, n_gpu_layers)
    )
    assert tiny.nmse(gpu["logits"], cpu["logits"]) <= MAX_NMSE
    n_layer = len(gpu["calls"])
    assert gpu["offload"]["n"] == (n_layer + 1 if n_gpu_layers == "all" else n_gpu_layers)
    assert gpu["counts"]["n_graph"] > 0 and cpu["counts"]["n_graph"] == 0
    assert gpu["calls"] == cpu["calls"]
    assert gpu["single_ops"] == 0
    assert gpu["counts"]["n_too_early"] == 0


def test_copies_and_waits(tmp_path, model):
    """What one more layer of attention on the GPU costs a token, with the stock scheduler and host buffers: x (for
    experts also their ids) comes down, y goes up, and three (four) times somebody waits."""
    some, more = (compute(tmp_path, {"model": model, "n_gpu_layers": n})[0]["counts"] for n in (2, 3))
    is_moe = "mixtral" in model.name
    per_layer = {name: (more[name] - some[name]) / STEPS for name in some}
    expected = {"n_synchronize": 4, "n_download": 2} if is_moe else {"n_synchronize": 3, "n_download": 1}
    expected |= {"n_upload": 1, "n_graph": 1, "n_async_upload": 0, "n_async_download": 0, "n_too_early": 0}
    assert {name: per_layer[name] for name in expected} == expected


def test_two_models(tmp_path):
    """One of them on the GPU, the other not, loaded side by side."""
    jobs = [(tiny.converted(name), n) for name in MODELS.values() for n in (0, "all")]
    alone = [compute(tmp_path, {"model": model, "n_gpu_layers": 0})[0]["logits"] for model, _ in jobs[::2]]
    together = compute(tmp_path, *({"model": model, "n_gpu_layers": n} for model, n in jobs))
    for i, answer in enumerate(together):
        assert tiny.nmse(answer["logits"], alone[i // 2]) <= MAX_NMSE
    assert [answer["offload"]["n"] > 0 for answer in together] == [False, True, False, True]


def test_which_gpu(tmp_path, model):
    """By name, by position, or all of them."""
    chosen = [{"device": "FAKE1"}, {"main_gpu": 1}, {"device": "fake1,FAKE0"}, {}]
    answers = [
        compute(tmp_path, {"model": model, "n_gpu_layers": "all", **choice}, FAKE_GPU_DEVICES="2")[0]
        for choice in chosen
    ]
    assert [answer["offload"]["gpus"] for answer in answers] == [
        ["FAKE1"],
        ["FAKE1"],
        ["FAKE1", "FAKE0"],
        ["FAKE0", "FAKE1"],
    ]
    cpu = compute(tmp_path, {"model": model, "n_gpu_layers": 0})[0]["logits"]
    for answer in answers:
        assert tiny.nmse(answer["logits"], cpu) <= MAX_NMSE


def test_as_many_layers_as_fit(tmp_path, model):
    """ "auto" heeds what is free, less the margin, and a budget; what it says it uses is what llama.cpp puts there."""
    header = read_header(model)
    costs = offload.layer_bytes(header, 512)
    for n in (0, 1, 2, len(costs)):
        memory = offload.MARGIN_BYTES + sum(costs[:n])
        (free,) = compute(tmp_path, {"model": model}, FAKE_GPU_MEMORY=str(memory))
        (budget,) = compute(tmp_path, {"model": model, "vram_budget": sum(costs[:n])})
        assert [free["offload"][key] for key in ("n", "bytes")] == [n, sum(costs[:n])]
        assert [budget["offload"][key] for key in ("n", "bytes")] == [n, sum(costs[:n])]


SEQUENCES = """
import sys
import numpy as np
import tsconv
from tsconv.bench.worker import Sequences

model = tsconv.load(sys.argv[1], n_threads=1, n_gpu_layers=sys.argv[2] if sys.argv[2] == "all" else int(sys.argv[2]))
n_seq, n = 3, 8
tokens = np.random.default_rng(0).integers(3, 250, (n, n_seq)).tolist()
sequences = Sequences(model, n, n_seq, 1)
logits = []
for position, row in enumerate(tokens):
    sequences.decode(row, position)
    rows = [sequences._context.get_logits_ith(i) for i in range(n_seq)]
    logits.append([np.ctypeslib.as_array(row, (model.n_vocab(),)).copy() for row in rows])
np.save(sys.argv[3], np.array(logits))
"""


def test_several_sequences(tmp_path, model):
    outs = []
    for n in (0, "all"):
        done = python(SEQUENCES, model, n, tmp_path / f"{n}.npy")
        assert done.returncode == 0, done.stderr
        outs.append(np.load(tmp_path / f"{n}.npy"))
    assert tiny.nmse(outs[1], outs[0]) <= MAX_NMSE


@pytest.mark.parametrize("part", ["up", "down"])
def test_adapter(tmp_path, part):
    """LoRA on an FFN matrix, whose layers are then computed operation by operation."""
    model = tiny.converted(MODELS["dense"])
    adapter = save_random_adapter(tmp_path / "adapter.gguf", read_header(model), part)
    cpu, gpu, without = (
        compute(tmp_path, {"model": model, "n_gpu_layers": n, **lora})[0]
        for n, lora in ((0, {"lora_path": str(adapter)}), ("all", {"lora_path": str(adapter)}), (0, {}))
    )
    assert tiny.nmse(gpu["logits"], cpu["logits"]) <= MAX_NMSE
    assert tiny.nmse(cpu["logits"], without["logits"]) > 1e-4, "the adapter matters"


# ---- commands


def tsconv_cli(*arguments: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*tiny.TSCONV, *map(str, arguments)],
        env=os.environ | {"TSCONV_GPU_BACKEND": str(fake_gpu.library())} | env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )


def test_run(model):
    """The same greedy text with and without; what was chosen is said once, and in the JSON."""
    texts = []
    for n in ("auto", "0"):
        done = tsconv_cli(
            "run", model, "-p", "And it came to pass", "-n", 24, "--temp", 0, "-t", 1, "-ngl", n, "--json"
        )
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(done.stdout))
        said = [line for line in done.stderr.splitlines() if line.startswith("GPU: ")]
        assert len(said) == (n == "auto")
    assert texts[0]["text"] == texts[1]["text"]
    assert (texts[0]["gpus"], texts[1]["gpus"], texts[1]["n_gpu_layers"]) == (["FAKE0"], [], 0)
    assert texts[0]["vram_bytes"] > 0


def test_run_on_machines(model):
    """A machine's profile says whether there is a GPU to use."""
    found = {}
    for machine in ("pc-2080ti", "cpu-only"):
        done = tsconv_cli("run", model, "-p", "And", "-n", 1, "-t", 1, "--machine", machine, "--json")
        assert done.returncode == 0, done.stderr
        found[machine] = json.loads(done.stdout)["n_gpu_layers"]
    assert found["pc-2080ti"] > 1 and found["cpu-only"] == 0


def test_perplexity_and_profile(tmp_path, model):
    """Profiling looks at single operations of every layer."""
    text = tmp_path / "text.txt"
    text.write_text("And it came to pass in those days, that there went out a decree from Caesar Augustus. " * 8)
    quality, counted = [], []
    for n in ("all", "0"):
        done = tsconv_cli("perplexity", "-m", model, "-f", text, "-c", 64, "-t", 1, "-ngl", n, "--json")
        assert done.returncode == 0, done.stderr
        quality.append(json.loads(done.stdout)["perplexity"])
        out = tmp_path / f"{n}.stats.gguf"
        arguments = ["--calib", text, "--tokens", "64", "--chunk", "64", "--outfile", out, "-t", 1, "-ngl", n]
        done = tsconv_cli("profile", model, *arguments)
        assert done.returncode == 0, done.stderr
        counted.append(stats_file.load(out))
    assert quality[0] == pytest.approx(quality[1], rel=1e-5)
    for name in ("active", "predicted"):
        a, b = (stats.total.of(name) for stats in counted)
        assert abs(a - b).sum() <= 1e-3 * b.sum()


def test_serve(tmp_path, model):
    """llama-server finds GPU backends in the folder that it is started in; its text is that of the CPU."""
    (tmp_path / "libggml-cuda.so").symlink_to(fake_gpu.library())
    answers = []
    for n, folder in (("all", tmp_path), ("0", ROOT)):
        with serving(
            "-ngl",
            n,
            "-v",
            "--",
            "-lv",
            5,
            model=model,
            cwd=folder,
            env={"TSCONV_GPU_BACKEND": str(fake_gpu.library())},
        ) as server:
            answer = server.client().completions.create(
                model="m", prompt="And it came to pass", max_tokens=24, temperature=0
            )
            answers.append(answer.choices[0].text)
            _, log = server.stop()
        offloaded = re.search(r"offloaded (\d+)/(\d+) layers to GPU", log)
        assert (offloaded is not None and offloaded[1] == offloaded[2]) == (n == "all"), log
    assert answers[0] == answers[1]


def test_bench(tmp_path, model):
    """Beside the faster of llama.cpp's two ways to use the same memory, with whole layers and with FFNs on the CPU."""
    header = read_header(model)
    whole, attention = (offload.layer_bytes(header, MAX_TOKENS, with_ffn) for with_ffn in (True, False))
    budget = sum(attention) + whole[1] - attention[1]  # all attention, and the FFN of one layer
    arguments = [
        "-m",
        model,
        "-t",
        1,
        "-r",
        1,
        "--test",
        "tg4",
        "--vram-budget",
        f"{budget}B",
        "--save",
        tmp_path / "rows.json",
    ]
    done = tsconv_cli("bench", *arguments)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["gpus"] == "FAKE0" and row["vram_bytes"] == sum(attention)
    assert row["baseline"] in ("llama.cpp-ngl", "llama.cpp-n-cpu-ffn")
    assert 0 < row["dense_vram_bytes"] <= budget
    assert row["active"] > 0 and row["avg_ts"] > 0 and row["dense_avg_ts"] > 0
    assert f"{row['gpu_share']}. {row['baseline']}: {row['dense_gpu_share']}" in done.stdout
    found = shares(header, MAX_TOKENS, Wanted(vram_budget=budget), [Gpu("G", "", 1 << 40, 1 << 40, False)])
    n_layer = len(attention) - 1
    on_cpu = "|".join(map(str, range(n_layer - 1)))
    assert found[CPU_FFN].on_host == rf"blk\.({on_cpu})\.ffn_(gate|up|down)(_exps)?\.weight"
    assert found[CPU_FFN].n_bytes == budget and found[CPU_FFN].n_gpu_layers == n_layer + 1
    assert found[WHOLE_LAYERS].n_gpu_layers == offload.layers_that_fit(whole, budget)
    assert "the FFNs of " + str(n_layer - 1) + " on the CPU" in described(found[CPU_FFN])


def test_bench_of_clients(tmp_path):
    (tmp_path / "libggml-cuda.so").symlink_to(fake_gpu.library())
    model = tiny.converted(MODELS["dense"])
    done = tsconv_cli("bench", "-m", model, "-t", 1, "-r", 1, "--clients", "2", "-o", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["active"] > 0 and row["avg_ts"] > 0 and row["dense_avg_ts"] > 0


# ---- what cannot be


@pytest.mark.parametrize(
    ("options", "env", "message"),
    [
        (
            ["-ngl", "3"],
            {"TSCONV_GPU_BACKEND": ""},
            "layers for a GPU: expected a GPU that llama.cpp has a backend for, found none",
        ),
        (["--device", "CUDA0"], {}, "no such GPU: expected some of FAKE0, found CUDA0"),
        (["--main-gpu", "1"], {}, "the main GPU: expected a number below 1: FAKE0, found 1"),
        (["-ngl", "-3"], {}, "'-3' is neither auto, all nor a number."),
        (["-ngl", "some"], {}, "'some' is neither auto, all nor a number."),
        (["-ngl", "all"], {"FAKE_GPU_MEMORY": "100000"}, "or put fewer layers on the GPU (-ngl)"),
    ],
)
def test_refused(options, env, message):
    done = tsconv_cli("run", tiny.converted(), "-p", "And", "-n", 1, "-t", 1, *options, **env)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


PUT_ELSEWHERE = """
import sys
import tsconv
from tsconv.errors import TsconvError
from tsconv.runtime.offload import Offload

Offload.apply = lambda self, params: None
try:
    tsconv.load(sys.argv[1], n_threads=1, n_gpu_layers=sys.argv[2] if sys.argv[2] == "all" else int(sys.argv[2]))
except TsconvError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("n", ["all", 2])
def test_ffn_on_the_gpu(model, n):
    """Without the override llama.cpp gives FFNs to the GPU: nothing is loaded."""
    done = python(PUT_ELSEWHERE, model, n)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("refused: ") and "would compute SwiGLU instead of dReLU" in done.stderr
