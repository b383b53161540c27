"""What programs of llama.cpp read from the environment (native/src/ggml/environment.c)."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import openai
import pytest

from support import tiny
from tsconv.errors import BackendError
from tsconv.format.header import read_header
from tsconv.format.order import shape_of
from tsconv.runtime import programs
from tsconv.runtime.programs import check_devices, command, environment, model_arguments
from tsconv.runtime.server import answers, check_address

NAMES = ("tiny-turbosparse-mistral", "tiny-turbosparse-mixtral")


def shape(model: Path) -> tuple[int, int, int]:
    """n_layer, n_ffn, n_ff."""
    return shape_of(read_header(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TSFFN_HOT", "1", "TSFFN_HOT: expected {n} numbers, one for each FFN, found 1"),
        ("TSFFN_HOT", ",".join("1" * 100), "TSFFN_HOT: expected {n} numbers, one for each FFN, found 100"),
        ("TSFFN_HOT", "1,-1", "TSFFN_HOT: number 2: expected 0 to {n_ff}, found '-1'"),
        ("TSFFN_HOT", "many", "TSFFN_HOT: number 1: expected 0 to {n_ff}, found 'many'"),
        ("TSFFN_HOT", "99999999999999999999", "TSFFN_HOT: number 1: expected 0 to {n_ff}"),
        ("TSFFN_HOT", "1;1", "TSFFN_HOT: number 1: expected 0 to {n_ff}, found '1;1'"),
        ("TSFFN_RESIDENCY", "lock,often", "TSFFN_RESIDENCY: expected prefault, lock or random, found 'often'"),
        ("TSFFN_SPARSITY", "some", "TSFFN_SPARSITY: expected 'predictor', 'exact', 'dense', 'topk:S' with S from 0 to"),
        ("TSFFN_MODEL", "/none.gguf", "/none.gguf"),
    ],
)
def test_wrong_values(name: str, variable: str, value: str, message: str) -> None:
    model = tiny.converted(name)
    n_layer, n_ffn, n_ff = shape(model)
    with pytest.raises(BackendError) as caught:
        check_devices("llama-server", environment(model) | {variable: value})
    assert message.format(n=n_layer * n_ffn, n_ff=n_ff) in str(caught.value)


def test_program_that_ends_before_its_log_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is found all the same."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho 'Available devices:'\necho '  (none)'\n")
    program.chmod(0o755)
    monkeypatch.setattr(programs, "program_path", lambda name: program)
    with pytest.raises(BackendError, match=r"found tsffn: TSFFN_RESIDENCY: expected .*, found 'often'; run make setup"):
        check_devices("llama-server", environment(tiny.converted()) | {"TSFFN_RESIDENCY": "often"})
    with pytest.raises(BackendError, match=r"found Available devices:; \(none\); run make setup"):
        check_devices("llama-server", environment(tiny.converted()))


@pytest.mark.parametrize("name", NAMES)
def test_hot_neurons_are_locked_and_all_is_counted(name: str, tmp_path: Path) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and limit < 4 << 20:
        pytest.skip(f"only {limit} bytes may be locked (ulimit -l)")
    model = tiny.converted(name)
    n_layer, n_ffn, n_ff = shape(model)
    locked = []
    for hot in (0, n_ff):
        counts = np.full((n_layer, n_ffn), hot, np.int32)
        stats = tmp_path / f"{hot}.json"
        variables = environment(model, hot=counts, lock=True, read_ahead=False) | {"TSFFN_STATS": str(stats)}
        locked.append(_served(model, variables))
        layers = json.loads(stats.read_text())["layers"]
        assert len(layers) == n_layer
        assert all(0 < layer["active"] < layer["neurons"] for layer in layers)
    assert 0 < locked[0] < locked[1]  # the predictors, and the neurons too


def _served(model: Path, variables: dict[str, str]) -> int:
    """Bytes that llama-server has locked when it answers."""
    port = check_address("127.0.0.1", 0)
    options = ["--host", "127.0.0.1", "--port", str(port), "-t", "1", "-c", "256", "--parallel", "1"]
    server = command("llama-server", [*model_arguments(model), *options], variables)
    process = subprocess.Popen(server.arguments, env=server.environment, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + tiny.TIMEOUT_S
        while not answers(f"http://127.0.0.1:{port}"):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        # It says that it is well before it minds signals, and computes only afterwards.
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none").completions.create(
            model="m", prompt="And", max_tokens=1
        )
        status = Path(f"/proc/{process.pid}/status").read_text()
    finally:
        process.terminate()
        process.wait(tiny.TIMEOUT_S)
    return 1024 * int(re.search(r"^VmLck:\s+(\d+) kB", status, re.M)[1])
