"""Checkpoints from the Hub: huggingface_hub against a small server that speaks the Hub's HTTP API, and without any."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest

from support import ROOT
from support.synthetic import SHAPES, random_tensors, save, write_predictors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = 7


class Hub(BaseHTTPRequestHandler):
    """The three requests that a snapshot download makes: revision, file tree, files."""

    repos: dict[str, Path]
    requested: list[str]
    broken: set[str]

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0].lstrip("/")
        self.requested.append(path)
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo == "owner/gated":
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if repo not in self.repos:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        folder = self.repos[repo]
        if match := re.fullmatch(rf"api/models/{repo}/revision/(.+)", path):
            if match[1] not in ("main", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), {}, with_body)
        if path == f"api/models/{repo}/tree/{COMMIT}":
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": self.etag(f)}
                for f in folder.iterdir()
            ]
            return self.send(200, json.dumps(files).encode(), {}, with_body)
        file = folder / path.rsplit("/", 1)[1]
        if file.name in self.broken and with_body:
            return self.send(418, b"", {})  # a status that the client does not try again
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(file)}"', "Accept-Ranges": "bytes"}
        return self.send(200, file.read_bytes(), headers, with_body)

    @staticmethod
    def etag(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body)), "Content-Type": "application/json"}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    shape = SHAPES["bamboo"]
    directory = save(tmp_path / "remote", shape, random_tensors(shape))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (directory / "pytorch_model.bin").write_bytes(b"not wanted")
    write_predictors(tmp_path / "remote-predictors", shape, [32, 64])
    handler = type("ThisHub", (Hub,), {"repos": {}, "requested": [], "broken": set()})
    handler.repos = {"owner/Bamboo-Tiny": directory, "owner/predictors": tmp_path / "remote-predictors"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def convert(tmp_path: Path, endpoint: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    hf = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "tsconv", "convert", *arguments]
    outfile = ["--outfile", str(tmp_path / "m.gguf")]
    return subprocess.run(
        [*command, *outfile], capture_output=True, text=True, cwd=ROOT, check=False, env=keep | hf | environment
    )


def endpoint(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_download_then_offline(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    arguments = ("owner/Bamboo-Tiny", "--predictor", "owner/predictors")
    done = convert(tmp_path, endpoint(hub), *arguments)
    assert done.returncode == 0, done.stderr
    model = keys(tmp_path / "m.gguf")
    assert model["general.name"] == "Bamboo-Tiny"
    assert model["general.license"] == "apache-2.0"
    assert model["general.source.url"] == "https://huggingface.co/owner/Bamboo-Tiny"
    assert (model["turbosparse.source.repo"], model["turbosparse.source.revision"]) == ("owner/Bamboo-Tiny", COMMIT)
    assert model["turbosparse.predictor.kind"] == "external"
    assert not any("pytorch_model.bin" in path for path in hub.RequestHandlerClass.requested)

    hub.RequestHandlerClass.requested.clear()
    again = convert(tmp_path, endpoint(hub), *arguments, "--force", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert keys(tmp_path / "m.gguf")["turbosparse.source.revision"] == COMMIT
    assert hub.RequestHandlerClass.requested == []


@pytest.mark.parametrize(
    ("repo", "options", "parts"),
    [
        ("owner/nothing", (), ["owner/nothing", "no such repository"]),
        ("owner/gated", (), ["owner/gated", "gated", "HF_TOKEN"]),
        ("owner/Bamboo-Tiny", ("--revision", "v9"), ["owner/Bamboo-Tiny@v9", "no such revision"]),
    ],
)
def test_refused_by_the_hub(
    repo: str, options: tuple[str, ...], parts: list[str], hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    check_refused(convert(tmp_path, endpoint(hub), repo, *options), tmp_path, parts)


def test_interrupted_download_is_finished_by_the_next_run(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    handler, shard = hub.RequestHandlerClass, "model-00002-of-00002.safetensors"
    handler.broken.add(shard)
    done = convert(tmp_path, endpoint(hub), "owner/Bamboo-Tiny")
    check_refused(done, tmp_path, ["owner/Bamboo-Tiny", "download failed", "418", "run it again"])
    handler.broken.clear()
    handler.requested.clear()
    again = convert(tmp_path, endpoint(hub), "owner/Bamboo-Tiny")
    assert again.returncode == 0, again.stderr
    fetched = {path.rsplit("/", 1)[1] for path in handler.requested if "/resolve/" in path}
    assert shard in fetched
    assert "model-00001-of-00002.safetensors" not in fetched


def test_offline_without_a_cached_copy(tmp_path: Path, silent: str) -> None:
    done = convert(tmp_path, silent, "owner/Bamboo-Tiny", HF_HUB_OFFLINE="1")
    check_refused(done, tmp_path, ["owner/Bamboo-Tiny", "offline"])


def test_hub_cannot_be_reached(tmp_path: Path, silent: str) -> None:
    done = convert(tmp_path, silent, "owner/Bamboo-Tiny")
    check_refused(done, tmp_path, ["owner/Bamboo-Tiny", "cannot be reached"])


def check_refused(done: subprocess.CompletedProcess[str], tmp_path: Path, parts: list[str]) -> None:
    assert (done.returncode, done.stdout) == (HUB, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not list(tmp_path.glob("m.gguf*"))
