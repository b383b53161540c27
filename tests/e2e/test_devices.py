"""Layers are computed by a device behind an interface (native/src/ffn/device.h): the CPU, or a module that is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import tiny
from support.native_build import ROOT, build
from support.tiny import nmse

TOKENS = [1, 20, 300, 7, 11, 45, 900]
LOGITS = """
import sys, numpy as np, tsconv
from llama_cpp import GGML_TYPE_F32 as F32
path, sparsity, n_batch, out = sys.argv[1:]
model = tsconv.load(path, n_threads=1, sparsity=sparsity, type_k=F32, type_v=F32)
logits = model.token_logits([1, 20, 300, 7, 11, 45, 900], int(n_batch))
stats = [[layer[key] for key in ("calls", "tokens", "predicted", "active")] for layer in model.ffn_stats()]
np.savez(out, logits=logits, stats=stats)
"""


@pytest.fixture(scope="module")
def reference() -> Path:
    """A device in plain C, as the formulas stand (native/tests/reference_device.c)."""
    return build(ROOT / "build" / "tests", "-DTSFFN_TESTS=ON") / "tests" / "libreference_device.so"


def run(script: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False
    )


def computed(out: Path, model: Path, sparsity: str, n_batch: int, **env: str) -> tuple[np.ndarray, np.ndarray]:
    done = run(LOGITS, model, sparsity, n_batch, out, **env)
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    return found["logits"], found["stats"]


@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
@pytest.mark.parametrize(
    ("outtype", "predictor", "sparsity"),
    [
        ("f32", None, "predictor"),
        ("f32", None, "exact"),
        ("f32", None, "topk:0.95"),
        ("f16", "q8_0", "predictor"),
        ("q4_0", "q3_nl", "predictor"),
    ],
)
@pytest.mark.parametrize("n_batch", [1, 7])
def test_reference_device(reference, tmp_path, name, outtype, predictor, sparsity, n_batch):
    """Every layout and type of weights, dense and with experts, gives what the CPU gives, but for the rounding of its
    activations."""
    model = tiny.converted(name, outtype, predictor)
    expected, by_cpu = computed(tmp_path / "cpu.npz", model, sparsity, n_batch)
    found, by_reference = computed(tmp_path / "reference.npz", model, sparsity, n_batch, TSFFN_DEVICE=str(reference))
    if outtype == "f32":
        assert (found != expected).any(), "another device computed"
    assert nmse(found, expected) < (
        1e-9 if outtype == "f32" else 1e-4
    )  # llama.cpp rounds activations to q8_0 in between
    np.testing.assert_allclose(by_reference, by_cpu, rtol=0.02)


@pytest.mark.parametrize(("module", "message"), [("nothing.so", "cannot open shared object"), ("gpu", "found none")])
def test_module_that_is_no_device(reference, module, message):
    path = reference.with_name("libfake_gpu.so") if module == "gpu" else module
    script = "import sys, tsconv; tsconv.load(sys.argv[1])"
    done = run(script, tiny.converted(), TSFFN_DEVICE=str(path))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "TSFFN_DEVICE: " in line]
    assert message in line and line.startswith("tsconv.errors.ModelFileError: ")
