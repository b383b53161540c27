"""Generates text with a loaded model and measures it: prefill apart from decoding, and what the FFNs did meanwhile.

Sampling and chat templates are llama-cpp-python's; here is the loop around `Llama.generate`, which create_completion
hides: it knows when the first token comes, and turns token bytes into text only when a character is complete.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp

from tsconv.errors import ModelFileError, TsconvError
from tsconv.runtime.chat import ChatFormatter
from tsconv.runtime.hybrid import overlap
from tsconv.runtime.model import TEMPLATE_KEY, WITHOUT_CHAT, SparseLlama


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 takes the likeliest; `seed` None is random.

    `min_p` leaves out tokens less likely than this share of the likeliest, `repeat_penalty` above 1 makes those of the
    last 64 less likely. `grammar` (GBNF, see tsconv.runtime.grammar) is what the text follows.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    grammar: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class GenerationSummary:
    """What a generation took. Means over layers and tokens are of decoding, or of prefill when nothing was decoded.

    Attributes:
        n_prompt: tokens of the prompt; n_cached of them were in the KV cache already and not computed again.
        n_generated: tokens generated, the end-of-text token not counted.
        finish_reason: "stop" (the model ended the text), "length" (the limit or the context is reached), "interrupted".
        n_decoded: tokens computed one at a time, in seconds_decode. The first token comes with the prefill.
        active, active_share: neurons with gate > 0 and up > 0 that the predictor let through, per token and layer (for
            MoE, per routed expert), and their share of n_ff.
        bytes_share: weights that the FFNs and predictors read, of what dense FFNs would have read.
        predictor_share: the predictors' share of the wall-clock time of the phase.
        memory_share: neurons that were in memory, of those that were needed; 1.0 where all always are.
        disk_bytes: read from disk, per token of the phase.
        disk_share: the share of the phase's time that was waited for the disk.
        gpu_share: active neurons that a GPU computed, of all.
        gpu_wait_share: the share of the phase's time in which the CPU waited for it.
        gpu_overlap: what GPU and CPU computed of the FFNs, in seconds of each, over the seconds that this took; None
            without a GPU.
    """

    n_prompt: int
    n_cached: int
    n_generated: int
    n_decoded: int
    finish_reason: str
    seconds_prefill: float
    seconds_decode: float
    n_ff: int
    active: float
    active_share: float
    bytes_share: float
    predictor_share: float
    memory_share: float
    disk_bytes: float
    disk_share: float
    gpu_share: float
    gpu_wait_share: float
    gpu_overlap: float | None

    @property
    def prefill_tokens_per_s(self) -> float:
        return (self.n_prompt - self.n_cached) / self.seconds_prefill

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None when nothing was decoded."""
        return self.n_decoded / self.seconds_decode if self.n_decoded else None


def combined(summaries: Sequence[GenerationSummary]) -> GenerationSummary:
    """One summary of several generations of one model, in order; there must be at least one."""
    steps = [max(1, s.n_decoded) for s in summaries]
    phase_seconds = [s.seconds_decode if s.n_decoded else s.seconds_prefill for s in summaries]

    def mean(key: str, weights: Sequence[float]) -> float:
        return sum(getattr(s, key) * w for s, w in zip(summaries, weights, strict=True)) / sum(weights)

    sums = ("n_prompt", "n_cached", "n_generated", "n_decoded", "seconds_prefill", "seconds_decode")
    return GenerationSummary(
        **{key: sum(getattr(s, key) for s in summaries) for key in sums},
        finish_reason=summaries[-1].finish_reason,
        n_ff=summaries[-1].n_ff,
        active=mean("active", steps),
        active_share=mean("active_share", steps),
        bytes_share=mean("bytes_share", steps),
        predictor_share=mean("predictor_share", phase_seconds),
        memory_share=mean("memory_share", steps),
        disk_bytes=mean("disk_bytes", steps),
        disk_share=mean("disk_share", phase_seconds),
        gpu_share=mean("gpu_share", steps),
        gpu_wait_share=mean("gpu_wait_share", phase_seconds),
        gpu_overlap=None if summaries[-1].gpu_overlap is None else mean("gpu_overlap", phase_seconds),
    )


def prompt_tokens(llama: SparseLlama, prompt: str) -> list[int]:
    """A text to continue, with the begin-of-text token if the model has it; control tokens in it count as such.

    Raises:
        TsconvError: the prompt is empty.
    """
    if not prompt:
        raise TsconvError("the prompt is empty")
    return llama.tokenize(prompt.encode("utf-8", errors="surrogateescape"), add_bos=True, special=True)


