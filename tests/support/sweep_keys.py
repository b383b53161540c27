"""Every key of a model file with values it must not have; each file is loaded and computes in a process of its own.

usage, in tests/: python -m support.sweep_keys MODEL DIRECTORY
Prints one line per file: key, value, and how it ended: "works", "refused", or what went wrong.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf

import tsconv
from support.edited import ARCHITECTURE, edited
from tsconv.errors import TsconvError

Kind = gguf.GGUFValueType
BAD = {
    Kind.UINT32: (0, 2**31, ("x", Kind.STRING)),
    Kind.FLOAT32: (-1.0, float("nan")),
    Kind.STRING: ("", "none", "bert"),
    Kind.BOOL: ((2, Kind.UINT32),),
}
SECONDS = 20


def changes(model: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, what is done to it, arguments of `edited`)"""
    for field in gguf.GGUFReader(model).fields.values():
        if field.name.startswith("GGUF.") or field.name == ARCHITECTURE:
            continue
        yield field.name, "missing", {"without": [field.name]}
        if field.types[0] == Kind.ARRAY:
            old = field.contents()
            values = {"shorter": old[:-1], "all alike": old[:1] * len(old), "no array": 1}
            for what, value in values.items():
                yield field.name, what, {"keys": {field.name: (1, Kind.UINT32) if value == 1 else value}}
        else:
            for value in BAD[field.types[0]]:
                yield field.name, repr(value), {"keys": {field.name: value}}


def use(model: Path) -> None:
    llama = tsconv.load(model, n_threads=1, n_ctx=256)
    llama.token_logits([1, 20, 30])
    llama.detokenize(llama.tokenize(b"hello you\n\xff"))


def outcome(model: Path, log: Path) -> str:
    pid = os.fork()
    if pid == 0:
        status = 1
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        signal.alarm(SECONDS)
        try:
            use(model)
            status = 0
        except TsconvError:
            status = 2
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    known = {0: "works", 2: "refused"}
    return known.get(status) or f"status {status}: {' '.join(log.read_text(errors='replace').split())[-500:]}"


def main() -> None:
    source, directory = Path(sys.argv[1]), Path(sys.argv[2])
    target = directory / "m.gguf"
    shutil.copy(source.with_suffix(".predictor.gguf"), target.with_suffix(".predictor.gguf"))
    for key, what, arguments in changes(source):
        edited(source, target, **arguments)
        print(key, what, outcome(target, directory / "log"), sep="\t", flush=True)


if __name__ == "__main__":
    main()
