"""Grammars (GBNF) that a text has to follow, checked before llama.cpp, which ends the process for a bad one."""

from __future__ import annotations

import json
import os
import tempfile

import llama_cpp

from tsconv.errors import TsconvError
from tsconv.runtime.model import SparseLlama


def from_json_schema(schema: str) -> str:
    """The grammar of the JSON that a schema, which is JSON itself, allows.

    Raises:
        TsconvError: it is not a schema, or uses what llama_cpp does not know.
    """
    try:
        json.loads(schema)
    except ValueError as error:
        raise TsconvError(f"the JSON schema is not JSON: {error}") from None
    try:
        return llama_cpp.LlamaGrammar.from_json_schema(schema)._grammar
    except Exception as error:  # asserts, attribute errors: whatever its converter runs into
        raise TsconvError("the JSON schema cannot be used", found=str(error) or type(error).__name__) from None


def check(llama: SparseLlama, grammar: str) -> None:
    """Raises TsconvError for a grammar that llama.cpp cannot parse; says what it says."""
    if not grammar.strip():
        raise TsconvError("the grammar cannot be used", found="nothing in it")
    with tempfile.TemporaryFile() as said:
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)  # its parser prints there
        try:
            vocab = llama_cpp.llama_model_get_vocab(llama.model)
            sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    if not sampler:
        raise TsconvError("the grammar cannot be used", found=lines[0] if lines else "no rule named root")
    llama_cpp.llama_sampler_free(sampler)
