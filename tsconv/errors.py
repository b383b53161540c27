"""One hierarchy of errors for everything a user can get wrong.

The message of every error is one line that says what is wrong, where, what was expected and found, and what to do.
The command line prints it without a traceback and exits with the class's fixed `exit_code`; Python callers catch
`TsconvError` or one of its subclasses.
"""

from __future__ import annotations


class TsconvError(Exception):
    """Base class. `exit_code` is what the command line exits with.

    Args:
        what: the problem, without a full stop.
        where: file, or file and tensor ("model.gguf: blk.0.ffn_up.weight").
        expected, found: the two sides of a mismatch; either may be left out.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        line = what if where is None else f"{where}: {what}"
        if expected is not None:
            line += f": expected {expected}"
        if found is not None:
            line += f"{',' if expected is not None else ':'} found {found}"
        if fix is not None:
            line += f"; {fix}"
        line = " ".join(line.split())
        super().__init__("".join(c if c.isprintable() else "\ufffd" for c in line))


class CheckpointError(TsconvError):
    """The source checkpoint is missing, damaged, or not a model this tool converts."""

    exit_code = 3


class ModelFileError(TsconvError):
    """A GGUF model or sidecar is missing, damaged, or does not match its partner."""

    exit_code = 4


class BackendError(TsconvError):
    """The native backend cannot be loaded into this llama.cpp, or failed while computing."""

    exit_code = 5


class OutputError(TsconvError):
    """An output cannot be written: it exists, the disk is full, the folder is missing."""

    exit_code = 6


class StoppedError(TsconvError):
    """The user stopped a run; what it had done until then is kept. The exit code is that of SIGINT in shells."""

    exit_code = 130


class HubError(TsconvError):
    """A repository on the Hugging Face Hub cannot be reached or does not exist."""

    exit_code = 7
