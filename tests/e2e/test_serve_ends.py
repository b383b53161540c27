"""How `tsconv serve` ends: signals, a killed parent, and what keeps it from starting."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import tiny
from support.serving import Server, serving
from tsconv.format.pair import sidecar_path

ENDS_SECONDS = 20


def alive(pid: int) -> bool:
    """Not a zombie either, which only waits for init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    limit = time.monotonic() + ENDS_SECONDS
    while alive(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_ends_both(number):
    with serving() as server:
        child = server.child()
        status, log = server.stop(number)
    assert status == 0
    assert not alive(child)
    assert log.count("\n") == 1, log


def start_long_stream(server: Server) -> Iterator[object]:
    """Of 3000 tokens, after the first; it lasts while the iterator is kept."""
    stream = iter(
        server.client().completions.create(
            model="any", prompt="And", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
    )
    next(stream)
    return stream


def test_signal_while_a_request_is_computed():
    """llama-server alone would wait for half a minute."""
    with serving("-c", 4096) as server:
        stream = start_long_stream(server)
        child, start = server.child(), time.monotonic()
        status, log = server.stop()
    assert status == 0
    assert time.monotonic() - start < ENDS_SECONDS
    assert not alive(child)
    assert log.count("\n") == 1, log
    del stream


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_killed_tsconv_takes_llama_server_along(busy):
    with serving("-c", 4096) as server:
        child = server.child()
        stream = start_long_stream(server) if busy else None
        server.process.kill()
        assert ends(child)
    del stream


def test_killed_llama_server_ends_tsconv():
    with serving() as server:
        os.kill(server.child(), signal.SIGKILL)
        assert server.process.wait(ENDS_SECONDS) == 128 + signal.SIGKILL


def serve(*arguments: object, model: Path | None = None, env: dict[str, str] | None = None):
    return tiny.run("serve", "-m", model or tiny.converted(), "-t", 1, "--port", 0, *arguments, env=env)


@pytest.mark.parametrize("kept", [0, 100, 5_000, 2_000_000])
def test_model_cut_short(tmp_path, kept):
    model = Path(shutil.copy(tiny.converted(), tmp_path))
    shutil.copy(sidecar_path(tiny.converted()), tmp_path)
    os.truncate(model, kept)
    line = tiny.error_line(serve(model=model))
    assert line.startswith("error: ") and "\n" not in line
    assert str(model) in line


def test_unknown_option_of_llama_server():
    result = serve("--", "--no-such-option")
    assert result.returncode == 1
    assert result.stderr.decode() == "error: invalid argument: --no-such-option\n"


def test_backend_that_does_not_load(tmp_path):
    wrong = tmp_path / "libggml-tsffn.so"
    wrong.write_bytes(b"\x7fELF and nothing more")
    line = tiny.error_line(serve(env={"TSCONV_BACKEND": str(wrong)}))
    assert line.startswith("error: ") and "\n" not in line
    assert "libggml-tsffn.so" in line


def test_lora_that_is_missing(tmp_path):
    line = tiny.error_line(serve("--lora", tmp_path / "none.gguf"))
    assert line.startswith("error: ") and "none.gguf" in line


def test_first_process_of_a_container():
    """There the parent of llama-server is process 1, as if it had ended and left llama-server to init."""
    new_namespace = ["unshare", "--pid", "--fork", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*new_namespace, "true"], check=False).returncode != 0:
        pytest.skip("this user may not make namespaces of process ids")
    with serving(before=new_namespace) as server:
        assert server.client().models.list().data
