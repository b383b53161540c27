"""A `llama_cpp.Llama` whose FFNs are computed sparsely by the native backend."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tsconv.checkpoint.config import MAX_CONTEXT
from tsconv.errors import BackendError, ModelFileError, TsconvError
from tsconv.format.adapter import refuse_adapter
from tsconv.format.header import Header, read_header
from tsconv.format.kv_cache import padded
from tsconv.machine.limits import fits_in_memory, usable_cores
from tsconv.native.devices import gpus
from tsconv.native.ffn_gpus import NoGpuError
from tsconv.native.library import gpu_module
from tsconv.native.log import computing, quiet_unless
from tsconv.native.threads import check_threads, use_threads
from tsconv.runtime.binding import NativeModel, Recorder, open_model
from tsconv.runtime.chat import ChatFormatter
from tsconv.runtime.guard import CLOSED, FORKED, Gone, Guard
from tsconv.runtime.hybrid import Share, memory_of, share
from tsconv.runtime.load_error import load_error
from tsconv.runtime.offload import AUTO, Offload, Offloading, Wanted, choose
from tsconv.runtime.residency import Residency, place_in_memory
from tsconv.runtime.streaming import choose_budget, loading_kept_weights

TEMPLATE_KEY = "tokenizer.chat_template"
WITHOUT_CHAT = "continue a text instead: -p, without --chat"
DEFAULT_TEMPLATE = "chat_template.default"  # what llama_cpp.Llama calls the chat format that this key holds
WINDOW_KEY = "turbosparse.source.sliding_window"
AMX = b"AMX_INT8 = 1"
MAX_THREADS = 512  # GGML_MAX_N_THREADS (ggml.h)
CPU_ALONE = ("dense", "topk")  # kinds of sparsity that no GPU computes

PARTS = ("_model", "_ctx", "_batch")  # of a llama_cpp.Llama
POINTERS = ("model", "vocab", "ctx", "memory", "batch")  # of them, into llama.cpp

_models: weakref.WeakSet[SparseLlama] = weakref.WeakSet()  # of this process: a fork leaves its child with none of them


def _alone(function: Callable[..., Any], changes: bool = True) -> Callable[..., Any]:
    """The method, called with the model for itself; `changes` as for `Guard.alone`."""

    @wraps(function)
    def method(self: SparseLlama, *args: Any, **kwargs: Any) -> Any:
        with self._guard.alone(changes=changes):
            return function(self, *args, **kwargs)

    return method


class FileName(str):
    """A path for llama_cpp, which encodes it strictly: file names need not be UTF-8."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


def _threads(n_threads: int | None, n_threads_batch: int | None) -> tuple[int, int]:
    """Those of decoding and of prefill. Raises TsconvError for a number that llama.cpp does not have."""
    for n in (n_threads, n_threads_batch):
        if n is not None and not 1 <= n <= MAX_THREADS:
            raise TsconvError("threads", expected=f"1 to {MAX_THREADS}", found=n)
    return n_threads or usable_cores(), n_threads_batch or n_threads or usable_cores()


def _prepare_openmp(n_threads: int) -> None:
    """Raises BackendError where this process cannot compute with so many threads."""
    check_threads(n_threads)
    if AMX in llama_cpp.llama_print_system_info():
        use_threads(usable_cores())  # of OpenMP's own choice, while weights are repacked


