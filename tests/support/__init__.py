"""What tests share: checkpoints to convert, other ways to read what was written, processes to watch."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
CHECKPOINTS = ROOT / "checkpoints"
