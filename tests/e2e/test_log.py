"""llama.cpp's log: who gets which lines."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import llama_cpp

import tsconv
from support import tiny
from tsconv.native.log import quiet_unless

ERROR = 4  # enum ggml_log_level (ggml.h)


def say(text: str) -> None:
    """An error line of llama.cpp, as it writes one: to whatever callback is set."""
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    callback(ERROR, text.encode(), data)


def fail_to_load(path: Path) -> None:
    """llama.cpp says the path, and that it is no model."""
    params = llama_cpp.llama_model_default_params()
    assert llama_cpp.llama_model_load_from_file(str(path).encode(), params) is None


def test_two_threads(tmp_path):
    """Each gets its own lines, also after the other one has ended."""
    names = [f"file-{i}.gguf" for i in range(2)]
    for name in names:
        (tmp_path / name).write_bytes(b"no model")
    inside, found = threading.Barrier(2), {}

    def load(i: int) -> None:
        with quiet_unless(False) as lines:
            inside.wait(tiny.TIMEOUT_S)
            for _ in range(50):
                fail_to_load(tmp_path / names[i])
            found[i] = list(lines)
            inside.wait(tiny.TIMEOUT_S)
            if i == 1:  # the other one has left, or is leaving
                threads[0].join(tiny.TIMEOUT_S)
                del lines[:]
                fail_to_load(tmp_path / names[1])
                found["later"] = list(lines)

    threads = [threading.Thread(target=load, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(tiny.TIMEOUT_S)
    for i in range(2):
        assert sum(names[i] in line for line in found[i]) == 50
        assert not any(names[1 - i] in line for line in found[i])
    assert sum(names[1] in line for line in found["later"]) == 1


def test_within_one_another():
    with quiet_unless(False) as outer:
        say("one")
        with quiet_unless(False) as inner:
            say("two\n")
        with quiet_unless(True) as shown:
            say("three")
        say("four")
    assert (outer, inner, shown) == (["one", "three", "four"], ["two"], [])


def test_lines_of_a_thread_that_python_did_not_start():
    """They belong to the model that is being loaded."""
    libc = ctypes.CDLL(None)
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    with quiet_unless(False) as lines:
        llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: callback(ERROR, b"from elsewhere", data))
        thread = ctypes.c_ulong()
        assert libc.pthread_create(ctypes.byref(thread), None, body, None) == 0
        libc.pthread_join(thread, None)
    assert lines == ["from elsewhere"]


def test_a_callback_of_the_user():
    """It gets what nobody collects, before and after a model is loaded."""
    script = """
import ctypes, sys
import llama_cpp, tsconv
from tsconv.native.log import quiet_unless
seen = []
@llama_cpp.llama_log_callback
def mine(level, text, data):
    seen.append((text, data))
llama_cpp.llama_log_set(mine, ctypes.c_void_p(7))
params = llama_cpp.llama_model_default_params()
def fail():
    del seen[:]
    llama_cpp.llama_model_load_from_file(b"/nonexistent", params)
    return any(b"/nonexistent" in text and data == 7 for text, data in seen)
answers = [fail()]
with quiet_unless(False) as lines:
    answers += [fail(), any("/nonexistent" in line for line in lines)]
answers += [fail()]
tsconv.load(sys.argv[1], n_threads=1).close()
print(answers + [fail()])"""
    command = [sys.executable, "-c", script, str(tiny.converted())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[True, False, True, True, True]\n"


def test_silence(capfd):
    tsconv.load(tiny.converted(), n_threads=1).close()
    assert capfd.readouterr() == ("", "")
