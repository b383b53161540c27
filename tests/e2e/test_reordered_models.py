"""Reordered models compute what they computed, and damaged orders are refused by the native library too."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from llama_cpp import GGML_TYPE_F32 as F32

import tsconv
from support import CHECKPOINTS, tiny
from support.edited import edited
from support.random_stats import expected_order, random_stats, save_stats
from support.refused import assert_in, put, refusal, sidecar_of
from support.reordered import check_alike, check_rows, tensors
from support.tiny import nmse
from tsconv.commands.reorder import reorder
from tsconv.format.header import read_header
from tsconv.format.order import neuron_order
from tsconv.transform.neuron_order import inverse

NAMES = ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"]
KEY = "turbosparse.neuron_order"
TEXT = (CHECKPOINTS / "heldout.txt").read_bytes()[:4096]
N_TOKENS = 200


def hot(name: str, outtype: str, sparsity: str = "predictor") -> Path:
    """The converted model, reordered by random statistics, beside it."""
    return _hot(name, outtype, sparsity)


@functools.cache
def _hot(name: str, outtype: str, sparsity: str) -> Path:
    model = tiny.converted(name, outtype)
    profile = save_stats(random_stats(model, sparsity), model.with_name(f"stats-{sparsity}.gguf"))
    return reorder(model, profile, model.with_name(f"hot-{sparsity}.gguf")).model


def logits(model: Path, sparsity: str, n_batch: int | None = None) -> tuple[np.ndarray, list[dict[str, float]]]:
    llama = tsconv.load(model, sparsity=sparsity, n_threads=1, n_ctx=256, type_k=F32, type_v=F32)
    found = llama.token_logits(llama.tokenize(TEXT)[:N_TOKENS], n_batch)
    stats = llama.ffn_stats()
    llama.close()
    return found, stats


@pytest.mark.sanitized
@pytest.mark.parametrize("n_batch", [1, None])
@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays(name, sparsity, n_batch):
    expected, counted = logits(tiny.converted(name), sparsity, n_batch)
    found, recounted = logits(hot(name, "f32", sparsity), sparsity, n_batch)
    assert len(found) == N_TOKENS
    assert nmse(found, expected) <= 1e-9
    for key in ("predicted", "gate_positive", "active", "bytes_read"):
        # A logit within rounding of 0 may fall either way.
        assert [layer[key] for layer in recounted] == pytest.approx([layer[key] for layer in counted], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_permutation_of_one_tensor_alone_would_show(name, tmp_path):
    """The comparison above can fail: without the sidecar's rows moved, the function is another."""
    expected, _ = logits(tiny.converted(name), "predictor")
    model = put(hot(name, "f32"), tmp_path)
    same = {key: read_header(model).keys[key] for key in ("turbosparse.pair_id", KEY)}
    edited(sidecar_of(tiny.converted(name)), sidecar_of(model), keys=same)
    found, _ = logits(model, "predictor")
    assert nmse(found, expected) > 1e-3


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_four_bit_rows_are_the_same_in_the_stated_order(name, sparsity):
    model, target = tiny.converted(name, "q4_0"), hot(name, "q4_0", sparsity)
    order = expected_order(random_stats(model, sparsity))
    assert neuron_order(read_header(target)).tolist() == order
    check_rows(model, target, order)
    check_rows(sidecar_of(model), sidecar_of(target), order)


@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
@pytest.mark.parametrize("name", NAMES)
def test_convert_with_a_profile(name, outtype, tmp_path):
    """One pass over the checkpoint gives the bytes of two steps, but for the random pair_id."""
    two = hot(name, outtype)
    profile = two.with_name("stats-predictor.gguf")
    one = tsconv.convert(CHECKPOINTS / name, tmp_path / "one.gguf", outtype, profile=profile).model
    check_alike(one, two)


