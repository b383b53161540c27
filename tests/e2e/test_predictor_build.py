"""`tsconv predictor build`: what the backend lets through is what the formulas of docs/format.md say of the file."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

import tsconv
from support import CHECKPOINTS, tiny
from support.edited import edited
from tsconv.errors import ModelFileError
from tsconv.format.header import Header, read_header
from tsconv.runtime.layers import LayersContext
from tsconv.stats.counts import COUNTS, HISTOGRAMS, N_BINS

NAMES = {"dense": "tiny-turbosparse-mistral", "moe": "tiny-turbosparse-mixtral"}
HELDOUT = CHECKPOINTS / "heldout.txt"
KINDS = {
    "sign": ("--kind", "sign"),
    "sign-margins": ("--kind", "sign", "--calib", "builtin", "--tokens", "256"),
    "bits1": ("--kind", "quant", "--type", "bits1", "--input-bits", "4"),
    "bits2": ("--kind", "quant", "--both", "--calib", "builtin", "--tokens", "256", "--target-miss", "0.1"),
    "q4_0": ("--kind", "quant", "--type", "q4_0"),
    "f16": ("--kind", "quant", "--type", "f16", "--both"),
    "svd": ("--kind", "svd", "--calib", "builtin", "--tokens", "256"),
}
EXACT = ("sign", "sign-margins", "bits1", "bits2")  # kinds whose sums are integers


def build(model: Path, out: Path, *options: str | Path) -> Path:
    done = tiny.run("predictor", "build", model, "--out", out, "-t", 1, *options)
    assert done.returncode == 0, done.stderr
    return out


def rows_of(header: Header, name: str) -> np.ndarray | None:
    """The rows of a matrix of the sidecar, float64; panels of 16 rows as docs/format.md lays them out."""
    found = [tensor for tensor in header.tensors if tensor.name == name]
    if not found:
        return None
    (tensor,) = found
    with open(header.path, "rb") as file:
        file.seek(tensor.offset)
        data = np.frombuffer(file.read(tensor.n_bytes), np.uint8)
    n_rows = tensor.shape[1] if len(tensor.shape) < 3 else tensor.shape[1] * tensor.shape[2]
    if tensor.kind.name in ("I16", "I32"):
        n_bits = 1 if tensor.kind.name == "I16" else 2
        words = data.view("<u4").reshape(n_rows // 16, -1, n_bits, 16)  # panel, block of columns, bit, row
        signs = 1 - 2 * (words[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.int64)
        weights = (signs * (1 << np.arange(n_bits))[:, None, None]).sum(axis=2)  # panel, block, row, column
        return weights.swapaxes(1, 2).reshape(n_rows, -1).astype(np.float64)
    if tensor.kind.name in ("Q4_0", "Q8_0"):
        n_words = 4 if tensor.kind.name == "Q4_0" else 8
        block = np.dtype([("d", "<f2", (16,)), ("q", "u1", (n_words, 16, 4))])
        panels = data.view(block).reshape(n_rows // 16, -1)
        q = panels["q"].transpose(0, 3, 1, 2, 4).reshape(n_rows, panels.shape[1], 4 * n_words)
        d = panels["d"].transpose(0, 2, 1).reshape(n_rows, -1, 1).astype(np.float64)
        if n_words == 4:
            q = np.concatenate([q & 15, q >> 4], axis=-1).astype(np.int64) - 8
        else:
            q = q.view(np.int8).astype(np.int64)
        return (d * q).reshape(n_rows, -1)
    return gguf.dequantize(data.reshape(n_rows, -1), tensor.kind).reshape(n_rows, -1).astype(np.float64)


def rounded_input(x: np.ndarray, n_bits: int) -> np.ndarray:
    """The odd integers q of docs/format.md, and d, in the float32 arithmetic that it prescribes."""
    if n_bits == 1:
        return np.where(x >= 0, 1.0, -1.0), np.float32(1)
    most = np.float32((1 << n_bits) - 1)
    largest = np.abs(x).max(axis=1, keepdims=True)
    places = np.rint(x * (np.float32(0.5) * most / largest) + np.float32(0.5) * most)
    return 2.0 * places - most, largest / most


def masks(header: Header, layer: int, expert: int | None, x: np.ndarray) -> np.ndarray:
    """Which neurons are on, bool [n, n_ff], of inputs x float32."""
    suffix = "" if expert is None else f".{expert}"
    matrices = {
        what: rows_of(header, f"blk.{layer}.ffn_pred_{what}{suffix}.weight")
        for what in ("fc1", "fc2", "gate", "up", "threshold")
    }
    scale: np.ndarray | np.float32 = np.float32(1)
    p: np.ndarray = x
    if bits := header.keys.get("turbosparse.predictor.input_bits"):
        p, scale = rounded_input(x, bits)
    logits = []
    if matrices["fc1"] is not None:
        assert header.keys["turbosparse.predictor.form"] == "linear"
        logits.append((p @ matrices["fc1"].T) @ matrices["fc2"].T)
    for what in ("gate", "up"):
        if matrices[what] is not None:
            logits.append(p @ matrices[what].T)
    thresholds = matrices["threshold"]
    found = np.stack([(v.astype(np.float32) * scale).astype(np.float32) for v in logits])
    if thresholds is not None:
        found -= thresholds.astype(np.float32).reshape(len(logits), 1, -1)
    return (found > 0).all(axis=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", NAMES)
def test_masks(tmp_path, shape, kind):
    """Counted for each neuron: equal for kinds of integers, but for a logit that rounding moves over 0 for others."""
    model = tiny.converted(NAMES[shape])
    sidecar = build(model, tmp_path / "p.predictor.gguf", *KINDS[kind])
    header = read_header(sidecar)
    llama = tsconv.load(model, predictor_path=sidecar, sparsity="predictor", n_ctx=1, n_threads=2)
    n_layer, n_ffn = llama.header.keys["llama.block_count"], max(1, llama.header.keys.get("llama.expert_count", 0))
    n_ff = llama.header.keys["llama.feed_forward_length"]
    want = np.zeros((n_layer, n_ffn, n_ff), np.int64)

    def add(layer, ffns, x, h):
        for e in np.unique(ffns).tolist():
            want[layer, e] += masks(header, layer, e if n_ffn > 1 else None, x[ffns == e].copy()).sum(axis=0)

    tokens = llama.tokenize(HELDOUT.read_bytes()[:1200])[:200]
    found = np.zeros((n_layer, len(COUNTS), n_ffn, n_ff), np.int64)
    with llama.profiling() as native, LayersContext(llama, 200) as layers, llama.recording(range(n_layer), add):
        layers.compute(tokens)
        for n in range(n_layer):
            native.read_profile(n, np.zeros(n_ffn, np.int64), found[n], np.zeros((len(HISTOGRAMS), N_BINS), np.int64))
    llama.close()
    counted = found[:, COUNTS.index("predicted")]
    assert 0 < counted.sum() < n_ff * n_layer * len(tokens) * 2
    wrong = np.abs(counted - want).sum()
    assert wrong == 0 if kind in EXACT else wrong <= 1e-4 * counted.sum() + 2


def test_margins_miss_what_they_may():
    """On the text that they were chosen on: about the share asked for, and fewer neurons for a larger share."""
    model = tiny.converted(NAMES["dense"])
    folder = model.parent
    found = []
    for share in ("0.001", "0.05"):
        out = build(
            model, folder / f"margins-{share}.predictor.gguf", "--kind", "quant", "--type", "q8_0", "--both", "--force",
            "--calib", HELDOUT, "--tokens", "1024", "--target-miss", share,
        )  # fmt: skip
        arguments = ("-m", model, "-f", HELDOUT, "-c", 512, "--chunks", 2, "--predictor", out, "--json", "-t", 1)
        done = tiny.run("eval", "predictor", *arguments)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0]["predicted"] > 1.3 * found[1]["predicted"] > 0
    assert found[0]["recall"] > found[1]["recall"] > 0
    assert found[1]["precision"] > 0.95  # q8_0 knows gate and up


def test_generated_text_with_every_kind(tmp_path):
    """Several sequences and single tokens, from memory and from disk: the same text."""
    model = tiny.converted(NAMES["dense"])
    for kind in ("sign-margins", "bits2", "svd"):
        sidecar = build(model, tmp_path / f"{kind}.predictor.gguf", *KINDS[kind])
        texts = []
        for budget in ("off", "24MB"):
            llama = tsconv.load(model, predictor_path=sidecar, n_ctx=64, n_threads=1, ram_budget=budget)
            texts.append(llama("In the beginning", max_tokens=12, temperature=0)["choices"][0]["text"])
            llama.close()
        assert texts[0] == texts[1] != ""


def test_the_comparison(tmp_path):
    """A line for each sidecar, with the bytes that a token reads; --json has the same."""
    model = tiny.converted(NAMES["moe"])
    paths = [build(model, tmp_path / f"{kind}.predictor.gguf", *KINDS[kind]) for kind in ("sign", "q4_0")]
    named = [argument for path in paths for argument in ("--predictor", path)]
    arguments = ("eval", "predictor", "-m", model, "-f", HELDOUT, "-c", 64, "--chunks", 2, "-t", 1, *named)
    table, values = (tiny.run(*arguments, *more) for more in ((), ("--json",)))
    assert (table.returncode, values.returncode) == (0, 0), (table.stderr, values.stderr)
    lines = table.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["predictor", *map(str, paths)]
    found = json.loads(values.stdout)["predictors"]
    for path, line, figures in zip(paths, lines[1:], found, strict=True):
        assert figures["predictor"] == str(path)
        assert f"{figures['bytes_predictor'] / 1e6:.3f}" in line
        matrices = sum(tensor.n_bytes for tensor in read_header(path).tensors)
        assert figures["bytes_predictor"] == pytest.approx(matrices * 2 / 8)  # two of eight experts


def test_reordered(tmp_path):
    """The rows of neurons go with them, margins too: the masks of the reordered pair are those of the pair."""
    original = tiny.converted(NAMES["moe"])
    model = tmp_path / "m.gguf"
    model.hardlink_to(original)
    build(model, tmp_path / "m.predictor.gguf", *KINDS["bits2"])
    stats = tmp_path / "s.gguf"
    assert tiny.run("profile", model, "--calib", HELDOUT, "--tokens", 256, "--outfile", stats).returncode == 0
    moved = tsconv.reorder(model, stats, tmp_path / "hot.gguf").model
    found = []
    for path in (model, moved):
        done = tiny.run("eval", "predictor", "-m", path, "-f", HELDOUT, "-c", 64, "--chunks", 3, "--json", "-t", 1)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    for key in ("recall", "precision", "predicted"):
        assert found[1][key] == pytest.approx(found[0][key], rel=2e-3), key


def test_a_model_without_predictors(tmp_path):
    """It takes those that lie beside it, and runs without them where exact sparsity is asked for."""
    from support import synthetic

    shape = synthetic.SHAPES["bamboo"]
    checkpoint = synthetic.save(tmp_path / "c", shape, synthetic.random_tensors(shape))
    model = tsconv.convert(checkpoint, tmp_path / "m.gguf", "f32").model
    build(model, tmp_path / "m.predictor.gguf", "--kind", "quant", "--type", "f16")
    for asked, got in ((None, "predictor"), ("exact", "exact")):
        llama = tsconv.load(model, sparsity=asked, n_ctx=32, n_threads=1)
        assert llama.sparsity == got
        llama.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kind", "svd", "--rank", "33"), ["--rank", "a multiple of 32", "33"]),
        (("--kind", "sign", "--rank", "32"), ["--rank is for --kind svd", "sign"]),
        (("--kind", "sign", "--type", "q4_0"), ["--type is for --kind quant and svd"]),
        (("--kind", "quant", "--type", "q9"), ["unknown type 'q9'"]),
        (("--kind", "quant", "--type", "q4_0", "--input-bits", "4"), ["--input-bits", "beside bits1 and bits2"]),
        (("--kind", "quant", "--type", "q4_K"), ["type q4_K does not fit", "a multiple of 256", "--type"]),
        (("--kind", "sign", "--calib", "/nowhere"), ["/nowhere"]),
    ],
)
def test_bad_options(tmp_path, options, said):
    out = tmp_path / "p.predictor.gguf"
    done = tiny.run("predictor", "build", tiny.converted(NAMES["dense"]), "--out", out, *options)
    line = done.stderr.decode()
    assert done.returncode != 0 and "Traceback" not in line and not list(tmp_path.iterdir())
    for part in said:
        assert part in line, line


GATE, THRESHOLD = "blk.1.ffn_pred_gate.weight", "blk.1.ffn_pred_threshold.weight"
BITS = "turbosparse.predictor.input_bits"
UP = "blk.1.ffn_pred_up.weight"
EDITS = {
    "no bits": ({"without": [BITS]}, f"key {BITS} is missing"),
    "many bits": ({"keys": {BITS: (9, gguf.GGUFValueType.UINT32)}}, f"key {BITS}: expected 1 to 8, found 9"),
    "rows": (
        {"keys": {"turbosparse.predictor.layout": "rows"}},
        "weights of 1 or 2 bits need panels16, an n_embd that is a multiple of 32 and an n_ff that is a multiple of 16"
        ", found rows, 128, 512",
    ),
    "nan": (
        {"data": {THRESHOLD: np.full((2, 512, 1), np.nan, np.float32)}},
        f"{THRESHOLD}: expected numbers, found nan for neuron 0; build the predictor again",
    ),
    "another type of up": (
        {"without": [UP], "extra": {UP: np.zeros((512, 128), np.float32)}},
        f"{UP}: expected type bits1, as gate has, found f32",
    ),
    "shape": (
        {"without": [GATE], "extra": {GATE: np.zeros((512, 9), np.int16)}},
        f"{GATE}: wrong shape: expected [8, 512, 1], found [9, 512, 1]",
    ),
    "no margins in a layer": (
        {"without": [THRESHOLD], "extra": {"more": np.zeros((2, 512, 1), np.float32)}},
        f"{THRESHOLD}: the tensor is missing",
    ),
    "version": (
        {"keys": {"turbosparse.format_version": (3, gguf.GGUFValueType.UINT32)}},
        "key turbosparse.predictor.form: expected from format version 4 on, found in version 3",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_sidecars_are_refused(tmp_path, edit):
    """In one line, which names file, key or tensor, expected and found."""
    model = tiny.converted(NAMES["dense"])
    sidecar = build(model, tmp_path / "p.predictor.gguf", *KINDS["sign-margins"])
    change, line = EDITS[edit]
    other = edited(sidecar, tmp_path / "other.predictor.gguf", **change)
    with pytest.raises(ModelFileError) as caught:
        tsconv.load(model, predictor_path=other, n_ctx=32, n_threads=1)
    assert str(other) in str(caught.value) and line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_takes_two_matrices_refuses_the_others(tmp_path):
    model = tiny.converted(NAMES["dense"])
    for kind in ("sign", "svd"):
        sidecar = build(model, tmp_path / f"{kind}.predictor.gguf", *KINDS[kind])
        done = tiny.run("predictor", "export", sidecar, "--out", tmp_path / "out")
        said = done.stderr.decode()
        assert done.returncode != 0 and f"{sidecar}: " in said and "expected turbosparse.predictor.form 'mlp'" in said
        assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_existing_sidecar_stays(tmp_path):
    model = tiny.converted(NAMES["dense"])
    beside = model.with_name(model.name.removesuffix(".gguf") + ".predictor.gguf")
    before = beside.read_bytes()
    done = tiny.run("predictor", "build", model, "--kind", "sign")
    assert done.returncode != 0 and b"--force" in done.stderr
    assert beside.read_bytes() == before
