"""Top-k sparsity and the predictor's threshold: `--sparsity topk:S` and `predictor:D` against the independent PyTorch
reference (checkpoints/reference.py), token for token, on both shipped checkpoints."""

from __future__ import annotations

import ctypes
import json

import llama_cpp
import numpy as np
import pytest
import torch
from reference import Reference

import tsconv
from support import CHECKPOINTS, tiny
from support.streamed import fewest_bytes, streaming
from support.tiny import nmse
from tsconv.errors import BackendError, TsconvError
from tsconv.runtime.sparsity import Sparsity, parse_sparsity

NAMES = ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"]
POINTS = ["0", "0.5", "0.8", "0.9", "0.95", "0.98", "0.999"]
N_TOKENS = 200
F32 = llama_cpp.GGML_TYPE_F32


def load(name: str, sparsity: str, outtype: str = "f32", **kwargs) -> tsconv.SparseLlama:
    path = tiny.converted(name, outtype)
    return tsconv.load(path, sparsity=sparsity, n_ctx=N_TOKENS, type_k=F32, type_v=F32, **{"n_threads": 2} | kwargs)


def kept(n_ff: int, sparsity: str) -> int:
    """Neurons that stay: what is dropped is rounded, halves up."""
    return max(1, n_ff - int(np.floor(float(sparsity) * n_ff + 0.5)))


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokens(name) -> list[int]:
    model = load(name, "exact")
    found = model.tokenize((CHECKPOINTS / "heldout.txt").read_bytes()[:4096])[:N_TOKENS]
    model.close()
    return found


@pytest.fixture(scope="module")
def reference(name) -> Reference:
    return Reference.load(CHECKPOINTS / name)


def hidden(reference: Reference, tokens: list[int], keep: int | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits, and h of each layer after the choice: [n_tokens, n_slots, n_ff], the slots of a token in the order of
    their weights."""
    seen, chosen = [], []
    reference.keep_largest(keep)
    hooks = [
        ffn.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for block in reference.model.layers
        for ffn in block.ffns
    ]
    try:
        with torch.no_grad():
            batch = torch.as_tensor(tokens).long()[None]
            logits = reference(batch, False, route=lambda share, slots: chosen.append(slots))[0]
    finally:
        reference.keep_largest(None)
        for hook in hooks:
            hook.remove()
    if not chosen:
        return logits.numpy(), [h[:, None].numpy() for h in seen]
    layers, rest = [], iter(seen)
    for slots in chosen:
        h = torch.zeros(*slots.shape, reference.config.n_ff)
        for e in range(reference.config.n_expert):
            row, slot = (slots == e).nonzero(as_tuple=True)
            if len(row):
                h[row, slot] = next(rest)
        layers.append(h.numpy())
    return logits.numpy(), layers


class Watched:
    """A context whose graph is cut behind h of every layer."""

    def __init__(self, model: tsconv.SparseLlama) -> None:
        self.h: dict[int, np.ndarray] = {}
        lib = llama_cpp.llama_cpp._lib
        lib.ggml_get_name.argtypes, lib.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
        lib.ggml_get_data.argtypes, lib.ggml_get_data.restype = [ctypes.c_void_p], ctypes.c_void_p
        lib.ggml_nelements.argtypes, lib.ggml_nelements.restype = [ctypes.c_void_p], ctypes.c_int64

        @llama_cpp.ggml_backend_sched_eval_callback
        def look(tensor, ask, user_data):
            name = lib.ggml_get_name(tensor).decode()
            wanted = name.startswith(("ffn_swiglu-", "ffn_moe_swiglu-"))
            if not ask and wanted:
                at = ctypes.cast(lib.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
                self.h[int(name.rpartition("-")[2])] = np.ctypeslib.as_array(at, (lib.ggml_nelements(tensor),)).copy()
            return wanted or not ask

        params = llama_cpp.llama_context_default_params()
        fields = {"n_ctx": 512, "n_batch": 512, "type_k": F32, "type_v": F32, "n_threads": 2, "n_threads_batch": 2}
        fields["flash_attn_type"] = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for field, value in (fields | {"cb_eval": look}).items():
            setattr(params, field, value)
        self._look, self._model = look, model
        self._context = llama_cpp.llama_init_from_model(model._model.model, params)
        assert self._context

    def decode(self, tokens: list[int]) -> np.ndarray:
        """Logits of all tokens."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
            batch.seq_id[i][0] = 0
        assert llama_cpp.llama_decode(self._context, batch) == 0
        shape = (len(tokens), self._model.n_vocab())
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape=shape).copy()
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(self._context)
        return logits


