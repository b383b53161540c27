"""`tsconv run` as a user on a terminal sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import termios
import time

from support import ROOT, tiny


class Terminal:
    """`tsconv run` with a pseudo-terminal as its stdin and stdout; stderr is a pipe."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*tiny.TSCONV, "run", "-t", "1", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - no other threads here
        )
        os.close(slave)
        self.seen = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def comes(self, pattern: bytes, seconds: float) -> bytes | None:
        """Reads until `pattern` comes; returns everything up to its end and forgets it. None if it does not come."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            if not select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]:
                return None
            self.seen += os.read(self.master, 4096)
        head, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return head

    def wait_for(self, pattern: bytes) -> bytes:
        head = self.comes(pattern, tiny.TIMEOUT_S)
        assert head is not None, self.seen
        return head

    def end(self) -> tuple[int, str]:
        """Exit status and stderr."""
        stderr = self.process.communicate(timeout=tiny.TIMEOUT_S)[1].decode()
        os.close(self.master)
        return self.process.returncode, stderr
