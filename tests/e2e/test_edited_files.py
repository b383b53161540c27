"""Models and sidecars with one key or tensor changed, each refused in one line that says which (docs/format.md)."""

from __future__ import annotations

import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
from llama_cpp import GGML_TYPE_F32 as F32

import tsconv
from support import TESTS, q3_nl, synthetic, tiny
from support.edited import edited
from support.panels import FFN_LAYOUT, LAYOUT, VERSION, stored_rows, write_rows
from support.refused import assert_in, put, refusal, sidecar_of
from tsconv.format.header import read_header

N_EMBD, N_FF, N_LAYER = 128, 512, 6
FC2 = "blk.1.ffn_pred_fc2.weight"
GATE, FC1, SCALE = "blk.1.ffn_gate.weight", "blk.1.ffn_pred_fc1.weight", "blk.1.ffn_pred_scale.weight"
THRESHOLD, RANK = "turbosparse.predictor.threshold", "turbosparse.predictor.rank"
FORM, THRESHOLDS = "turbosparse.predictor.form", "blk.0.ffn_pred_threshold.weight"
USED = "llama.expert_used_count"
EPSILON, TOKENS = "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.tokens"
UINT32, UINT64, FLOAT32 = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.UINT64, gguf.GGUFValueType.FLOAT32

# edit: what is changed, and what the line must say after the file's name
MODEL_EDITS = {
    "ffn shape": (
        {"shapes": {GATE: (N_FF - 32, N_EMBD)}},
        f"{GATE}: wrong shape: expected [128, 512, 1], found [128, 480, 1]; ",
    ),
    "transposed": (
        {"shapes": {GATE: (N_EMBD, N_FF)}},
        f"{GATE}: wrong shape: expected [128, 512, 1], found [512, 128, 1]; ",
    ),
    "attention shape": (
        {"shapes": {"blk.1.attn_qkv.weight": (64, N_EMBD)}},
        "llama.cpp cannot load the model: found",
        "blk.1.attn_qkv.weight",
        "expected",
        "convert again",
    ),
    "no ffn tensor": ({"without": [GATE]}, f"{GATE}: the tensor is missing; "),
    "no other tensor": (
        {"without": ["blk.1.attn_qkv.weight"]},
        "llama.cpp cannot load the model: found",
        "blk.1.attn_q.weight",  # which it looks for then
        "convert again",
    ),
    "extra tensor": (
        {"extra": {"more": np.zeros(32, np.float32)}},
        "llama.cpp cannot load the model: found",
        "wrong number of tensors; expected 46, got 45",
        "convert again",
    ),
    "format version": (
        {"keys": {VERSION: 3}},  # there are such sidecars only
        "unknown format version: expected 1 to 2, found 3; install the tsconv that wrote the file",
    ),
    "FFN layout": (
        {"keys": {FFN_LAYOUT: "columns"}},
        f"key {FFN_LAYOUT}: expected 'rows' or 'bundles', found 'columns'; install the tsconv that wrote the file",
    ),
    "version 2 without an FFN layout": ({"without": [FFN_LAYOUT]}, f"key {FFN_LAYOUT} is missing"),
    "bundles in version 1": (
        {"keys": {VERSION: 1}},
        f"key {FFN_LAYOUT}: expected from format version 2 on, found in version 1; convert again",
    ),
    "no version": (
        {"without": ["turbosparse.format_version"]},
        "key turbosparse.format_version is missing: expected a file written by tsconv convert; ",
    ),
    "version type": (
        {"keys": {"turbosparse.format_version": (1, UINT64)}},
        "key turbosparse.format_version has the wrong type: expected u32, found u64; ",
    ),
    "no activation": ({"without": ["turbosparse.activation"]}, "key turbosparse.activation is missing"),
    "activation": (
        {"keys": {"turbosparse.activation": "swiglu"}},
        "key turbosparse.activation: expected 'drelu', found 'swiglu'; ",
    ),
    "layout": (
        {"keys": {"turbosparse.ffn_down.layout": "usual"}},
        "key turbosparse.ffn_down.layout: expected 'neuron_major', found 'usual'; ",
    ),
    "no pair id": ({"without": ["turbosparse.pair_id"]}, "key turbosparse.pair_id is missing"),
    "pair id": (
        {"keys": {"turbosparse.pair_id": "0" * 100}},
        "key turbosparse.pair_id: expected at most 63 characters, found 100",
    ),
    "pair id of other digits": (
        {"keys": {"turbosparse.pair_id": "A" * 32}},
        f"key turbosparse.pair_id: expected 32 lower-case hex digits, found '{'A' * 32}'; convert again",
    ),
    "predictor kind": (
        {"keys": {"turbosparse.predictor.kind": "inside"}},
        "key turbosparse.predictor.kind: expected 'none', 'embedded' or 'external', found 'inside'; ",
    ),
    "pair id type": (
        {"keys": {"turbosparse.pair_id": (7, UINT64)}},
        "key turbosparse.pair_id has the wrong type: expected str, found u64; ",
    ),
    "no layers": ({"keys": {"llama.block_count": 0}}, "key llama.block_count: expected 1 to 512, found 0"),
    "many layers": ({"keys": {"llama.block_count": 513}}, "key llama.block_count: expected 1 to 512, found 513"),
    "one more layer": ({"keys": {"llama.block_count": 7}}, "blk.6.ffn_gate.weight: the tensor is missing; "),
    "experts": ({"keys": {"llama.expert_count": (8, UINT32)}}, "blk.0.ffn_gate_exps.weight: the tensor is missing; "),
    "context": (
        {"keys": {"llama.context_length": (2**31, UINT32)}},
        "key llama.context_length: expected 1 to 16777216, found 2147483648; convert again",
    ),
    "epsilon": (
        {"keys": {EPSILON: float("nan")}},
        f"key {EPSILON}: expected 0 to 1, found nan; convert again",
    ),
    "tokenizer": (
        {"keys": {"tokenizer.ggml.model": "bert"}},
        "key tokenizer.ggml.model: expected 'llama', found 'bert'; ",
    ),
    "token twice": (
        {"keys": {TOKENS: ["<unk>", "<s>", "</s>", *map(str, range(1052)), "7"]}},
        f"key {TOKENS}: expected every token once, found '7' twice; convert again",
    ),
    "tokens type": ({"keys": {TOKENS: (1, UINT32)}}, f"key {TOKENS} has the wrong type: expected arr, found u32; "),
}

