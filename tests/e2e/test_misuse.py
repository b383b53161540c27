"""Models used where llama.cpp would crash, hang or mix two texts up: closed, in forked processes, by several callers at
once, copied. What could do so runs in a process of its own, with a time limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import llama_cpp
import numpy as np
import pytest

import tsconv
from support import tiny
from tsconv.errors import BackendError
from tsconv.runtime.generate import Generation, Sampling, prompt_tokens

PROMPT = "In the beginning"
TOKENS = [1, 20, 300, 7]

START = """
import json, os, sys, threading
import numpy as np
import tsconv
from tsconv.errors import BackendError
model = sys.argv[1]
def error(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except BaseException as e:
        return f"{type(e).__name__}: {e}"
    return "no error"
"""


def python(script: str, *arguments: object, options: tuple[str, ...] = ()) -> object:
    """What the script prints, as JSON."""
    process = subprocess.Popen(
        [sys.executable, *options, "-c", START + script, str(tiny.converted()), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=tiny.TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # children of a fork that hang, too
        raise
    assert (process.returncode, stderr) == (0, "")
    return json.loads(stdout)


# ---- closed

USES = {
    "token_logits": "m.token_logits([1])",
    "warm_up": "m.warm_up()",
    "ffn_stats": "m.ffn_stats()",
    "reset_ffn_stats": "m.reset_ffn_stats()",
    "profiling": "m.profiling().__enter__()",
    "place_in_memory": "m.place_in_memory([[1]] * 6)",
    "tokenize": "m.tokenize(b'x')",
    "detokenize": "m.detokenize([5])",
    "eval": "m.eval([1])",
    "sample": "m.sample()",
    "reset": "m.reset()",
    "generate": "next(m.generate([1]))",
    "create_completion": "m.create_completion('x', max_tokens=1)",
    "stream": "next(m.create_completion('x', max_tokens=1, stream=True))",
    "call": "m('x')",
    "chat": "m.create_chat_completion([{'role': 'user', 'content': 'x'}])",
    "embed": "m.embed('x')",
    "create_embedding": "m.create_embedding('x')",
    "save_state": "m.save_state()",
    "load_state": "m.load_state(state)",
    "n_ctx": "m.n_ctx()",
    "n_embd": "m.n_embd()",
    "n_vocab": "m.n_vocab()",
    "token_bos": "m.token_bos()",
    "token_eos": "m.token_eos()",
    "token_nl": "m.token_nl()",
    "tokenizer": "m.tokenizer().tokenize(b'x')",
    "pooling_type": "m.pooling_type()",
    "ctx": "m.ctx",
    "model": "m.model",
    "context_warning": "m.context_warning(9)",
    "pickle": "pickle.dumps(m)",
    "deepcopy": "copy.deepcopy(m)",
    "native stats": "native.stats(0)",
    "native armed": "native.armed().__enter__()",
    "native profile": "native.profile(True)",
    "native read_profile": "native.read_profile(0, *arrays)",
    "native read_squares": "native.read_squares(0)",
    "native recording": "native.recording(range(1), print).__enter__()",
    "layers": "layers.compute([1])",
    "generation": "next(iter(Generation(m, [1])))",
    "begun generation": "next(begun)",
    "begun stream": "next(stream)",
    "measure": "measure(m, [[1, 2]])",
}
PREPARED = """
import copy, pickle
from tsconv.eval.perplexity import measure
from tsconv.runtime.generate import Generation
from tsconv.runtime.layers import LayersContext
m = tsconv.load(model, n_threads=1)
native, layers, tokenizer = m._native, LayersContext(m, 8), m.tokenizer()
arrays = np.zeros(1, np.int64), np.zeros((6, 1, 512), np.int64), np.zeros((3, 130), np.int64)
m.eval([1, 5])
state = m.save_state()
begun = m.generate([1, 5, 9])
next(begun)
stream = m.create_completion("x", stream=True, max_tokens=4)
"""


def test_closed():
    uses = ", ".join(f"{name!r}: lambda: {use}" for name, use in USES.items())
    script = (
        f"{PREPARED}\nm.close()\nm.close()\nprint(json.dumps({{name: error(use) for name, use in {{{uses}}}.items()}}))"
    )
    assert python(script) == dict.fromkeys(USES, "BackendError: the model is closed")


def test_what_was_taken_from_a_model_that_is_closed():
    """llama_cpp's own objects: an error, whatever it is called."""
    script = f"""{PREPARED}
vocab, context = m._model, m._ctx
m.close()
uses = [lambda: tokenizer.tokenize(b"x"), lambda: vocab.n_vocab(), lambda: context.n_ctx(), context.kv_cache_clear]
print(json.dumps([error(use) for use in uses]))"""
    for line in python(script):
        assert "the model is closed" in line


def test_closed_while_it_works():
    script = """
m = tsconv.load(model, n_threads=1)
def close(tokens, logits):
    errors.append(error(m.close))
    return logits
errors = []
m.create_completion("x", max_tokens=1, logits_processor=[close])
m.close()
print(json.dumps(errors))"""
    assert python(script) == ["BackendError: the model is working; close it when the call that it works for has ended"]


def test_closed_by_another_thread():
    """It waits for the token that is being computed, and the next one is refused."""
    script = """
m = tsconv.load(model, n_threads=1)
began, ended = threading.Event(), []
def use():
    for _ in range(10**6):
        m.token_logits([1, 5] * 50)
        m.tokenize(b"In the beginning")
        m.ffn_stats()
        began.set()
thread = threading.Thread(target=lambda: ended.append(error(use)))
thread.start()
began.wait()
m.close()
thread.join()
print(json.dumps(ended))"""
    assert python(script) == ["BackendError: the model is closed"]


def test_a_model_alive_when_the_interpreter_ends():
    assert python("m = tsconv.load(model, n_threads=1)\nm.token_logits([1])\nm.me = m\nprint(1)") == 1


def test_wrong_arguments_leave_no_noise():
    assert "model_path" in python("print(json.dumps(error(tsconv.SparseLlama)))")


# ---- forked

FORK = """
def forked(function):
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with os.fdopen(read) as stream:
            text = stream.read()
        assert os.waitpid(pid, 0)[1] == 0
        return text
    os.write(write, str(function()).encode())
    os._exit(0)
"""


@pytest.mark.parametrize("n_threads", [1, 2])
def test_model_from_before_a_fork(n_threads):
    uses = ", ".join(f"lambda: {use}" for name, use in USES.items() if name != "load_state")
    script = f"""{FORK}{PREPARED.replace("n_threads=1", f"n_threads={n_threads}")}
answer = forked(lambda: json.dumps([error(use) for use in [{uses}]]))
m.token_logits([1])
m.close()
print(answer)"""
    expected = "BackendError: the model was loaded before this process was forked, and llama.cpp's threads are not"
    for line in python(script):
        assert line.startswith(expected), line


def test_a_closed_model_before_a_fork():
    """It is not in the way of the others, and says in the child what it says in the parent."""
    script = f"""{FORK}
models = [tsconv.load(model, n_threads=1) for _ in range(3)]
models[0].close()
models[2].close()
print(forked(lambda: json.dumps([error(m.token_logits, [1]) for m in models])))"""
    first, second, third = python(script)
    assert first == third == "BackendError: the model is closed"
    assert second.startswith("BackendError: the model was loaded before this process was forked")


# llama.cpp repacks weights for AMX with as many threads as OpenMP likes, while it loads a model.
AMX = b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info() and len(os.sched_getaffinity(0)) > 1
SEVERAL = "forked from one that had computed with several threads, which are not in it: expected 1 thread"


@pytest.mark.parametrize("computes", [True, False])
def test_model_loaded_in_a_forked_process(computes):
    """With one thread it works; OpenMP's other threads are those of the parent, if there were any."""
    script = f"""{FORK}
m = tsconv.load(model, n_threads=2)
if {computes}:
    m.token_logits([1, 5])
def in_child(n):
    child = tsconv.load(model, n_threads=n)
    found = child.token_logits([1, 5]).argmax()
    child.close()
    return int(found)
answers = [forked(lambda: in_child(1)), forked(lambda: error(in_child, 2))]
print(json.dumps([*answers, str(m.token_logits([1, 5]).argmax())]))"""
    one, two, expected = python(script.replace("in_child(1)", "error(in_child, 1)") if AMX else script)
    assert SEVERAL in one if AMX else one == expected
    assert SEVERAL in two if AMX or computes else two == "no error"


def test_forked_before_anything_was_loaded():
    script = f"""{FORK}
from tsconv.native.library import load_backend
load_backend()
print(json.dumps(forked(lambda: tsconv.load(model, n_threads=2).token_logits([1]).shape[0])))"""
    assert python(script) == "1"


def test_forked_while_another_thread_holds_the_locks():
    script = f"""{FORK}
m = tsconv.load(model, n_threads=1)
held, done = threading.Event(), threading.Event()
def hold():
    with m._native.armed(), m._guard.lock, m._native.lock:
        held.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
answer = forked(lambda: [error(m.token_logits, [1]), error(m.ffn_stats), tsconv.load(model, n_threads=1).n_vocab()])
done.set()
thread.join()
print(json.dumps(answer))"""
    assert python(script).count("the model was loaded before this process was forked") == 2


def test_multiprocessing():
    """A forked worker is refused, a spawned one gets a copy."""
    script = """
import multiprocessing
m = tsconv.load(model, n_threads=1, sparsity="exact")
def token():
    return int(m.token_logits([1, 5]).argmax())
with multiprocessing.get_context("fork").Pool(1) as pool:
    answers = [error(pool.apply, token)]
with multiprocessing.get_context("spawn").Pool(1) as pool:
    answers += [int(pool.apply(tsconv.SparseLlama.token_logits, (m, [1, 5])).argmax()), token()]
print(json.dumps(answers))"""
    forked, spawned, expected = python(script)
    assert forked.startswith("BackendError: the model was loaded before this process was forked")
    assert spawned == expected


# ---- several at once


@pytest.fixture(scope="module")
def llama() -> tsconv.SparseLlama:
    llama = tsconv.load(tiny.converted(), n_threads=1)
    yield llama
    llama.close()


def in_threads(*functions) -> list[object]:
    results: list[object] = [None] * len(functions)

    def call(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(tiny.TIMEOUT_S)
        assert not thread.is_alive()
    return results


def test_threads_wait_for_each_other(llama):
    """What each of them gets is what it gets alone."""
    sequences = [[1, *range(10 * i, 10 * i + 60)] for i in range(1, 4)]
    expected = [llama.token_logits(sequence) for sequence in sequences]
    prompts = ["In the beginning", "And it came to pass", "The words of"]
    texts = [llama.create_completion(p, max_tokens=12, temperature=0)["choices"][0]["text"] for p in prompts]

    def logits(i):
        return lambda: [llama.token_logits(sequences[i]) for _ in range(8)]

    def text(i):
        return lambda: [
            llama.create_completion(prompts[i], max_tokens=12, temperature=0)["choices"][0]["text"] for _ in range(4)
        ]

    found = in_threads(*map(logits, range(3)), *map(text, range(3)))
    for i in range(3):
        for one in found[i]:
            np.testing.assert_array_equal(one, expected[i])
        assert found[3 + i] == [texts[i]] * 4


MESSAGES = [{"role": "user", "content": PROMPT}]
OTHERS = {
    "token_logits": lambda llama: llama.token_logits(TOKENS),
    "completion": lambda llama: llama.create_completion("x", max_tokens=1),
    "chat": lambda llama: llama.create_chat_completion(MESSAGES, max_tokens=1),
    "stream": lambda llama: next(llama.create_completion("x", max_tokens=1, stream=True)),
    "eval": lambda llama: llama.eval([1]),
    "reset": lambda llama: llama.reset(),
    "load_state": lambda llama: llama.load_state(llama.save_state()),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("kind", ["generate", "stream", "chat", "generation"])
def test_a_text_cannot_go_on_after_another(llama, kind, other):
    def begin():
        if kind == "generate":
            return llama.generate(TOKENS, temp=0)
        if kind == "stream":
            return llama.create_completion(PROMPT, max_tokens=20, temperature=0, stream=True)
        if kind == "chat":
            return llama.create_chat_completion(MESSAGES, max_tokens=20, temperature=0, stream=True)
        return iter(Generation(llama, prompt_tokens(llama, PROMPT), 20, Sampling(temperature=0)))

    text = begin()
    for _ in range(3):
        next(text)
    llama.tokenize(b"does not matter")
    llama.ffn_stats()
    next(text)
    other(llama)
    with pytest.raises(BackendError, match="another call has used the model since: this text cannot be continued; end"):
        next(text)
    # The newcomer is not disturbed, and neither is who comes after an abandoned text.
    first, second = begin(), begin()
    whole = [str(part) for _, part in zip(range(4), begin(), strict=False)]
    next(first)
    assert len([part for _, part in zip(range(4), second, strict=False)]) == len(whole)


def test_steps_of_a_text_in_several_threads(llama):
    """As a server's pool of threads takes them."""
    expected = [part for _, part in zip(range(8), llama.generate(TOKENS, temp=0), strict=False)]
    text = llama.generate(TOKENS, temp=0)
    assert [in_threads(lambda: next(text))[0] for _ in range(8)] == expected


def test_loading_in_several_threads():
    models = in_threads(*[lambda: tsconv.load(tiny.converted(), n_threads=1)] * 4)
    for model in models:
        assert model.n_vocab() > 0
        model.close()


# ---- copies

COPIES = """
import copy, pickle, shutil
from pathlib import Path
sidecar = Path(sys.argv[2])
shutil.copy(model, moved := sidecar.with_name("m.gguf"))
"""


@pytest.mark.parametrize("way", ["copy.copy(m)", "copy.deepcopy(m)", "pickle.loads(pickle.dumps(m))"])
def test_copies(tmp_path, way):
    """A copy is loaded with the arguments of its original."""
    sidecar = tmp_path / "elsewhere.gguf"
    sidecar.write_bytes(tiny.converted().with_suffix(".predictor.gguf").read_bytes())
    script = f"""{COPIES}
answers = []
for arguments in (dict(sparsity="exact", n_ctx=300), dict(predictor_path=sidecar, flash_attn=False, use_mmap=False)):
    m = tsconv.load(moved, n_threads=1, **arguments)
    m.set_seed(9)
    other = {way}
    same = [
        (x.sparsity, x.n_ctx(), x.n_threads, x._seed, x.context_params.flash_attn_type, x.verbose,
         x.model_params.load_mode, x.token_logits([1, 5, 9]).tobytes().hex())
        for x in (m, other)
    ]
    answers.append([same[0] == same[1], other.sparsity])
    m.close()
    other.token_logits([1])
    other.close()
print(json.dumps(answers))"""
    assert python(script, sidecar) == [[True, "exact"], [True, "predictor"]]


# ---- memory that C is given

ARRAYS = """
from tsconv.transform import q3_nl
m = tsconv.load(model, n_threads=1)
f = lambda *shape: np.zeros(shape, np.float32)
i = lambda *shape: np.zeros(shape, np.int64)
u, out = np.zeros(4, np.float16), np.zeros((4, 2 + 13), np.uint8)
calls = [
    lambda: q3_nl.round_rows(f(4, 32).astype(float), f(32), u, out),
    lambda: q3_nl.round_rows(f(32, 4).T, f(32), u, out),
    lambda: q3_nl.round_rows(f(4, 32), f(31), u, out),
    lambda: q3_nl.round_rows(f(4, 32), f(32), u[:3], out),
    lambda: q3_nl.round_rows(f(4, 32), f(32), u, out[:, :14]),
    lambda: m._native.read_profile(0, i(1).astype(np.int32), i(6, 1, 512), i(3, 130)),
    lambda: m._native.read_profile(0, i(2), i(6, 1, 512), i(3, 130)),
    lambda: m._native.read_profile(0, i(1), i(5, 1, 512), i(3, 130)),
    lambda: m._native.read_profile(0, i(1), i(512), i(3, 130)),
    lambda: m._native.read_profile(0, i(1), i(6, 1, 512), i(3, 129)),
    lambda: m._native.read_profile(0, i(1), i(6, 1, 8), i(3, 130)),
    lambda: m._native.read_profile(0, i(1), i(6, 1, 1024)[:, :, ::2], i(3, 130)),
]
answers = [error(call) for call in calls]
answers += [error(q3_nl.round_rows, f(4, 33), f(33), u, out)]
answers += [error(m._native.stats, 6), error(m._native.stats, -1)]
m.close()
print(json.dumps(answers))"""


def test_arrays_that_do_not_fit():
    """Also where assert does nothing."""
    *arrays, columns, above, below = python(ARRAYS, options=("-O",))
    for line in arrays:
        assert line.startswith("BackendError: an array for the native library: expected "), line
    assert columns == "BackendError: columns of rows for q3_nl: expected a multiple of 32, found 33"
    assert [above, below] == [f"BackendError: layer: expected 0 to 5, found {n}" for n in (6, -1)]
