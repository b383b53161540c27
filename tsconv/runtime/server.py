"""llama-server, llama.cpp's OpenAI-compatible server, with a converted model: started, watched, stopped."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from types import FrameType

from tsconv.errors import BackendError, TsconvError
from tsconv.runtime.programs import Command

POLL_SECONDS = 0.05
# llama-server waits for streams until their next sign of life, and for other requests until they are given up.
GRACE_SECONDS = 3.0
ENDING = (signal.SIGINT, signal.SIGTERM)  # ask llama-server to end
FORWARDED = (*ENDING, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_prctl = ctypes.CDLL(None).prctl
EXIT_OF_SIGNAL = 128  # a shell's exit status of a process that signal n ended: 128 + n


def check_address(host: str, port: int) -> int:
    """The port that a server can listen on at `host`; a free one for port 0.

    Asked before a model is loaded, it tells early that a port is in use. The port is free again when this returns, so
    another program can still take it.

    Raises:
        TsconvError: the address is not one of this machine, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise TsconvError(f"cannot listen on {host}: {error.strerror}", fix="use another --host") from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError as error:
            raise TsconvError(
                f"cannot listen on {host} port {port}: {error.strerror}", fix="use another --port"
            ) from None
        return listener.getsockname()[1]


def serve(command: Command, url: str, ready: Callable[[], None]) -> int:
    """Runs llama-server until it ends.

    Signals that ask this process to end, or mean something to llama-server, go on to it. GRACE_SECONDS after it was
    asked to end, it is killed, and requests that are still computed are cut off. It is killed with this process too.

    Args:
        command: llama-server with all its options.
        url: where it answers, "http://host:port".
        ready: called once, when the model is loaded and the server answers.

    Returns:
        its exit status, 128 + n when signal n ended it; 0 when it was killed after it was asked to end.

    Raises:
        BackendError: it cannot be executed.
    """
    try:
        # In a process group of its own: Ctrl-C on a terminal reaches this process alone, which sends it on once.
        process = subprocess.Popen(
            command.arguments,
            env=command.environment,
            process_group=0,
            preexec_fn=functools.partial(_end_with, os.getpid()),  # noqa: PLW1509 - takes no lock of another thread
        )
    except OSError as error:
        raise BackendError("llama-server cannot be run", where=command.arguments[0], found=error.strerror) from None
    with _forwarding(process) as late:
        while process.poll() is None:
            if answers(url):
                ready()
                break
            time.sleep(POLL_SECONDS)
        status = process.wait()
    if late.is_set():
        return 0
    return EXIT_OF_SIGNAL - status if status < 0 else status


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """While this holds, the signals in FORWARDED go to `process` instead of ending this one.

    Yields:
        an event that is set when the process was killed because it did not end in GRACE_SECONDS.
    """
    late = threading.Event()

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)
        if number in ENDING:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def kill(number: int, frame: FrameType | None) -> None:
        late.set()
        process.kill()

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, kill)
    try:
        yield late
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(url: str) -> bool:
    """Whether the server is up with its model loaded. GET /health needs no key; it is 503 while the model loads."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def _end_with(parent: int) -> None:
    """In the child: it is killed when the process `parent`, which started it, ends, however that happens."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that was asked for
        os._exit(1)
