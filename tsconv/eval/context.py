"""Contexts of llama.cpp for several sequences at once, beside the one that a model has."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as library
from llama_cpp._internals import LlamaBatch, LlamaContext

from tsconv.errors import BackendError
from tsconv.native.log import quiet_unless
from tsconv.runtime.model import SparseLlama

N_UBATCH = 512


class SequencesContext:
    """A context of `model`, to be used while it is alone (`SparseLlama.alone`).

    Args:
        n_ctx: tokens of all sequences together.
        n_seq: sequences.
        n_batch: tokens of a batch at most.
        shared: sequences may have tokens in common; else each has n_ctx / n_seq tokens to itself.
        what, fix: the context in words, and what to do where there is no memory for it.

    Attributes:
        batch: a llama_batch, to be filled; a token may be of all sequences.

    Raises:
        BackendError: no memory.
    """

    def __init__(
        self, model: SparseLlama, *, n_ctx: int, n_seq: int, n_batch: int, shared: bool, what: str, fix: str
    ) -> None:
        params = type(model.context_params).from_buffer_copy(model.context_params)
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, n_batch, N_UBATCH, n_seq
        params.kv_unified = shared
        self._model, self._n_vocab = model, model.n_vocab()
        with quiet_unless(model.verbose) as errors:
            try:
                self._context = LlamaContext(model=model._model, params=params, verbose=False)
            except ValueError as error:
                found = "; ".join(errors) or error
                raise BackendError(f"llama.cpp cannot make a context of {what}", found=found, fix=fix) from None
        self._batch = LlamaBatch(n_tokens=n_batch, embd=0, n_seq_max=n_seq if shared else 1, verbose=False)
        self.batch = self._batch.batch
        self.memory = library.llama_get_memory(self._context.ctx)

    def clear(self) -> None:
        """Forgets all sequences."""
        self._context.kv_cache_clear()

    def decode(self) -> None:
        """Computes the batch. Raises BackendError."""
        with quiet_unless(self._model.verbose) as errors:
            status = library.llama_decode(self._context.ctx, self.batch)
        if status != 0:
            raise BackendError("llama.cpp cannot compute", found="; ".join(errors) or f"status {status}")

    def logits(self, at: int, n: int) -> npt.NDArray[np.float32]:
        """float32 [n, n_vocab] of the batch's next n outputs from token `at` on, in llama.cpp's memory."""
        pointer = library.llama_get_logits_ith(self._context.ctx, at)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, (n, self._n_vocab))

    def close(self) -> None:
        self._batch.close()
        self._context.close()
