"""The benchmark of the row kernels: that it computes what it should, not how fast."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from support.native_build import ROOT, build

TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]
FRACTIONS = [0.01, 0.05, 0.1, 0.2, 0.5, 1.0]
SMALL = ["--rows", "208", "--cols", "128", "--mib", "2", "--ms", "1", "--repeat", "1", "--threads", "1,2"]


@pytest.fixture(scope="module")
def bench() -> Path:
    return build(ROOT / "build" / "bench", "-DTSFFN_KERNELS_ONLY=ON", "-DTSFFN_BENCH=ON") / "bench" / "bench_kernels"


def run(bench: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([bench, *options], capture_output=True, text=True, check=False)


def test_json_has_every_kernel(bench):
    done = run(bench, *SMALL, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["n_rows"], report["n_cols"], report["bytes"]) == (208, 128, 2 << 20)
    results = report["results"]
    assert all(row["ns_per_product"] > 0 and row["gb_per_s"] > 0 for row in results)

    found = {(r["pattern"], r["kernel"], r["isa"], r["type"], r["threads"], r["fraction"]) for r in results}
    assert len(found) == len(results)
    expected = set()
    expected |= {("cached", kernel, "ref", "q3_nl", 1, 1.0) for kernel in ("panel", "panel4")}
    for n in (1, 2):
        expected |= {
            ("in_order", kernel, isa, "q3_nl", n, 1.0) for kernel, isa in (("panel", "ref"), ("only read", None))
        }
    for kind in TYPES:
        panels = ["panel", "panel4"] if kind.startswith("q") else []
        expected |= {("cached", kernel, "ref", kind, 1, 1.0) for kernel in ["dot", "dot4", "axpy", *panels]}
        for n in (1, 2):
            expected |= {("in_order", kernel, "ref", kind, n, 1.0) for kernel in ["dot", *panels[:1]]}
            expected |= {("sparse", kernel, "ref", kind, n, f) for kernel in ("dot", "axpy") for f in FRACTIONS}
            expected |= {("in_order", "only read", None, kind, n, 1.0)}
            expected |= {("sparse", "only read", None, kind, n, f) for f in FRACTIONS}
    assert {row for row in found if row[2] in ("ref", None)} == expected


def test_markdown_has_the_tables(bench):
    done = run(bench, *SMALL, "--type", "q4_0", "--isa", "ref")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "| type | kernel | ref |" in lines
    assert "| type | kernel | threads | no kernel | ref |" in lines
    assert "| type | kernel | threads | 1 % | 5 % | 10 % | 20 % | 50 % | 100 % |" in lines
    names = {line.split("|")[2].strip() for line in lines if line.startswith("| q4_0")}
    assert names == {"dot", "dot4", "axpy", "panel", "panel4", "only read", "dot ref", "axpy ref"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "--threads: expected a whole number from 1 to 1024, found '0'"),
        (["--threads", "1,x"], "--threads: expected a whole number from 1 to 1024, found 'x'"),
        (["--rows", "200,300"], "--rows: expected one number, found '200,300'"),
        (["--type", "q4_1"], "--type: expected some of f32,f16,bf16,q8_0,q4_0,q3_nl, found 'q4_1'"),
        (["--cols", "100"], "--cols: expected a multiple of 32, found '100'"),
        (["--mib", "1"], "--mib: expected at least 224, one f32 matrix of 14336 rows of 4096 weights, found '1'"),
        (["--threads", "200"], "--threads: expected at most 143, a hundredth of the rows, found '200'"),
        (["--ms"], "--ms: expected a value"),
        (["--speed", "1"], "unknown option '--speed', see --help"),
    ],
)
def test_bad_options(bench, options, message):
    done = run(bench, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bench_kernels: {message}\n"
