"""Computing the layers of a model without the logits: for counting what happens inside them.

Every token must be an output, or llama.cpp leaves it out of the last layer; but then the output matrix, 7 % of a 7B
model's weights, would be multiplied with every token for nothing. An evaluation callback ends the graph before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp

from tsconv.errors import BackendError, TsconvError
from tsconv.runtime.backend import load_backend
from tsconv.runtime.log import quiet_unless
from tsconv.runtime.model import SparseLlama

GGML_TYPE_F32 = 0  # ggml.h
MAX_BATCH = 512  # tokens per call of llama_decode; llama.cpp's own default


class LayersContext:
    """A context of `llama`'s model that computes layers only, with keys and values in f32: in f16 they would be the
    largest difference from the checkpoint's own activations.

    Args:
        llama: outlives this.
        n_ctx: the longest sequence, in tokens.

    Raises:
        BackendError: llama.cpp could not make the context.
    """

    def __init__(self, llama: SparseLlama, n_ctx: int) -> None:
        self.n_ctx, self._where = n_ctx, llama.model_path
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_ctx, MAX_BATCH)
        params.n_threads = params.n_threads_batch = llama.n_threads
        params.type_k = params.type_v = GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cb_eval = load_backend().stop_before_output
        self._n_batch = params.n_batch
        with quiet_unless(False) as errors:
            self._context = llama_cpp.llama_init_from_model(llama._model.model, params)
        if not self._context:
            raise BackendError("llama.cpp could not make a context", where=self._where, found="; ".join(errors))
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)

    def compute(self, tokens: Sequence[int]) -> None:
        """Runs one sequence from position 0 through all layers.

        Raises:
            TsconvError: no tokens, or more than `n_ctx`.
            BackendError: llama.cpp could not compute them.
        """
        if not 0 < len(tokens) <= self.n_ctx:
            raise TsconvError("tokens to compute", expected=f"1 to {self.n_ctx} (n_ctx)", found=len(tokens))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        for start in range(0, len(tokens), self._n_batch):
            piece = tokens[start : start + self._n_batch]
            batch = self._batch
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i] = token
                batch.pos[i] = start + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = True
            status = llama_cpp.llama_decode(self._context, batch)
            if status != 0:
                raise BackendError("llama.cpp could not compute a batch", where=self._where, found=f"status {status}")

    def close(self) -> None:
        """Frees the context."""
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def __enter__(self) -> LayersContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
