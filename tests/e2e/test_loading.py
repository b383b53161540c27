"""`tsconv.load`: what it does with a chat template that is none, with too little memory, and with wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tsconv
from support import CHECKPOINTS, tiny
from support.edited import edited
from support.refused import refusal, sidecar_of
from tsconv.errors import BackendError, ModelFileError, TsconvError
from tsconv.runtime.load_error import load_error
from tsconv.runtime.offload import Offload

MESSAGES = [{"role": "user", "content": "Hello."}]
TEMPLATE_KEY = "tokenizer.chat_template"


# ---- chat templates


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model whose chat template does not parse."""
    source, target = tiny.converted(), tmp_path_factory.mktemp("broken") / "m.gguf"
    edited(source, target, keys={TEMPLATE_KEY: "{% for m in messages %}{{ m['content']"})
    sidecar_of(target).symlink_to(sidecar_of(source))
    return target


def test_a_broken_template_leaves_completion(broken):
    llama, whole = (tsconv.load(path, n_threads=1) for path in (broken, tiny.converted()))
    answers = [model.create_completion("In the", max_tokens=8, temperature=0)["choices"] for model in (llama, whole)]
    assert answers[0] == answers[1]
    assert llama.metadata[TEMPLATE_KEY].startswith("{% for m")
    for request in ({}, {"stream": True}):
        with pytest.raises(ModelFileError, match=f"{broken}: the chat template cannot be used: found ") as caught:
            llama.create_chat_completion(MESSAGES, **request)
    assert "\n" not in str(caught.value)
    llama.chat_format = "chatml"
    assert llama.create_chat_completion(MESSAGES, max_tokens=1)["choices"]
    llama.close()
    whole.close()


def test_a_broken_template_and_another_format(broken):
    llama = tsconv.load(broken, n_threads=1, chat_format="chatml")
    assert llama.create_chat_completion(MESSAGES, max_tokens=1)["choices"]
    llama.close()


def test_a_broken_template_on_the_command_line(broken):
    result = tiny.run("run", "-m", broken, "-p", "In the", "-n", 2, "-t", 1)
    assert result.returncode == 0, result.stderr
    line = tiny.error_line(tiny.run("run", "-m", broken, "-p", "In the", "-n", 2, "-t", 1, "--chat"))
    assert line.startswith(f"error: {broken}: the chat template cannot be used: found ")
    assert "\n" not in line


def test_a_broken_template_beside_a_good_one(tmp_path):
    source, target = tiny.converted(), tmp_path / "m.gguf"
    edited(source, target, keys={f"{TEMPLATE_KEY}.tool_use": "{% if"})
    llama = tsconv.load(target, n_threads=1, sparsity="exact")
    assert llama.create_chat_completion(MESSAGES, max_tokens=1)["choices"]
    llama.close()


# ---- memory

LIMITED = """
import resource, sys, tsconv
from tsconv.errors import TsconvError
from tsconv.native.library import load_backend
load_backend()
pages = int(open("/proc/self/statm").read().split()[0])
size = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    tsconv.load(sys.argv[1], n_threads=1, n_ctx=int(sys.argv[3]), use_mmap=sys.argv[4] == "mmap")
except TsconvError as error:
    print(type(error).__name__, error)
"""


def limited(n_bytes: int, n_ctx: int, mode: str) -> str:
    command = [sys.executable, "-c", LIMITED, *map(str, (tiny.converted(), n_bytes, n_ctx, mode))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_context_that_does_not_fit():
    line = limited(1 << 30, 1 << 20, "mmap")
    assert line.startswith(
        f"BackendError {tiny.converted()}: llama.cpp cannot make a context of 1048576 tokens: found "
    )
    assert "lower it with -c (n_ctx)" in line
    assert "convert" not in line


def test_what_llama_cpp_says_without_memory():
    """Not that the file is to blame."""
    says = ["llama_model_load: error loading model: unable to allocate TSFFN buffer"]
    error = load_error(ValueError("Failed to load model from file: m.gguf"), says, Path("m.gguf"), 256, Offload(0, 7))
    assert isinstance(error, BackendError)
    assert str(error).startswith(f"m.gguf: no memory for the model: found {says[0]}; close other programs")
    says = ["llama_model_load: error loading model: missing tensor 'output_norm.weight'"]
    error = load_error(ValueError("Failed to load model from file: m.gguf"), says, Path("m.gguf"), 256, Offload(0, 7))
    assert str(error).startswith("m.gguf: llama.cpp cannot load the model: found ")
    assert "convert again" in str(error)


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ctx": -1}, "context: expected 0 to 16777216 tokens, found -1"),
        ({"n_ctx": 2**32 + 256}, "context: expected 0 to 16777216 tokens, found 4294967552"),
        ({"n_threads": 0}, "threads: expected 1 to 512, found 0"),
        ({"n_threads": -1}, "threads: expected 1 to 512, found -1"),
        ({"n_threads_batch": 513}, "threads: expected 1 to 512, found 513"),
        ({"sparsity": "none"}, "sparsity: expected 'predictor', 'exact', 'dense', 'topk:S' with S from 0 to below 1"),
        ({"kv_overrides": {"x": "y" * 200}}, "Value for x is too long"),
        ({"kv_overrides": {"x": None}}, "Unknown value type for x"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(TsconvError, match=message) as caught:
        tsconv.load(tiny.converted(), **arguments)
    assert "convert" not in str(caught.value)


# ---- a sidecar elsewhere


@pytest.fixture
def elsewhere(tmp_path):
    """(model without a sidecar beside it, its sidecar)"""
    source = tiny.converted()
    (model := tmp_path / "m.gguf").symlink_to(source)
    (sidecar := tmp_path / "other.gguf").symlink_to(sidecar_of(source))
    return model, sidecar


def test_the_sidecar_can_be_named(elsewhere, tmp_path):
    """What the refusal advises works in every command that loads a model."""
    model, sidecar = elsewhere
    assert "name it" in refusal(model)
    text = CHECKPOINTS / "heldout.txt"
    result = tiny.run("run", "-m", model, "-p", "In the", "-n", 2, "-t", 1, "--predictor", sidecar, "--json")
    assert json.loads(result.stdout)["sparsity"] == "predictor"
    for command in (
        ("perplexity", "-m", model, "-f", text, "-c", 64, "--chunks", 1),
        ("profile", model, "--calib", text, "--tokens", 64, "--chunk", 64, "--outfile", tmp_path / "s.gguf"),
    ):
        assert "name it" in tiny.error_line(tiny.run(*command, "-t", 1))
        result = tiny.run(*command, "-t", 1, "--predictor", sidecar)
        assert result.returncode == 0, result.stderr
    line = tiny.error_line(tiny.run("run", "-m", model, "-p", "x", "-t", 1, "--predictor", tmp_path / "none.gguf"))
    assert str(tmp_path / "none.gguf") in line


# ---- threads

QUOTA = """
import sys, tsconv
from pathlib import Path
from tsconv.machine import limits
limits.PROC = Path(sys.argv[2])
llama = tsconv.load(sys.argv[1])
print(llama.n_threads, llama.n_threads_batch)
"""


def test_threads_of_a_container(tmp_path):
    """No more than the CPU time that the control group grants: threads without time are waited for."""
    group = tmp_path / "cg"
    group.mkdir()
    (group / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "proc" / "self" / "mountinfo").write_text(f"31 23 0:28 / {group} rw - cgroup2 cgroup2 rw\n")
    command = [sys.executable, "-c", QUOTA, str(tiny.converted()), str(tmp_path / "proc")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False)
    assert done.stdout == "1 1\n", done.stderr