SIDECAR_EDITS = {
    "shape": ({"shapes": {FC1: (32, N_EMBD)}}, f"{FC1}: wrong shape: expected [128, ", "], found [128, 32, 1]; "),
    "no tensor": ({"without": [FC1]}, "wrong number of tensors: expected 18, found 17; convert again"),
    "other tensor": (
        {"without": [FC1], "extra": {"more": np.zeros(32, np.float32)}},
        f"{FC1}: the tensor is missing; ",
    ),
    "extra tensor": ({"extra": {"more": np.zeros(32, np.float32)}}, "wrong number of tensors: expected 18, found 19"),
    "scale type": (
        {"without": [SCALE], "extra": {SCALE: np.ones(N_EMBD, np.float16)}},
        f"{SCALE}: wrong type: expected f32, found f16",
    ),
    "format version": ({"keys": {VERSION: 5}}, "unknown format version: expected 1 to 4, found 5; install the tsconv"),
    "version 0": ({"keys": {VERSION: 0}}, "unknown format version: expected 1 to 4, found 0; install the tsconv"),
    "version 4 without a form": ({"keys": {VERSION: 4, LAYOUT: "rows"}}, f"key {FORM} is missing"),
    "form": (
        {"keys": {VERSION: 4, LAYOUT: "rows", FORM: "forest"}},
        f"key {FORM}: expected 'mlp', 'linear', 'gate' or 'gate_up', found 'forest'; install the tsconv that wrote",
    ),
    "another form": (
        {"keys": {VERSION: 4, LAYOUT: "rows", FORM: "gate_up"}},
        "blk.0.ffn_pred_gate.weight: the tensor is missing; ",
    ),
    "thresholds of a pre-norm predictor": (
        {"keys": {VERSION: 4, LAYOUT: "rows", FORM: "mlp"}, "extra": {THRESHOLDS: np.zeros((N_FF, 1), np.float32)}},
        f"{THRESHOLDS}: expected no thresholds, because only the sign of a pre-norm predictor survives the norm",
    ),
    "thresholds before version 4": (
        {"extra": {THRESHOLDS: np.zeros((N_FF, 1), np.float32)}},
        "wrong number of tensors: expected 18, found 19",
    ),
    "version 2 without a layout": ({"keys": {VERSION: 2}}, f"key {LAYOUT} is missing"),
    "layout": (
        {"keys": {VERSION: 2, LAYOUT: "panels8"}},
        f"key {LAYOUT}: expected 'rows' or 'panels16', found 'panels8'; install the tsconv that wrote the file",
    ),
    "layout type": ({"keys": {VERSION: 2, LAYOUT: (1, UINT32)}}, f"key {LAYOUT} has the wrong type: expected str"),
    "panels in version 1": (
        {"keys": {LAYOUT: "panels16"}},
        f"key {LAYOUT}: expected from format version 2 on, found in version 1; convert again",
    ),
    "bytes in rows": (
        {"without": [FC2], "extra": {FC2: np.zeros((N_FF, q3_nl.row_bytes(64)), np.int8)}},
        f"{FC2}: q3_nl needs panels16, a rank that is a multiple of 32 up to 131072 and "
        "an n_ff that is a multiple of 16, found rows, 64, 512; convert again",
    ),
    "bytes of another rank": (
        {"keys": {VERSION: 3, LAYOUT: "panels16"}, "without": [FC2], "extra": {FC2: np.zeros((N_FF, 15), np.int8)}},
        f"{FC2}: wrong shape: expected [28, 512, 1], found [15, 512, 1]; ",
    ),
    "fc1 of bytes": (
        {"without": [FC1], "extra": {FC1: np.zeros((64, N_EMBD), np.int8)}},
        f"{FC1}: type i8 cannot be computed by this ggml; convert with another --outtype",
    ),
    "no input": ({"without": ["turbosparse.predictor.input"]}, "key turbosparse.predictor.input is missing"),
    "input": (
        {"keys": {"turbosparse.predictor.input": "raw"}},
        "key turbosparse.predictor.input: expected 'pre_norm' or 'normed', found 'raw'",
    ),
    "comparison": (
        {"keys": {"turbosparse.predictor.comparison": "lt"}},
        "key turbosparse.predictor.comparison: expected 'gt' or 'ge', found 'lt'",
    ),
    "threshold": (
        {"keys": {THRESHOLD: [0.0] * 5 + [0.5]}},
        f"key {THRESHOLD}: expected 0 in every layer",
        "found 0.5 in layer 5",
    ),
    "threshold nan": (
        {"keys": {THRESHOLD: [float("nan")] * N_LAYER}},
        f"key {THRESHOLD}: expected a finite number in every layer, found nan in layer 0; convert again",
    ),
    "threshold length": ({"keys": {THRESHOLD: [0.0] * 5}}, f"key {THRESHOLD}: expected f32[6], found f32[5]; "),
    "threshold type": (
        {"keys": {THRESHOLD: (0.0, FLOAT32)}},
        f"key {THRESHOLD} has the wrong type: expected arr, found f32; ",
    ),
    "rank length": ({"keys": {RANK: [64] * 7}}, f"key {RANK}: expected i32[6], found i32[7]; "),
    "rank": ({"keys": {RANK: [0] * N_LAYER}}, f"key {RANK}: expected 1 to 1048576, found 0 in layer 0"),
    "negative rank": ({"keys": {RANK: [-64] * N_LAYER}}, f"key {RANK}: expected 1 to 1048576, found -64 in layer 0"),
    "one rank": ({"keys": {RANK: [32] * N_LAYER}}, ".weight: wrong shape: expected [128, 32, 1], found [128, "),
    "no type": ({"without": ["general.type"]}, "key general.type is missing"),
    "n_ff": ({"keys": {"llama.feed_forward_length": 256}}, "other shape than", "n_ff 512", "256"),
    "alignment": (
        {"keys": {"general.alignment": (8, UINT32)}},
        "key general.alignment: expected a multiple of 32, found 8",
    ),
}


