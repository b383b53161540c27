"""Whole conversions of small checkpoints, read back with gguf-py and compared with independent numpy."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from support import CHECKPOINTS, TESTS, q3_nl
from support.panels import LAYOUT, stored_rows
from support.synthetic import SHAPES, as_float32, random_tensors, save, write_predictors, write_shard
from tsconv import convert
from tsconv.bench.synthetic import Shape
from tsconv.checkpoint.config import read_config
from tsconv.checkpoint.safetensors_reader import open_checkpoint
from tsconv.format.header import TensorEntry, read_header
from tsconv.transform.quantize import TYPES

ALL_TYPES = list(TYPES)
ROUGH = {"Q3_K": 4e-2}  # share of the squares that rounding loses; a hundredth of others


def hf_to_llama_rope(w: np.ndarray, n_head: int) -> np.ndarray:
    """Row by row: row 2i + s of a head comes from row i + s * d/2."""
    d = w.shape[0] // n_head
    order = [head * d + i + s * (d // 2) for head in range(n_head) for i in range(d // 2) for s in range(2)]
    return w[order]


def reference(t: dict[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
    """GGUF name -> float32 rows as they must lie in the files (ffn_down: one row per neuron)."""
    out = {
        "token_embd.weight": t["model.embed_tokens.weight"],
        "output_norm.weight": t["model.norm.weight"],
        "output.weight": t["lm_head.weight"],
    }
    for n in range(shape.n_layer):
        source, blk = f"model.layers.{n}.", f"blk.{n}."
        q = hf_to_llama_rope(t[source + "self_attn.q_proj.weight"], shape.n_head)
        k = hf_to_llama_rope(t[source + "self_attn.k_proj.weight"], shape.n_head_kv)
        out |= {
            blk + "attn_norm.weight": t[source + "input_layernorm.weight"],
            blk + "ffn_norm.weight": t[source + "post_attention_layernorm.weight"],
            blk + "attn_qkv.weight": np.concatenate([q, k, t[source + "self_attn.v_proj.weight"]]),
            blk + "attn_output.weight": t[source + "self_attn.o_proj.weight"],
        }
        if shape.n_expert:
            experts = [f"{source}block_sparse_moe.experts.{e}." for e in range(shape.n_expert)]
            out |= {
                blk + "ffn_gate_inp.weight": t[source + "block_sparse_moe.gate.weight"],
                blk + "ffn_gate_exps.weight": np.stack([t[e + "w1.weight"] for e in experts]),
                blk + "ffn_up_exps.weight": np.stack([t[e + "w3.weight"] for e in experts]),
                blk + "ffn_down_exps.weight": np.stack([t[e + "w2.weight"].T for e in experts]),
            }
            for i, e in enumerate(experts):
                for fc in ("fc1", "fc2"):
                    if f"{e}predictor.{fc}.weight" in t:
                        out[f"{blk}ffn_pred_{fc}.{i}.weight"] = t[f"{e}predictor.{fc}.weight"]
        else:
            out |= {
                blk + "ffn_gate.weight": t[source + "mlp.gate_proj.weight"],
                blk + "ffn_up.weight": t[source + "mlp.up_proj.weight"],
                blk + "ffn_down.weight": t[source + "mlp.down_proj.weight"].T,
            }
            if f"{source}mlp.predictor.fc1.weight" in t:
                out[blk + "ffn_pred_fc1.weight"] = t[source + "mlp.predictor.fc1.weight"]
                out[blk + "ffn_pred_fc2.weight"] = t[source + "mlp.predictor.fc2.weight"]
                out[blk + "ffn_pred_scale.weight"] = 1 / t[source + "post_attention_layernorm.weight"]
    return out


def keys_of(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    return keys_of(reader), {tensor.name: tensor for tensor in reader.tensors}


def other_kind(tensors: dict[str, Any], name: str) -> gguf.GGMLQuantizationType | None:
    """The type of the fc2 of which `name` is the fc1."""
    return tensors[name.replace("_fc1", "_fc2")][0].tensor_type if "ffn_pred_fc1" in name else None


def check_balanced(stored: np.ndarray, kind: Any, expected: dict[str, np.ndarray], name: str) -> None:
    """fc1 or fc2 of a predictor whose fc2 is q3_nl: with the scale taken back, near what it should be."""
    fc1, fc2 = (expected[name.replace("fc1", fc).replace("fc2", fc)] for fc in ("fc1", "fc2"))
    scale = q3_nl.scale(fc1, fc2)
    if kind == q3_nl.KIND:
        values, found = fc2 * scale, q3_nl.matrix(stored.reshape(len(fc2), -1))
    else:
        values, found = fc1 / scale[:, None], gguf.dequantize(stored.reshape(len(fc1), -1), kind)
    assert found.shape == values.shape, name
    assert np.square(found - values).sum() <= (0.05 if kind == q3_nl.KIND else 0.01) * np.square(values).sum(), name


def check_tensors(result: Any, expected: dict[str, np.ndarray], outtype: str) -> None:
    """Every tensor is there, nothing else is, and its bytes are those of gguf-py's quantizers where it has them."""
    files = [gguf.GGUFReader(path) for path in (result.model, result.sidecar) if path is not None]
    tensors = {tensor.name: (tensor, file) for file in files for tensor in file.tensors}
    assert set(tensors) == set(expected)
    assert all(".ffn_pred_" in tensor.name for file in files[1:] for tensor in file.tensors)
    for name, values in expected.items():
        tensor, file = tensors[name]
        declared = values.swapaxes(-1, -2).shape if "ffn_down" in name else values.shape
        if tensor.tensor_type == q3_nl.KIND:
            declared = (len(values), q3_nl.row_bytes(values.shape[1]))
        assert tuple(reversed(tensor.shape.tolist())) == declared, name
        stored = stored_rows(file, tensor)
        kind = tensor.tensor_type
        if values.ndim == 1 or "ffn_gate_inp" in name or outtype == "f32":
            assert kind == gguf.GGMLQuantizationType.F32, name
        if q3_nl.KIND in (kind, other_kind(tensors, name)):
            check_balanced(stored, kind, expected, name)
        elif kind.name.endswith(("_K", "_NL")):
            block, size = gguf.GGML_QUANT_SIZES[kind]
            rows = stored.reshape(-1, values.shape[-1] // block * size)
            error = gguf.dequantize(rows, kind).reshape(values.shape) - values
            assert np.square(error).sum() <= ROUGH.get(kind.name, 1e-2) * np.square(values).sum(), name
        else:
            exact = gguf.quantize(np.ascontiguousarray(values, dtype=np.float32), kind)
            np.testing.assert_array_equal(stored, exact.view(np.uint8).reshape(-1), err_msg=name)


@pytest.mark.parametrize("outtype", ALL_TYPES)
@pytest.mark.parametrize("family", SHAPES)
def test_every_tensor(family: str, outtype: str, tmp_path: Path) -> None:
    shape, tensors = SHAPES[family], random_tensors(SHAPES[family])
    result = convert(save(tmp_path / "checkpoint", shape, tensors), tmp_path / "m.gguf", outtype)
    assert (result.sidecar is None) == (family == "bamboo")
    check_tensors(result, reference({k: as_float32(v) for k, v in tensors.items()}, shape), outtype)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_every_source_type_and_sharding(dtype: str, n_shards: int, tmp_path: Path) -> None:
    shape, tensors = SHAPES["mistral"], random_tensors(SHAPES["mistral"], dtype)
    result = convert(save(tmp_path / "checkpoint", shape, tensors, n_shards), tmp_path / "m.gguf", "q8_0")
    check_tensors(result, reference({k: as_float32(v) for k, v in tensors.items()}, shape), "q8_0")


def test_k_quants_and_several_slabs(tmp_path: Path) -> None:
    """Rows that take k-quants, and tensors of more than one slab, from a single-file checkpoint."""
    shape = Shape(320, 1024, 9216, 8, 8, 1, ranks=(256,))
    tensors = random_tensors(shape)
    directory = save(tmp_path / "checkpoint", shape, tensors, 1)
    expected = reference({k: as_float32(v) for k, v in tensors.items()}, shape)
    for outtype in ("q4_0", "q6_K"):
        result = convert(directory, tmp_path / f"{outtype}.gguf", outtype)
        check_tensors(result, expected, outtype)
        assert {t.type for t in result.tensors if "ffn_down" in t.name} == {outtype}


@pytest.mark.parametrize("outtype", ALL_TYPES)
@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def test_trained_checkpoints(name: str, outtype: str, tmp_path: Path) -> None:
    directory = CHECKPOINTS / name
    tensors = open_checkpoint(directory)
    weights = {}
    for key, tensor in tensors.items():
        rows = tensor.read_rows(0, tensor.shape[0] if len(tensor.shape) > 1 else 1)
        weights[key] = as_float32(rows).reshape(tensor.shape)
    fc1 = [t.shape[0] for key, t in tensors.items() if key.endswith("predictor.fc1.weight")]
    keys, _ = read((result := convert(directory, tmp_path / "m.gguf", outtype)).model)
    shape = Shape(
        keys["llama.vocab_size"],
        keys["llama.embedding_length"],
        keys["llama.feed_forward_length"],
        keys["llama.attention.head_count"],
        keys["llama.attention.head_count_kv"],
        keys["llama.block_count"],
        tuple(fc1),
        keys.get("llama.expert_count", 0),
    )
    check_tensors(result, reference(weights, shape), outtype)


def test_keys_of_a_dense_pair(tmp_path: Path) -> None:
    shape = SHAPES["mistral"]
    directory = save(tmp_path / "Some-Model", shape, random_tensors(shape), sliding_window=64, rope_theta=5000.0)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    result = convert(directory, tmp_path / "m.gguf", "q4_0")
    model, _ = read(result.model)
    sidecar, _ = read(result.sidecar)
    assert {k: v for k, v in model.items() if not k.startswith("tokenizer.")} == {
        "general.architecture": "turbosparse",
        "general.type": "model",
        "general.name": "Some-Model",
        "general.license": "apache-2.0",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 4096,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": 320,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "turbosparse.format_version": 2,
        "turbosparse.ffn.layout": "bundles",
        "turbosparse.activation": "drelu",
        "turbosparse.ffn_down.layout": "neuron_major",
        "turbosparse.neuron_order": "checkpoint",
        "turbosparse.pair_id": model["turbosparse.pair_id"],
        "turbosparse.predictor.kind": "embedded",
        "turbosparse.source.fingerprint": model["turbosparse.source.fingerprint"],
        "turbosparse.source.sliding_window": 64,
        "turbosparse.tensor_crc32": model["turbosparse.tensor_crc32"],
    }
    assert sidecar == {
        "general.architecture": "turbosparse",
        "general.type": "predictor",
        "general.name": "Some-Model",
        "general.license": "apache-2.0",
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "turbosparse.format_version": 3,
        "turbosparse.neuron_order": "checkpoint",
        "turbosparse.pair_id": model["turbosparse.pair_id"],
        "turbosparse.predictor.layout": "panels16",
        "turbosparse.predictor.input": "pre_norm",
        "turbosparse.predictor.rank": [32, 64],
        "turbosparse.predictor.threshold": [0.0, 0.0],
        "turbosparse.predictor.comparison": "gt",
        "turbosparse.source.fingerprint": model["turbosparse.source.fingerprint"],
        "turbosparse.tensor_crc32": sidecar["turbosparse.tensor_crc32"],
    }
    assert len(bytes.fromhex(model["turbosparse.pair_id"])) == 16
    assert len(model["tokenizer.ggml.tokens"]) == 320


def test_keys_of_a_moe_pair(tmp_path: Path) -> None:
    shape = SHAPES["mixtral"]
    result = convert(save(tmp_path / "c", shape, random_tensors(shape)), tmp_path / "m.gguf", "f16")
    model, _ = read(result.model)
    sidecar, _ = read(result.sidecar)
    assert (model["llama.expert_count"], model["llama.expert_used_count"], model["general.file_type"]) == (4, 2, 1)
    assert sidecar["llama.expert_count"] == 4
    assert sidecar["turbosparse.predictor.input"] == "normed"


@pytest.mark.parametrize("n_ff", [96, 160, 100])
@pytest.mark.parametrize("outtype", ALL_TYPES)
def test_layout_says_what_is_in_the_sidecar(outtype: str, n_ff: int, tmp_path: Path) -> None:
    """Panels of q4_0 and q8_0, and of the q8_0 that stands in for others; format version 1 where nothing has panels."""
    shape = dataclasses.replace(SHAPES["mistral"], n_ff=n_ff, ranks=(40, 64))
    directory = save(tmp_path / "c", shape, random_tensors(shape))
    result = convert(directory, tmp_path / "m.gguf", "f32", predictor_outtype=outtype)
    reader = gguf.GGUFReader(result.sidecar)
    keys, matrices = keys_of(reader), [t for t in reader.tensors if ".ffn_pred_fc" in t.name]
    in_panels = [t for t in matrices if t.tensor_type.name in ("Q4_0", "Q8_0")]
    expected = (2, "panels16") if in_panels else (1, None)
    assert (keys["turbosparse.format_version"], keys.get(LAYOUT)) == expected
    assert bool(in_panels) == (outtype not in ("f32", "f16", "bf16", "q4_1", "q5_0", "q5_1", "iq4_nl"))
    for tensor in matrices:
        raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1)
        assert np.array_equal(raw, stored_rows(reader, tensor)) == (tensor not in in_panels)