@pytest.mark.parametrize("name", NAMES)
def test_back_to_the_checkpoint_s_order(name, tmp_path):
    """Rows taken at the inverse of the stated order are the unordered model's."""
    model, target = tiny.converted(name, "q4_0"), hot(name, "q4_0")
    where = inverse(neuron_order(read_header(target)))
    before, after = tensors(model), tensors(target)
    suffix = "_exps" if where.shape[1] > 1 else ""
    for layer, part in ((0, "gate"), (1, "up"), (2, "down")):
        tensor = f"blk.{layer}.ffn_{part}{suffix}.weight"
        rows = after[tensor][2].reshape(*where.shape[1:], -1)
        assert (np.take_along_axis(rows, where[layer][..., None], 1).reshape(-1) == before[tensor][2]).all()


# ---- the native library


def test_old_sidecar(tmp_path):
    """The sidecar of the unordered model does not fit, and the line says so."""
    name = NAMES[0]
    model = put(hot(name, "f32"), tmp_path, with_sidecar=False)
    shutil.copy(sidecar_of(tiny.converted(name)), sidecar_of(model))
    assert_in(refusal(model), f"{sidecar_of(model)}: is the sidecar of another model than", "expected pair_id")
    pair_id = {"turbosparse.pair_id": read_header(model).keys["turbosparse.pair_id"]}
    edited(sidecar_of(tiny.converted(name)), sidecar_of(model), keys=pair_id)
    assert_in(refusal(model), "expected hot_first, found checkpoint; reorder both files together")


def identities(order: np.ndarray, first: int = 0, last: int | None = None) -> list[int]:
    """What a layer of a model with this order may say, but for its first and last number."""
    values = list(range(order.shape[2])) * order.shape[1]
    values[0], values[-1] = first, order.shape[2] - 1 if last is None else last
    return values


U32 = gguf.GGUFValueType.UINT32
WORDS = "expected 'checkpoint' or 'hot_first', found"
LIST = "neurons once, found another list in FFN"
# edit: (keys that are changed in a model with this order, keys left out, what the line must say)
EDITS = {
    "unknown": (lambda order: {KEY: "cold_first"}, [], f"key {KEY}: {WORDS} 'cold_first'"),
    "no array": (lambda order: {}, [f"{KEY}.2"], f"key {KEY}.2 is missing"),
    "no list": (lambda order: {f"{KEY}.0": (1, U32)}, [], f"key {KEY}.0 has the wrong type: expected arr, found u32"),
    "short": (lambda order: {f"{KEY}.2": identities(order)[:-1]}, [], f"key {KEY}.2: expected i32["),
    "twice": (lambda order: {f"{KEY}.0": identities(order, 1)}, [], f"{LIST} 0; convert and reorder again"),
    "negative": (lambda order: {f"{KEY}.1": identities(order, -1)}, [], f"{LIST} 0"),
    "most negative": (lambda order: {f"{KEY}.1": identities(order, -(2**31))}, [], f"{LIST} 0"),
    "beyond": (lambda order: {f"{KEY}.2": identities(order, 0, order.shape[2])}, [], f"{LIST} {{last}}"),
}


@pytest.mark.sanitized
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_order(tmp_path, name, edit):
    changes, without, message = EDITS[edit]
    original = hot(name, "f32")
    order = neuron_order(read_header(original))
    model = put(original, tmp_path)
    edited(original, model, keys=changes(order), without=without)
    assert_in(refusal(model), f"error: {model}: ", f"key {KEY}", message.format(last=order.shape[1] - 1))


def test_unknown_order_of_the_pair(tmp_path):
    """Both files agree on a word that no reader knows."""
    model = put(tiny.converted(), tmp_path)
    for file, original in ((model, tiny.converted()), (sidecar_of(model), sidecar_of(tiny.converted()))):
        edited(original, file, keys={KEY: ""})
    assert_in(refusal(model), f"error: {model}: key {KEY}: {WORDS} ''")
