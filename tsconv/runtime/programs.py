"""llama.cpp's own programs with a converted model: llama-server, llama-perplexity and the rest, unmodified.

They are compiled by `make setup` (native/programs) and installed in `tsconv/bin`. What tells them apart from a program
without tsconv is on their command line and in their environment, so that `ps` shows it and any other build of the same
llama.cpp can be run the same way:

- `GGML_BACKEND_PATH` names our library, `TSFFN_MODEL` the model;
- `--override-kv general.architecture=str:llama`, because llama.cpp does not know "turbosparse";
- `-ot PATTERN=CPU` keeps the FFN weights away from other devices. It is also what makes a program load the library at
  GGML_BACKEND_PATH: llama.cpp only loads backends itself when it has none (common/arg.cpp,
  parse_tensor_buffer_overrides; src/llama.cpp, which asks for ggml_backend_reg_count() == 0).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tsconv.errors import BackendError
from tsconv.native.devices import program_folders
from tsconv.native.library import library_path

PROGRAMS = ("llama-server", "llama-cli", "llama-perplexity", "llama-batched-bench", "llama-bench")
WITHOUT_OVERRIDES = ("llama-bench",)  # no --override-kv: a library that is loaded before does the same
ARCHITECTURE_LIBRARY = "libllama-architecture.so"  # native/programs/llama_architecture.c
DEVICE = "TSFFN"  # our device's name in ggml
FFN_WEIGHTS = r"ffn_(gate|up|down)(_exps)?\.weight"
AS_LLAMA = ("--override-kv", "general.architecture=str:llama")
FFN_HERE = ("-ot", f"{FFN_WEIGHTS}=CPU")
CHECK_SECONDS = 60
# Variables that this module decides about; TSFFN_STATS and TSFFN_ISA are the user's (docs/usage.md).
OURS = (
    "TSFFN_MODEL",
    "TSFFN_PREDICTOR",
    "TSFFN_SPARSITY",
    "TSFFN_HOT",
    "TSFFN_RESIDENCY",
    "TSFFN_NEURON_CACHE",
    "TSFFN_GPU",
    "TSFFN_GPU_HOT",
    "TSFFN_VRAM_BUDGET",
    "GGML_BACKEND_PATH",
)


@dataclass(frozen=True)
class Command:
    """A program's command line and environment, to be executed."""

    arguments: list[str]
    environment: dict[str, str]

    def execute(self) -> None:
        """Becomes the program: signals, exit status and output are its own. Does not return.

        Raises:
            OSError: it cannot be executed.
        """
        os.execve(self.arguments[0], self.arguments, self.environment)


def program_path(name: str) -> Path:
    """The installed file `name`: one of PROGRAMS, or ARCHITECTURE_LIBRARY.

    Raises:
        BackendError: it was not built.
    """
    candidates = [folder / name for folder in program_folders()]
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate.absolute()
    raise BackendError(
        f"llama.cpp's {name} is not installed",
        expected=" or ".join(map(str, candidates)),
        fix="it is compiled by make setup, which needs a C++ compiler and PyPI; build/programs.log says what failed",
    )


def environment(
    model: str | os.PathLike[str],
    *,
    predictor: str | os.PathLike[str] | None = None,
    sparsity: str | None = None,
    hot: npt.NDArray[np.int32] | None = None,
    lock: bool = False,
    read_ahead: bool = True,
) -> dict[str, str]:
    """This process's environment with what makes a program compute the model sparsely (docs/usage.md).

    Args:
        model, predictor, sparsity: as for `tsconv.load`.
        hot, lock, read_ahead: what to bring into RAM once the model is loaded, as for
            `tsconv.runtime.residency.place_in_memory`; None leaves it to the system.
    """
    variables = {name: value for name, value in os.environ.items() if name not in OURS}
    variables["GGML_BACKEND_PATH"] = os.fspath(library_path())
    variables["TSFFN_MODEL"] = os.fspath(model)
    if predictor is not None:
        variables["TSFFN_PREDICTOR"] = os.fspath(predictor)
    if sparsity is not None:
        variables["TSFFN_SPARSITY"] = sparsity
    if hot is not None:
        variables["TSFFN_HOT"] = ",".join(map(str, hot.ravel().tolist()))
        words = {"prefault": True, "lock": lock, "random": not read_ahead}
        variables["TSFFN_RESIDENCY"] = ",".join(word for word, wanted in words.items() if wanted)
    return variables


def gpu_environment(number: int, vram_budget: int | None, hot: npt.NDArray[np.int32] | None) -> dict[str, str]:
    """What gives a GPU its share of the FFNs: as `tsconv.runtime.hybrid.share`, but that `vram_budget` is for them
    alone."""
    variables = {"TSFFN_GPU": str(number)}
    if vram_budget is not None:
        variables["TSFFN_VRAM_BUDGET"] = str(vram_budget)
    if hot is not None:
        variables["TSFFN_GPU_HOT"] = ",".join(map(str, hot.ravel().tolist()))
    return variables


def model_arguments(model: str | os.PathLike[str]) -> list[str]:
    """Options by which a program loads the converted model."""
    return ["-m", os.fspath(model), *AS_LLAMA, *FFN_HERE]


def with_model(name: str, arguments: Sequence[str], model: str | os.PathLike[str]) -> Command:
    """Program `name` with a user's arguments, among which is the converted model, ready to be run.

    Raises:
        BackendError: as `command`.
    """
    variables = environment(model)
    if name not in WITHOUT_OVERRIDES:
        return command(name, [*AS_LLAMA, *FFN_HERE, *arguments], variables)
    preloaded = os.environ.get("LD_PRELOAD", "").split()
    variables["LD_PRELOAD"] = " ".join([str(program_path(ARCHITECTURE_LIBRARY)), *preloaded])
    return command(name, [*FFN_HERE, *arguments], variables)


def command(name: str, arguments: Sequence[str], variables: Mapping[str, str]) -> Command:
    """Program `name` with the arguments, once it is known to have the backend with this environment.

    Raises:
        BackendError: it is not installed, or does not load the backend: it would compute another function.
    """
    path = program_path(name)
    check_devices(name, variables)
    return Command([os.fspath(path), *arguments], dict(variables))


def check_devices(name: str, variables: Mapping[str, str]) -> None:
    """Whether program `name` has our device with this environment.

    Raises:
        BackendError: as `command`.
    """
    path = program_path(name)
    try:
        listed = subprocess.run(
            [path, "--list-devices"],
            env=dict(variables),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHECK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"llama.cpp's {name} cannot be run", where=path, found=error, fix="make setup") from None
    if f"{DEVICE}:" not in listed.stdout:
        lines = [line for line in (listed.stderr + listed.stdout).splitlines() if line.strip()]
        raise BackendError(
            f"llama.cpp's {name} does not load the sparse backend",
            where=path,
            found="; ".join((_own(listed.stderr) or _refusal(variables) or lines)[-2:])
            or f"exit status {listed.returncode}",
            fix="run make setup again, which builds both for one another",
        )


def _own(log: str) -> list[str]:
    """What the backend says, of a program's log."""
    return [line for line in log.splitlines() if "tsffn" in line.lower()]


def _refusal(variables: Mapping[str, str]) -> list[str]:
    """Why the backend does not load with this environment. Programs write their log in a thread of its own, and may end
    before the line is written."""
    load = "from tsconv.native.library import load_backend; load_backend()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", load],
            env=dict(variables),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHECK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.search(r"tsffn: (.*?)(; load_backend: |$)", done.stderr, re.MULTILINE)
    return [] if found is None else [f"tsffn: {found[1]}"]
