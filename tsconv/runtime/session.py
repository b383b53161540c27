"""A model's context in a file: the keys and values of a text that was computed, so that it need not be again.

It is llama.cpp's session file (llama_state_save_file), whose list of tokens begins with a mark of the model: llama.cpp
would take another model's file of the same shape, and compute nonsense from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import struct
from pathlib import Path

import llama_cpp

from tsconv.errors import ModelFileError, OutputError
from tsconv.native.log import quiet_unless
from tsconv.runtime.model import SparseLlama

MAGIC = 0x6767736E  # LLAMA_SESSION_MAGIC (llama.h)
HEAD = struct.Struct("<III")  # magic, version, number of tokens
N_MARK = 4  # tokens of the mark, 4 bytes each


def save(llama: SparseLlama, path: Path) -> None:
    """Writes what is in the context, all or nothing; an older file is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    tokens = [*_mark(llama), *llama.input_ids[: llama.n_tokens].tolist()]
    part = path.with_name(path.name + ".part")
    try:
        with llama.alone(changes=False), quiet_unless(llama.verbose) as errors:
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            written = llama_cpp.llama_state_save_file(llama.ctx, os.fsencode(part), array, len(tokens))
        if not written:
            raise OutputError("the prompt cache cannot be written", where=path, found="; ".join(errors) or None)
        try:
            os.replace(part, path)
        except OSError as error:
            raise OutputError(f"the prompt cache cannot be written: {error.strerror}", where=path) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def restore(llama: SparseLlama, path: Path) -> int:
    """Reads a file that `save` wrote into the context. Returns the number of tokens in it.

    Raises:
        ModelFileError: it cannot be read, is something else, damaged, or of another model; or the context is too short.
    """
    _check(llama, path)
    n_ctx = llama.n_ctx()
    array, n = (llama_cpp.llama_token * (n_ctx + N_MARK))(), ctypes.c_size_t()
    with llama.alone(), quiet_unless(llama.verbose) as errors:
        if not llama_cpp.llama_state_load_file(llama.ctx, os.fsencode(path), array, len(array), ctypes.byref(n)):
            raise ModelFileError(
                "the prompt cache cannot be used",
                where=path,
                found="; ".join(errors) or None,
                fix="raise the context with -c, or delete the file",
            )
        n_tokens = n.value - N_MARK
        llama.input_ids[:n_tokens] = array[N_MARK : n.value]
        llama.n_tokens = n_tokens
        llama._requires_eval = True  # llama_cpp.Llama: the logits are not there
    return n_tokens


def _check(llama: SparseLlama, path: Path) -> None:
    """Raises ModelFileError when a file is no session, or another model's."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD.size + 4 * N_MARK)
    except OSError as error:
        raise ModelFileError(f"the prompt cache cannot be read: {error.strerror}", where=path) from None
    if len(head) < HEAD.size + 4 * N_MARK or HEAD.unpack_from(head)[0] != MAGIC:
        raise ModelFileError("not a prompt cache", where=path, fix="name another file, or delete it")
    if list(struct.unpack_from(f"<{N_MARK}i", head, HEAD.size)) != _mark(llama):
        raise ModelFileError(
            "the prompt cache is of another model, or of another --sparsity or --lora",
            where=path,
            fix="name another file, or delete it",
        )


def _mark(llama: SparseLlama) -> list[int]:
    """Of what the keys and values depend on beside the tokens: model, sparsity, adapter."""
    digest = hashlib.sha256(f"{llama.header.keys.get('turbosparse.pair_id')} {llama.sparsity}".encode())
    if llama.lora_path:
        digest.update(Path(llama.lora_path).read_bytes())
    return list(struct.unpack(f"<{N_MARK}i", digest.digest()[: 4 * N_MARK]))
