"""The folder of a training that may be killed at any time: what is there is whole, and what is whole is not made again.

lock           is locked by the process that works here
task.json      what is trained; another task is refused
tokens.npy     the text
ranks.json     of each layer, where they were chosen
recorded.json  the layers whose samples are there
*.x, *.h       samples (tsconv.predictor.train.samples)
N-E.state      of the FFN in training, behind its last epoch
N-E.npz        a predictor that is ready
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tsconv.errors import OutputError, TsconvError
from tsconv.predictor.train.calibrate import Figures
from tsconv.predictor.train.fit import Fitted, State, restored, saved
from tsconv.predictor.train.rounding import Stored
from tsconv.write.writer import lock

FIRST_FILES = ("lock", "task.json", "tokens.npy")


class Work:
    """
    Args:
        path: the folder, which is made.
        task: what is trained, as JSON has it.

    Raises:
        TsconvError: the folder is of another task.
        OutputError: it cannot be made, or another process works in it.
    """

    def __init__(self, path: Path, task: dict[str, Any]) -> None:
        self.path = path
        task = json.loads(json.dumps(task))
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"the folder of the work cannot be made: {error.strerror}", where=path) from None
        try:
            self._lock = lock(path / "lock")
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=path) from None
        there = self._json("task.json")
        if there is None or not (path / "tokens.npy").exists():
            if any(entry.name.removesuffix(".part") not in FIRST_FILES for entry in path.iterdir()):
                raise OutputError("is not a folder of this command", where=path, fix="name another --work")
            self._write("task.json", lambda file: file.write(json.dumps(task, indent=1).encode()))
        elif there != task:
            differs = [key for key in {*task, *there} if task.get(key) != there.get(key)]
            raise TsconvError(
                f"a training with other options was begun here: {', '.join(sorted(differs))}",
                where=path,
                expected=", ".join(repr(task.get(key)) for key in sorted(differs)),
                found=", ".join(repr(there.get(key)) for key in sorted(differs)),
                fix="give the same options to go on, or remove the folder, or name another --work",
            )

    # ---- the text

    def tokens(self, make: Callable[[], npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
        """Those that are there, or what `make` makes. Where it cannot the folder goes: nothing is in it."""
        path = self.path / "tokens.npy"
        if not path.exists():
            try:
                tokens = make()
            except TsconvError:
                self.close()
                raise
            self._write("tokens.npy", lambda file: np.save(file, tokens))
        return np.load(path)

    # ---- ranks

    def ranks(self) -> list[int] | None:
        """Those that were chosen."""
        found: list[int] | None = self._json("ranks.json")
        return found

    def keep_ranks(self, ranks: list[int]) -> None:
        self._write("ranks.json", lambda file: file.write(json.dumps(ranks).encode()))

    # ---- samples

    def recorded(self) -> list[int]:
        """Layers whose samples are there."""
        return self._json("recorded.json") or []

    def forget_samples(self) -> None:
        """Removes all samples, also those that were being written."""
        (self.path / "recorded.json").unlink(missing_ok=True)
        for path in [*self.path.glob("*.x"), *self.path.glob("*.h")]:
            path.unlink()

    def note_recorded(self, layers: range) -> None:
        self._write("recorded.json", lambda file: file.write(json.dumps(list(layers)).encode()))

    def forget_layer(self, layer: int) -> None:
        """Removes the samples of a layer whose predictors are ready."""
        for path in self.path.glob(f"layer-{layer}-ffn-*"):
            path.unlink()

    # ---- predictors

    def state(self, layer: int, ffn: int) -> State | None:
        """Of a training that was begun."""
        import torch

        path = self.path / f"{layer}-{ffn}.state"
        return restored(torch.load(path, weights_only=True)) if path.exists() else None

    def keep_state(self, layer: int, ffn: int, state: State) -> None:
        import torch

        self._write(f"{layer}-{ffn}.state", lambda file: torch.save(saved(state), file))

    def result(self, layer: int, ffn: int) -> tuple[Fitted, float] | None:
        """A predictor that is ready, and the seconds it took."""
        path = self.path / f"{layer}-{ffn}.npz"
        if not path.exists():
            return None
        with np.load(path) as data:
            figures = Figures(int(data["figures"][0]), *data["figures"][1:].tolist())
            fitted = Fitted(Stored(data["fc1"], data["fc2"]), figures, int(data["epochs"]))
            return fitted, float(data["seconds"])

    def keep_result(self, layer: int, ffn: int, fitted: Fitted, seconds: float) -> None:
        figures = list(vars(fitted.figures).values())
        arrays: dict[str, Any] = {"fc1": fitted.stored.fc1, "fc2": fitted.stored.fc2, "figures": np.array(figures)}
        self._write(f"{layer}-{ffn}.npz", lambda file: np.savez(file, epochs=fitted.epochs, seconds=seconds, **arrays))
        (self.path / f"{layer}-{ffn}.state").unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder: its task is done."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    # ---- files

    def _json(self, name: str) -> Any:
        path = self.path / name
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError:
            raise TsconvError("damaged", where=path, fix="remove the folder and begin again") from None

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """A file that is whole under its name, or not there."""
        part = self.path / f"{name}.part"
        try:
            with open(part, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot be written: {error.strerror}", where=self.path / name) from None
