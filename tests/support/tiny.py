"""The tiny checkpoints of the repository, converted once per test session, and the command line as a subprocess."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import tsconv
from support import CHECKPOINTS, ROOT, synthetic

TSCONV = (sys.executable, "-m", "tsconv")
TIMEOUT_S = 600  # for a machine that is busy with other things too


@functools.cache
def converted(name: str = "tiny-turbosparse-mistral", outtype: str = "f32", predictor: str | None = None) -> Path:
    """`NAME.gguf` and its sidecar in a folder that goes when the tests end."""
    directory = Path(tempfile.mkdtemp(prefix="tsconv-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return tsconv.convert(CHECKPOINTS / name, directory / f"{name}.gguf", outtype, predictor_outtype=predictor).model


@functools.cache
def of_bytes() -> Path:
    """A converted model of random weights whose tokens are letters and bytes: its greedy text never ends."""
    directory = Path(tempfile.mkdtemp(prefix="tsconv-tests-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    shape = synthetic.SHAPES["mistral"]
    checkpoint = synthetic.save(directory / "checkpoint", shape, synthetic.random_tensors(shape))
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}")
    return tsconv.convert(checkpoint, directory / "bytes.gguf", "f32").model


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Squared error over squared size."""
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def run(
    *arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`tsconv ARGUMENTS` with stdin from a pipe."""
    return subprocess.run(
        [*TSCONV, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | (env or {}),
        timeout=TIMEOUT_S,
        check=False,
    )


def error_line(result: subprocess.CompletedProcess[bytes]) -> str:
    """What a failed command printed on stderr: never a traceback, and nothing on stdout."""
    assert result.returncode != 0
    assert result.stdout == b""
    text = result.stderr.decode().rstrip("\n")
    assert "Traceback" not in text
    return text
