"""Conversations in a model's own chat template, as llama.cpp's programs render them."""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import ChatFormatterResponse, Jinja2ChatFormatter


class ChatFormatter(Jinja2ChatFormatter):
    """A chat template, rendered by Jinja as transformers does.

    The prompt begins with one BOS token where the tokenizer adds one to a text, whether or not the template writes it.
    transformers adds none to a chat. llama.cpp does: tools/server tokenizes the rendered text with add_special. The
    same conversation must give the same tokens in `tsconv run`, `tsconv serve` and Python.
    """

    def __init__(self, llama: llama_cpp.Llama, template: str) -> None:
        """Raises what Jinja raises for a template that is none."""
        vocab = llama_cpp.llama_model_get_vocab(llama.model)
        bos, eos = (
            llama_cpp.llama_vocab_get_text(vocab, token).decode() if token >= 0 else ""
            for token in (llama.token_bos(), llama.token_eos())
        )
        super().__init__(template=template, bos_token=bos, eos_token=eos, stop_token_ids=[llama.token_eos()])
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocab))

    def __call__(self, **kwargs: Any) -> ChatFormatterResponse:
        response = super().__call__(**kwargs)
        if self.adds_bos:
            response.prompt = response.prompt.removeprefix(self.bos_token)
            response.added_special = False
        return response