def test_bundles_of_two_types(tmp_path):
    pair = tiny.converted(outtype="q4_0")
    name = "blk.1.ffn_up.weight"
    model = edited(pair, put(pair, tmp_path), shapes={name: (N_FF, N_EMBD)})
    expected = f"{name}: expected type q4_0, as all of a layer's bundles have, found f32; convert again"
    assert_in(refusal(model), f"error: {model}: ", expected)


@pytest.mark.parametrize("matrix", ["fc1", "fc2"])
def test_experts_of_two_types(tmp_path, matrix):
    pair = tiny.converted("tiny-turbosparse-mixtral", "q4_0", "q8_0")
    model = put(pair, tmp_path)
    name = f"blk.1.ffn_pred_{matrix}.2.weight"
    shape = next(tensor.shape for tensor in read_header(sidecar_of(pair)).tensors if tensor.name == name)
    edited(sidecar_of(pair), sidecar_of(model), shapes={name: shape[::-1]})
    expected = f"{name}: expected type q8_0, as the layer's first expert has, found f32; convert again"
    assert_in(refusal(model), f"error: {sidecar_of(model)}: ", expected)
    expected = f"{name}: experts whose predictors have different types: expected q8_0, as"
    assert_in(tiny.error_line(tiny.run("inspect", sidecar_of(model))), f"error: {sidecar_of(model)}: ", expected)


