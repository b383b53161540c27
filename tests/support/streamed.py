"""Models that are loaded with little memory for their neurons."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tsconv.errors import BackendError
from tsconv.runtime import model as runtime_model
from tsconv.runtime.binding import open_model
from tsconv.runtime.streaming import Budget


def fewest_bytes(path: Path) -> int:
    """What a cache for the model needs at least, as its refusal says."""
    native = open_model(path, None, None)
    with pytest.raises(BackendError) as refused:
        native.stream(1000)
    native.close()
    return int(re.search(r"expected at least (\d+) bytes, found 1000", str(refused.value))[1])


@contextmanager
def streaming(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> Iterator[None]:
    """While this holds, models are loaded with `n_bytes` of memory for neurons, whatever fits."""
    with monkeypatch.context() as patch:
        patch.setattr(runtime_model, "choose_budget", lambda *_, **__: Budget(n_bytes, True, 0, 0, 0, 1 << 40))
        yield
