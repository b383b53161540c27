"""`tsconv run OWNER/NAME`: from a repository on a small Hub to text, and from what is kept without any request."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from support import CHECKPOINTS, ROOT, tiny
from support.hub import Hub, endpoint, environment, serve

CHECKPOINT = "tiny-turbosparse-mistral"
REPO = f"owner/{CHECKPOINT}"
SHARD = "model-00002-of-00002.safetensors"
TEXT = ("-p", "In the beginning", "-n", "4", "--temp", "0", "-t", "1", "-c", "256")

# Ends at its n-th renaming of a finished file: the sidecar is renamed first, then the model.
KILLED = """
import os, signal, sys
from tsconv import cli
from tsconv.write import writer
left, rename = int(sys.argv.pop(1)), writer._rename
def counted(*files):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*files)
writer._rename = counted
cli.main()
"""


# Believes that every disk has room.
ROOMY = """
import shutil
from collections import namedtuple
from tsconv.cli import main
shutil.disk_usage = lambda path: namedtuple("Usage", "total used free")(1 << 50, 0, 1 << 50)
main()
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    pair = tmp_path / "pair"
    pair.mkdir()
    model = tiny.converted(outtype="q8_0")
    shutil.copy(model, pair / "tiny-q8_0.gguf")
    shutil.copy(model.with_suffix(".predictor.gguf"), pair / "tiny-q8_0.predictor.gguf")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (other / "model.safetensors").write_bytes(b"never asked for")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("nothing")
    repos = {REPO: CHECKPOINTS / CHECKPOINT, "owner/pair": pair, "owner/other": other, "owner/empty": empty}
    with serve(repos) as server:
        yield server


def surroundings(tmp_path: Path, where: str) -> dict[str, str]:
    return environment(tmp_path / "hf", where) | {"XDG_CACHE_HOME": str(tmp_path / "cache")}


class Machine:
    """A user's caches and the Hub that is reached from there."""

    def __init__(self, tmp_path: Path, server: ThreadingHTTPServer) -> None:
        self.handler: type[Hub] = server.RequestHandlerClass  # type: ignore[assignment]
        self.environment = surroundings(tmp_path, endpoint(server))
        self.models = tmp_path / "cache/tsconv/models"

    def call(self, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*tiny.TSCONV, *map(str, arguments)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=self.environment | more,
            timeout=tiny.TIMEOUT_S,
            check=False,
        )

    def run(self, *arguments: object, **more: str) -> str:
        """What a run that succeeds says on stderr, without the line of measurements."""
        done = self.call("run", *arguments, *TEXT, **more)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        *said, measured = done.stderr.splitlines()
        assert measured.startswith("prefill ")
        return "\n".join(said)

    def refused(self, *arguments: object, code: int = 7, **more: str) -> str:
        """The last line of one that does not; nothing is kept."""
        done = self.call("run", *arguments, *TEXT, **more)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert "Traceback" not in done.stderr
        line = done.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert self.listed() == []
        return line

    def listed(self) -> list[dict[str, object]]:
        return json.loads(self.call("list", "--json").stdout)

    def requests(self) -> list[str]:
        found = list(self.handler.requested)
        self.handler.requested.clear()
        return found

    def shards(self) -> list[str]:
        """The files with weights that were downloaded since then."""
        found = [name for name in self.handler.downloaded if name.endswith(".safetensors")]
        self.handler.downloaded.clear()
        return found


@pytest.fixture
def machine(tmp_path: Path, hub: ThreadingHTTPServer) -> Machine:
    return Machine(tmp_path, hub)


def test_a_checkpoint_is_converted_once(machine: Machine) -> None:
    said = machine.run(REPO)
    plan, kept = said.splitlines()
    assert re.match(
        rf"{REPO}: [\d.]+ MB to download to .+/hf/hub, then to be converted to q4_0, about [\d.]+ MB in ", plan
    )
    assert f"kept as {REPO}:q4_0" in kept and "hf cache rm" in kept
    assert machine.requests()
    (listed,) = machine.listed()
    path = machine.models / f"{REPO}-q4_0.gguf"
    assert (listed["name"], listed["type"], listed["path"]) == (f"{REPO}:q4_0", "q4_0", str(path))
    assert listed["bytes"] == path.stat().st_size + path.with_suffix(".predictor.gguf").stat().st_size
    assert not listed["downloaded"]

    for names in ([REPO], ["-hf", REPO], ["-m", f"{REPO}:q4_0"], [CHECKPOINT], [f"{CHECKPOINT}:Q4_0"], [path]):
        assert machine.run(*names) == ""
    assert machine.run(TSCONV_MODEL=REPO) == ""
    assert machine.run(REPO, HF_HUB_OFFLINE="1", TSCONV_MODEL="/nonexistent.gguf") == ""
    assert machine.requests() == []