@pytest.mark.parametrize("edit", MODEL_EDITS)
def test_edited_model(tmp_path, edit):
    changes, *parts = MODEL_EDITS[edit]
    model = put(tiny.converted(), tmp_path)
    edited(tiny.converted(), model, **changes)
    assert_in(refusal(model), f"error: {model}: ", *parts)


def test_edited_template(tmp_path):
    """Only a chat needs it."""
    model = put(tiny.converted(), tmp_path)
    edited(tiny.converted(), model, keys={"tokenizer.chat_template": "{% if %}"})
    arguments = ("run", "-m", model, "-p", "x", "-n", 1, "-t", 1)
    assert tiny.run(*arguments).returncode == 0
    line = tiny.error_line(tiny.run(*arguments, "--chat"))
    assert_in(line, f"error: {model}: ", "the chat template cannot be used: found", "without --chat")


@pytest.mark.parametrize("edit", SIDECAR_EDITS)
def test_edited_sidecar(tmp_path, edit):
    changes, *parts = SIDECAR_EDITS[edit]
    model = put(tiny.converted(), tmp_path)
    edited(sidecar_of(tiny.converted()), sidecar_of(model), **changes)
    assert_in(refusal(model), f"error: {sidecar_of(model)}: ", *parts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"keys": {USED: (0, UINT32)}}, f"key {USED}: expected 1 to 8, found 0"),
        ({"keys": {USED: (9, UINT32)}}, f"key {USED}: expected 1 to 8, found 9"),
        ({"without": [USED]}, f"key {USED} is missing"),
    ],
)
def test_edited_moe_model(tmp_path, value, message):
    original = tiny.converted("tiny-turbosparse-mixtral")
    model = put(original, tmp_path)
    edited(original, model, **value)
    assert_in(refusal(model), f"error: {model}: ", message)


def test_q3_nl_in_a_sidecar_of_version_2(tmp_path):
    original = tiny.converted(predictor="q3_nl")
    model = put(original, tmp_path)
    edited(sidecar_of(original), sidecar_of(model), keys={VERSION: 2})
    first = "blk.0.ffn_pred_fc2.weight"
    expected = f"{first}: q3_nl needs format version 3, found 2; convert again"
    assert_in(refusal(model), f"error: {sidecar_of(model)}: ", expected)


@pytest.mark.parametrize(
    ("of_sidecar", "edit", "expected"),
    [
        (False, {VERSION: 3}, "bad turbosparse.format_version: expected 1 or 2, found 3"),
        (True, {VERSION: 2}, "bad turbosparse.format_version: expected 3 or 4, found 2"),
        (
            False,
            {"turbosparse.predictor.kind": "inside"},
            "bad turbosparse.predictor.kind: expected 'none' or 'embedded' or 'external', found 'inside'",
        ),
    ],
)
def test_commands_that_read_headers_refuse_the_same(tmp_path, of_sidecar, edit, expected):
    original = tiny.converted(predictor="q3_nl")
    model = put(original, tmp_path)
    file, source = (sidecar_of(model), sidecar_of(original)) if of_sidecar else (model, original)
    edited(source, file, keys=edit)
    assert_in(tiny.error_line(tiny.run("inspect", file)), f"error: {file}: {expected}")


