"""Perplexity of a converted model on a text, and its Kullback-Leibler divergence from another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tsconv.errors import ModelFileError, TsconvError
from tsconv.eval.estimate import log_softmax
from tsconv.eval.ppl import neuron_shares
from tsconv.format.header import Header
from tsconv.format.keys import FINGERPRINT
from tsconv.runtime.model import SparseLlama

# What all conversions of a checkpoint have alike, whatever their types, order and layout. The fingerprint tells
# checkpoints apart; models of older converters have none, and the others tell of another family, size or vocabulary.
CHECKPOINT_KEYS = (
    FINGERPRINT,
    "turbosparse.source.repo",
    "llama.block_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "tokenizer.ggml.tokens",
)
MAY_LACK = (FINGERPRINT, "turbosparse.source.repo")


@dataclass(frozen=True)
class Quality:
    """Means over `n_tokens` predicted tokens.

    Attributes:
        perplexity: exp of the mean negative log likelihood.
        kl: mean over tokens of sum_v p_v log(p_v / q_v), in nats; p is the baseline's distribution, q the model's.
            None without a baseline.
        same_top: share of the tokens where both find the same token likeliest; None without a baseline.
        predicted, active: mean shares of the neurons that the predictor let through, and that were not zero.
    """

    n_tokens: int
    perplexity: float
    kl: float | None
    same_top: float | None
    predicted: float
    active: float


def pieces(model: SparseLlama, text: bytes, n_ctx: int) -> list[list[int]]:
    """The text's tokens in pieces of n_ctx - 1, each behind the begin-of-text token; what is left over is dropped.

    Raises:
        TsconvError: the text is shorter than one piece.
    """
    tokens = model.tokenize(text, add_bos=False, special=False)
    step = n_ctx - 1
    whole = [[model.token_bos(), *tokens[i : i + step]] for i in range(0, len(tokens) - step + 1, step)]
    if not whole:
        raise TsconvError(
            "the text is too short", expected=f"at least {step} tokens", found=len(tokens), fix="lower --ctx-size"
        )
    return whole


def check_baseline(model: Header, baseline: Header) -> None:
    """Refuses a baseline that is a conversion of another checkpoint.

    Raises:
        ModelFileError: it is.
    """
    for key in CHECKPOINT_KEYS:
        expected, found = model.keys.get(key), baseline.keys.get(key)
        if expected == found or (key in MAY_LACK and None in (expected, found)):
            if key == FINGERPRINT and expected is not None and expected == found:
                return  # a checkpoint in a folder has no repository
            continue
        shown = isinstance(expected, (str, int)) and isinstance(found, (str, int))
        raise ModelFileError(
            f"the baseline is of another checkpoint than {model.path}: key {key}",
            where=baseline.path,
            expected=repr(expected) if shown else None,
            found=repr(found) if shown else None,
            fix="convert one checkpoint in two types",
        )


def measure(
    model: SparseLlama,
    sequences: Sequence[Sequence[int]],
    baseline: SparseLlama | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Every token of every sequence, predicted from those before it.

    Args:
        sequences: tokens, each at most the models' context; from `pieces`.
        baseline: the model to diverge from, a conversion of the same checkpoint.
        progress: called with (sequences done, sequences in all).

    Raises:
        ModelFileError: the baseline is of another checkpoint.
    """
    if baseline is not None:
        check_baseline(model.header, baseline.header)
    model.reset_ffn_stats()
    n_tokens, likelihood, kl, same_top = 0, 0.0, 0.0, 0
    for i, sequence in enumerate(sequences):
        log_q = log_softmax(model.token_logits(sequence)[:-1])
        likelihood += log_q[np.arange(len(log_q)), list(sequence[1:])].sum()
        n_tokens += len(log_q)
        if baseline is not None:
            log_p = log_softmax(baseline.token_logits(sequence)[:-1])
            kl += (np.exp(log_p) * (log_p - log_q)).sum()
            same_top += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
        if progress is not None:
            progress(i + 1, len(sequences))
    predicted, active = neuron_shares(model)
    return Quality(
        n_tokens=n_tokens,
        perplexity=float(np.exp(-likelihood / n_tokens)),
        kl=float(kl / n_tokens) if baseline is not None else None,
        same_top=same_top / n_tokens if baseline is not None else None,
        predicted=predicted,
        active=active,
    )
