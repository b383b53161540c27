"""A small server that speaks the Hub's HTTP API for datasets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Dataset information, file tree, and byte ranges of files."""

    repos: dict[tuple[str, str], tuple[str, Path]]  # (repository, revision): commit, folder
    cards: dict[str, object]
    served: list[tuple[str, int]]  # (path, bytes) of the ranges that are sent in full, noted before the client has them
    fail: list[str]  # what becomes of the next ranges: "drop" half-way, "short" of bytes, "busy"
    down_after: int | None  # ranges until the server answers no more

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0]).lstrip("/")
        if api := re.fullmatch(r"api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo, what, rest = api[1], api[2] or "revision", api[3] or "main"
            if repo == "owner/gated":
                return self.refuse(403, "GatedRepo")
            if what == "revision":
                return self.revision(repo, rest)
            return self.tree(repo, *self.split(repo, rest))
        repo, rest = re.fullmatch(r"datasets/([^/]+/[^/]+)/resolve/(.+)", path).groups()
        revision, name = self.split(repo, rest)
        self.range(self.repos[repo, revision][1] / name)

    def split(self, repo: str, rest: str) -> tuple[str, str]:
        revision = next(r for known, r in self.repos if known == repo and (rest + "/").startswith(r + "/"))
        return revision, rest[len(revision) + 1 :]

    def revision(self, repo: str, revision: str) -> None:
        if not any(known == repo for known, _ in self.repos):
            return self.refuse(404, "RepoNotFound")
        if (repo, revision) not in self.repos:
            return self.refuse(404, "RevisionNotFound")
        info = {"id": repo, "sha": self.repos[repo, revision][0], "siblings": [], "cardData": self.cards.get(repo)}
        self.send(200, json.dumps(info).encode())

    def tree(self, repo: str, revision: str, inside: str) -> None:
        root = self.repos[repo, revision][1]
        if not (root / inside).is_dir():
            return self.refuse(404, "EntryNotFound")
        found = (root / inside).rglob("*") if "recursive=true" in self.path.lower() else (root / inside).iterdir()
        entries = [
            {"path": p.relative_to(root).as_posix(), "oid": hashlib.sha1(p.name.encode()).hexdigest()}
            | ({"type": "file", "size": p.stat().st_size} if p.is_file() else {"type": "directory", "size": 0})
            for p in found
        ]
        self.send(200, json.dumps(entries).encode())

    def range(self, file: Path) -> None:
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        data = file.read_bytes()[first : last + 1]
        kind = type(self)
        if kind.down_after is not None and len(self.served) >= kind.down_after:
            self.close_connection = True
            return self.connection.close()
        failure = self.fail.pop(0) if self.fail else None
        if failure == "busy":
            return self.refuse(503, "")
        sent = data[: len(data) // 2] if failure else data
        headers = {"Content-Range": f"bytes {first}-{last}/*"}
        if not failure:
            self.served.append((file.name, len(data)))
        self.send(206, sent, headers, len(data) if failure == "drop" else len(sent))

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A Hub without repositories, which this process and those that it starts take for the real one meanwhile."""
    fields = {"repos": {}, "cards": {}, "served": [], "fail": [], "down_after": None}
    handler = type("ThisHub", (Hub,), fields)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


def publish(hub: type[Hub], repo: str, folder: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    hub.repos[repo, revision] = hub.repos[repo, commit] = (commit, folder)
    return folder
