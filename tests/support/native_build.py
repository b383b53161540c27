"""Builds of native/ that tests need, under build/, where the next run finds them."""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
from pathlib import Path

from support import ROOT

TOOLS = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
OTHER_GGML = "0.9.1"


@functools.cache
def build(directory: Path, *options: str) -> Path:
    """Configures and builds native/ into `directory`, while no other process of the tests does."""
    configure = ["cmake", "-S", ROOT / "native", "-B", directory, "-G", "Ninja"]
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [*configure, f"-DPython_EXECUTABLE={sys.executable}", *options],
            ["cmake", "--build", directory],
        ):
            done = subprocess.run(command, env=TOOLS, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return directory


@functools.cache
def library_for_other_ggml() -> Path:
    """The native library as it would be when built against ggml `OTHER_GGML`."""
    return build(ROOT / "build" / "other-ggml", f"-DTSFFN_EXPECT_GGML={OTHER_GGML}") / "libggml-tsffn.so"
