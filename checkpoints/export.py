"""Writes a trained model in the layout of the TurboSparse checkpoints: bf16 shards, configs, tokenizer, model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tokenizer
import torch
from reference import EXPERT_NAMES, Config, Reference
from safetensors.torch import save_file
from torch import Tensor

N_SHARD = 2
N_CTX_MAX = 4096
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% endif %}"
    "{% if system_message is defined %}{{ '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ content + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
)
TOKEN_FLAGS = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)


@dataclass(frozen=True)
class Family:
    architecture: str
    model_type: str
    module: str  # of auto_map, as the real checkpoints name it
    ships: str  # the one tokenizer file of this checkpoint


DENSE = Family("BambooForCausalLM", "bamboo", "bamboo.Bamboo", "tokenizer.json")
MOE = Family(
    "TurboSparseMixtralForCausalLM", "turbosparsemixtral", "turbosparsemixtral.TurboSparseMixtral", "tokenizer.model"
)


def model_config(c: Config, name: str) -> dict:
    """config.json with the keys of the real checkpoint of the family, in their order (alphabetical)."""
    family = MOE if c.n_expert else DENSE
    module, cls = family.module.split(".")
    config = {
        "_name_or_path": name,
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": f"configuration_{module}.{cls}Config",
            "AutoModel": f"modeling_{module}.{family.architecture}",
            "AutoModelForCausalLM": f"modeling_{module}.{family.architecture}",
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "relu",
        "hidden_size": c.n_embd,
        "initializer_range": 0.02,
        "intermediate_size": c.n_ff,
        "max_position_embeddings": N_CTX_MAX,
        "model_type": family.model_type,
        "num_attention_heads": c.n_head,
        "num_hidden_layers": c.n_layer,
        "num_key_value_heads": c.n_head_kv,
        "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope_theta,
        "sliding_window": c.window,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.0",
        "use_cache": False,
        "vocab_size": c.n_vocab,
    }
    if c.n_expert:
        config |= {
            "num_experts_per_tok": c.n_expert_used,
            "num_local_experts": c.n_expert,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
        }
    return dict(sorted(config.items()))


def tensors(ref: Reference) -> dict[str, Tensor]:
    """The model's parameters in bf16 under the checkpoint's names."""
    state = {}
    back = {ours: theirs for theirs, ours in EXPERT_NAMES.items()}
    for name, tensor in ref.state_dict().items():
        is_expert = ".experts." in name
        theirs = ".".join(back.get(part, part) for part in name.split(".")) if is_expert else name
        state[theirs] = tensor.detach().to(torch.bfloat16).contiguous()
    return state


def write_shards(state: dict[str, Tensor], directory: Path, n_shard: int = N_SHARD) -> None:
    """model-0000I-of-0000N.safetensors, cut between tensors at equal shares of the bytes, and their index."""
    total = sum(t.nbytes for t in state.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shard)]
    done = 0
    for name, tensor in state.items():
        shards[done * n_shard // total][name] = tensor
        done += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{n_shard:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)
        weight_map |= {name: file for name in shard}
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def tokenizer_config(n_piece: int) -> dict:
    ids = {piece: i for i, piece in enumerate(tokenizer.CONTROL)} | tokenizer.added_tokens(n_piece)
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": True,
        "added_tokens_decoder": {str(i): {"content": t, **TOKEN_FLAGS, "special": True} for t, i in ids.items()},
        "additional_special_tokens": ["<|im_start|>"],
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "legacy": True,
        "model_max_length": N_CTX_MAX,
        "pad_token": "<unk>",
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "split_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def special_tokens_map() -> dict:
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "unk_token": "<unk>"}
    return {"additional_special_tokens": ["<|im_start|>"]} | {
        key: {"content": token, **TOKEN_FLAGS} for key, token in named.items()
    }


def write_checkpoint(ref: Reference, name: str, pieces: bytes, directory: Path) -> None:
    """Everything but the README.md into an empty or missing directory. `pieces` is the sentencepiece model."""
    directory.mkdir(parents=True, exist_ok=True)
    n_piece = tokenizer.SentencePiece(pieces).sp.vocab_size()
    write_shards(tensors(ref), directory)
    write_json(directory / "config.json", model_config(ref.config, name))
    write_json(
        directory / "generation_config.json",
        {"do_sample": True, "max_new_tokens": N_CTX_MAX, "temperature": 0.0, "transformers_version": "4.41.0"},
    )
    write_json(directory / "tokenizer_config.json", tokenizer_config(n_piece))
    write_json(directory / "special_tokens_map.json", special_tokens_map())
    write_json(directory / "added_tokens.json", tokenizer.added_tokens(n_piece))
    if ref.config.n_expert:
        (directory / MOE.ships).write_bytes(pieces)
    else:
        (directory / DENSE.ships).write_text(tokenizer.to_json(pieces))


def replace(new: Path, final: Path) -> None:
    """Puts a finished directory in the place of another by renames."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