def test_another_type(machine: Machine) -> None:
    assert "converted to q8_0" in machine.run("-hf", f"{REPO}:Q8_0")
    assert [kept["name"] for kept in machine.listed()] == [f"{REPO}:q8_0"]
    assert SHARD in machine.shards()
    assert f"{REPO}: 0 B to download" in machine.run(f"{REPO}:f16")
    assert machine.shards() == []


def test_several_types_and_no_default(machine: Machine) -> None:
    for kind in ("q8_0", "f16"):
        machine.run(f"{REPO}:{kind}")
    done = machine.call("run", CHECKPOINT, *TEXT)
    assert done.returncode == 4
    assert done.stderr == (
        f"error: {CHECKPOINT}: several kept models have this name; name one of {REPO}:f16, {REPO}:q8_0\n"
    )
    assert machine.call("rm", REPO).returncode == 4
    assert len(machine.listed()) == 2
    assert machine.call("rm", f"{REPO}:f16").returncode == 0
    assert machine.run(CHECKPOINT) == ""


def test_a_converted_model_is_downloaded(machine: Machine) -> None:
    said = machine.run("owner/pair")
    assert re.match(r"owner/pair: tiny-q8_0.gguf and its predictors, [\d.]+ MB to download", said)
    (listed,) = machine.listed()
    assert (listed["name"], listed["downloaded"]) == ("owner/pair:q8_0", True)
    machine.requests()
    assert machine.run("owner/pair") == ""
    assert machine.run("owner/pair:q8_0") == ""
    assert machine.requests() == []

    snapshot = Path(os.readlink(str(listed["path"])))
    blob = snapshot.resolve()
    removed = machine.call("rm", "pair")
    assert (removed.returncode, removed.stdout) == (0, "")
    assert removed.stderr.startswith("removed owner/pair:q8_0, ")
    assert machine.listed() == []
    assert not blob.exists() and not snapshot.exists()
    machine.run("owner/pair")
    assert len(machine.listed()) == 1


