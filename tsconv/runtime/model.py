"""A `llama_cpp.Llama` whose FFNs are computed sparsely by the native backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jinja2
import llama_cpp
import numpy as np
import numpy.typing as npt

from tsconv.errors import BackendError, ModelFileError, TsconvError
from tsconv.export.adapter import refuse_adapter
from tsconv.export.gguf_header import read_header
from tsconv.export.kv_cache import padded
from tsconv.runtime.backend import NativeModel, load_backend
from tsconv.runtime.cpu import physical_cores
from tsconv.runtime.limits import fits_in_memory
from tsconv.runtime.log import quiet_unless
from tsconv.runtime.residency import Residency, place_in_memory

OWN_MESSAGE = "tsffn: "  # begins every message of the native backend (native/src/backend/log.c)


class SparseLlama(llama_cpp.Llama):
    """A converted model. Everything `llama_cpp.Llama` does works; the FFNs run in the sparse backend.

    Args:
        model_path: `NAME.gguf` written by `tsconv convert`.
        sparsity: "predictor" (the checkpoint's own mask), "exact" (no predictor, unmasked dReLU), "dense" (what exact
            computes, every weight read and multiplied: a baseline to measure against), or None: predictor when the
            model has one.
        predictor_path: the sidecar, when it is not `NAME.predictor.gguf` beside the model.
        n_threads: None for the physical cores this process may use.
        n_ctx: tokens of context, 0 for the model's own; rounded up to a multiple of 256 as llama.cpp does, so that the
            buffers that `llama_cpp.Llama` keeps beside the context are as long as the context.
        flash_attn: llama.cpp's fused attention, which prefill and decoding are faster with. None: on, but for keys or
            values in f32, which it would round to f16 for every token.
        preload: bring the model file into the page cache before llama.cpp maps it, which makes loading it from disk and
            reading its rows faster. None: when it fits in memory, control groups included.
        progress: called with (bytes of the file in memory, bytes in all) meanwhile.
        verbose: llama.cpp's log on stderr.
        **kwargs: as `llama_cpp.Llama`.

    Raises:
        ModelFileError: model or sidecar missing, damaged, or not a pair.
        BackendError: the native library does not fit this llama.cpp.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        sparsity: str | None = None,
        predictor_path: str | os.PathLike[str] | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_ctx: int = 512,
        flash_attn: bool | None = None,
        preload: bool | None = None,
        progress: Callable[[int, int], None] | None = None,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        # llama_cpp.Llama's destructor closes this, also when loading fails before its own constructor runs.
        self._stack = ExitStack()
        path = Path(model_path)
        if kwargs.get("lora_path"):
            refuse_adapter(read_header(path), read_header(Path(kwargs["lora_path"])))
        native = load_backend().open_model(path, None if predictor_path is None else Path(predictor_path), sparsity)
        self._native = native
        self.sparsity: str = native.sparsity
        n_threads = n_threads or physical_cores()
        if flash_attn is None:
            flash_attn = llama_cpp.GGML_TYPE_F32 not in (kwargs.get("type_k"), kwargs.get("type_v"))
        undo = ExitStack()
        undo.callback(native.close)
        try:
            with undo, native.armed(), quiet_unless(verbose) as errors:
                if preload is None:
                    preload = kwargs.get("use_mmap", True) and fits_in_memory(native.file_bytes)
                if preload:
                    native.cache_file(progress)
                super().__init__(
                    str(path),
                    n_threads=n_threads,
                    n_threads_batch=n_threads_batch or n_threads,
                    n_ctx=padded(n_ctx),
                    flash_attn=flash_attn,
                    kv_overrides={**(kv_overrides or {}), "general.architecture": "llama"},
                    verbose=verbose,
                    **kwargs,
                )
                undo.pop_all()
        except ValueError as error:
            reason = next((line for line in errors if line), str(error))
            if reason.startswith(OWN_MESSAGE):
                raise BackendError(reason.removeprefix(OWN_MESSAGE)) from None
            raise ModelFileError(
                "llama.cpp cannot load the model",
                where=path,
                found=reason,
                fix="convert again, or run with -v for its log",
            ) from None
        except jinja2.TemplateError as error:
            raise ModelFileError(
                "key tokenizer.chat_template cannot be used", where=path, found=error, fix="convert again"
            ) from None
        # Runs after llama.cpp has freed context and weights.
        self._model._exit_stack.callback(native.close)

    def token_logits(self, tokens: Sequence[int], n_batch: int | None = None) -> npt.NDArray[np.float32]:
        """Logits of every position of one sequence, computed from a cleared context.

        Args:
            tokens: token ids, no more than `n_ctx()`.
            n_batch: tokens per call of llama_decode, at most the model's `n_batch`; None for that.

        Returns:
            float32 [n_tokens, n_vocab]; row t predicts token t + 1.

        Raises:
            TsconvError: no tokens, or more than the context holds.
        """
        n_batch = n_batch or self.n_batch
        if not 0 < len(tokens) <= self.n_ctx():
            raise TsconvError("token_logits", expected=f"1 to {self.n_ctx()} tokens (n_ctx)", found=len(tokens))
        if not 0 < n_batch <= self.n_batch:
            raise TsconvError("token_logits: n_batch", expected=f"1 to {self.n_batch}", found=n_batch)
        self.reset()
        self._ctx.kv_cache_clear()
        logits = np.empty((len(tokens), self._n_vocab), dtype=np.float32)
        for start in range(0, len(tokens), n_batch):
            piece = tokens[start : start + n_batch]
            self._batch.set_batch(piece, n_past=start, logits_all=True)
            self._decode()
            rows = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(len(piece), self._n_vocab))
            logits[start : start + len(piece)] = rows
        self._ctx.kv_cache_clear()
        return logits

    @contextmanager
    def profiling(self) -> Iterator[NativeModel]:
        """While this holds, activations are counted; read them from what it yields (`NativeModel.read_profile`)."""
        self._native.profile(True)
        try:
            yield self._native
        finally:
            self._native.profile(False)

    def _decode(self) -> None:
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as error:
            raise BackendError("llama.cpp could not compute a batch", where=self.model_path, found=error) from None

    def ffn_stats(self) -> list[dict[str, float]]:
        """What the FFNs did since loading or `reset_ffn_stats()`, one dict per layer.

        Keys: layer; calls (times computed); tokens (for MoE, tokens times routed experts); n_ff; predicted,
        gate_positive and active (mean neurons per token: let through by the predictor, of these gate > 0, of these
        up > 0);
        bytes_predictor, bytes_ffn, bytes_read (their sum) and bytes_dense (what a dense FFN would have read);
        seconds_predictor, seconds_ffn; seconds_attention (what llama.cpp computes between the FFN of the layer before
        and this one: norms, attention, router; 0 for layer 0, which has none before it); single_ops (operations
        computed alone because the graph was cut in between).
        """
        layers = []
        for layer in range(self._native.n_layer):
            s = self._native.stats(layer)
            rows = max(1, s.rows)
            layers.append(
                {
                    "layer": layer,
                    "calls": s.calls,
                    "tokens": s.rows,
                    "n_ff": s.neurons // rows,
                    "predicted": s.predicted / rows,
                    "gate_positive": s.gate_positive / rows,
                    "active": s.active / rows,
                    "bytes_predictor": s.bytes_predictor,
                    "bytes_ffn": s.bytes_ffn,
                    "bytes_read": s.bytes_predictor + s.bytes_ffn,
                    "bytes_dense": s.bytes_dense,
                    "seconds_predictor": s.ns_predictor * 1e-9,
                    "seconds_ffn": s.ns_ffn * 1e-9,
                    "seconds_attention": s.ns_attention * 1e-9,
                    "single_ops": s.single_ops,
                }
            )
        return layers

    def reset_ffn_stats(self) -> None:
        """Sets the counters of `ffn_stats` to 0."""
        self._native.reset_stats()

    def place_in_memory(
        self, hot: npt.ArrayLike, *, prefault: bool = True, lock: bool = False, read_ahead: bool = True
    ) -> Residency:
        """Brings the first `hot` [n_layer, n_ffn] neurons of each FFN into RAM; see `tsconv.runtime.residency`."""
        return place_in_memory(self._native, hot, prefault=prefault, lock=lock, read_ahead=read_ahead)

    def warm_up(self) -> None:
        """Computes one token, which touches what every token reads: attention, router, norms, output, predictors.

        Leaves the context and the counters of `ffn_stats` empty.
        """
        self.token_logits([max(0, self.token_bos())])
        self.reset_ffn_stats()


def load(model_path: str | os.PathLike[str], **kwargs: Any) -> SparseLlama:
    """Loads a converted model; see `SparseLlama` for the arguments and errors."""
    return SparseLlama(model_path, **kwargs)