def test_external_predictors_in_numeric_order(tmp_path: Path) -> None:
    """Twelve layers: model_10.pt and model_11.pt come after model_2.pt, whatever the file system says."""
    shape = Shape(320, 64, 96, 4, 2, 12)
    ranks = [32 * (1 + n % 3) for n in range(12)]
    written = write_predictors(tmp_path / "p", shape, ranks)
    (tmp_path / "p" / "config.json").write_text('{"sparse_threshold": 0.0}')
    directory = save(tmp_path / "c", shape, random_tensors(shape))
    result = convert(directory, tmp_path / "m.gguf", "f32", predictor=tmp_path / "p")
    keys, tensors = read(result.sidecar)
    assert keys["turbosparse.predictor.rank"] == ranks
    assert keys["turbosparse.predictor.comparison"] == "ge"
    assert read(result.model)[0]["turbosparse.predictor.kind"] == "external"
    for n, state in enumerate(written):
        for fc in ("fc1", "fc2"):
            np.testing.assert_array_equal(tensors[f"blk.{n}.ffn_pred_{fc}.weight"].data, state[f"{fc}.weight"])


@pytest.mark.parametrize("missing", [None, "lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings(missing: str | None, tmp_path: Path) -> None:
    """One matrix, under one of its two names or both."""
    shape, tensors = SHAPES["bamboo"], random_tensors(SHAPES["bamboo"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors.pop(missing, None)
    directory = save(tmp_path / "c", shape, tensors, tie_word_embeddings=True)
    result = convert(directory, tmp_path / "m.gguf", "f32")
    written = read(result.model)[1]
    assert "output.weight" not in written
    embeddings = as_float32(next(tensor for name, tensor in tensors.items() if "embed" in name or "head" in name))
    np.testing.assert_array_equal(written["token_embd.weight"].data, embeddings)
    assert result.notes == ()


@pytest.mark.parametrize("row", [0, -1])
def test_tied_embeddings_beside_another_output_matrix(row: int, tmp_path: Path) -> None:
    """It is kept, however little differs."""
    shape, tensors = SHAPES["bamboo"], random_tensors(SHAPES["bamboo"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][row, row] ^= 1
    directory = save(tmp_path / "c", shape, tensors, tie_word_embeddings=True)
    result = convert(directory, tmp_path / "m.gguf", "f32")
    np.testing.assert_array_equal(read(result.model)[1]["output.weight"].data, as_float32(tensors["lm_head.weight"]))
    (note,) = result.notes
    assert "lm_head.weight is kept" in note and "tie_word_embeddings" in note


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_orig_mod.module.", "model."]
)
def test_names_of_a_wrapped_model(prefix: str, tmp_path: Path) -> None:
    shape, tensors = SHAPES["mistral"], random_tensors(SHAPES["mistral"])
    plain = convert(save(tmp_path / "a", shape, tensors), tmp_path / "a.gguf", "f32")
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    result = convert(save(tmp_path / "b", shape, wrapped), tmp_path / "b.gguf", "f32")
    for one, other in ((plain.model, result.model), (plain.sidecar, result.sidecar)):
        expected, found = read(one)[1], read(other)[1]
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name].data, expected[name].data) for name in expected)


def test_names_of_wrapped_predictors(tmp_path: Path) -> None:
    shape = SHAPES["bamboo"]
    written = write_predictors(tmp_path / "p", shape, [32, 64])
    for path in (tmp_path / "p").glob("*.pt"):
        state = torch.load(path)
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    directory = save(tmp_path / "c", shape, random_tensors(shape))
    result = convert(directory, tmp_path / "m.gguf", "f32", predictor=tmp_path / "p")
    fc2 = read(result.sidecar)[1]["blk.1.ffn_pred_fc2.weight"].data
    np.testing.assert_array_equal(fc2, written[1]["fc2.weight"])


def test_other_weights_that_transformers_does_not_read(tmp_path: Path) -> None:
    """Mistral's repositories hold the weights twice, in their own format as well; others have an index of one file."""
    shape, tensors = SHAPES["mistral"], random_tensors(SHAPES["mistral"])
    directory = save(tmp_path / "c", shape, tensors)
    write_shard(directory / "consolidated.safetensors", {"tok_embeddings.weight": np.zeros((2, 2), np.uint16)})
    convert(directory, tmp_path / "a.gguf")
    directory = save(tmp_path / "d", shape, tensors, 1)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(directory, tmp_path / "b.gguf")


def test_defaults_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, seen = SHAPES["mistral"], []
    directory = save(tmp_path / "My-Model", shape, random_tensors(shape))
    monkeypatch.chdir(tmp_path)
    result = convert(directory, progress=lambda done, total: seen.append((done, total)))
    assert (str(result.model), str(result.sidecar)) == ("My-Model-q4_0.gguf", "My-Model-q4_0.predictor.gguf")
    assert seen[-1] == (result.input_bytes, result.input_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (result.model.stat().st_size, result.sidecar.stat().st_size) == (result.model_bytes, result.sidecar_bytes)


def weights_shape(tensor: TensorEntry) -> tuple[int, ...]:
    """Shape of the weights, not of the bytes of q3_nl."""
    n, *rows = tensor.shape
    return ((n - 2) // 13 * 32 if tensor.kind == q3_nl.KIND else n, *rows)


def test_dry_run_writes_nothing_and_says_what_a_run_does(tmp_path: Path) -> None:
    shape = SHAPES["mixtral"]
    directory = save(tmp_path / "c", shape, random_tensors(shape))
    before = sorted(os.listdir(tmp_path))
    plan = convert(directory, tmp_path / "m.gguf", "q4_0", dry_run=True)
    assert sorted(os.listdir(tmp_path)) == before
    result = convert(directory, tmp_path / "m.gguf", "q4_0")
    assert plan.tensors == result.tensors
    for label, path in (("model", result.model), ("sidecar", result.sidecar)):
        planned = {t.name: (tuple(reversed(t.shape)), t.bytes) for t in plan.tensors if t.file == label}
        written = {t.name: (weights_shape(t), t.n_bytes) for t in read_header(path).tensors}
        assert planned == written


def test_two_conversions_do_not_pair(tmp_path: Path) -> None:
    shape = SHAPES["mistral"]
    directory = save(tmp_path / "c", shape, random_tensors(shape))
    ids = {read(convert(directory, tmp_path / f"{i}.gguf").model)[0]["turbosparse.pair_id"] for i in range(2)}
    assert len(ids) == 2


@pytest.mark.parametrize("family", SHAPES)
def test_llama_cpp_reads_vocabulary_and_keys(family: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    shape = SHAPES[family]
    result = convert(save(tmp_path / "c", shape, random_tensors(shape)), tmp_path / "m.gguf")
    llama = llama_cpp.Llama(
        str(result.model), kv_overrides={"general.architecture": "llama"}, vocab_only=True, verbose=False
    )
    assert llama.n_vocab() == shape.n_vocab
    assert llama.detokenize(llama.tokenize(b"abc xyz")).strip() == b"abc xyz"
    with pytest.raises(ValueError, match="Failed to load model"):
        llama_cpp.Llama(str(result.model), vocab_only=True, verbose=False)


def test_published_config_is_accepted() -> None:
    """config.json of PowerInfer/TurboSparse-Mistral-Instruct, as published."""
    directory = TESTS / "data" / "turbosparse-mistral-instruct"
    config = read_config(directory, {"BambooForCausalLM": "bamboo"}, frozenset())
    assert (config.n_vocab, config.n_embd, config.n_ff, config.n_layer) == (32064, 4096, 14336, 32)
    assert (config.n_head, config.n_head_kv, config.head_dim, config.n_ctx) == (32, 8, 128, 32768)
    assert (config.rope_theta, config.rms_eps, config.sliding_window) == (10000.0, 1e-5, 4096)
    assert (config.n_expert, config.tied_embeddings) == (0, False)
