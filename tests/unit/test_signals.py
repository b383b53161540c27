"""Signals that come while the main thread holds a lock that the threads of a pool wait for, or while C calls back."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.synthetic import SHAPES, random_tensors, save
from tsconv.signals import calling_c

TIMEOUT_S = 60  # some seconds beside other programs; what hangs hangs for ever

# `tsconv ARGUMENTS`. A signal comes when the main thread has taken the lock in question for the n-th time and is still
# within Condition.__enter__, where no `with` would release it again. Other threads want that lock only afterwards.
PROGRAM = """
import signal, sys, threading
from concurrent.futures import Future, ThreadPoolExecutor
from tsconv.cli import main
from tsconv.machine import disk, measure

place, number, left = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
came = threading.Event()

class Lock:
    def __init__(self, lock):
        self.lock = lock

    def __enter__(self):
        global left
        if threading.current_thread() is not threading.main_thread():
            came.wait()
            return self.lock.__enter__()
        self.lock.acquire()
        if left:
            left -= 1
            if not left:
                came.set()
                signal.raise_signal(number)
        return True

    def __exit__(self, *error):
        return self.lock.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.lock, name)

def with_lock(kind, attribute):
    original = kind.__init__
    def made(self, *arguments, **options):
        original(self, *arguments, **options)
        setattr(self, attribute, threading.Condition(Lock(threading.RLock())))
    kind.__init__ = made

with_lock(*{"pool": (threading.Semaphore, "_cond"), "future": (Future, "_condition")}[place])

# Of measuring a machine only the disk's random reads are of interest here.
measure.measure_cores = lambda backend: (2, [])
measure.measure_memory = lambda backend, cores: (2e9, 1e9, [])
measure.busy_share = lambda: 0.0
disk.FILE_BYTES, disk.RANDOM_SECONDS, disk.IN_MEMORY, disk._drop_cache = 16 << 20, 0.2, (), lambda fd: True

main()
"""

# The pool asks its semaphore for an idle thread at each submit; at the second one a thread is there already.
PLACES = {"pool": 2, "future": 1}


def interrupted(place: str, number: int, *arguments: object, cache: Path) -> tuple[int, str, str]:
    command = [sys.executable, "-c", PROGRAM, place, str(int(number)), str(PLACES[place]), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env={"XDG_CACHE_HOME": str(cache)},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "\ninterrupted\n"), (signal.SIGTERM, 143, "")]
)
@pytest.mark.parametrize("place", PLACES)
def test_conversion_ends(place: str, number: int, code: int, said: str, tmp_path: Path, out: Path) -> None:
    checkpoint = save(tmp_path / "c", SHAPES["mistral"], random_tensors(SHAPES["mistral"]))
    done = interrupted(place, number, "convert", checkpoint, "--outfile", out, cache=tmp_path)
    assert done == (code, "", said)


@pytest.mark.parametrize("place", PLACES)
def test_measuring_the_disk_ends(place: str, out: Path) -> None:
    cache = out.parent.parent / "cache"
    code, stdout, stderr = interrupted(
        place, signal.SIGINT, "profile", "--machine", out.with_name("m.toml"), cache=cache
    )
    assert (code, stdout) == (130, "")
    assert stderr.endswith("\ninterrupted\n") and "disk: " in stderr and "GPU" not in stderr
    assert list((cache / "tsconv").iterdir()) == []


def test_ctrl_c_in_a_callback_is_not_lost() -> None:
    """C sorts, and Python compares: what is raised in there would be told to nobody."""
    begun, came, seen = threading.Event(), threading.Event(), 0

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)
        came.set()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
    def compare(a, b) -> int:
        nonlocal seen
        seen += 1
        begun.set()
        came.wait()
        return a[0] - b[0]

    thread = threading.Thread(target=interrupt)
    thread.start()
    numbers = (ctypes.c_int * 100)(*range(100, 0, -1))
    with pytest.raises(KeyboardInterrupt), calling_c():
        ctypes.CDLL(None).qsort(numbers, 100, ctypes.sizeof(ctypes.c_int), compare)
    thread.join()
    assert list(numbers) == list(range(1, 101)) and seen > 100


def test_signals_without_a_handler_do_not_wait() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with calling_c():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
