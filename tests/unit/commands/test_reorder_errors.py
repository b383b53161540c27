"""What `tsconv reorder` and `tsconv convert --profile` refuse, and what is left when they are cut short: nothing."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from support.edited import edited
from support.panels import FFN_LAYOUT, LAYOUT, VERSION
from support.random_stats import expected_order, random_stats, save_stats
from support.refused import sidecar_of
from support.reordered import check_rows, make
from support.synthetic import SHAPES, random_tensors, save
from tsconv import convert
from tsconv.commands.reorder import reorder
from tsconv.errors import TsconvError
from tsconv.format.forms import KEY as FORM
from tsconv.format.header import read_header
from tsconv.stats.counts import Stats

MODEL_FILE, OUTPUT, USAGE = 4, 6, 2
KEY, PAIR_ID, FINGERPRINT = "turbosparse.neuron_order", "turbosparse.pair_id", "turbosparse.source.fingerprint"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """(a dense model whose sidecar may have any version, statistics of it)"""
    model = make(tmp_path, "mistral", predictor_outtype="q4_0")
    return model, save_stats(random_stats(model), tmp_path / "stats.gguf")


def refused(run: Run, folder: Path, code: int, *arguments: object) -> str:
    """The one line that a command is refused with; nothing in `folder` changes."""
    before = {path: path.stat() for path in folder.rglob("*")}
    found, stdout, stderr = run(*arguments)
    assert (found, stdout) == (code, ""), stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert {path: path.stat() for path in folder.rglob("*")}.keys() == before.keys()
    assert all(path.stat().st_mtime_ns == stat.st_mtime_ns for path, stat in before.items() if path.is_file())
    return stderr


COMMANDS = {
    "reorder": lambda folder, profile: ("reorder", folder / "m.gguf", "--profile", profile),
    "convert": lambda folder, profile: ("convert", folder / "c", "--outfile", folder / "x.gguf", "--profile", profile),
}

# what is wrong with the statistics: (a change of the file or of the statistics, what the line must say)
BAD_STATS: dict[str, tuple[Callable[[Path, Stats], Any], str]] = {
    "another model": (
        lambda path, stats: save_stats(dataclasses.replace(stats, subject=subject(stats, fingerprint="5" * 64)), path),
        "the statistics are of another",
    ),
    "truncated header": (lambda path, stats: os.truncate(path, 100), "it is truncated or damaged"),
    "truncated": (lambda path, stats: os.truncate(path, path.stat().st_size - 100), "beyond the end of the file"),
    "empty": (lambda path, stats: os.truncate(path, 0), "not a GGUF file"),
    "missing": (lambda path, stats: path.unlink(), "No such file"),
    "a model": (lambda path, stats: shutil.copy(path.with_name("m.gguf"), path), "not activation statistics"),
    "a folder": (lambda path, stats: (path.unlink(), path.mkdir()), "Is a directory"),
    "text": (lambda path, stats: path.write_text("neurons\n"), "not a GGUF file"),
    "another shape": (
        lambda path, stats: save_stats(random_stats(path.with_name("m.gguf"), n_ff=64), path),
        "do not fit the model: expected 2 layers of 1 x 96 neurons, found 2 of 1 x 64",
    ),
}


def subject(stats: Stats, **changes: Any) -> Any:
    return dataclasses.replace(stats.subject, **changes)


@pytest.mark.parametrize("what", BAD_STATS)
@pytest.mark.parametrize("command", COMMANDS)
def test_bad_statistics(command: str, what: str, pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    change, message = BAD_STATS[what]
    change(pair[1], random_stats(pair[0]))
    assert message in refused(run, tmp_path, MODEL_FILE, *COMMANDS[command](tmp_path, pair[1]))


def test_statistics_of_another_checkpoint(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    """Same shape, other weights: both commands name the two fingerprints."""
    shape = SHAPES["mistral"]
    save(tmp_path / "c", shape, random_tensors(shape, seed=1))
    other = convert(tmp_path / "c", tmp_path / "m.gguf", force=True).model
    old, new = (random_stats(other).subject.fingerprint, read_header(pair[1]).keys[FINGERPRINT])
    for command in COMMANDS.values():
        line = refused(run, tmp_path, MODEL_FILE, *command(tmp_path, pair[1]))
        assert old[:12] in line and new[:12] in line


def replace(path: Path, **changes: Any) -> None:
    edited(path, path.with_name("edited"), **changes)
    path.with_name("edited").replace(path)


def put_empty_array(path: Path) -> None:
    """gguf-py does not write one: it has the length of a string of four bytes, and takes its place."""
    replace(path, keys={"x.empty": "four"})
    kinds = gguf.GGUFValueType
    string = struct.pack("<IQ4s", kinds.STRING, 4, b"four")
    array = struct.pack("<IIQ", kinds.ARRAY, kinds.UINT8, 0)
    data = path.read_bytes()
    assert data.count(b"x.empty" + string) == 1
    path.write_bytes(data.replace(b"x.empty" + string, b"x.empty" + array))


GATE, FC2 = "blk.1.ffn_gate.weight", "blk.0.ffn_pred_fc2.weight"
BAD_PAIRS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda m: m.unlink(), "m.gguf: cannot be read: No such file"),
    "not gguf": (lambda m: m.write_text("weights"), "m.gguf: not a GGUF file"),
    "truncated": (lambda m: os.truncate(m, m.stat().st_size - 1), "beyond the end of the file"),
    "a sidecar": (lambda m: shutil.copy(sidecar_of(m), m), "m.gguf: not a converted model: expected"),
    "statistics": (lambda m: shutil.copy(m.with_name("stats.gguf"), m), "m.gguf: not a converted model: expected"),
    "no fingerprint": (
        lambda m: [replace(path, without=[FINGERPRINT]) for path in (m, sidecar_of(m))],
        f"bad {FINGERPRINT}: expected 64 lower-case hex digits, found nothing; convert the checkpoint again",
    ),
    "version": (lambda m: replace(m, keys={VERSION: 4}), f"bad {VERSION}: expected 1 or 2, found 4"),
    "FFN layout": (
        lambda m: replace(m, keys={FFN_LAYOUT: "columns"}),
        f"bad {FFN_LAYOUT}: expected 'rows' or 'bundles', found 'columns'",
    ),
    "bundles in version 1": (
        lambda m: replace(m, keys={VERSION: 1}),
        f"bad {FFN_LAYOUT}: expected nothing in format version 1, found 'bundles'",
    ),
    "order": (lambda m: replace(m, keys={KEY: "cold_first"}), f"bad {KEY}: expected 'checkpoint' or 'hot_first'"),
    "no arrays": (lambda m: replace(m, keys={KEY: "hot_first"}), f"bad {KEY}.0: expected int32[96], found nothing"),
    "damaged arrays": (
        lambda m: replace(m, keys={KEY: "hot_first", f"{KEY}.0": [0] * 96, f"{KEY}.1": list(range(96))}),
        f"bad {KEY}.0: expected each of 96 neurons once, found neuron 0 96 times in FFN 0",
    ),
    "no tensor": (lambda m: replace(m, without=[GATE]), f"{GATE}: the tensor is missing"),
    "tensor shape": (lambda m: replace(m, shapes={GATE: (64, 96)}), f"{GATE}: wrong shape: expected [64, 96, 1]"),
    "n_embd": (
        lambda m: [replace(path, without=["llama.embedding_length"]) for path in (m, sidecar_of(m))],
        "bad llama.embedding_length: expected 1 to 1048576, found nothing",
    ),
    "empty array": (put_empty_array, "key x.empty is an empty array, which cannot be written"),
    "sidecar not gguf": (lambda m: sidecar_of(m).write_text("weights"), "m.predictor.gguf: not a GGUF file"),
    "sidecar truncated": (
        lambda m: os.truncate(sidecar_of(m), sidecar_of(m).stat().st_size - 1),
        "m.predictor.gguf: blk.",
    ),
    "sidecar a model": (lambda m: shutil.copy(m, sidecar_of(m)), "m.predictor.gguf: not a predictor sidecar"),
    "pair": (
        lambda m: replace(sidecar_of(m), keys={PAIR_ID: "0" * 32}),
        f"m.predictor.gguf: is the sidecar of another model than {{model}}: {PAIR_ID}: expected",
    ),
    "sidecar order": (
        lambda m: replace(sidecar_of(m), keys={KEY: "hot_first"}),
        f"{KEY}: expected 'checkpoint', found 'hot_first'",
    ),
    "sidecar shape": (
        lambda m: replace(sidecar_of(m), keys={"llama.feed_forward_length": 64}),
        "llama.feed_forward_length: expected 96, found 64",
    ),
    "sidecar fingerprint": (
        lambda m: replace(sidecar_of(m), keys={FINGERPRINT: "0" * 64}),
        "is the sidecar of another model than",
    ),
    "sidecar version": (
        lambda m: replace(sidecar_of(m), keys={VERSION: 5}),
        f"m.predictor.gguf: bad {VERSION}: expected 1 or 2 or 3 or 4, found 5",
    ),
    "sidecar form": (
        lambda m: replace(sidecar_of(m), keys={VERSION: 4, LAYOUT: "rows", FORM: "forest"}),
        f"m.predictor.gguf: bad {FORM}: expected 'mlp' or 'linear' or 'gate' or 'gate_up', found 'forest'",
    ),
    "sidecar form before version 4": (
        lambda m: replace(sidecar_of(m), keys={FORM: "gate"}),
        f"m.predictor.gguf: bad {FORM}: expected nothing before version 4, found 'gate'",
    ),
    "layout": (
        lambda m: replace(sidecar_of(m), keys={LAYOUT: "panels8"}),
        f"m.predictor.gguf: bad {LAYOUT}: expected 'rows' or 'panels16', found 'panels8'",
    ),
    "no layout": (
        lambda m: replace(sidecar_of(m), without=[LAYOUT]),
        f"m.predictor.gguf: bad {LAYOUT}: expected 'rows' or 'panels16', found nothing",
    ),
    "panels in version 1": (
        lambda m: replace(sidecar_of(m), keys={VERSION: 1}),
        f"m.predictor.gguf: bad {LAYOUT}: expected nothing in format version 1, found 'panels16'",
    ),
    "no fc2": (lambda m: replace(sidecar_of(m), without=[FC2]), f"{FC2}: the tensor is missing"),
    "bundles of two types": (
        lambda m: replace(m, shapes={"blk.1.ffn_up.weight": (96, 64)}),
        "m.gguf: blk.1.ffn_gate.weight: bundles that cannot be reordered: expected blk.1.ffn_gate.weight, ",
    ),
    "fc2 shape": (
        lambda m: replace(sidecar_of(m), shapes={FC2: (32, 32)}),
        f"{FC2}: wrong shape: expected [32, 96,",
    ),
}


@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_pair(what: str, pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    change, message = BAD_PAIRS[what]
    change(pair[0])
    line = refused(run, tmp_path, MODEL_FILE, *COMMANDS["reorder"](tmp_path, pair[1]))
    assert message.format(model=pair[0]) in line


@pytest.mark.parametrize("name", ["m-hot.gguf", "m-hot.predictor.gguf"])
def test_output_exists(name: str, pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    (tmp_path / name).write_text("precious")
    arguments = COMMANDS["reorder"](tmp_path, pair[1])
    assert f"{name}: output exists" in refused(run, tmp_path, OUTPUT, *arguments)
    assert run(*arguments, "--force")[0] == 0
    check_rows(pair[0], tmp_path / "m-hot.gguf", expected_order(random_stats(pair[0])))


def test_obsolete_sidecar(tmp_path: Path, run: Run) -> None:
    """A sidecar that does not belong beside a model without one goes with --force only."""
    model = make(tmp_path, "bamboo")
    profile = save_stats(random_stats(model), tmp_path / "stats.gguf")
    (old := tmp_path / "m-hot.predictor.gguf").write_text("old")
    arguments = COMMANDS["reorder"](tmp_path, profile)
    assert "m-hot.predictor.gguf: output exists" in refused(run, tmp_path, OUTPUT, *arguments)
    assert run(*arguments, "--force")[0] == 0
    assert not old.exists()


@pytest.mark.parametrize("outfile", ["m.gguf", "m.predictor.gguf", "stats.gguf", "link.gguf", "linked.gguf"])
def test_output_that_is_an_input(outfile: str, pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    (tmp_path / "link.gguf").symlink_to(pair[0])
    os.link(pair[1], tmp_path / "linked.gguf")
    arguments = (*COMMANDS["reorder"](tmp_path, pair[1]), "--outfile", tmp_path / outfile, "--force")
    assert "the output would replace an input" in refused(run, tmp_path, OUTPUT, *arguments)


def test_convert_keeps_the_statistics(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    arguments = ("convert", tmp_path / "c", "--outfile", pair[1], "--profile", pair[1], "--force")
    assert "the output would replace an input" in refused(run, tmp_path, OUTPUT, *arguments)


@pytest.mark.parametrize(
    ("outfile", "message"),
    [("x.bin", "expected a name that ends in .gguf"), ("none/x.gguf", "folder of the output does not exist")],
)
def test_bad_output(outfile: str, message: str, pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    arguments = (*COMMANDS["reorder"](tmp_path, pair[1]), "--outfile", tmp_path / outfile)
    assert message in refused(run, tmp_path, OUTPUT, *arguments)


def test_no_statistics_named(pair: tuple[Path, Path], run: Run) -> None:
    code, stdout, stderr = run("reorder", pair[0])
    assert (code, stdout) == (USAGE, "")
    assert "--profile" in stderr and "Traceback" not in stderr


# ---- cut short

CUT = """
import os, sys
from tsconv import convert
from tsconv.errors import TsconvError
from tsconv.commands.reorder import reorder
command, signal, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
model, out, profile = (f"{folder}/{name}.gguf" for name in ("m", "m-hot", "stats"))
def half(done, total):
    assert os.path.getsize(out + ".part") > 0
    if 2 * done > total:
        os.kill(os.getpid(), signal)
