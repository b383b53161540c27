"""`make bench-stream`: engines in memory control groups, where the system lets this process make them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import tiny
from tsconv.bench import stream
from tsconv.bench.stream import NoGroupError, memory_group
from tsconv.machine.limits import PROC, control_groups


@pytest.fixture
def groups() -> None:
    try:
        with memory_group(1 << 30):
            pass
    except NoGroupError as reason:
        pytest.skip(f"no memory control group can be made: {reason}")


def groups_now() -> set[Path]:
    return {path for _, folder in control_groups("memory", PROC) for path in folder.parent.glob("**/tsconv-bench-*")}


def test_engines_in_a_group(groups, tmp_path):
    before = groups_now()
    command = [sys.executable, "-m", "tsconv.bench.stream", "-m", tiny.converted(), "--memory", "2G"]
    command += ["--warm-up", "tg2", "--test", "tg4", "-r", "1", "-t", "1", "--save", tmp_path / "rows.json"]
    command += ["--plot", tmp_path / "plot.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    ours, stock = json.loads((tmp_path / "rows.json").read_text())
    assert (ours["engine"], stock["engine"]) == ("tsconv", "llama.cpp-norepack")
    for row in (ours, stock):
        assert 10 << 20 < row["peak_bytes"] <= 2 << 30
        assert row["tokens_per_s"] > 0
        assert row["load_disk_bytes"] >= 0
        assert row["cache_bytes"] < 100 << 20
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["tsconv", "llama.cpp-norepack"]
    assert groups_now() <= before


def test_an_engine_that_does_not_fit(groups):
    row = stream.measure(tiny.converted(), "tsconv", "30M", "tg2", "tg4", 1, 1)
    assert row["killed"]
    assert stream.describe(row).endswith("killed: out of memory")


def test_without_a_group():
    row = stream.measure(tiny.converted(), "tsconv", stream.ALL, "tg2", "tg4", 1, 1)
    assert (row["killed"], row["memory_bytes"], row["cache_bytes"]) == (False, None, None)
    assert stream.describe(row).startswith("all  tsconv ")


def test_where_none_can_be_made(monkeypatch, tmp_path):
    (tmp_path / "tsconv-bench-1").touch()
    monkeypatch.setattr(stream, "control_groups", lambda *_: iter([(False, tmp_path)]))
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(NoGroupError, match="File exists"), memory_group(1 << 30):
        pass
