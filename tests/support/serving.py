"""`tsconv serve` as a process, on a loopback port that the system chooses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from support import ROOT, tiny

# llama-server takes defaults from these; what tsconv says on its command line counts.
HOSTILE_ENVIRONMENT = {"LLAMA_ARG_PORT": "1", "LLAMA_ARG_HOST": "192.0.2.1", "LLAMA_ARG_MODEL": "/nonexistent.gguf"}


class Server:
    """A server that answers.

    Attributes:
        url: where the OpenAI API is.
        log: lines on stderr until now.
    """

    def __init__(
        self,
        model: Path,
        *arguments: object,
        before: Sequence[str] = (),
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`before`: a program that starts the server, with its options; `env`: more variables."""
        self.process = subprocess.Popen(
            [*before, *tiny.TSCONV, "serve", "-m", str(model), "-t", "1", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=os.environ | HOSTILE_ENVIRONMENT | (env or {}),
            text=True,
        )
        self.log, match = [], None
        while match is None and (line := self.process.stderr.readline()):
            self.log.append(line)
            match = re.fullmatch(rf"serving .*{model.name} on (http://.+)/v1 \(Ctrl-C stops\)\n", line)
        if match is None:
            self.process.kill()
            raise AssertionError("".join(self.log))
        self.root = match[1]
        self.url = f"{self.root}/v1"
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=api_key, max_retries=0, timeout=tiny.TIMEOUT_S)

    def child(self) -> int:
        """The process id of llama-server."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Sends the signal, by default that of Ctrl-C; returns the exit status and everything on stderr."""
        self.process.send_signal(number)
        status = self.process.wait(tiny.TIMEOUT_S)
        self.reader.join(tiny.TIMEOUT_S)
        self.process.stderr.close()
        self.process.stdout.close()
        return status, "".join(self.log)


@contextmanager
def serving(*arguments: object, model: Path | None = None, **started: Any) -> Iterator[Server]:
    """A server of `model`, by default the tiny Mistral, that ends with the context; `started` as for Server."""
    server = Server(model or tiny.converted(), "--port", 0, *arguments, **started)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
