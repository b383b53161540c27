"""Computing the layers of a model without the logits: for counting what happens inside them.

Every token must be an output, or llama.cpp leaves it out of the last layer; but then the output matrix, 7 % of a 7B
model's weights, would be multiplied with every token for nothing. An evaluation callback ends the graph before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
from llama_cpp._internals import LlamaBatch, LlamaContext

from tsconv.errors import BackendError, TsconvError
from tsconv.native.library import load_backend
from tsconv.native.log import computing, quiet_unless
from tsconv.native.threads import use_threads
from tsconv.runtime.model import SparseLlama

MAX_BATCH = 512  # tokens per call of llama_decode; llama.cpp's own default
STOPPED = 2  # what that returns where a recorder had seen enough


class LayersContext:
    """A context of `llama`'s model that computes layers only, with keys and values in f32: in f16 they would be the
    largest difference from the checkpoint's own activations.

    Args:
        llama: outlives this.
        n_ctx: the longest sequence, in tokens.

    Attributes:
        one_batch: whether every sequence is computed in one batch. Then `llama.recording` may stop it: a second batch
            would need the first one's keys and values.

    Raises:
        BackendError: llama.cpp could not make the context.
    """

    def __init__(self, llama: SparseLlama, n_ctx: int) -> None:
        self.n_ctx, self._where, self._guard = n_ctx, llama.model_path, llama._guard
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_ctx, MAX_BATCH)
        params.n_threads = params.n_threads_batch = llama.n_threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cb_eval = load_backend().stop_before_output
        self._n_batch, self.one_batch = params.n_batch, n_ctx <= MAX_BATCH
        try:
            with llama._guard.alone(changes=False), quiet_unless(False) as errors:
                self._context = LlamaContext(model=llama._model, params=params, verbose=False)
        except ValueError:
            found = "; ".join(errors)
            raise BackendError("llama.cpp could not make a context", where=self._where, found=found) from None
        self._batch = LlamaBatch(n_tokens=self._n_batch, embd=0, n_seq_max=1, verbose=False)

    def compute(self, tokens: Sequence[int]) -> None:
        """Runs one sequence from position 0 through all layers.

        Raises:
            TsconvError: no tokens, or more than `n_ctx`.
            BackendError: llama.cpp could not compute them, or `llama` is closed.
        """
        with self._guard.alone(changes=False):
            use_threads(self._guard.n_threads)
            self._compute(tokens)

    def _compute(self, tokens: Sequence[int]) -> None:
        if not 0 < len(tokens) <= self.n_ctx:
            raise TsconvError("tokens to compute", expected=f"1 to {self.n_ctx} (n_ctx)", found=len(tokens))
        self._context.kv_cache_clear()
        for start in range(0, len(tokens), self._n_batch):
            self._batch.set_batch(tokens[start : start + self._n_batch], n_past=start, logits_all=True)
            with computing(self._where):
                code = llama_cpp.llama_decode(self._context.ctx, self._batch.batch)
                if code not in (0, STOPPED):
                    raise RuntimeError(f"llama_decode returned {code}")

    def close(self) -> None:
        """Frees the context."""
        self._batch.close()
        self._context.close()

    def __enter__(self) -> LayersContext:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
