"""`make bench-gpu` in small: the GPU's kernels are compiled for the host, and llama.cpp has a GPU that is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import fake_gpu, host_gpu, tiny

SMALL = ["-t", 1, "-r", 1, "--test", "tg4", "--test", "pp20", "--twice", 12]


def bench(*options: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tsconv.bench.gpu_suite", *map(str, [*SMALL, *options])],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def test_table(tmp_path: Path, name: str):
    """Checks first; then a row for each engine, and all of it as JSON."""
    env = host_gpu.environment() | {"TSCONV_GPU_BACKEND": str(fake_gpu.library()), "TSFFN_CUDA_PREFILL": "32"}
    options = ["-m", tiny.converted(name, "f16"), "--vram-budget", 8 << 20, "--save", tmp_path / "found.json"]
    done = bench(*options, **env)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["gpu"] == host_gpu.NAME and found["left_out"] == []
    assert [check["part"] for check in found["checks"]] == [0, 10, 50, 100]
    assert all(max(check["nmse"], check["nmse_prompt"]) <= 1e-5 for check in found["checks"])
    assert all(check["same_twice"] and check.get("same_text", True) for check in found["checks"])
    assert [check["part"] for check in found["checks"] if "same_text" in check] == [50]
    assert [check["part"] for check in found["checks"] if check["bytes_streamed"] > 0] == [10]
    engines = [row["engine"] for row in found["rows"]]
    assert engines[:2] == ["tsconv-gpu", "tsconv"] and "llama.cpp-ngl" in engines
    shared, cpu, *theirs = found["rows"]
    assert all(row["tg4"] > 0 and row["pp20"] > 0 for row in found["rows"])
    assert shared["vram_bytes"] > 0 == cpu["vram_bytes"] and host_gpu.NAME in shared["gpu_share"]
    for test in ("tg4", "pp20"):
        assert shared[f"{test}_ms_hot"] > 0 == cpu[f"{test}_ms_hot"] and shared[f"{test}_ms_predictor_gpu"] > 0
        assert shared[f"{test}_overlap"] > 0 and cpu[f"{test}_overlap"] is None
    assert not any("tg4_ms_hot" in row for row in theirs)
    lines = done.stdout.splitlines()
    assert host_gpu.NAME in lines[0] and sum("% of the neurons: NMSE" in line for line in lines) == 4
    assert [line.split()[0] for line in lines[-len(engines) :]] == engines


def test_kernels(tmp_path: Path):
    """The kernels' test runs alone and under each checker; what one of them says ends the benchmark."""
    fine, broken = script(tmp_path / "fine", "exit 0"), script(tmp_path / "broken", "echo row 3: y; exit 1")
    checker = script(tmp_path / "compute-sanitizer", 'shift; echo "$1" >> "$(dirname "$0")/ran"; shift 3; exec "$@"')
    env = host_gpu.environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    without = {"PATH": os.environ["PATH"]} if shutil.which("compute-sanitizer") is None else None
    options = ["--seconds", 0, "-m", "none.gguf"]
    done = bench("--kernels", broken, *options, **env)
    assert done.returncode == 1 and "Error: kernels: a check failed: found row 3: y" in done.stderr
    done = bench("--kernels", fine, *options, **env)
    assert done.stdout.splitlines()[1:] == ["kernels: ok", "memcheck: ok", "racecheck: ok"]
    assert checker.exists() and (tmp_path / "ran").read_text().split()[-2:] == ["memcheck", "racecheck"]
    if without is not None:
        done = bench("--kernels", fine, *options, **(env | without))
        assert "memcheck, racecheck: not run: compute-sanitizer is not installed" in done.stdout


def test_without_a_gpu():
    done = bench("-m", "unused.gguf", TSFFN_CUDA_MODULE="off")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "skipped: CUDA module: TSFFN_CUDA_MODULE is off\n"
