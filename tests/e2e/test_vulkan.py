"""Attention on a GPU backend that nobody here wrote: llama.cpp's for Vulkan, with Mesa's lavapipe as its GPU, which
computes on the CPU. `make test-vulkan` builds the backend, and says what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import tiny
from support.serving import serving

MODULE = os.environ.get("TSCONV_TEST_VULKAN")
pytestmark = pytest.mark.skipif(MODULE is None, reason="make test-vulkan runs it: llama.cpp's Vulkan backend is needed")

MODELS = {"dense": "tiny-turbosparse-mistral", "moe": "tiny-turbosparse-mixtral"}
PROMPT = "And it came to pass in those days"
MAX_NMSE = 1e-6
MAX_NMSE_OF_MASKS = 1e-4  # a neuron at the predictor's threshold may be skipped on one side alone
PROGRAM = """
import sys
import numpy as np
import tsconv

path, layers, sparsity, out = sys.argv[1:]
model = tsconv.load(path, n_threads=1, sparsity=sparsity, n_gpu_layers=layers if layers == "all" else int(layers))
assert [gpu.name for gpu in model.offload.gpus] == (["Vulkan0"] if layers != "0" else []), model.offload
np.save(out, model.token_logits([1, *range(20, 60), 7, 300, 41]))
assert sum(layer["single_ops"] for layer in model.ffn_stats()) == 0
"""


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Path:
    return tiny.converted(MODELS[request.param])


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
def test_logits(tmp_path, model, sparsity):
    """All layers there, two of them, or none."""
    found = {}
    for layers in ("0", "all", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, model, layers, sparsity, tmp_path / f"{layers}.npy"],
            env=os.environ | {"TSCONV_GPU_BACKEND": MODULE},
            capture_output=True,
            text=True,
            timeout=tiny.TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[layers] = np.load(tmp_path / f"{layers}.npy")
    for layers in ("all", "2"):
        errors = np.square(found[layers] - found["0"]).sum(1) / np.square(found["0"]).sum(1)
        if sparsity == "exact":
            assert tiny.nmse(found[layers], found["0"]) <= MAX_NMSE
        else:
            assert tiny.nmse(found[layers], found["0"]) <= MAX_NMSE_OF_MASKS
            assert np.median(errors) <= MAX_NMSE


def test_llama_server(tmp_path, model):
    """The same greedy text from llama-server with all layers there and with none. Without flash attention, in which the
    lavapipe of Mesa 22.3 crashes there."""
    (tmp_path / "libggml-vulkan.so").symlink_to(MODULE)
    texts = []
    for n in ("all", "0"):
        options = ["-ngl", n, "-v", "--", "-lv", 5, "-fa", "off"]
        with serving(*options, model=model, cwd=tmp_path, env={"TSCONV_GPU_BACKEND": MODULE}) as server:
            answer = server.client().completions.create(model="m", prompt=PROMPT, max_tokens=16, temperature=0)
            texts.append(answer.choices[0].text)
            _, log = server.stop()
        assert ("Vulkan0 model buffer size" in log) == (n == "all"), log
    assert texts[0] == texts[1]
