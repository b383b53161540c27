"""Which neuron is hot, orders and what reads them, and the checkpoint's fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from support.edited import edited
from support.random_stats import expected_order, random_stats
from support.synthetic import SHAPES, random_tensors, save, save_adapter, write_predictors
from tsconv import convert
from tsconv.errors import ModelFileError
from tsconv.format.adapter import refuse_adapter
from tsconv.format.header import read_header
from tsconv.format.order import neuron_order
from tsconv.format.summary import summarise_file
from tsconv.stats.counts import Counts, merge
from tsconv.stats.heat import described, hot_first, hot_order, rows_read
from tsconv.transform.neuron_order import between, by_tensor, inverse

KEY = "turbosparse.neuron_order"
FINGERPRINT = "turbosparse.source.fingerprint"
N_FF = SHAPES["mistral"].n_ff


@pytest.fixture(scope="module", params=["mistral", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, shape = tmp_path_factory.mktemp("model"), SHAPES[request.param]
    return convert(save(folder / "c", shape, random_tensors(shape)), folder / "m.gguf", "f16").model


# ---- heat


def test_rows_read_of_known_counts() -> None:
    """One layer, one FFN, three neurons; counts are in the order of COUNTS."""
    neurons = np.array([[5, 9, 0], [1, 1, 1], [4, 2, 0], [8, 3, 0], [3, 3, 0], [2, 1, 0]]).reshape(6, 1, 1, 3)
    counts = Counts(np.array([[10]]), neurons, np.zeros((1, 3, 130), np.int64))
    np.testing.assert_array_equal(rows_read(counts, "predictor"), [[[8 + 3 + 2, 3 + 3 + 1, 0]]])
    np.testing.assert_array_equal(rows_read(counts, "exact"), [[[10 + 5 + 4, 10 + 9 + 2, 10]]])
    with pytest.raises(ValueError, match="neither"):
        rows_read(counts, "dense")


def test_hot_first_is_stable() -> None:
    order = hot_first(np.array([[[3, 7, 3, 7, 0]], [[0, 0, 0, 0, 0]]]))
    assert order.dtype == np.int32
    assert order.tolist() == [[[1, 3, 0, 2, 4]], [[0, 1, 2, 3, 4]]]


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
def test_hot_order_sorts_by_heat(model: Path, sparsity: str) -> None:
    stats = random_stats(model, sparsity)
    shape = (stats.subject.n_layer, stats.subject.n_ffn, stats.subject.n_ff)
    order = hot_order(stats, shape)
    assert order.tolist() == expected_order(stats)
    heat = np.take_along_axis(rows_read(stats.total, sparsity), order, axis=-1)
    assert (np.diff(heat) <= 0).all() and (np.diff(heat) < 0).any() and (np.diff(heat) == 0).any()
    with pytest.raises(ModelFileError, match="do not fit the model: expected 2 layers of 1 x 7 neurons, found 2 of"):
        hot_order(stats, (2, 1, 7))


def test_the_two_functions_have_other_orders(model: Path) -> None:
    predictor, exact = (expected_order(random_stats(model, sparsity)) for sparsity in ("predictor", "exact"))
    assert predictor != exact


def test_described(model: Path) -> None:
    stats = random_stats(model)
    assert described(stats) == "some/text plain at 0123abc: 60 tokens"
    assert described(merge([stats, random_stats(model, seed=1)])) == "some/text plain at 0123abc: 120 tokens"


# ---- orders


def test_inverse_and_between() -> None:
    rng = np.random.default_rng(0)
    stored, wanted = (np.argsort(rng.random((2, 3, 50))).astype(np.int32) for _ in range(2))
    weights = rng.random((2, 3, 50))  # one "row" per neuron, as the checkpoint has them
    file = np.take_along_axis(weights, stored, -1)
    np.testing.assert_array_equal(np.take_along_axis(file, inverse(stored), -1), weights)
    np.testing.assert_array_equal(
        np.take_along_axis(file, between(stored, wanted), -1), np.take_along_axis(weights, wanted, -1)
    )
    identity = np.broadcast_to(np.arange(50, dtype=np.int32), (2, 3, 50))
    np.testing.assert_array_equal(between(identity, wanted), wanted)
    np.testing.assert_array_equal(between(wanted, wanted), identity)


def test_by_tensor_names_the_files_tensors(model: Path) -> None:
    """All tensors with neurons for rows, and no others."""
    header, sidecar = read_header(model), read_header(model.with_suffix(".predictor.gguf"))
    order = neuron_order(header)
    found = by_tensor(order, "llama.expert_count" in header.keys)
    names = [{t.name for t in file.tensors if N_FF in t.shape} for file in (header, sidecar)]
    assert [set(part) for part in found] == names
    assert {part.shape for part in found[0].values()} == {order.shape[1:]}
    assert {part.shape for part in found[1].values()} == {(1, N_FF)}


# ---- reading the order of a file


def hot(model: Path, target: Path, **changes: Any) -> Path:
    """A copy that says hot_first and gives the reversed order; `changes` are keys instead, None to leave one out."""
    n_ffn = max(1, read_header(model).keys.get("llama.expert_count", 0))
    keys: dict[str, Any] = {KEY: "hot_first"}
    keys |= {f"{KEY}.{n}": list(range(N_FF))[::-1] * n_ffn for n in range(2)} | changes
    return edited(model, target, keys={key: value for key, value in keys.items() if value is not None})


def test_order_of_the_checkpoint(model: Path) -> None:
    header = read_header(model)
    order = neuron_order(header)
    n_ffn = max(1, header.keys.get("llama.expert_count", 0))
    np.testing.assert_array_equal(order, np.tile(np.arange(N_FF), (2, n_ffn, 1)))


def test_order_from_the_arrays(model: Path, tmp_path: Path) -> None:
    path = hot(model, tmp_path / "hot.gguf")
    order = neuron_order(read_header(path))
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, np.tile(np.arange(N_FF)[::-1], (2, order.shape[1], 1)))
    assert summarise_file(read_header(path)).keys[KEY] == "hot_first"


U32 = gguf.GGUFValueType.UINT32
ALL = list(range(N_FF))
LIMIT = "expected 1 to"

# what is wrong: (keys that are changed in a model of n FFNs per layer, what the line must say)
DAMAGE = {
    "no array": (lambda n: {f"{KEY}.1": None}, f"bad {KEY}.1: expected int32"),
    "no list": (lambda n: {f"{KEY}.0": (1, U32)}, f"bad {KEY}.0: expected int32"),
    "type": (lambda n: {f"{KEY}.0": [float(i) for i in ALL] * n}, "found float32["),
    "short": (lambda n: {f"{KEY}.0": (ALL * n)[:-1]}, f"bad {KEY}.0: expected int32"),
    "twice": (lambda n: {f"{KEY}.1": [0, 0, *ALL[2:]] + ALL * (n - 1)}, "neuron 0 2 times in FFN 0"),
    "missing": (lambda n: {f"{KEY}.1": ALL * (n - 1) + [1, *ALL[1:]]}, "neuron 0 0 times in FFN"),
    "negative": (lambda n: {f"{KEY}.0": [-1, *ALL[1:]] + ALL * (n - 1)}, "neuron 0 0 times"),
    "beyond": (lambda n: {f"{KEY}.0": [N_FF, *ALL[1:]] + ALL * (n - 1)}, "neuron 0 0 times"),
    "unknown": (lambda n: {KEY: "cold_first"}, f"bad {KEY}: expected 'checkpoint' or 'hot_first', found 'cold_first'"),
    "no word": (lambda n: {KEY: (1, U32)}, f"bad {KEY}: expected 'checkpoint' or 'hot_first', found 1"),
    "layers": (lambda n: {"llama.block_count": 3}, f"bad {KEY}.2: expected int32"),
    "many layers": (lambda n: {"llama.block_count": 2**31}, f"bad llama.block_count: {LIMIT} 512"),
    "no n_ff": (lambda n: {"llama.feed_forward_length": 0}, f"bad llama.feed_forward_length: {LIMIT} 1048576, found 0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_order(model: Path, tmp_path: Path, damage: str) -> None:
    changes, message = DAMAGE[damage]
    n_ffn = max(1, read_header(model).keys.get("llama.expert_count", 0))
    path = hot(model, tmp_path / "hot.gguf", **changes(n_ffn))
    for reading in (lambda: neuron_order(read_header(path)), lambda: summarise_file(read_header(path))):
        with pytest.raises(ModelFileError) as caught:
            reading()
        assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_order_of_nothing(model: Path, tmp_path: Path) -> None:
    for name in (model, model.with_suffix(".predictor.gguf")):
        path = edited(name, tmp_path / "m.gguf", without=[KEY])
        with pytest.raises(ModelFileError, match=f"bad {KEY}: expected 'checkpoint' or 'hot_first', found nothing"):
            summarise_file(read_header(path))


# ---- adapters


@pytest.mark.parametrize("part", ["attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp", "ffn_up_exps"])
def test_adapter_for_another_order(model: Path, tmp_path: Path, part: str) -> None:
    """Only what touches neurons is refused, and only where they were reordered."""
    name = f"blk.0.{part}.weight"
    shape = next((tensor.shape for tensor in read_header(model).tensors if tensor.name == name), None)
    adapter = read_header(save_adapter(tmp_path / "lora.gguf", name, shape or (64, 96)))
    if shape is None:  # the other family's
        with pytest.raises(ModelFileError, match=f"the adapter changes {name}, which {model} does not have"):
            refuse_adapter(read_header(model), adapter)
        return
    refuse_adapter(read_header(model), adapter)
    reordered = read_header(hot(model, tmp_path / "hot.gguf"))
    if part in ("attn_output", "ffn_gate_inp"):
        refuse_adapter(reordered, adapter)
        return
    with pytest.raises(ModelFileError) as caught:
        refuse_adapter(reordered, adapter)
    line = f"the adapter changes blk.0.{part}.weight, whose neurons are in another order in {reordered.path}"
    assert str(caught.value).startswith(f"{adapter.path}: {line}; use it with")


# ---- fingerprint


def fingerprint(checkpoint: Path, target: Path, outtype: str = "f16", **options: Any) -> str:
    result = convert(checkpoint, target, outtype, force=True, **options)
    (found,) = {
        gguf.GGUFReader(path).get_field(FINGERPRINT).contents() for path in (result.model, result.sidecar) if path
    }
    return found


def gate_names(family: str) -> list[str]:
    """Layer after layer, expert after expert."""
    shape = SHAPES[family]
    if shape.n_expert:
        experts = [f"block_sparse_moe.experts.{e}.w1" for e in range(shape.n_expert)]
    else:
        experts = ["mlp.gate_proj"]
    return [f"model.layers.{n}.{expert}.weight" for n in range(shape.n_layer) for expert in experts]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("family", SHAPES)
def test_fingerprint_is_as_documented(family: str, dtype: str, tmp_path: Path) -> None:
    shape, tensors = SHAPES[family], random_tensors(SHAPES[family], dtype)
    text = f"tsconv fingerprint 1\n{shape.n_layer} {shape.n_embd} {shape.n_ff} {shape.n_expert}\n".encode()
    for name in gate_names(family):
        text += f"{dtype}\n".encode() + b"".join(tensors[name][row].tobytes() for row in (0, 64))
    expected = hashlib.sha256(text).hexdigest()
    for n_shards, outtype in ((1, "f32"), (3, "q8_0")):
        checkpoint = save(tmp_path / str(n_shards), shape, tensors, n_shards)
        assert fingerprint(checkpoint, tmp_path / "m.gguf", outtype) == expected


@pytest.mark.parametrize("family", SHAPES)
def test_fingerprint_tells_checkpoints_apart(family: str, tmp_path: Path) -> None:
    """Any hashed row of any gate matrix counts, and where it is; others do not."""
    shape, tensors = SHAPES[family], random_tensors(SHAPES[family])
    first = fingerprint(save(tmp_path / "c", shape, tensors), tmp_path / "m.gguf")
    names, seen = gate_names(family), {first}
    for name in names:
        for row in (0, 64):
            changed = tensors | {name: tensors[name].copy()}
            changed[name][row, -1] ^= 1
            seen.add(fingerprint(save(tmp_path / "c", shape, changed), tmp_path / "m.gguf"))
    swapped = tensors | {names[0]: tensors[names[-1]], names[-1]: tensors[names[0]]}
    seen.add(fingerprint(save(tmp_path / "c", shape, swapped), tmp_path / "m.gguf"))
    assert len(seen) == 2 + 2 * len(names)
    assert all(len(bytes.fromhex(digest)) == 32 and digest == digest.lower() for digest in seen)
    other = tensors | {"model.norm.weight": tensors["model.norm.weight"] ^ 1}
    assert fingerprint(save(tmp_path / "c", shape, other), tmp_path / "m.gguf") == first


def test_fingerprint_of_one_checkpoint_with_and_without_predictors(tmp_path: Path) -> None:
    shape = SHAPES["bamboo"]
    checkpoint = save(tmp_path / "c", shape, random_tensors(shape))
    write_predictors(tmp_path / "p", shape, [32, 64])
    first = fingerprint(checkpoint, tmp_path / "m.gguf")
    assert fingerprint(checkpoint, tmp_path / "m.gguf", predictor=tmp_path / "p") == first


@pytest.mark.parametrize("value", ["", "0" * 63, "G" * 64, "A" * 64])
def test_fingerprint_that_is_none(model: Path, tmp_path: Path, value: str) -> None:
    path = edited(model, tmp_path / "m.gguf", keys={FINGERPRINT: value})
    with pytest.raises(ModelFileError, match=f"bad {FINGERPRINT}: expected 64 lower-case hex digits, found '{value}'"):
        summarise_file(read_header(path))


def test_older_files_have_no_fingerprint(model: Path, tmp_path: Path) -> None:
    path = edited(model, tmp_path / "m.gguf", without=[FINGERPRINT])
    assert FINGERPRINT not in summarise_file(read_header(path)).keys