@pytest.mark.parametrize("point", POINTS)
def test_equals_pytorch(name, tokens, reference, point):
    """Logits of every token, also where the graph is cut; and which neurons of each layer and expert stayed for it."""
    n_ff = reference.config.n_ff
    expected, layers = hidden(reference, tokens, kept(n_ff, point))
    model = load(name, f"topk:{point}")
    assert model.sparsity == f"topk:{point}"
    found = model.token_logits(tokens)
    stats = model.ffn_stats()
    watched = Watched(model)
    cut = watched.decode(tokens)
    model.close()
    assert nmse(found, expected) < 1e-5
    assert nmse(cut, found) < 1e-9
    for n, want in enumerate(layers):
        h = watched.h[n].reshape(want.shape)
        stays = (h != 0).sum(axis=-1)
        assert stays.max() <= kept(n_ff, point)
        assert stats[n]["active"] == pytest.approx(stays.mean(), rel=1e-3)
        assert stats[n]["predicted"] == stats[n]["n_ff"] == n_ff
        # Two neurons whose |h| are the same but for rounding may change places at the edge.
        differs = (h != 0) != (want != 0)
        edge = np.where(want != 0, want, np.inf).min(axis=-1, keepdims=True)
        assert (np.maximum(h, want)[differs] <= 1.001 * np.broadcast_to(edge, h.shape)[differs] + 1e-5).all()
        assert differs.mean() < 1e-4


def test_nothing_dropped_is_exact(name, tokens):
    """Bit for bit, in batches and token by token."""
    logits = {}
    for sparsity in ("exact", "topk:0"):
        model = load(name, sparsity)
        logits[sparsity] = [model.token_logits(tokens[:40], n_batch) for n_batch in (1, 40)]
        model.close()
    for exact, topk in zip(*logits.values(), strict=True):
        np.testing.assert_array_equal(topk, exact)


@pytest.mark.parametrize("outtype", ["f16", "q8_0", "q4_0", "q5_1"])
def test_types(name, tokens, reference, outtype):
    """Types with kernels of their own and without, in bundles: as close as exact sparsity is."""
    model = load(name, "topk:0.9", outtype)
    found = model.token_logits(tokens)
    model.close()
    expected, _ = hidden(reference, tokens, kept(reference.config.n_ff, "0.9"))
    exact = load(name, "exact", outtype)
    error = nmse(exact.token_logits(tokens), hidden(reference, tokens, None)[0])
    exact.close()
    assert nmse(found, expected) < max(2 * error, 1e-5)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_threads(name, tokens, n_threads):
    """They change the order of sums, and not which neurons stay."""
    found = {}
    for n in (2, n_threads):
        model = load(name, "topk:0.9", n_threads=n)
        logits = model.token_logits(tokens)
        found[n] = logits, [layer["active"] for layer in model.ffn_stats()]
        model.close()
    assert nmse(found[n_threads][0], found[2][0]) < 1e-9
    assert found[n_threads][1] == pytest.approx(found[2][1], rel=1e-4)


def test_neurons_from_disk(monkeypatch, name, tokens):
    """With memory for few neurons, in rounds: which of them memory holds does not matter."""
    model = load(name, "topk:0.95", ram_budget="off")
    expected = model.token_logits(tokens[:70]), model.token_logits(tokens[:5], 1)
    model.close()
    with streaming(monkeypatch, fewest_bytes(tiny.converted(name))):
        model = load(name, "topk:0.95")
    np.testing.assert_array_equal(model.token_logits(tokens[:70]), expected[0])
    np.testing.assert_array_equal(model.token_logits(tokens[:5], 1), expected[1])
    assert sum(layer["neurons_missing"] for layer in model.ffn_stats()) > 0
    model.close()


