"""llama.cpp's own server tests against `tsconv serve` and against llama-server alone: both must pass the same.

    python tests/llama_server/run.py [PYTEST OPTIONS]

The tests come from the source distribution of llama-cpp-python, which LLAMA_CPP_SOURCE names. They run in a copy; what
plugin.py changes is the model, and left_out.txt lists the tests that do not apply. llama-server alone computes the
same file, told that its architecture is llama, without our backend: a dense SwiGLU model with the same tokenizer and
shapes. Its text is noise, its API must be the same.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import tsconv
from tsconv.runtime.programs import AS_LLAMA, OURS, program_path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CHECKPOINT = ROOT / "checkpoints" / "tiny-turbosparse-mistral"
TESTS = Path("tools/server/tests")
FIRST_PORT = 18080  # one for each side; a test may take the next few
PORTS_APART = 100
TIMEOUT_SECONDS = 120  # of one test, on a machine that is busy with other things too
OUTCOMES = ("passed", "failed", "skipped")
HOW_TO_GET = """\
skipped: llama.cpp's server tests are in the source distribution of llama-cpp-python. Download and unpack it:
    .venv/bin/pip download --no-deps --no-build-isolation --no-binary :all: llama-cpp-python=={version}
    tar -xf llama_cpp_python-{version}.tar.gz
    LLAMA_CPP_SOURCE=llama_cpp_python-{version} make test-server"""


def copy_of_tests(source: Path, folder: Path) -> Path:
    """llama.cpp's folder of server tests, with the chat templates where the tests look for them."""
    llama = source / "vendor" / "llama.cpp"
    shutil.copytree(llama / TESTS, folder / TESTS)
    (folder / "models").symlink_to(llama / "models")
    return folder / TESTS


def executable(path: Path, words: list[str]) -> Path:
    """A program which runs `words` followed by its own arguments."""
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


def start(tests: Path, program: Path, model: Path, port: int, options: list[str]) -> subprocess.Popen[bytes]:
    """pytest on the copied tests; results in `results(program)`, output in a log beside it."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {
        "LLAMA_SERVER_BIN_PATH": str(program),
        "TSCONV_TEST_MODEL": str(model),
        "TSCONV_TEST_RESULTS": str(results(program)),
        "PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(tests), str(FOLDER)]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["--timeout", str(TIMEOUT_SECONDS), *options]
    with open(log(program), "wb") as file:
        return subprocess.Popen(command, cwd=tests, env=environment, stdout=file, stderr=subprocess.STDOUT)


def results(program: Path) -> Path:
    return program.with_suffix(".json")


def log(program: Path) -> Path:
    return ROOT / "build" / f"server-tests-{program.name}.log"


def outcomes_of(program: Path) -> dict[str, str]:
    """Of each test: passed, failed or skipped."""
    if not results(program).exists():
        sys.exit(f"pytest did not run: see {log(program)}")
    outcomes: dict[str, str] = json.loads(results(program).read_text(encoding="utf-8"))
    return outcomes


def compare(ours: Path, stock: Path) -> int:
    """Prints both sides and the tests that do not pass on both; returns the exit status."""
    sides = {"tsconv serve": outcomes_of(ours), "llama-server": outcomes_of(stock)}
    print(f"{'':12}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
    for name, outcomes in sides.items():
        counts = Counter(outcomes.values())
        print(f"{name:12}" + "".join(f"{counts[outcome]:9}" for outcome in OUTCOMES))
    passes = [{test for test, outcome in side.items() if outcome == "passed"} for side in sides.values()]
    for test in sorted(set().union(*sides.values()) - (passes[0] & passes[1])):
        found = ", ".join(f"{name}: {side.get(test, 'not run')}" for name, side in sides.items())
        print(f"{test}  {found}")
    if passes[0] != passes[1] or not passes[0]:
        print(f"output: {log(ours)} {log(stock)}")
        return 1
    return 0


def main(options: list[str]) -> int:
    named = os.environ.get("LLAMA_CPP_SOURCE")
    source = Path(named or ".").absolute()
    if not named or not (source / "vendor" / "llama.cpp" / TESTS).is_dir():
        print(HOW_TO_GET.format(version=version("llama-cpp-python")))
        return 0
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tsconv-server-tests-") as name:
        folder = Path(name)
        model = tsconv.convert(CHECKPOINT, folder / f"{CHECKPOINT.name}.gguf", "f32").model
        ours = executable(folder / "tsconv", [sys.executable, str(FOLDER / "wrapper.py")])
        stock = executable(folder / "llama", [str(program_path("llama-server")), *AS_LLAMA])
        running = [
            start(copy_of_tests(source, folder / f"source-{program.name}"), program, model, port, options)
            for program, port in ((ours, FIRST_PORT), (stock, FIRST_PORT + PORTS_APART))
        ]
        for process in running:
            process.wait()
        return compare(ours, stock)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
