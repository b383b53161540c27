"""What tests share: checkpoints to convert, other ways to read what was written, processes to watch."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CHECKPOINTS = ROOT / "checkpoints"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# "llama-cpp-python==X.Y.Z", which tsconv is built for
(LLAMA,) = (
    f"llama-cpp-python=={line.partition('==')[2]}"
    for line in PYPROJECT["project"]["dependencies"]
    if line.startswith("llama-cpp-python")
)
