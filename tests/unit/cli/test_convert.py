"""What `tsconv convert` prints when all goes well."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from support import ROOT
from support.synthetic import SHAPES, random_tensors, save
from tsconv.bench.synthetic import Shape
from tsconv.cli.convert import TYPES as LISTED
from tsconv.cli.text import size, table
from tsconv.format.mixes import MIXES
from tsconv.transform.quantize import TYPES

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(run: Callable[..., tuple[int, str, str]]) -> Run:
    """`tsconv convert ARGUMENTS`, which must succeed: (stdout, stderr)."""

    def call(*arguments: object) -> tuple[str, str]:
        code, stdout, stderr = run("convert", *arguments)
        assert code == 0, stderr
        return stdout, stderr

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "Tiny", SHAPES["mistral"], random_tensors(SHAPES["mistral"]))


def test_summary_names_files_and_the_next_command(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    model = tmp_path / "my model.gguf"
    stdout, stderr = run(checkpoint, "--outfile", model)
    assert stderr == ""
    lines = stdout.splitlines()
    assert lines[0].split()[0] == "model" and size(model.stat().st_size) in lines[0]
    assert lines[1].split()[0] == "sidecar" and "my model.predictor.gguf" in lines[1]
    assert "MB/s" in lines[2]
    assert lines[3] == f"next: tsconv run -m '{model}'"


def test_json(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    result = json.loads(run(checkpoint, "--outfile", tmp_path / "m.gguf", "--json")[0])
    assert result["model"] == str(tmp_path / "m.gguf")
    assert result["model_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert result["predictor_kind"] == "embedded"
    assert result["mb_per_s"] > 0
    assert {t["name"] for t in result["tensors"] if t["file"] == "sidecar"} == {
        f"blk.{n}.ffn_pred_{part}.weight" for n in range(2) for part in ("fc1", "fc2", "scale")
    }


def test_dry_run_lists_every_tensor(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    options = ("--outfile", tmp_path / "m.gguf", "--tensor-type", "attn_v=f16", "--predictor-outtype", "q4_0")
    stdout, _ = run(checkpoint, *options, "--dry-run")
    rows = {line.split()[1]: line.split() for line in stdout.splitlines() if ".weight" in line}
    assert len(rows) == 3 + 2 * (9 + 3)
    fc1, attn_v = "blk.1.ffn_pred_fc1.weight", "blk.0.attn_v.weight"
    assert rows[fc1] == ["sidecar", fc1, "64", "x", "64", "bf16", "q4_0", "2,304"]
    assert rows[attn_v] == ["model", attn_v, "32", "x", "64", "bf16", "f16", "4,096"]
    assert "nothing was written" in stdout
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_a_type_that_does_not_fit_is_said(tmp_path: Path, run: Run) -> None:
    shape = Shape(320, 64, 96, 4, 2, 2, ranks=(40, 64))
    checkpoint = save(tmp_path / "Tiny", shape, random_tensors(shape))
    _, stderr = run(checkpoint, "--outfile", tmp_path / "m.gguf", "--predictor-outtype", "q8_0")
    assert stderr == "note: blk.0.ffn_pred_fc2.weight: f16 instead of q8_0, whose blocks of 32 do not divide its rows\n"


def test_a_type_that_gains_nothing_is_said(tmp_path: Path, run: Run) -> None:
    """Rows of 64 have room for blocks of 32 alone."""
    shape = Shape(320, 64, 96, 4, 2, 2, ranks=(32, 64))
    checkpoint = save(tmp_path / "Tiny", shape, random_tensors(shape))
    _, stderr = run(checkpoint, "--outfile", tmp_path / "k.gguf", "--outtype", "q4_K")
    same = "note: no tensor has a shape for q4_K: asking for q5_0 gives the same weights\n"
    assert stderr.startswith(same)
    _, stderr = run(checkpoint, "--outfile", tmp_path / "m.gguf", "--outtype", "q5_0")
    assert "no tensor has" not in stderr
    k, five = (
        {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("k.gguf", "m.gguf")
    )
    assert k == five


def test_q3_nl_that_does_not_fit_is_said(tmp_path: Path, run: Run) -> None:
    shape = Shape(320, 64, 104, 4, 2, 1, ranks=(32,))
    checkpoint = save(tmp_path / "Tiny", shape, random_tensors(shape))
    options = ("--outfile", tmp_path / "m.gguf", "--outtype", "f32", "--predictor-outtype", "q3_nl")
    _, stderr = run(checkpoint, *options)
    assert stderr == (
        "note: blk.0.ffn_pred_fc2.weight: q4_0 instead of q3_nl, which is for a multiple of 16 rows,"
        " of at most 131072 weights\n"
    )


def test_notes_of_the_checkpoint_come_first_and_whole(tmp_path: Path, run: Run) -> None:
    shape = Shape(320, 64, 96, 4, 2, 2, ranks=(40, 40))
    tensors = random_tensors(shape)
    checkpoint = save(tmp_path / "Tiny", shape, tensors, tie_word_embeddings=True, bos_token_id=7, eos_token_id=320)
    options = ("--outfile", tmp_path / "m.gguf", "--predictor-outtype", "q8_0")
    stdout, stderr = run(checkpoint, *options, "--json")
    lines = stderr.splitlines()
    assert [line.split()[1] for line in lines] == [
        "lm_head.weight",
        *["config.json:"] * 2,
        "blk.0.ffn_pred_fc2.weight:",
    ]
    assert lines[-1].endswith("(and 1 more tensors: see --dry-run --json)")
    result = json.loads(stdout)
    assert [f"note: {note}" for note in result["notes"]] == lines[:-1]
    assert [note.split(":")[0] for note in result["type_notes"]] == [f"blk.{n}.ffn_pred_fc2.weight" for n in range(2)]


def test_help_lists_the_types() -> None:
    assert ", ".join([*TYPES, *MIXES]) == LISTED


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["inspect", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from tsconv import cli; sys.argv[0] = 'tsconv'\n"
        "try: cli.main()\n"
        "finally: print([m for m in ('torch', 'llama_cpp', 'numpy', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_sizes_and_tables() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_080_000, 27_300_000_000, 999_999)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.08 MB",
        "27.3 GB",
        "1 MB",
    ]
    assert table([("a", "1"), ("bbb", "22")], right=(1,)) == "a     1\nbbb  22"