class SparseLlama(Offloading, llama_cpp.Llama):
    """A converted model. Everything `llama_cpp.Llama` does works; the FFNs run in the sparse backend.

    One call at a time: threads that share a model wait for each other. A text that comes in pieces (`generate`,
    `create_completion(stream=True)`) keeps nobody waiting between them, but raises BackendError where it would go on
    after another call has changed the context. After `close()`, and in processes that were forked from the one that
    loaded it, every use of the model raises BackendError. A copy (pickle, copy.deepcopy) loads the model again with the
    same arguments; its context is empty.

    Args:
        model_path: `NAME.gguf` written by `tsconv convert`.
        sparsity: "predictor" (the checkpoint's own mask), "exact" (no predictor, unmasked dReLU), "dense" (what exact
            computes, every weight read and multiplied: a baseline to measure against), "topk:S" (of each token's
            neurons, those of each expert apart, the share S with the smallest |gate * up| is dropped; gate and up are
            computed of all, so that it measures what sparsity costs in quality and is no faster than exact),
            "predictor:D" (D added to the threshold that the predictor's logits must pass), or None: predictor when
            the model has one.
        predictor_path: the sidecar, when it is not `NAME.predictor.gguf` beside the model.
        n_threads: None for the physical cores this process may use, and no more than control groups grant it.
        n_ctx: tokens of context, 0 for the model's own; rounded up to a multiple of 256 as llama.cpp does, so that the
            buffers that `llama_cpp.Llama` keeps beside the context are as long as the context.
        flash_attn: llama.cpp's fused attention, which prefill and decoding are faster with. None: on, but for keys or
            values in f32, which it would round to f16 for every token.
        n_gpu_layers: attention, keys and values of the last so many layers, and the output, which counts as one, are
            computed by llama.cpp's GPU backends: "auto" (as many as fit into the free memory of GPUs that have their
            own), "all" or -1, or a number. FFNs are computed here, but for what a GPU has a share of: predictors and
            hot neurons, as many as fit into what is left (`gpu_share`). With 0 nothing goes to a GPU.
        device: names of the GPUs to use, joined by commas, as `tsconv doctor` shows them. None: all of them.
        main_gpu: the position among them of one to use alone.
        vram_budget: bytes to put on GPUs at most: with "auto" layers, and then FFNs. None: what is free, but for 1 GiB
            of each.
        gpu_hot: [n_layer, n_ffn] neurons at the front of each FFN that may be on a GPU, whatever n_gpu_layers is.
            None: all.
        ram_budget: bytes, or "3G" and such, that weights and context may take. Where that is less than all of them,
            neurons are read from disk when they are needed and the rest is kept in memory. "auto": what this process
            can come to use, control groups included; "off": the model is mapped whatever its size.
        preload: bring the model file into the page cache before llama.cpp maps it, which makes loading it from disk and
            reading its rows faster. None: when it fits in memory, control groups included.
        progress: called with (bytes of the file in memory, bytes in all) meanwhile, and then with those of what goes
            to a GPU.
        header: of the model file, where it has been read already.
        verbose: llama.cpp's log on stderr.
        **kwargs: as `llama_cpp.Llama`.

    Attributes:
        offload: what llama.cpp has on GPUs.
        gpu_share: what a GPU has of the FFNs; None: nothing, and gpu_complaint says why where one was there or asked
            for.

    Raises:
        ModelFileError: model or sidecar missing, damaged, or not a pair; an adapter (lora_path) that does not fit.
        BackendError: the native library does not fit this llama.cpp, or there is no memory for the context, or this
            process was forked from one that computed with several threads.
        TsconvError: a context or a number of threads that llama.cpp does not have; no such GPU; no room for what every
            token needs.
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
        n_gpu_layers: int | str = AUTO,
        device: str | None = None,
        main_gpu: int | None = None,
        vram_budget: int | None = None,
        gpu_hot: npt.ArrayLike | None = None,
        ram_budget: int | str = AUTO,
        preload: bool | None = None,
        progress: Callable[[int, int], None] | None = None,
        header: Header | None = None,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        path = Path(model_path)
        if not 0 <= n_ctx <= MAX_CONTEXT:
            raise TsconvError("context", expected=f"0 to {MAX_CONTEXT} tokens", found=n_ctx)
        threads = _threads(n_threads, n_threads_batch)
        lora_path = kwargs.pop("lora_path", None)
        if lora_path:
            header = header or read_header(path)
            refuse_adapter(header, read_header(Path(lora_path)))
            kwargs["use_mmap"] = False
        _prepare_openmp(max(threads))
        self._native = open_model(path, None if predictor_path is None else Path(predictor_path), sparsity, header)
        self.sparsity: str = self._native.sparsity
        on_gpus = Wanted(n_gpu_layers, device, main_gpu, vram_budget, gpu_hot)
        try:
            self.offload = self._choose_offload(on_gpus, n_ctx)
            self.budget = choose_budget(
                self._native.header, self._native.sidecar_bytes, n_ctx, ram_budget, on_gpus=self.offload.n_bytes
            )
        except BaseException:
            self._native.close()
            raise
        self.gpu_share: Share | None = None
        self.gpu_complaint: str | None = None
        # llama_cpp.Llama's destructor closes these, also when loading fails before its own constructor runs.
        self._guard, self._stack = Guard(max(threads)), ExitStack()
        self._arguments = {
            "model_path": model_path,
            "sparsity": self.sparsity,
            "predictor_path": predictor_path,
            "n_threads": n_threads,
            "n_threads_batch": n_threads_batch,
            "n_ctx": n_ctx,
            "flash_attn": flash_attn,
            "n_gpu_layers": n_gpu_layers,
            "device": device,
            "main_gpu": main_gpu,
            "vram_budget": vram_budget,
            "gpu_hot": gpu_hot,
            "ram_budget": ram_budget,
            "preload": preload,
            "kv_overrides": kv_overrides,
            "verbose": verbose,
            "lora_path": lora_path,
            **kwargs,
        }
        if flash_attn is None:
            flash_attn = llama_cpp.GGML_TYPE_F32 not in (kwargs.get("type_k"), kwargs.get("type_v"))
        shared = None if lora_path or self._native.kind in CPU_ALONE else memory_of(self.offload)
        if shared is not None:
            self._native.keep_on_gpu(shared)
        self._load(
            path,
            preload,
            progress,
            n_threads=threads[0],
            n_threads_batch=threads[1],
            n_ctx=padded(n_ctx),
            flash_attn=flash_attn,
            n_gpu_layers=self.offload.n_gpu_layers,
            kv_overrides={**(kv_overrides or {}), "general.architecture": "llama"},
            verbose=verbose,
            **kwargs,
        )
        self._use_templates(kwargs.get("chat_format") is kwargs.get("chat_handler") is None)
        if lora_path:
            self._use_adapter(Path(lora_path))
            on_gpus = Wanted(n_gpu_layers=0)  # its FFNs are computed in parts
        self._after_loading(on_gpus, progress)

    def _use_templates(self, is_free: bool) -> None:
        """Chat templates are rendered as transformers does; the model's own is used where the user `is_free` of
        wishes."""
        for name in self._chat_handlers:  # "chat_template.default" and others, as llama_cpp.Llama names them
            template = self._metadata[TEMPLATE_KEY if name == DEFAULT_TEMPLATE else f"tokenizer.{name}"]
            self._chat_handlers[name] = ChatFormatter(self, template).to_chat_handler()
        self._metadata |= self._unusable_templates
        if TEMPLATE_KEY in self._metadata and is_free:
            self.chat_format = DEFAULT_TEMPLATE  # not one of llama_cpp's own that it takes to be the same

    def _after_loading(self, on_gpus: Wanted, progress: Callable[[int, int], None] | None) -> None:
        """Gives a GPU its share of the FFNs, and brings into memory what is kept of the others.

        Raises:
            TsconvError: no such GPU; neurons that cannot be read. The model is closed then.
        """
        try:
            if on_gpus.ffns and self._native.kind not in CPU_ALONE:
                self._share_ffns(on_gpus, progress)
            if self.budget is not None:
                self._native.fill(progress)
        except BaseException:
            self.close()
            raise

    def _load(
        self, path: Path, preload: bool | None, progress: Callable[[int, int], None] | None, /, **arguments: Any
    ) -> None:
        """llama_cpp.Llama's constructor, with `arguments`, while the backend claims the FFNs.

        Raises:
            TsconvError: what `load_error` makes of its errors; the model is closed then.
        """
        native, undo, errors = self._native, ExitStack(), list[str]()
        undo.callback(native.close)
        try:
            with undo:
                reading: AbstractContextManager[None] = nullcontext()
                if self.budget is not None:
                    native.stream(self.budget.neurons)
                    reading = loading_kept_weights(native, str(path))
                else:
                    if preload is None:
                        preload = arguments.get("use_mmap", True) and fits_in_memory(native.file_bytes)
                    if preload:
                        native.cache_file(progress)
                with native.armed(), reading, quiet_unless(arguments["verbose"]) as errors:
                    super().__init__(FileName(path), **arguments)
                undo.pop_all()
        except (ValueError, MemoryError) as error:
            self.close()
            raise load_error(error, errors, path, arguments["n_ctx"], self.offload) from None
        self._model._exit_stack.callback(native.close)  # runs after llama.cpp has freed context and weights
        _models.add(self)

    def _choose_offload(self, wanted: Wanted, n_ctx: int) -> Offload:
        """What goes to which GPUs of this process. Drivers are asked only when they may be wanted.

        Raises:
            TsconvError: as `tsconv.runtime.offload.choose`.
        """
        header = self._native.header
        n_ctx = n_ctx or header.keys.get("llama.context_length", 0)
        there = gpus() if wanted.n_gpu_layers != 0 else []
        if not there and wanted.n_gpu_layers == AUTO and gpu_module() is not None:
            wanted = replace(wanted, device=None, main_gpu=None)  # meant for FFNs
        return choose(header, there, wanted, n_ctx=n_ctx)

    def _share_ffns(self, wanted: Wanted, progress: Callable[[int, int], None] | None) -> None:
        """Gives a GPU its share of the FFNs, if there is one that can have it. Raises TsconvError for no such GPU."""
        try:
            self.gpu_share = share(self._native, self.offload, wanted, progress)
        except NoGpuError as error:
            asked = wanted.has_names or wanted.vram_budget is not None or wanted.gpu_hot is not None
            if asked and not self.offload.gpus:
                self.gpu_complaint = str(error)
        except BackendError as error:
            self.gpu_complaint = str(error)

    def _use_adapter(self, path: Path) -> None:
        """What llama_cpp.Llama does for lora_path, but that it does not see when llama.cpp refuses the adapter.

        Raises:
            ModelFileError: it does; the model is closed then.
        """
        with quiet_unless(self.verbose) as errors:
            adapter = llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(path))
            if adapter:
                self._lora_adapter, self.lora_path = adapter, str(path)
                self._stack.callback(llama_cpp.llama_adapter_lora_free, adapter)
                adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
                if llama_cpp.llama_set_adapters_lora(self.ctx, adapters, 1, (ctypes.c_float * 1)(self.lora_scale)) == 0:
                    return
            self.close()
        raise ModelFileError("llama.cpp cannot use the adapter", where=path, found="; ".join(errors) or None)

    # ---- a model that is gone

    def close(self) -> None:
        """Frees the model. Every use of it raises BackendError from now on.

        Raises:
            BackendError: the model is working for the caller, who is in the middle of it.
        """
        guard = getattr(self, "_guard", None)
        if guard is None:  # nothing was opened: the destructor of a model with wrong arguments
            return
        with guard.lock:
            if guard.gone is not None:
                return
            if guard.is_working:
                raise BackendError("the model is working", fix="close it when the call that it works for has ended")
            with self._native.lock:
                self._end(CLOSED)

    def after_fork(self) -> None:
        """In the child: leaves the parent's model alone; nothing is freed, since other threads may have held locks."""
        self._guard.after_fork()
        self._native.after_fork()
        self._end(self._guard.gone or FORKED, free=False)

    def _end(self, why: str, free: bool = True) -> None:
        """From now on every use of the model, and of what others hold of it, says `why` it cannot be used."""
        self._guard.gone = why
        names = [name for name in (*PARTS, "tokenizer_") if name in vars(self)]
        # llama_cpp's objects around llama.cpp's pointers; a model that was closed before a fork has none left
        parts = [vars(self)[name] for name in names if name in PARTS and not isinstance(vars(self)[name], Gone)]
        self.__dict__.update(dict.fromkeys(names, Gone(why)))
        if free:
            self._stack.close()
        else:
            for stack in (self._stack, *(part._exit_stack for part in parts)):
                stack.pop_all()
        for part in parts:
            part.__dict__.update({name: Gone(why) for name in POINTERS if name in vars(part)})

    def __getstate__(self) -> dict[str, Any]:
        with self._guard.alone(changes=False):
            return self._arguments | {"seed": self._seed}

    # ---- one call at a time

    def alone(self, *, changes: bool = True) -> AbstractContextManager[None]:
        """While this holds, no other thread uses the model. `changes`: tokens may come into the context, or leave it.

        Raises:
            BackendError: the model cannot be used any more.
        """
        return self._guard.alone(changes=changes)

    reset = _alone(llama_cpp.Llama.reset)
    embed = _alone(llama_cpp.Llama.embed)
    load_state = _alone(llama_cpp.Llama.load_state)
    save_state = _alone(llama_cpp.Llama.save_state, changes=False)
    sample = _alone(llama_cpp.Llama.sample, changes=False)
    tokenize = _alone(llama_cpp.Llama.tokenize, changes=False)
    detokenize = _alone(llama_cpp.Llama.detokenize, changes=False)

    @_alone
    def eval(self, tokens: Sequence[int]) -> None:
        """As llama_cpp.Llama's, but that BackendError says why llama.cpp could not compute the tokens."""
        with computing(self.model_path, self.verbose):
            super().eval(tokens)

    @wraps(llama_cpp.Llama.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        return self._in_steps(super().generate(*args, **kwargs))

    @wraps(llama_cpp.Llama.create_completion)
    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        with self._guard.alone():
            answer = super().create_completion(*args, **kwargs)
        return answer if isinstance(answer, dict) else self._in_steps(answer)  # stream=True: nothing is computed yet

    @wraps(llama_cpp.Llama.create_chat_completion)
    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        with self._guard.alone(changes=False):
            error = self._template_errors.get(TEMPLATE_KEY)
            if error is not None and self.chat_handler is None and self.chat_format == DEFAULT_TEMPLATE:
                raise ModelFileError(
                    "the chat template cannot be used",
                    where=self.model_path,
                    found=error,
                    fix="name another chat_format, or continue a text instead",
                )
        return super().create_chat_completion(*args, **kwargs)

    def _in_steps(self, stream: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        """`stream`, having the model for itself during each step, and its context unchanged between them."""
        value, version = None, None
        while True:
            with self._guard.alone(continues=version):
                try:
                    item = stream.send(value)
                except StopIteration:
                    return
                version = self._guard.version
            value = yield item

    # ---- chat templates

    @property
    def header(self) -> Header:
        """Of the model file."""
        return self._native.header

    @property
    def metadata(self) -> dict[str, str]:
        """The model's keys that are no arrays, as text."""
        return self._metadata

    @metadata.setter
    def metadata(self, keys: dict[str, str]) -> None:
        """Called by llama_cpp.Llama's constructor, which goes on to compile the templates among them, and would fail
        for a model that is to continue texts only: it does not get to see those that are none."""
        self._template_errors = {}
        for key in (key for key in keys if key == TEMPLATE_KEY or key.startswith(f"{TEMPLATE_KEY}.")):
            try:
                Jinja2ChatFormatter(template=keys[key], eos_token="", bos_token="")
            except Exception as error:  # Jinja raises what it likes for a template that is wrong
                self._template_errors[key] = error
        self._metadata = {key: value for key, value in keys.items() if key not in self._template_errors}
        self._unusable_templates = {key: keys[key] for key in self._template_errors}

    def context_warning(self, n_tokens: int) -> str | None:
        """One line when `n_tokens` tokens are more than the checkpoint was made for; None otherwise."""
        window = self.metadata.get(WINDOW_KEY, "")
        if window.isdecimal() and n_tokens > int(window):
            return (
                f"{n_tokens} tokens are more than the checkpoint's attention window of {window}; llama.cpp attends to "
                "all of them, which the checkpoint has not learned: the text may get worse"
            )
        trained = self._model.n_ctx_train()
        if n_tokens > trained:
            return (
                f"{n_tokens} tokens are more than the {trained} the checkpoint was trained with: the text may get worse"
            )
        return None

    @_alone
    def token_logits(self, tokens: Sequence[int], n_batch: int | None = None) -> npt.NDArray[np.float32]:
        """Logits of every position of one sequence, computed from a cleared context.

        Args:
            tokens: token ids, no more than `n_ctx()`.
            n_batch: tokens per call of llama_decode, at most the model's `n_batch`; None for that.

        Returns:
            float32 [n_tokens, n_vocab]; row t predicts token t + 1.

        Raises:
            TsconvError: no tokens, or more than the context holds.
            BackendError: llama.cpp could not compute them.
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

    def recording(
        self, layers: range, record: Recorder, stops: bool = False
    ) -> AbstractContextManager[Callable[[], None]]:
        """While this holds, `record` gets what the FFNs of `layers` compute; see `NativeModel.recording`."""
        return self._native.recording(layers, record, stops)

    def _decode(self) -> None:
        with computing(self.model_path, self.verbose):
            self._ctx.decode(self._batch)

    def ffn_stats(self) -> list[dict[str, float]]:
        """What the FFNs did since loading or `reset_ffn_stats()`, one dict per layer.

        Keys: layer; calls (times computed); tokens (for MoE, tokens times routed experts); n_ff; predicted,
        gate_positive and active (mean neurons per token: let through by the predictor, of these gate > 0, of these
        up > 0);
        bytes_predictor, bytes_ffn, bytes_read (their sum) and bytes_dense (what a dense FFN would have read);
        seconds_predictor, seconds_ffn; seconds_attention (what llama.cpp computes between the FFN of the layer before
        and this one: norms, attention, router; 0 for layer 0, which has none before it); single_ops (operations
        computed alone because the graph was cut in between). Where neurons come from disk (ram_budget): neurons_needed,
        of these neurons_missing in memory, and of those neurons_ahead, read while the layer before was computed;
        neurons_in_vain, read ahead and not needed; disk_reads, bytes_disk, seconds_disk (in which a thread waited for
        them).
        Where a GPU has a share (gpu_share): gpu_calls, those it took part in; gpu_neurons and gpu_active, which it
        computed, per token; bytes_gpu, of bytes_read, from its memory; bytes_streamed, of neurons that were copied
        there for a prompt; seconds_gpu, in which it computed, of these seconds_gpu_predictor, and seconds_gpu_wait, in
        which the CPU did not.
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
                    "neurons_needed": s.needed,
                    "neurons_missing": s.missing,
                    "neurons_ahead": s.ahead,
                    "neurons_in_vain": s.in_vain,
                    "disk_reads": s.reads,
                    "bytes_disk": s.bytes_disk,
                    "seconds_disk": s.ns_disk * 1e-9,
                    "gpu_calls": s.gpu_calls,
                    "gpu_neurons": s.gpu_neurons / rows,
                    "gpu_active": s.gpu_active / rows,
                    "bytes_gpu": s.gpu_bytes,
                    "bytes_streamed": s.gpu_streamed,
                    "seconds_gpu": s.ns_gpu * 1e-9,
                    "seconds_gpu_predictor": s.ns_gpu_predictor * 1e-9,
                    "seconds_gpu_wait": s.ns_gpu_wait * 1e-9,
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

    @_alone
    def warm_up(self) -> None:
        """Computes one token, which touches what every token reads: attention, router, norms, output, predictors.

        Leaves the context and the counters of `ffn_stats` empty.
        """
        self.token_logits([max(0, self.token_bos())])
        self.reset_ffn_stats()


def _after_fork() -> None:
    for model in list(_models):
        model.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def load(model_path: str | os.PathLike[str], **kwargs: Any) -> SparseLlama:
    """Loads a converted model; see `SparseLlama` for the arguments and errors."""
    return SparseLlama(model_path, **kwargs)