def chat_tokens(llama: SparseLlama, messages: Sequence[dict[str, str]]) -> list[int]:
    """A conversation in the model's own chat template, up to where the assistant answers.

    Args:
        messages: {"role": "system" | "user" | "assistant", "content": text} each.

    Raises:
        ModelFileError: the model has no chat template, or it cannot be rendered.
    """
    template = llama.metadata.get(TEMPLATE_KEY)
    if template is None:
        raise ModelFileError("the model has no chat template", where=llama.model_path, fix=WITHOUT_CHAT)
    try:
        rendered = ChatFormatter(llama, template)(messages=list(messages))
    except Exception as error:  # Jinja raises what it likes for a template that is wrong
        raise ModelFileError(
            "the chat template cannot be used", where=llama.model_path, found=error, fix=WITHOUT_CHAT
        ) from None
    text = rendered.prompt.encode("utf-8", errors="surrogateescape")
    return llama.tokenize(text, add_bos=not rendered.added_special, special=True)


class Generation:
    """One continuation of `tokens`: iterate over it for pieces of text, then read `summary`.

    Args:
        limit: most tokens to generate; None for as many as the context holds.
        should_stop: asked after every token; true ends the generation as "interrupted".

    Raises:
        TsconvError: the prompt leaves no room in the context.
    """

    def __init__(
        self,
        llama: SparseLlama,
        tokens: Sequence[int],
        limit: int | None = None,
        sampling: Sampling = Sampling(),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        n_ctx = llama.n_ctx()
        room = n_ctx - len(tokens)
        if room < 1:
            raise TsconvError(
                "the prompt does not fit the context",
                expected=f"at most {n_ctx - 1} tokens",
                found=len(tokens),
                fix="shorten it or raise the context with -c",
            )
        self._llama, self._tokens, self._should_stop = llama, list(tokens), should_stop
        self._limit = room if limit is None else min(limit, room)
        self._sampling = sampling
        self._summary: GenerationSummary | None = None

    @property
    def summary(self) -> GenerationSummary:
        """Of the whole text, when it is there.

        Raises:
            TsconvError: it is not.
        """
        if self._summary is None:
            raise TsconvError("the text is not complete")
        return self._summary

    def __iter__(self) -> Iterator[str]:
        llama, vocab = self._llama, llama_cpp.llama_model_get_vocab(self._llama.model)
        known = llama.input_ids[: llama.n_tokens].tolist()
        n_cached = min(llama.longest_token_prefix(known, self._tokens), len(self._tokens) - 1)
        sampling, finish_reason = self._sampling, "length"
        llama.set_seed(llama_cpp.LLAMA_DEFAULT_SEED if sampling.seed is None else sampling.seed)
        chosen = {
            "temp": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repeat_penalty,
            "grammar": None if sampling.grammar is None else llama_cpp.LlamaGrammar.from_string(sampling.grammar),
        }
        stream = llama.generate(self._tokens, **chosen)  # type: ignore[arg-type] # wraps() hides that it is a method
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        seconds = [0.0, 0.0]  # prefill, decode
        n_generated = n_steps = 0
        while n_generated < self._limit:
            if n_steps < 2:
                llama.reset_ffn_stats()
            started = time.perf_counter()
            token = next(stream)
            seconds[min(n_steps, 1)] += time.perf_counter() - started
            n_steps += 1
            if llama_cpp.llama_vocab_is_eog(vocab, token):
                finish_reason = "stop"
                break
            n_generated += 1
            piece = text.decode(llama.detokenize([token]))
            if piece:
                yield piece
            if self._should_stop():
                finish_reason = "interrupted"
                break
        rest = text.decode(b"", final=True)
        if rest:
            yield rest
        self._summary = GenerationSummary(
            n_prompt=len(self._tokens),
            n_cached=n_cached,
            n_generated=n_generated,
            n_decoded=n_steps - 1,
            finish_reason=finish_reason,
            seconds_prefill=seconds[0],
            seconds_decode=seconds[1],
            **_ffn_means(
                llama.ffn_stats(), seconds[min(n_steps - 1, 1)], max(n_steps - 1, 0) or len(self._tokens) - n_cached
            ),
        )


def _ffn_means(layers: list[dict[str, float]], seconds: float, n_tokens: int) -> dict[str, Any]:
    """The FFN part of a `GenerationSummary` from `ffn_stats()` of a phase of `n_tokens` that took `seconds`."""

    def total(key: str) -> float:
        return sum(layer[key] for layer in layers)

    def per_token(key: str) -> float:
        return sum(layer[key] * layer["tokens"] for layer in layers) / max(1, total("tokens"))

    n_ff, active = per_token("n_ff"), per_token("active")
    return {
        "n_ff": round(n_ff),
        "active": active,
        "active_share": active / max(1, n_ff),
        "bytes_share": total("bytes_read") / max(1, total("bytes_dense")),
        "predictor_share": total("seconds_predictor") / seconds,
        "memory_share": 1.0 - total("neurons_missing") / max(1, total("neurons_needed")),
        "disk_bytes": total("bytes_disk") / n_tokens,
        "disk_share": total("seconds_disk") / seconds,
        "gpu_share": per_token("gpu_active") / max(1e-9, active),
        "gpu_wait_share": total("seconds_gpu_wait") / seconds,
        "gpu_overlap": overlap(layers),
    }