try:
    if command == "reorder":
        reorder(model, profile, force=True, progress=half)
    else:
        convert(f"{folder}/c", out, profile=profile, force=True, progress=half)
except TsconvError as error:
    sys.exit(f"error: {error}")
"""


def cut(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CUT, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_interrupted_half_way(number: int, code: int, command: str, pair: tuple[Path, Path]) -> None:
    """A real signal when half is written: no part is left, and what was there before stays."""
    folder = pair[0].parent
    (folder / "m-hot.gguf").write_text("precious")
    before = sorted(os.listdir(folder))
    done = cut(command, number, folder)
    assert done.returncode == code, done.stderr
    assert sorted(os.listdir(folder)) == before
    assert (folder / "m-hot.gguf").read_text() == "precious"


@pytest.mark.parametrize("command", COMMANDS)
def test_file_size_limit(command: str, pair: tuple[Path, Path]) -> None:
    """A write that fails half-way."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    size, before = pair[0].stat().st_size, sorted(os.listdir(pair[0].parent))
    done = cut(command, 0, pair[0].parent, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "m-hot.gguf.part: cannot be written: File too large" in done.stderr
    assert sorted(os.listdir(pair[0].parent)) == before


def test_input_that_shrinks(pair: tuple[Path, Path]) -> None:
    """The model is cut off while it is read: refused, not filled with zeros."""
    before = sorted(os.listdir(pair[0].parent))

    def shrink(done: int, total: int) -> None:
        os.truncate(pair[0], 4096)

    with pytest.raises(TsconvError, match=r"m\.gguf: became shorter while it was read"):
        reorder(*pair, progress=shrink)
    assert sorted(os.listdir(pair[0].parent)) == before
