"""lm_eval's own model "hf" on checkpoints/reference.py, which transformers does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from reference import Reference
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from support import CHECKPOINTS

VOCABULARY = CHECKPOINTS / "tiny-turbosparse-mistral" / "tokenizer.json"  # of both checkpoints


class ForTransformers(PreTrainedModel, GenerationMixin):
    """The PyTorch reference as a model of transformers, without a cache of keys and values."""

    config_class = PretrainedConfig
    _supports_cache_class = False

    def __init__(self, config: PretrainedConfig, reference: Reference, sparsity: str) -> None:
        super().__init__(config)
        self.reference, self.masked = reference, sparsity == "predictor"
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """They are there."""

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.reference(input_ids, self.masked))

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: Any = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}


def hf_model(checkpoint: Path, sparsity: str, n_ctx: int, logits_cache: bool = True) -> HFLM:
    """`logits_cache`: lm_eval's, which confuses texts that are equal but cut at different places."""
    reference = Reference.load(checkpoint)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(VOCABULARY), bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="<unk>"
    )
    config = PretrainedConfig(
        vocab_size=reference.config.n_vocab,
        num_hidden_layers=reference.config.n_layer,
        num_attention_heads=reference.config.n_head,
        hidden_size=reference.config.n_embd,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        is_encoder_decoder=False,
    )
    model = ForTransformers(config, reference, sparsity).eval()
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=n_ctx,
        batch_size=1,
        logits_cache=logits_cache,
        device="cpu",
        backend="causal",
    )
