"""What a user can get wrong with `tsconv convert`: one line on stderr, a fixed exit code, and nothing left on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from support.synthetic import SHAPES, random_tensors, save, write_predictors, write_shard
from tsconv.bench.synthetic import Shape

CHECKPOINT, OUTPUT, HUB, USAGE = 3, 6, 7, 1
DENSE = SHAPES["mistral"]
NAN = 0x7FC0

Run = Callable[..., tuple[int, str, str]]


def refused(run: Run, out: Path, checkpoint: Path, code: int, *parts: str, options: tuple[object, ...] = ()) -> None:
    found, stdout, stderr = run("convert", checkpoint, "--outfile", out, *options)
    assert (found, stdout) == (code, ""), stderr
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_act": "silu"}, ["hidden_act", "SwiGLU", "dReLU models only"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "not a dReLU"]),
        ({"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "BambooForCausalLM", "TurboSparseMixtral"]),
        ({"architectures": None}, ["architectures", "BambooForCausalLM"]),
        ({"model_type": "mistral"}, ["model_type", "'bamboo'", "'mistral'"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor of num_attention_heads 4"]),
        ({"num_attention_heads": 7}, ["num_attention_heads", "divisor of hidden_size 64"]),
        ({"hidden_size": "64"}, ["hidden_size", "integer", "'64'"]),
        ({"num_hidden_layers": 513}, ["num_hidden_layers", "1..512"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps", "number"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters", "yarn"]),
        ({"attention_bias": True}, ["attention_bias", "False"]),
        ({"head_dim": 32}, ["head_dim", "16"]),
        ({"vocab_size": 319}, ["embed_tokens", "(319, 64)", "(320, 64)"]),
        ({"num_hidden_layers": 3}, ["missing", "model.layers.2."]),
        ({"num_hidden_layers": 1}, ["no place in the model", "model.layers.1."]),
        ({"max_position_embeddings": (1 << 24) + 1}, ["max_position_embeddings", "1..16777216"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "unquantized checkpoints"]),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, ["bad rope_theta", "1000000.0", "10000.0"]),
        ({"eos_token_id": "2"}, ["config.json", "bad eos_token_id", "'2'"]),
        ({"eos_token_id": [2, True]}, ["config.json", "bad eos_token_id"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config(changes: dict[str, object], parts: list[str], tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE), **changes)
    refused(run, out, directory, CHECKPOINT, *parts)


@pytest.mark.parametrize(
    ("architecture", "key", "activation", "said"),
    [
        ("LlamaForCausalLM", "hidden_act", "relu", "llama.cpp computes SiLU where this model needs relu"),
        ("LlamaForCausalLM", "hidden_act", "fatrelu", "llama.cpp computes SiLU where this model needs fatrelu"),
        ("MiniCPMForCausalLM", "hidden_act", "fatrelu", "llama.cpp computes SiLU"),
        ("Qwen2ForCausalLM", "hidden_act", "relu", "llama.cpp computes SiLU"),
        ("FalconForCausalLM", "activation", "relu", "llama.cpp computes SiLU or GELU"),
        ("OPTForCausalLM", "activation_function", "relu", "if it has this architecture at all"),
        ("NemotronForCausalLM", "hidden_act", "relu", "llama.cpp computes relu2 where this model needs relu"),
        ("NemotronForCausalLM", "hidden_act", "relu2", "llama.cpp's own converter takes most others"),
        ("NemotronHForCausalLM", "mlp_hidden_act", "relu2", "llama.cpp's own converter takes most others"),
        ("SmallThinkerForCausalLM", "hidden_act", "relu", "llama.cpp's own converter takes most others"),
        ("LlamaForCausalLM", "hidden_act", "silu", "llama.cpp's own converter takes most others"),
        ("GemmaForCausalLM", "hidden_activation", "gelu_pytorch_tanh", "llama.cpp's own converter takes most others"),
    ],
)
def test_where_another_architecture_is_sent(
    architecture: str, key: str, activation: str, said: str, tmp_path: Path, run: Run, out: Path
) -> None:
    """Never to a converter that would make another function of it."""
    changes = {"hidden_act": None, "architectures": [architecture], key: activation}
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE), **changes)
    refused(run, out, directory, CHECKPOINT, architecture, said)
    takes = "takes most others"
    assert (takes in run("convert", directory, "--outfile", out)[2]) == (takes in said)


@pytest.mark.parametrize("used", [0, 5, None])
def test_experts_per_token(used: int | None, tmp_path: Path, run: Run, out: Path) -> None:
    shape = SHAPES["mixtral"]
    directory = save(tmp_path / "c", shape, random_tensors(shape), num_experts_per_tok=used)
    refused(run, out, directory, CHECKPOINT, "num_experts_per_tok", "1..4")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100000, "\xff"])
def test_config_is_not_json(text: str, tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE))
    (directory / "config.json").write_text(text, encoding="latin-1")
    refused(run, out, directory, CHECKPOINT, "config.json")


SECOND = "model-00002-of-00002.safetensors"


def spoil_missing_shard(directory: Path) -> None:
    (directory / SECOND).unlink()


def spoil_truncated_data(directory: Path) -> None:
    os.truncate(directory / SECOND, (directory / SECOND).stat().st_size - 100)


def spoil_truncated_header(directory: Path) -> None:
    os.truncate(directory / SECOND, 20)


def spoil_empty_shard(directory: Path) -> None:
    os.truncate(directory / SECOND, 0)


def spoil_trailing_bytes(directory: Path) -> None:
    with open(directory / SECOND, "ab") as file:
        file.write(b"more")


def spoil_huge_header_length(directory: Path) -> None:
    data = (directory / SECOND).read_bytes()
    (directory / SECOND).write_bytes((1 << 60).to_bytes(8, "little") + data[8:])


def spoil_not_safetensors(directory: Path) -> None:
    (directory / SECOND).write_bytes(b"<html>404 not found</html>" * 10)


def spoil_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def spoil_index_leads_out(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')


def spoil_index_names_more(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.weight"] = SECOND
    path.write_text(json.dumps(index))


def spoil_no_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").unlink()


def spoil_with_a_single_file(directory: Path) -> None:
    write_shard(directory / "model.safetensors", random_tensors(DENSE, seed=1))


def spoil_with_another_shard(directory: Path) -> None:
    (directory / "model-00003-of-00003.safetensors").write_bytes((directory / SECOND).read_bytes())


def spoil_name(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    write_shard(directory / "model.fp16.safetensors", random_tensors(DENSE))


def spoil_adapter_only(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    write_shard(directory / "adapter_model.safetensors", {"a": np.zeros((2, 2), np.uint16)})


def spoil_adapter_folder(directory: Path) -> None:
    for path in (directory / "config.json", *directory.glob("model*")):
        path.unlink()
    (directory / "adapter_config.json").write_text("{}")


def spoil_with_an_adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")


def spoil_pytorch_only(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / "pytorch_model-00001-of-00001.bin").write_bytes(b"")


def spoil_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_missing_shard, [SECOND, "shard is missing"]),
        (spoil_truncated_data, [SECOND, "truncated or damaged"]),
        (spoil_truncated_header, [SECOND, "truncated or damaged"]),
        (spoil_empty_shard, [SECOND, "truncated or damaged"]),
        (spoil_trailing_bytes, [SECOND, "truncated or damaged"]),
        (spoil_huge_header_length, [SECOND, "truncated or damaged"]),
        (spoil_not_safetensors, [SECOND, "truncated or damaged"]),
        (spoil_index, ["index.json", "weight_map"]),
        (spoil_index_leads_out, ["index.json", "../other.safetensors"]),
        (spoil_index_names_more, [SECOND, "model.layers.9.weight", "not in the shard"]),
        (spoil_no_index, ["shards without", "index.json"]),
        (spoil_with_a_single_file, ["model.safetensors: ", "model.safetensors.index.json does not name", "remove or"]),
        (spoil_with_another_shard, ["model-00003-of-00003.safetensors: ", "index.json does not name", "remove or"]),
        (spoil_name, ["weights of another name", "model.fp16.safetensors", "call it model.safetensors"]),
        (spoil_adapter_only, ["adapter_model.safetensors", "not a model", "merge_and_unload()"]),
        (spoil_adapter_folder, ["adapter_config.json", "not a model", "merge_and_unload()"]),
        (spoil_with_an_adapter, ["adapter_config.json", "beside config.json", "merge_and_unload()", "move"]),
        (spoil_pytorch_only, [".bin", "save_pretrained()"]),
        (spoil_tokenizer, ["tokenizer"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_files(spoil: Callable[[Path], None], parts: list[str], tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE))
    spoil(directory)
    refused(run, out, directory, CHECKPOINT, *parts)


def test_a_shard_beside_a_single_file(tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE), 1)
    (directory / SECOND).write_bytes((directory / "model.safetensors").read_bytes())
    refused(run, out, directory, CHECKPOINT, f"{SECOND}: a shard beside model.safetensors", "remove or move away")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4949453792\n"


@pytest.mark.parametrize(
    "name", [SECOND, "tokenizer.json", "tokenizer.model", "config.json", "model.safetensors.index.json"]
)
def test_git_lfs_pointer(name: str, tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE))
    (directory / name).write_bytes(POINTER)
    refused(run, out, directory, CHECKPOINT, f"{name}: a Git LFS pointer", "git lfs pull")


def test_git_lfs_pointer_of_a_predictor(bamboo: Path, predictors: Path, run: Run, out: Path) -> None:
    (predictors / "model_1.pt").write_bytes(POINTER)
    options = ("--predictor", predictors)
    refused(run, out, bamboo, CHECKPOINT, "model_1.pt: a Git LFS pointer", "git lfs pull", options=options)


@pytest.mark.parametrize(
    ("rename", "parts"),
    [
        (lambda i, name: "module." + name if i else name, ["'module.'", ", model.embed_tokens.weight;", "save_pre"]),
        (lambda _, name: name.replace("layers.0.", "layers.0._orig_mod."), ["'_orig_mod.'", "save_pretrained()"]),
        (
            lambda _, name: "base_model.model." + name.replace("q_proj.", "q_proj.base_layer."),
            ["q_proj.base_layer.", "not merged", "merge_and_unload()"],
        ),
        (
            lambda _, name: "base_model.model." + name.replace("q_proj.", "q_proj.lora_A."),
            ["q_proj.lora_A.", "not merged", "merge_and_unload()"],
        ),
    ],
)  # fmt: skip
def test_wrapped_names(
    rename: Callable[[int, str], str], parts: list[str], tmp_path: Path, run: Run, out: Path
) -> None:
    tensors = {rename(i, name): tensor for i, (name, tensor) in enumerate(random_tensors(DENSE).items())}
    directory = save(tmp_path / "c", DENSE, tensors)
    refused(run, out, directory, CHECKPOINT, *parts)


def test_index_of_other_shards(tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE))
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps(index))
    refused(run, out, directory, CHECKPOINT, "lm_head.weight", "index.json disagrees", "not of one checkpoint")


def test_tensor_in_two_shards(tmp_path: Path, run: Run, out: Path) -> None:
    tensors = random_tensors(DENSE)
    directory = save(tmp_path / "c", DENSE, tensors)
    last = list(tensors)[len(tensors) // 2 :]
    write_shard(directory / SECOND, {name: tensors[name] for name in [*last, "model.embed_tokens.weight"]})
    refused(run, out, directory, CHECKPOINT, "model.embed_tokens.weight", "two shards")


def test_quantized_checkpoint(tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE), 1)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"I16" ', 1))
    refused(run, out, directory, CHECKPOINT, "model.embed_tokens.weight", "F32, F16 or BF16", "I16")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.layers.0.post_attention_layernorm.weight"]
)
@pytest.mark.parametrize("outtype", ["q4_0", "f16", "f32"])
def test_nan_weights(name: str, outtype: str, tmp_path: Path, run: Run, out: Path) -> None:
    tensors = random_tensors(DENSE)
    tensors[name].reshape(-1)[17] = NAN
    directory = save(tmp_path / "c", DENSE, tensors)
    refused(run, out, directory, CHECKPOINT, name, "found nan", options=("--outtype", outtype))


def test_nan_in_a_predictor_leaves_no_model_either(tmp_path: Path, run: Run, out: Path) -> None:
    tensors = random_tensors(DENSE)
    tensors["model.layers.1.mlp.predictor.fc2.weight"][5, 5] = NAN
    directory = save(tmp_path / "c", DENSE, tensors)
    refused(run, out, directory, CHECKPOINT, "predictor.fc2.weight", "found nan")


def test_unknown_tensor(tmp_path: Path, run: Run, out: Path) -> None:
    tensors = random_tensors(DENSE) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.uint16)}
    directory = save(tmp_path / "c", DENSE, tensors)
    refused(run, out, directory, CHECKPOINT, "no place in the model", "q_proj.bias")


def test_rotary_tables_are_ignored(tmp_path: Path, run: Run) -> None:
    tensors = random_tensors(DENSE) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.uint16)}
    directory = save(tmp_path / "c", DENSE, tensors)
    assert run("convert", directory, "--outfile", tmp_path / "m.gguf")[0] == 0


def test_no_output_matrix(tmp_path: Path, run: Run, out: Path) -> None:
    """tie_word_embeddings is false in these families where config.json does not say it."""
    tensors = random_tensors(DENSE)
    del tensors["lm_head.weight"]
    directory = save(tmp_path / "c", DENSE, tensors)
    config = json.loads((directory / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (directory / "config.json").write_text(json.dumps(config))
    refused(run, out, directory, CHECKPOINT, "lm_head.weight", "set tie_word_embeddings to true")


def test_weight_too_large_for_the_type(tmp_path: Path, run: Run) -> None:
    """The advice is one that helps."""
    tensors = random_tensors(DENSE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 0x4780  # 65536
    directory = save(tmp_path / "c", DENSE, tensors)
    code, _, stderr = run("convert", directory, "--outfile", tmp_path / "m.gguf")
    option, value = "--tensor-type", "blk.1.ffn_up.weight=bf16"
    assert (code, stderr.strip().endswith(f"found 65536; choose a type that holds it: {option} {value}")) == (3, True)
    assert run("convert", directory, "--outfile", tmp_path / "m.gguf", option, value)[0] == 0


def test_layer_without_predictor(tmp_path: Path, run: Run, out: Path) -> None:
    tensors = random_tensors(DENSE)
    del tensors["model.layers.1.mlp.predictor.fc1.weight"]
    directory = save(tmp_path / "c", DENSE, tensors)
    refused(run, out, directory, CHECKPOINT, "layer 1 has no predictor")


@pytest.fixture
def bamboo(tmp_path: Path) -> Path:
    return save(tmp_path / "c", SHAPES["bamboo"], random_tensors(SHAPES["bamboo"]))


@pytest.fixture
def predictors(tmp_path: Path) -> Path:
    write_predictors(tmp_path / "p", SHAPES["bamboo"], [32, 64])
    return tmp_path / "p"


def test_predictor_of_another_model(bamboo: Path, tmp_path: Path, run: Run, out: Path) -> None:
    write_predictors(tmp_path / "p", Shape(320, 128, 96, 4, 2, 2), [32, 64])
    options = ("--predictor", tmp_path / "p")
    refused(run, out, bamboo, CHECKPOINT, "model_0.pt: fc1.weight", "(32, 64)", "(32, 128)", options=options)


def test_predictor_files_missing(bamboo: Path, predictors: Path, run: Run, out: Path) -> None:
    (predictors / "model_1.pt").unlink()
    refused(run, out, bamboo, CHECKPOINT, "model_1.pt missing", options=("--predictor", predictors))


def test_predictor_of_more_layers(bamboo: Path, predictors: Path, run: Run, out: Path) -> None:
    (predictors / "model_2.pt").write_bytes((predictors / "model_0.pt").read_bytes())
    refused(run, out, bamboo, CHECKPOINT, "model_0.pt to model_1.pt", options=("--predictor", predictors))


@pytest.mark.parametrize("threshold", [0.5, -1, "0", True, None])
def test_predictor_threshold(threshold: object, bamboo: Path, predictors: Path, run: Run, out: Path) -> None:
    (predictors / "config.json").write_text(json.dumps({"sparse_threshold": threshold}))
    refused(run, out, bamboo, CHECKPOINT, "sparse_threshold", "sign", options=("--predictor", predictors))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "not a readable"),
        (b"PK\x03\x04 garbage", "not a readable"),
        ({"fc1.weight": torch.zeros(32, 64)}, "wrong keys"),
        (
            {"fc1.weight": torch.zeros(32, 64), "fc2.weight": torch.zeros(96, 32), "fc2.bias": torch.zeros(96)},
            "wrong keys",
        ),
        ({"fc1.weight": torch.zeros(32, 64).long(), "fc2.weight": torch.zeros(96, 32)}, "torch.int64"),
        ({"fc1.weight": 3, "fc2.weight": 4}, "state dict"),
        ([1, 2], "state dict"),
        ({1: torch.zeros(32, 64)}, "state dict"),
    ],
)
def test_damaged_predictor(content: object, part: str, bamboo: Path, predictors: Path, run: Run) -> None:
    if isinstance(content, bytes):
        (predictors / "model_1.pt").write_bytes(content)
    else:
        torch.save(content, predictors / "model_1.pt")
    options = ("--predictor", predictors)
    refused(run, predictors / "m.gguf", bamboo, CHECKPOINT, "model_1.pt", part, options=options)
    assert not list(predictors.glob("*gguf*"))


def test_pickled_code_is_not_run(bamboo: Path, predictors: Path, tmp_path: Path, run: Run, out: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"fc1.weight": Evil()}, predictors / "model_1.pt")
    refused(run, out, bamboo, CHECKPOINT, "model_1.pt", options=("--predictor", predictors))
    assert not (tmp_path / "evil").exists()


def test_predictor_beside_embedded_ones(predictors: Path, tmp_path: Path, run: Run, out: Path) -> None:
    directory = save(tmp_path / "m", DENSE, random_tensors(DENSE))
    refused(run, out, directory, CHECKPOINT, "has its own predictors", options=("--predictor", predictors))


@pytest.mark.parametrize("source", ["no/such/place", "nowhere", "./owner/name", "../no-such-folder"])
def test_no_such_directory(source: str, run: Run, out: Path) -> None:
    refused(run, out, Path(source) if source[0] != "." else source, CHECKPOINT, "no such directory")


def test_source_is_a_file(tmp_path: Path, run: Run, out: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(run, out, tmp_path / "model.safetensors", CHECKPOINT, "not a directory; name", "that holds *.safetensors")


def test_predictor_is_a_file(bamboo: Path, predictors: Path, run: Run, out: Path) -> None:
    options = ("--predictor", predictors / "model_0.pt")
    refused(run, out, bamboo, CHECKPOINT, "model_0.pt: not a directory; name", "that holds model_*.pt", options=options)


def test_revision_of_a_directory(bamboo: Path, run: Run, out: Path) -> None:
    refused(run, out, bamboo, CHECKPOINT, "--revision", options=("--revision", "main"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--outtype", "q2_K"), ["unknown type 'q2_K'", "q4_K"]),
        (("--predictor-outtype", "int8"), ["unknown predictor type 'int8'", "q3_nl"]),
        (("--tensor-type", "attn_q"), ["REGEX=TYPE"]),
        (("--tensor-type", "nothing=q8_0"), ["matches no tensor"]),
    ],
)
def test_bad_types(options: tuple[str, ...], parts: list[str], bamboo: Path, run: Run, out: Path) -> None:
    refused(run, out, bamboo, USAGE, *parts, options=options)


def test_existing_outputs_are_kept(tmp_path: Path, run: Run) -> None:
    directory = save(tmp_path / "c", DENSE, random_tensors(DENSE))
    model, sidecar = tmp_path / "m.gguf", tmp_path / "m.predictor.gguf"
    for existing in (model, sidecar):
        existing.write_bytes(b"precious")
        code, _, stderr = run("convert", directory, "--outfile", model)
        assert (code, existing.read_bytes()) == (OUTPUT, b"precious")
        assert f"{existing}: output exists" in stderr and "--force" in stderr
        existing.unlink()
    model.write_bytes(b"old")
    assert run("convert", directory, "--outfile", model, "--force")[0] == 0
    assert model.read_bytes()[:4] == b"GGUF"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "m.gguf", "m.predictor.gguf"]


def test_an_old_sidecar_does_not_stay_beside_a_model_without_one(bamboo: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "m.predictor.gguf").write_bytes(b"old")
    assert run("convert", bamboo, "--outfile", tmp_path / "m.gguf")[0] == OUTPUT
    assert run("convert", bamboo, "--outfile", tmp_path / "m.gguf", "--force")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "m.gguf"]


def test_bad_outputs(bamboo: Path, tmp_path: Path, run: Run, out: Path) -> None:
    refused(run, tmp_path / "nowhere" / "m.gguf", bamboo, OUTPUT, "does not exist")
    refused(run, tmp_path / "m.bin", bamboo, OUTPUT, ".gguf")
    (tmp_path / "d.gguf").mkdir()
    refused(run, tmp_path / "d.gguf", bamboo, OUTPUT, "is a directory")


def test_folder_not_writable(bamboo: Path, run: Run) -> None:
    """/proc refuses new files to everyone, root included."""
    code, _, stderr = run("convert", bamboo, "--outfile", "/proc/m.gguf")
    assert code == OUTPUT
    assert "writ" in stderr or "room" in stderr