def test_every_key_with_wrong_values(tmp_path):
    """Whatever a key holds, the model works or is refused: llama.cpp, which asserts some of them, never ends us."""
    shape = synthetic.SHAPES["mixtral"]
    checkpoint = synthetic.save(tmp_path / "checkpoint", shape, synthetic.random_tensors(shape))
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    model = tsconv.convert(checkpoint, tmp_path / "original.gguf", "f32").model
    command = [sys.executable, "-m", "support.sweep_keys", model, tmp_path]
    result = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=tiny.TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    ends = [line.split("\t") for line in result.stdout.splitlines()]
    assert not [end for end in ends if end[2] not in ("works", "refused")]
    assert sum(end[2] == "refused" for end in ends) > 40
    assert {end[0] for end in ends} >= {"llama.context_length", "tokenizer.ggml.tokens", "turbosparse.pair_id"}


def test_an_edit_that_changes_nothing_loads(tmp_path):
    """The refusals above are due to the edits, not to the way that the files are copied."""
    model = put(tiny.converted(), tmp_path)
    edited(tiny.converted(), model)
    edited(sidecar_of(tiny.converted()), sidecar_of(model))
    llamas = [tsconv.load(path, n_threads=1) for path in (model, tiny.converted())]
    a, b = (llama.token_logits([1, 20, 300]) for llama in llamas)
    assert (a == b).all()
    for llama in llamas:
        llama.close()


@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
@pytest.mark.parametrize("outtype", ["q4_0", "q8_0"])
def test_layouts_compute_the_same(tmp_path, name, outtype):
    """Sidecars of version 1, and those of version 2 in rows, load and give what panels give, but for rounding."""
    original = tiny.converted(name, outtype, outtype)
    model = put(original, tmp_path, with_sidecar=False)
    results = []
    for version in (1, 2, None):
        if version is None:
            shutil.copy(sidecar_of(original), sidecar_of(model))
        else:
            write_rows(sidecar_of(original), sidecar_of(model), version)
        llama = tsconv.load(model, n_threads=1)
        results.append(llama.token_logits([1, 20, 300, 7, 11]))
        llama.close()
    assert (results[0] == results[1]).all()
    assert tiny.nmse(results[2], results[0]) < 1e-3


@pytest.mark.sanitized
@pytest.mark.parametrize("n_batch", [1, None])
@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def test_q3_nl_computes_what_its_weights_are(tmp_path, name, n_batch):
    """Beside a sidecar that has the same weights in f32, read from the file by the tables of docs/format.md."""
    original = tiny.converted(name, "f32", "q3_nl")
    model = put(original, tmp_path, with_sidecar=False)
    reader = gguf.GGUFReader(sidecar_of(original))
    assert {t.tensor_type for t in reader.tensors if "fc2" in t.name} == {q3_nl.KIND}
    floats = {}
    for tensor in reader.tensors:
        if ".ffn_pred_fc" in tensor.name:
            rows = stored_rows(reader, tensor).reshape(int(tensor.shape[1]), -1)
            is_q3_nl = tensor.tensor_type == q3_nl.KIND
            values = q3_nl.matrix(rows) if is_q3_nl else gguf.dequantize(rows, tensor.tensor_type)
            floats[tensor.name] = values.astype(np.float32)
    edited(sidecar_of(original), sidecar_of(model), keys={VERSION: 1}, without=[LAYOUT, *floats], extra=floats)
    results = []
    for path in (original, model):
        llama = tsconv.load(path, n_threads=1, type_k=F32, type_v=F32)
        results.append(llama.token_logits(list(range(3, 80)), n_batch))
        llama.close()
    assert (
        tiny.nmse(results[0], results[1]) < 1e-3
    )  # of 17 bits an activation keeps 14: few logits near 0 fall otherwise


def test_ordinary_llama_model(tmp_path):
    """A file that other programs made: nothing about it is turbosparse."""
    writer = gguf.GGUFWriter(model := tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_in(refusal(model), model, "expected general.architecture 'turbosparse', found 'llama'", "tsconv convert")
