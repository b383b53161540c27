"""Which weights are in RAM, by what the kernel says of their pages; and what is chosen for a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest

import tsconv
from support import TESTS, synthetic, tiny
from support.edited import edited
from support.memory_map import (
    cached,
    drop_cache,
    locked_bytes,
    locked_in_process,
    may_lock,
    page_set,
    present,
    release,
)
from support.panels import FFN_LAYOUT
from tsconv.bench.synthetic import Shape, tensor_shapes, to_bf16
from tsconv.errors import BackendError
from tsconv.format.header import Header, read_header

TOKENS = [1, 20, 300, 7]
STEP = 32  # predictors let every so manieth neuron through
SHAPES = {  # rows of 5 kB in f32: larger than a page, and not whole pages
    "dense": Shape(synthetic.N_VOCAB, 1280, 256, 10, 2, 2, ranks=(32, 32)),
    "moe": Shape(synthetic.N_VOCAB, 1280, 64, 10, 2, 1, ranks=(32,), n_expert=4, rope_theta=1e6),
}
SHAPES["dense in rows"] = SHAPES["dense"]
HOT = {"dense": np.array([[100], [37]]), "moe": np.array([[64, 0, 7, 64]])}
HOT["dense in rows"] = HOT["dense"]


@pytest.fixture(scope="module")
def large_rows(tmp_path_factory) -> dict[str, Path]:
    """A model of each kind in f32, whose predictors let every STEPth neuron through whatever their input is."""
    models = {}
    for kind, shape in SHAPES.items():
        directory = tmp_path_factory.mktemp(kind.split()[0])
        block = to_bf16(np.random.default_rng(0).standard_normal(100003, dtype=np.float32) / 8)
        tensors = {
            name: np.resize(block, dims) if len(dims) > 1 else np.full(dims, 0x3F80, np.uint16)  # bf16 1.0
            for name, dims in tensor_shapes(shape).items()
        }
        sign = np.where(np.arange(shape.n_ff) % STEP == 0, np.float32(1), np.float32(-1))
        for name in tensors:
            if name.endswith("predictor.fc2.weight"):
                tensors[name] = to_bf16(np.repeat(sign[:, None], tensors[name].shape[1], axis=1))
        checkpoint = synthetic.save(directory / "checkpoint", shape, tensors)
        layout = "rows" if kind.endswith("rows") else "bundles"
        model = directory / f"{kind.split()[0]}.gguf"
        models[kind] = tsconv.convert(checkpoint, model, "f32", ffn_layout=layout).model
    return models


def ffn_tensors(header: Header) -> list[tuple[int, int, int]]:
    """(layer, first byte, bytes) of gate, up and down of every layer."""
    found = [t for t in header.tensors if any(f".ffn_{part}" in t.name for part in ("gate", "up", "down"))]
    found = [t for t in found if "inp" not in t.name]
    return [(int(t.name.split(".")[1]), t.offset, t.n_bytes) for t in found]


def inside(model: Path) -> set[int]:
    """Pages that hold nothing but FFN weights."""
    return set().union(*(page_set(at, at + n, whole=True) for _, at, n in ffn_tensors(read_header(model))))


def rows(model: Path, chosen: dict[int, list[list[int]]]) -> set[int]:
    """Pages with a byte of the gate, up or down row of the chosen neurons: {layer: [ffn] -> neurons}."""
    header = read_header(model)
    n_ff = header.keys["llama.feed_forward_length"]
    bundles = header.keys.get(FFN_LAYOUT) == "bundles"
    pages: set[int] = set()
    tensors = ffn_tensors(header)
    for layer, ffns in chosen.items():
        parts = [(at, n_bytes) for number, at, n_bytes in tensors if number == layer]
        n_rows = len(ffns) * n_ff
        row = parts[0][1] // n_rows
        for ffn, neurons in enumerate(ffns):
            for i in neurons:
                for k in range(3):
                    part, n = divmod(3 * (ffn * n_ff + i) + k, n_rows) if bundles else (k, ffn * n_ff + i)
                    begin = parts[part][0] + n * row
                    pages |= page_set(begin, begin + row)
    return pages


def hot_pages(model: Path, hot: np.ndarray) -> set[int]:
    return rows(model, {layer: [list(range(n)) for n in ffns] for layer, ffns in enumerate(hot)})


def sidecar_of(model: Path) -> Path:
    return model.with_suffix(".predictor.gguf")


# ---- pages


def test_only_what_is_computed_with_comes_back(large_rows):
    """Loading leaves no page of the file in the process; what a token needs comes back unchanged."""
    model = large_rows["dense"]
    llama = tsconv.load(model, n_threads=1)
    assert present(model) == set()
    expected = llama.token_logits(TOKENS)
    assert present(model) & inside(model)
    llama.close()
    again = tsconv.load(model, n_threads=1, use_mmap=False)
    np.testing.assert_array_equal(again.token_logits(TOKENS), expected)
    again.close()


def test_a_model_the_user_locks_stays(large_rows):
    model = large_rows["dense"]
    llama = tsconv.load(model, n_threads=1, use_mlock=True)
    if not locked_bytes(model):
        pytest.skip("this process may not lock so much")
    assert inside(model) <= present(model)
    assert len(present(model)) * os.sysconf("SC_PAGESIZE") >= locked_bytes(model)
    llama.close()


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", SHAPES)
def test_exactly_the_hot_pages_are_resident(large_rows, kind):
    model, hot = large_rows[kind], HOT[kind]
    llama = tsconv.load(model, n_threads=1)
    expected, ffn = hot_pages(model, hot), inside(model)
    assert not present(model) & ffn, "loading leaves no page of an FFN in the process"
    drop_cache(model)
    if cached(model) & ffn:
        pytest.skip("this file system does not evict pages")
    done = llama.place_in_memory(hot, read_ahead=False)
    assert present(model) & ffn == expected & ffn
    assert expected <= present(model)
    assert done.failures == ()
    page = os.sysconf("SC_PAGESIZE")
    assert done.hot_bytes == done.hot_resident_bytes == len(expected) * page
    assert done.ffn_bytes == sum(n for *_, n in ffn_tensors(read_header(model)))
    assert done.sidecar_bytes == done.sidecar_resident_bytes == len(present(sidecar_of(model))) * page
    assert done.sidecar_bytes >= sidecar_of(model).stat().st_size
    assert done.random_bytes == len(ffn - expected) * page
    assert done.locked_bytes == 0
    llama.close()


@pytest.mark.sanitized
def test_matrices_that_share_pages(tmp_path):
    """Smaller than a page and in another order than the layers': every page is counted once."""
    shape = Shape(synthetic.N_VOCAB, 64, 5, 4, 2, 8)
    checkpoint = synthetic.save(tmp_path / "checkpoint", shape, synthetic.random_tensors(shape))
    usual = tsconv.convert(checkpoint, tmp_path / "usual.gguf", "f32").model
    weights = {
        t.name: t.data.copy() for t in gguf.GGUFReader(usual).tensors if ".ffn_" in t.name and "norm" not in t.name
    }
    model = edited(usual, tmp_path / "m.gguf", without=list(weights), extra=dict(reversed(weights.items())))
    llama = tsconv.load(model, n_threads=1)
    expected = llama.token_logits(TOKENS)
    hot = np.full((shape.n_layer, 1), shape.n_ff)
    done = llama.place_in_memory(hot)
    assert done.hot_bytes == done.hot_resident_bytes == len(hot_pages(model, hot)) * os.sysconf("SC_PAGESIZE")
    np.testing.assert_array_equal(llama.token_logits(TOKENS), expected)
    llama.close()


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", SHAPES)
def test_cold_neurons_are_read_without_their_neighbours(large_rows, kind):
    model = large_rows[kind]
    header = read_header(model)
    shape = SHAPES[kind]
    on = [list(range(0, shape.n_ff, STEP))] * max(1, shape.n_expert)
    read = {}
    for read_ahead in (False, True):
        llama = tsconv.load(model, n_threads=1)
        done = llama.place_in_memory(np.zeros((shape.n_layer, len(on))), read_ahead=read_ahead)
        assert done.hot_bytes == 0
        llama.warm_up()  # attention comes in, and what is read ahead of it
        for _, at, n_bytes in ffn_tensors(header):
            release(model, at, at + n_bytes)
        drop_cache(model)
        if cached(model) & inside(model):
            pytest.skip("this file system does not evict pages")
        llama.token_logits(TOKENS[:1])
        read[read_ahead] = cached(model) & inside(model)
        llama.close()
    possible = rows(model, dict.fromkeys(range(header.keys["llama.block_count"]), on))
    assert read[False]
    assert read[False] <= possible
    assert read[False] < read[True]


