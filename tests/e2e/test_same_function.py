"""A converted model computes the checkpoint's function: logits against the independent PyTorch reference
(checkpoints/reference.py), 512 tokens of held-out text, f32 KV cache."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import llama_cpp
import numpy as np
import pytest
from reference import Reference

import tsconv
from support import CHECKPOINTS, tiny
from support.tiny import nmse
from tsconv.native.library import load_backend

NAMES = ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"]
N_TOKENS = 512
F32 = llama_cpp.GGML_TYPE_F32
NMSE_LIMITS = {"f32": 1e-5, "f16": 1e-4, "bf16": 1e-4, "q8_0": 5e-3}
FOUR_AND_FIVE_BITS = ["q4_0", "q4_1", "q5_0", "q5_1"]  # own kernels for q4_0, ggml's for the others


def perplexity(logits: np.ndarray, tokens: list[int]) -> float:
    """exp of the mean negative log likelihood of tokens[1:]."""
    x = logits[:-1].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    log_probability = x[np.arange(len(x)), tokens[1:]] - np.log(np.exp(x).sum(axis=1))
    return float(np.exp(-log_probability.mean()))


def load(name: str, outtype: str, sparsity: str, **kwargs) -> tsconv.SparseLlama:
    path = tiny.converted(name, outtype)
    return tsconv.load(path, sparsity=sparsity, n_threads=2, n_ctx=N_TOKENS, type_k=F32, type_v=F32, **kwargs)


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokens(name) -> list[int]:
    model = load(name, "f32", "exact")
    text = (CHECKPOINTS / "heldout.txt").read_bytes()
    found = model.tokenize(text[:8192])[:N_TOKENS]
    model.close()
    assert len(found) == N_TOKENS
    return found


@pytest.fixture(scope="module")
def reference(name, tokens) -> dict[str, np.ndarray]:
    model = Reference.load(CHECKPOINTS / name)
    return {sparsity: model.logits(tokens, sparsity=sparsity).detach().numpy() for sparsity in ("predictor", "exact")}


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("outtype", NMSE_LIMITS)
def test_logits(name, tokens, reference, outtype, sparsity):
    model = load(name, outtype, sparsity)
    error = nmse(model.token_logits(tokens), reference[sparsity])
    model.close()
    print(f"{name} {outtype} {sparsity}: NMSE {error:.2e}, limit {NMSE_LIMITS[outtype]:.0e}")
    assert error <= NMSE_LIMITS[outtype]


@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
def test_q_k_and_v_apart(name, tokens, tmp_path, outtype):
    """The function is the same when q, k and v are not in one matrix."""
    model = load(name, outtype, "predictor")
    expected = model.token_logits(tokens)
    model.close()
    apart = tsconv.convert(CHECKPOINTS / name, tmp_path / "m.gguf", outtype, fuse_qkv=False).model
    model = tsconv.load(apart, n_threads=2, n_ctx=N_TOKENS, type_k=F32, type_v=F32)
    found = model.token_logits(tokens)
    model.close()
    assert nmse(found, expected) <= 1e-9


def test_the_mask_matters(reference):
    """The two modes are different functions: agreement with the one is not agreement with the other."""
    assert nmse(reference["exact"], reference["predictor"]) > 10 * NMSE_LIMITS["f32"]


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("outtype", FOUR_AND_FIVE_BITS)
def test_perplexity(name, tokens, reference, outtype, sparsity):
    model = load(name, outtype, sparsity)
    found = perplexity(model.token_logits(tokens), tokens)
    model.close()
    expected = perplexity(reference[sparsity], tokens)
    print(f"{name} {outtype} {sparsity}: perplexity {found:.2f}, reference {expected:.2f}")
    assert expected < 100, "the checkpoint is trained"
    assert found < 1.25 * expected


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("n_batch", [1, 2, 7, 32])
def test_batches_agree(name, tokens, reference, sparsity, n_batch):
    """Token by token and in any batch, what one batch of 512 gives."""
    model = load(name, "f32", sparsity)
    whole = model.token_logits(tokens, n_batch=512)
    assert nmse(model.token_logits(tokens, n_batch=n_batch), whole) <= 1e-9
    model.close()


def context(model: tsconv.SparseLlama, **fields) -> ctypes.c_void_p:
    """Another llama_context on the same weights."""
    params = llama_cpp.llama_context_default_params()
    fields = {"n_ctx": 2048, "n_batch": 2048, "type_k": F32, "type_v": F32, **fields}
    fields |= {"n_threads": 2, "n_threads_batch": 2}  # the order of sums depends on the number of threads
    fields["flash_attn_type"] = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as llama_cpp.Llama does
    for field, value in fields.items():
        setattr(params, field, value)
    ctx = llama_cpp.llama_init_from_model(model._model.model, params)
    assert ctx
    return ctx


def decode(ctx: ctypes.c_void_p, entries: list[tuple[int, int, int]], n_vocab: int) -> np.ndarray:
    """llama_decode of (token, position, sequence) entries; logits of all, [len(entries), n_vocab]."""
    batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
    batch.n_tokens = len(entries)
    for i, (token, position, sequence) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, True
        batch.seq_id[i][0] = sequence
    assert llama_cpp.llama_decode(ctx, batch) == 0
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), shape=(len(entries), n_vocab)).copy()
    llama_cpp.llama_batch_free(batch)
    return logits


@pytest.mark.sanitized
@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
def test_parallel_sequences(name, tokens, sparsity):
    """Four sequences decoded together, interleaved, give what each gives alone."""
    model = load(name, "f32", sparsity)
    n_vocab, length = model.n_vocab(), 40
    sequences = [tokens[start : start + length] for start in range(0, 4 * length, length)]
    alone = [model.token_logits(sequence) for sequence in sequences]
    ctx = context(model, n_seq_max=4)
    together = np.empty((4, length, n_vocab), dtype=np.float32)
    for position in range(length):
        entries = [(sequences[s][position], position, s) for s in range(4)]
        together[:, position] = decode(ctx, entries, n_vocab)
    llama_cpp.llama_free(ctx)
    model.close()
    for s in range(4):
        assert nmse(together[s], alone[s]) <= 1e-9


@pytest.mark.sanitized
@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("stop", ["gate", "up", "swiglu"])
def test_graph_cut_between_the_operations(name, tokens, sparsity, stop, outtype):
    """An evaluation callback makes the scheduler hand over the four operations one by one: the result stays."""
    model = load(name, outtype, sparsity)
    seen = []
    tensor_name_of = llama_cpp.llama_cpp._lib.ggml_get_name
    tensor_name_of.argtypes, tensor_name_of.restype = [ctypes.c_void_p], ctypes.c_char_p

    @llama_cpp.ggml_backend_sched_eval_callback
    def wants(tensor, ask, user_data):
        tensor_name = tensor_name_of(tensor).decode()
        if tensor_name.startswith((f"ffn_{stop}-", f"ffn_moe_{stop}-")):
            seen.append(tensor_name)
            return True
        return not ask

    n_vocab = model.n_vocab()
    entries = [(token, position, 0) for position, token in enumerate(tokens[:70])]
    whole = model.token_logits(tokens[:70])
    model.reset_ffn_stats()
    ctx = context(model, cb_eval=wants)
    cut = decode(ctx, entries, n_vocab)
    llama_cpp.llama_free(ctx)
    stats = model.ffn_stats()
    model.close()
    assert seen
    assert all(layer["single_ops"] > 0 and layer["calls"] == layer["seconds_attention"] == 0 for layer in stats)
    # At q4_0 the hidden state is not quantized between the operations either: only the order of sums differs, and more
    # with a predictor, whose neurons threads share otherwise; ggml rounds what follows from it to 8 bits.
    assert nmse(cut, whole) <= (1e-5 if (sparsity, outtype) == ("predictor", "q4_0") else 1e-9)


def test_counters_equal_the_reference(name, tokens):
    """Neurons predicted and active per layer, as the reference counts them; bytes read follow from them."""
    model = load(name, "f32", "predictor")
    model.reset_ffn_stats()
    model.token_logits(tokens, n_batch=1)
    stats = model.ffn_stats()
    model.close()
    expected = Reference.load(CHECKPOINTS / name).activity(tokens)
    row = 4 * json.loads((CHECKPOINTS / name / "config.json").read_text())["hidden_size"]
    for layer, want in zip(stats, expected, strict=True):
        rows = layer["tokens"]
        assert rows == want["calls"]
        # A logit within rounding of 0 may fall either way.
        assert layer["predicted"] / layer["n_ff"] == pytest.approx(want["predicted"], abs=1e-5)
        assert layer["active"] / layer["n_ff"] == pytest.approx(want["predicted_active"], abs=1e-5)
        touched = layer["predicted"] + layer["gate_positive"] + layer["active"]
        assert layer["bytes_ffn"] == pytest.approx(row * touched * rows)
        assert layer["bytes_dense"] == row * 3 * layer["n_ff"] * rows
        assert layer["bytes_ffn"] < 0.5 * layer["bytes_dense"]


@pytest.mark.parametrize("n_batch", [1, 8, 512])
def test_dense_is_exact_without_skipping(name, tokens, reference, n_batch):
    """The same function and the same neurons; every row of gate, up and down is read."""
    stats = {}
    for sparsity in ("exact", "dense"):
        model = load(name, "f32", sparsity)
        assert model.sparsity == sparsity
        assert nmse(model.token_logits(tokens, n_batch=n_batch), reference["exact"]) <= NMSE_LIMITS["f32"]
        stats[sparsity] = model.ffn_stats()
        model.close()
    for exact, dense in zip(stats["exact"], stats["dense"], strict=True):
        assert dense["bytes_predictor"] == 0
        assert dense["bytes_ffn"] == dense["bytes_dense"] == exact["bytes_dense"] > exact["bytes_ffn"]
        assert dense["predicted"] == dense["n_ff"] == exact["n_ff"]
        for count in ("gate_positive", "active"):
            assert dense[count] == pytest.approx(exact[count], rel=1e-3)


@pytest.mark.sanitized
def test_two_models_in_one_process(tokens, name):
    """Each with its own sidecar and mode, used in turn."""
    other = next(n for n in NAMES if n != name)
    first, second = load(name, "f32", "predictor"), load(other, "f32", "exact")
    before = first.token_logits(tokens[:64])
    second.token_logits(tokens[:64])
    third = load(name, "f32", "exact")
    assert nmse(first.token_logits(tokens[:64]), before) == 0
    assert nmse(third.token_logits(tokens[:64]), before) > 1e-4
    assert second.ffn_stats()[0]["calls"] == 1
    first.close()
    assert np.isfinite(third.token_logits(tokens[:64])).all()
    second.close()
    third.close()


LOGITS_SCRIPT = """
import sys, numpy, tsconv
from tsconv.native.library import load_backend
path, out, *tokens = sys.argv[1:]
model = tsconv.load(path, n_threads=2, n_ctx=512, type_k=0, type_v=0)
numpy.save(out, model.token_logits(list(map(int, tokens))))
print(load_backend().isa)
"""


@pytest.mark.parametrize("isa", ["ref", "avx2"])
def test_lower_isa_tiers(name, tokens, reference, isa, tmp_path):
    """The environment can lower the kernels' tier; the function stays."""
    out = tmp_path / "logits.npy"
    command = [sys.executable, "-c", LOGITS_SCRIPT, tiny.converted(name, "f32"), out, *map(str, tokens)]
    done = subprocess.run(command, env=os.environ | {"TSFFN_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this machine's best tier is {load_backend().isa}")
    assert nmse(np.load(out), reference["predictor"]) <= NMSE_LIMITS["f32"]