class OfNormed(torch.nn.Module):
    """A predictor that reads its input without its size, as the backend sees it: the sign of a logit stays."""

    def __init__(self, predictor: torch.nn.Module, eps: float) -> None:
        super().__init__()
        self.predictor, self.eps = predictor, eps

    def forward(self, p: torch.Tensor) -> torch.Tensor:
        return self.predictor(p * torch.rsqrt(p.square().mean(-1, keepdim=True) + self.eps))


@pytest.mark.parametrize("shift", ["-1.5", "0", "0.5", "2"])
def test_threshold_of_the_predictor(name, tokens, shift):
    reference = Reference.load(CHECKPOINTS / name)
    for ffn in (ffn for block in reference.model.layers for ffn in block.ffns):
        ffn.threshold = float(shift)
        if not reference.config.n_expert:  # experts' predictors read the normed input itself
            ffn.predictor = OfNormed(ffn.predictor, reference.config.rms_eps)
    model = load(name, f"predictor:{shift}")
    assert nmse(model.token_logits(tokens), reference.logits(tokens).numpy()) < 1e-5
    model.close()


# ---- what a user writes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("predictor", Sparsity("predictor")),
        ("exact", Sparsity("exact")),
        ("dense", Sparsity("dense")),
        ("topk:0", Sparsity("topk", 0)),
        ("topk:0.95", Sparsity("topk", 0.95)),
        ("topk:+0.5", Sparsity("topk", 0.5)),
        ("topk:0.", Sparsity("topk", 0)),
        ("predictor:-1.25", Sparsity("predictor", -1.25)),
        ("predictor:3", Sparsity("predictor", 3)),
    ],
)
def test_accepted(text, expected):
    """By Python, and by the library."""
    assert parse_sparsity(text) == expected
    model = load(NAMES[0], text)
    assert model.sparsity == text
    model.close()


HOSTILE = [
    "",
    "topk",
    "topk:",
    "topk:1",
    "topk:1.5",
    "topk:-0.1",
    "topk:x",
    "topk:nan",
    "topk:inf",
    "topk:0.5 ",
    "exact:1",
]
HOSTILE += ["topk:0,5", "topk:1e-1", "topk:.5", "topk:0.5.5", "top", "predictor:", "predictor:--1", "dense:0", "topk:٠"]
HOSTILE += ["topk:0.1234567890123456", "topk:" + "0" * 40]


@pytest.mark.parametrize("text", HOSTILE)
def test_refused(text, monkeypatch):
    """In one line, by Python and by the library."""
    with pytest.raises(TsconvError, match=r"^sparsity: expected 'predictor', .*, found "):
        tsconv.load(tiny.converted(), sparsity=text)
    monkeypatch.setattr("tsconv.runtime.binding.parse_sparsity", lambda text: Sparsity("exact"))
    with pytest.raises(TsconvError, match=r"^sparsity: expected 'predictor', .*, found "):
        tsconv.load(tiny.converted(), sparsity=text)


def test_statistics_are_refused():
    model = load(NAMES[0], "topk:0.9")
    with pytest.raises(BackendError, match="activations are not counted with topk"), model.profiling():
        pass
    model.close()


# ---- commands


def test_run_says_what_it_costs():
    done = tiny.run("run", tiny.converted(), "-p", "And it", "-n", 4, "--temp", 0, "--sparsity", "topk:0.9", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sparsity"] == "topk:0.9"
    assert b"note: topk:0.9 computes gate and up of every neuron" in done.stderr


@pytest.mark.parametrize("command", ["run", "serve"])
def test_commands_refuse(command):
    line = tiny.error_line(tiny.run(command, tiny.converted(), "--sparsity", "topk:1.5"))
    assert "'--sparsity': sparsity: expected 'predictor'" in line and "found 'topk:1.5'" in line


def test_profile_refuses(tmp_path):
    arguments = ("--calib", "builtin", "--tokens", 512, "--outfile", tmp_path / "s.gguf", "--sparsity", "topk:0.5")
    line = tiny.error_line(tiny.run("profile", tiny.converted(), *arguments))
    assert "statistics are of a function that the model has: expected --sparsity predictor or exact, found topk" in line