@pytest.mark.sanitized
@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
def test_the_function_stays(name, use_mmap, sparsity):
    model = tiny.converted(name)
    llama = tsconv.load(model, n_threads=1, use_mmap=use_mmap, sparsity=sparsity)
    expected = llama.token_logits(TOKENS)
    keys = read_header(model).keys
    shape = keys["llama.block_count"], max(1, keys.get("llama.expert_count", 0))
    for n, lock, read_ahead in ((100, True, False), (0, False, False), (keys["llama.feed_forward_length"], True, True)):
        done = llama.place_in_memory(np.full(shape, n), lock=lock, read_ahead=read_ahead)
        assert done.hot_resident_bytes == done.hot_bytes
        assert (done.random_bytes > 0) == (use_mmap and not read_ahead)
        assert (done.sidecar_bytes > 0) == (sparsity == "predictor")
        llama.warm_up()
        assert llama.ffn_stats()[0]["calls"] == 0
        np.testing.assert_array_equal(llama.token_logits(TOKENS), expected)
    llama.close()


def test_several_contexts(large_rows):
    """Models over one file have mappings of their own; several threads may place while others compute."""
    model = large_rows["dense"]
    first, second = (tsconv.load(model, n_threads=1) for _ in range(2))
    expected = first.token_logits(TOKENS)
    failed = []

    def place(llama, seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(20):
                llama.place_in_memory(rng.integers(0, 257, (2, 1)), lock=bool(seed % 2), read_ahead=bool(seed // 2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=place, args=(llama, i)) for i, llama in enumerate([first, first, second])]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        np.testing.assert_array_equal(second.token_logits(TOKENS), expected)
    assert failed == []
    before = locked_bytes(model)
    done = second.place_in_memory(HOT["dense"], lock=True)
    assert locked_bytes(model) - before <= done.hot_locked_bytes
    first.place_in_memory(HOT["dense"], lock=False)
    first.close()
    assert locked_bytes(model) == done.hot_locked_bytes
    np.testing.assert_array_equal(second.token_logits(TOKENS), expected)
    second.close()


def test_numbers_that_do_not_fit(large_rows):
    llama = tsconv.load(large_rows["moe"], n_threads=1)
    for hot, message in (
        ([[1, 2, 3]], "expected a number for each of 1 layers times 4 FFNs, found 3"),
        ([[1, 2, 3, 65]], "hot neurons of layer 0, FFN 3: expected 0 to 64, found 65"),
        ([[1, -2, 3, 4]], "hot neurons of layer 0, FFN 1: expected 0 to 64, found -2"),
    ):
        with pytest.raises(BackendError, match=message):
            llama.place_in_memory(hot)
    llama.close()
    with pytest.raises(BackendError, match="the model is closed"):
        llama.place_in_memory(HOT["moe"])


# ---- locks (AddressSanitizer makes mlock do nothing)


@pytest.mark.parametrize("use_mmap", [True, False])
def test_locked_bytes(large_rows, use_mmap):
    """What is reported locked is what the kernel counts; a later call replaces it, and closing ends it."""
    model, hot = large_rows["dense"], HOT["dense"]
    before = locked_in_process()
    llama = tsconv.load(model, n_threads=1, use_mmap=use_mmap)
    done = llama.place_in_memory(hot, lock=True)
    if done.failures:
        pytest.skip(f"this process may not lock so much: {done.failures}")
    assert done.locked_bytes == done.hot_bytes + done.sidecar_bytes > 0
    assert locked_in_process() - before == done.locked_bytes
    assert locked_bytes(sidecar_of(model)) == done.sidecar_bytes
    if use_mmap:
        assert locked_bytes(model) == done.hot_bytes
    less = llama.place_in_memory(hot // 2, lock=True)
    assert less.locked_bytes < done.locked_bytes
    assert locked_in_process() - before == less.locked_bytes
    assert llama.place_in_memory(hot).locked_bytes == 0
    assert locked_in_process() == before
    llama.place_in_memory(hot, lock=True)
    llama.close()
    assert locked_in_process() == before


LIMITED = """
import json, sys
from pathlib import Path
import dataclasses, tsconv
from support.memory_map import locked_in_process, locked_ranges
model, hot, sparsity = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
llama = tsconv.load(model, n_threads=1, sparsity=sparsity)
done = llama.place_in_memory(hot, lock=True)
logits = llama.token_logits([1, 20, 300, 7])
print(json.dumps(dataclasses.asdict(done) | {"process": locked_in_process(), "ranges": locked_ranges(model)}))
"""


def limited(model: Path, n_bytes: int, sparsity: str = "exact") -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(model), json.dumps(HOT["dense"].tolist()), sparsity],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        preexec_fn=may_lock(n_bytes),
        capture_output=True,
        text=True,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["dense", "dense in rows"])
def test_a_limit_leaves_out_the_coldest_of_every_ffn(large_rows, kind):
    model, hot = large_rows[kind], HOT[kind]
    header = read_header(model)
    page = os.sysconf("SC_PAGESIZE")
    matrices = ffn_tensors(header)  # (layer, first byte, bytes) of what has a hot prefix
    if kind == "dense":
        matrices = [(gate[0], gate[1], sum(n for *_, n in matrices[i : i + 3])) for i, gate in enumerate(matrices)][::3]
    prefixes = [
        (at, n * int(hot[layer, 0]) // header.keys["llama.feed_forward_length"], n) for layer, at, n in matrices
    ]
    limit = sum(n for _, n, _ in prefixes) // 2 // page * page
    found = limited(model, limit)
    assert found["hot_resident_bytes"] == found["hot_bytes"]
    assert limit - 16 * page <= found["hot_locked_bytes"] <= limit
    assert found["process"] == found["hot_locked_bytes"]
    assert found["lock_limit_bytes"] == limit
    assert found["failures"] == ["locking: Cannot allocate memory"]
    for at, n_hot, n_bytes in prefixes:
        locked = [(max(at, b), min(at + n_bytes, e)) for b, e in found["ranges"] if b < at + n_bytes and e > at]
        n_locked = sum(e - b for b, e in locked)
        assert 0.35 * n_hot < n_locked < 0.65 * n_hot, "half of each"
        assert min(b for b, _ in locked) - at < page, "the front"


def test_a_limit_goes_to_the_predictors_first(large_rows):
    model = large_rows["dense"]
    page = os.sysconf("SC_PAGESIZE")
    n = -(-sidecar_of(model).stat().st_size // page) * page
    found = limited(model, n + 20 * page, "predictor")
    assert found["sidecar_locked_bytes"] == found["sidecar_bytes"] == n
    assert 0 < found["hot_locked_bytes"] <= 20 * page
    found = limited(model, n // 2, "predictor")
    assert 0.9 * (n // 2) < found["sidecar_locked_bytes"] <= n // 2
    assert found["hot_locked_bytes"] == 0
    assert limited(model, 0, "predictor")["process"] == 0