def test_list_for_people(machine: Machine) -> None:
    empty = machine.call("list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert empty.stderr.startswith("no models in ")
    machine.run("owner/pair")
    head, row = machine.call("list").stdout.splitlines()
    assert head.split() == ["name", "type", "size", "date"]
    assert re.fullmatch(r"owner/pair:q8_0 +q8_0 +[\d.]+ MB +\d{4}-\d\d-\d\d \d\d:\d\d", row)


@pytest.mark.parametrize(
    ("name", "code", "parts"),
    [
        ("owner/nothing", 7, ["owner/nothing: no such repository on the Hub"]),
        ("owner/private", 7, ["owner/private: the Hub does not let you have this repository", "HF_TOKEN"]),
        ("owner/gated", 7, ["owner/gated: repository is gated", "HF_TOKEN"]),
        ("owner/other", 3, ["LlamaForCausalLM"]),
        ("owner/empty", 3, ["owner/empty:q4_0: the repository has neither"]),
        ("owner/pair:q4_0", 3, ["owner/pair:q4_0: the repository has neither a converted model of this type nor"]),
        (f"{REPO}:q9", 1, ["unknown type 'q9'"]),
        ("nothing", 4, ["nothing: no such file, and no kept model of this name", "tsconv list"]),
        ("nothing.gguf", 4, ["nothing.gguf: "]),
        ("checkpoints/tiny-turbosparse-mistral", 4, ["is a folder", "tsconv convert checkpoints/"]),
    ],
)
def test_refused(machine: Machine, name: str, code: int, parts: list[str]) -> None:
    line = machine.refused(name, code=code)
    for part in parts:
        assert part in line
    assert machine.shards() == []


def test_a_file_is_not_a_repository(machine: Machine) -> None:
    assert "not a repository on the Hub" in machine.refused("-hf", "model.gguf")


def test_downloads_resume(machine: Machine) -> None:
    machine.handler.broken.add(SHARD)
    assert "download failed" in machine.refused(REPO)
    machine.handler.broken.clear()
    machine.shards()
    machine.run(REPO)
    fetched = machine.shards()
    assert SHARD in fetched
    assert "model-00001-of-00002.safetensors" not in fetched


def test_a_cut_download_resumes(machine: Machine) -> None:
    machine.handler.cut.add(SHARD)
    line = machine.refused(REPO)
    assert "download failed" in line and "it resumes" in line
    machine.handler.cut.clear()
    machine.run(REPO)


def test_too_little_room(machine: Machine) -> None:
    machine.handler.claimed[SHARD] = 10**15
    line = machine.refused(REPO, code=6)
    needed = re.search(
        rf"not enough room for {REPO}:q4_0: expected about ([\d,]+) bytes free, found [\d,]+; free some", line
    )
    assert needed and int(needed[1].replace(",", "")) > 10**15  # the download and what is made of it
    assert "XDG_CACHE_HOME" in line
    assert machine.shards() == []


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system with 1 MB."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_nearly_full(machine: Machine, full: Path) -> None:
    for variable, room in (("HF_HOME", "hub"), ("XDG_CACHE_HOME", "tsconv/models/owner")):
        line = machine.refused(REPO, code=6, **{variable: str(full)})
        assert f"{full}/{room}: not enough room for {REPO}:q4_0" in line
    assert machine.shards() == []


@pytest.mark.parametrize(
    ("variable", "code", "message"),
    [("HF_HOME", 7, "no room in the Hub's cache"), ("XDG_CACHE_HOME", 6, "cannot be written: No space left on device")],
)
def test_a_disk_that_fills_up_meanwhile(machine: Machine, full: Path, variable: str, code: int, message: str) -> None:
    """After the check, which therefore does not see it."""
    command = [sys.executable, "-c", ROOMY, "run", REPO, *TEXT]
    env = machine.environment | {variable: str(full)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert [path for path in full.rglob("*.gguf*") if path.suffix != ".lock"] == []


def test_without_the_hub(machine: Machine) -> None:
    with socket.socket() as taken:  # nobody listens
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert "the Hub cannot be reached" in machine.refused(REPO, HF_ENDPOINT=nowhere)
    assert "offline" in machine.refused(REPO, HF_HUB_OFFLINE="1")


def test_offline_with_the_checkpoint_in_the_cache(machine: Machine) -> None:
    machine.run(REPO)
    assert machine.call("rm", REPO).returncode == 0
    machine.requests()
    assert "converting it to q4_0" in machine.run(REPO, HF_HUB_OFFLINE="1")
    assert machine.requests() == []


@pytest.mark.parametrize("n", [1, 2])
def test_a_killed_conversion_counts_for_nothing(machine: Machine, n: int) -> None:
    command = [sys.executable, "-c", KILLED, str(n), "run", REPO, *TEXT]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=machine.environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(machine.models.rglob("*.part"))) == 3 - n
    assert machine.listed() == []
    assert f"kept as {REPO}:q4_0" in machine.run(REPO)
    assert len(machine.listed()) == 1
    assert not list(machine.models.rglob("*.part"))


def test_two_at_once(machine: Machine) -> None:
    command = [*tiny.TSCONV, "run", REPO, *TEXT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    both = [subprocess.Popen(command, cwd=ROOT, env=machine.environment, text=True, **pipes) for _ in range(2)]
    ended = [process.communicate(timeout=tiny.TIMEOUT_S) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0] != ""
    assert sum("kept as" in stderr for _, stderr in ended) == 1
    assert len(machine.listed()) == 1


def test_serve_finds_it_too(machine: Machine) -> None:
    machine.run("owner/pair")
    machine.requests()
    process = subprocess.Popen(
        [*tiny.TSCONV, "serve", "pair", "-t", "1", "-c", "256", "--port", "0", "--", "--no-webui"],
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=machine.environment,
        text=True,
    )
    assert re.fullmatch(r"serving .+/owner/pair-q8_0.gguf on http://.+\n", process.stderr.readline())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=tiny.TIMEOUT_S)
    assert machine.requests() == []


@pytest.mark.parametrize("names", [[], ["a.gguf", "-m", "b.gguf"], ["-m", "b.gguf", "-hf", REPO]])
def test_one_model_is_named(machine: Machine, names: list[str]) -> None:
    done = machine.call("run", *names, *TEXT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "One model is needed" in done.stderr
