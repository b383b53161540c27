"""A small server that speaks the Hub's HTTP API, with folders as repositories, and the environment to use it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The three requests that a snapshot download makes: revision, file tree, files.

    Attributes:
        repos: OWNER/NAME -> folder. owner/gated and owner/private exist too, and are not for everybody.
        requested: the paths of all requests.
        downloaded: names of the files that were asked for, not only their sizes.
        broken: names of files that cannot be had.
        cut: names of files whose connection ends after half of what is left.
        claimed: sizes that are said of files, in bytes, instead of their own.
    """

    repos: dict[str, Path]
    requested: list[str]
    downloaded: list[str]
    broken: set[str]
    cut: set[str]
    claimed: dict[str, int]

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
        if repo == "owner/private":
            return self.send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        if repo not in self.repos:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        folder = self.repos[repo]
        if match := re.fullmatch(rf"api/models/{repo}/revision/(.+)", path):
            if match[1] not in ("main", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return self.send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode(), {}, with_body)
        if path == f"api/models/{repo}/tree/{COMMIT}":
            files = [
                {"type": "file", "path": f.name, "size": self.size(f), "oid": self.etag(f)} for f in folder.iterdir()
            ]
            return self.send(200, json.dumps(files).encode(), {}, with_body)
        file = folder / path.rsplit("/", 1)[1]
        if with_body:
            self.downloaded.append(file.name)
        if file.name in self.broken and with_body:
            return self.send(418, b"", {})  # a status that the client does not try again
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.etag(file)}"', "Accept-Ranges": "bytes"}
        if file.name in self.claimed:
            headers["Content-Length"] = str(self.size(file))
        body, status = file.read_bytes(), 200
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        return self.send(status, body, headers, with_body, cut=file.name in self.cut)

    def size(self, file: Path) -> int:
        return self.claimed.get(file.name, file.stat().st_size)

    @staticmethod
    def etag(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def send(
        self, status: int, body: bytes, headers: dict[str, str], with_body: bool = True, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serve(repos: dict[str, Path]) -> Iterator[ThreadingHTTPServer]:
    """The Hub with these repositories; its `RequestHandlerClass` is a Hub of its own."""
    own = {"repos": repos, "requested": [], "downloaded": [], "broken": set(), "cut": set(), "claimed": {}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), own))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def endpoint(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def environment(cache: Path, endpoint: str) -> dict[str, str]:
    """This process's environment, with the Hub at `endpoint`, its cache in a folder, and no other settings for it."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return keep | {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
