"""Shares of the neurons on a GPU: with its kernels compiled for the host, and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import host_gpu, tiny
from tsconv.bench.hybrid import HEADER


def bench(*options: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tsconv.bench.hybrid", "-t", "1", "-r", "1", "-n", "4", *map(str, options)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def test_rows(tmp_path: Path, name: str):
    options = ["-m", tiny.converted(name, "f16"), "--most", 64 << 20, "--part", 40, "--part", 100]
    done = bench(*options, "--save", tmp_path / "rows.json", **host_gpu.environment())
    assert done.returncode == 0, done.stderr
    cpu, some, whole = json.loads((tmp_path / "rows.json").read_text())
    assert cpu["gpu"] is None and cpu["ms_gpu"] == 0 and cpu["tokens_per_s"] > 0
    assert 0 < some["neurons"] < whole["neurons"] == 1.0 == whole["active_on_gpu"]
    for row in (some, whole):
        assert row["gpu"] == host_gpu.NAME and row["same_twice"] and row["nmse"] <= 1e-5
        assert row["ms"] == pytest.approx(row["ms_cpu"] + row["ms_wait"] + row["ms_other"])
        assert row["ms_gpu"] > 0 and row["ratio"] > 0 and row["overlap"] > 0
    first, *lines = done.stdout.splitlines()
    assert host_gpu.NAME in first and lines[0] == HEADER and len(lines) == 4


def test_without_a_gpu():
    done = bench("-m", "unused.gguf", TSFFN_CUDA_MODULE="off")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "skipped: CUDA module: TSFFN_CUDA_MODULE is off\n"
