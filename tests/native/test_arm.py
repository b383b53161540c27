"""The kernels for 64-bit ARM, under qemu."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from support.native_build import ROOT, TOOLS

NEEDED = ["aarch64-linux-gnu-gcc", "qemu-aarch64"]
missing = [tool for tool in NEEDED if shutil.which(tool) is None]


@pytest.mark.skipif(
    bool(missing),
    reason=f"not found: {', '.join(missing)} (apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
)
def test_kernels_of_arm():
    command = [ROOT / "native" / "tests" / "run_qemu", ROOT / "build" / "arm", "-V", "-R", "kernels|panels"]
    done = subprocess.run(command, cwd=ROOT, env=TOOLS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Two programs, on a processor with every extension and on one without.
    assert [done.stdout.count(f" {tier}: ok\n") for tier in ("ref", "neon", "neondot")] == [4, 4, 2]
