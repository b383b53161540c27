"""pytest plugin for llama.cpp's own server tests: a local model in place of downloaded ones, a list of tests left out.

Environment: TSCONV_TEST_MODEL names the model, TSCONV_TEST_RESULTS the JSON file for {test: outcome}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

LEFT_OUT = Path(__file__).parent / "left_out.txt"
RANK = ("passed", "skipped", "failed")  # of a test's set-up, call and tear-down the last in this order counts
outcomes: dict[str, str] = {}


def left_out() -> list[str]:
    """The patterns in left_out.txt: what stands before the first blank of a line."""
    lines = LEFT_OUT.read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]


def is_left_out(test: str, patterns: list[str]) -> bool:
    """Whether a pattern is the test, or its file, or its name without parameters, or matches it with *."""
    names = (test, test.partition("[")[0], test.partition("::")[0])
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns for name in names)


def with_local_model(preset: Callable[[], Any]) -> staticmethod[[], Any]:
    """The preset, which a test may still change, with the local model."""

    def server() -> Any:
        process = preset()
        process.model_file = os.environ["TSCONV_TEST_MODEL"]
        process.model_hf_repo = process.model_hf_file = None
        return process

    return staticmethod(server)


def pytest_configure(config: pytest.Config) -> None:
    import utils  # of llama.cpp's tests

    for name, preset in list(vars(utils.ServerPreset).items()):
        if isinstance(preset, staticmethod):
            setattr(utils.ServerPreset, name, with_local_model(preset.__func__))
    utils.ServerPreset.load_all = staticmethod(lambda: None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    patterns = left_out()
    chosen = [item for item in items if not is_left_out(item.nodeid, patterns)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    before = outcomes.get(report.nodeid, "passed")
    outcomes[report.nodeid] = max(before, report.outcome, key=RANK.index)


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ["TSCONV_TEST_RESULTS"]).write_text(json.dumps(outcomes), encoding="utf-8")
