"""A text in windows, as llama-perplexity takes it (tools/perplexity/perplexity.cpp), and the logits of each.

The text is tokenized once, behind a begin-of-text token, and cut into windows of n_ctx tokens; what is left over is
dropped. A window is computed from an empty context, its first token replaced by the begin-of-text token. Scored are the
predictions at positions n_ctx / 2 to n_ctx - 2, which have at least half of the window before them: 255 of 512.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as library

from tsconv.errors import TsconvError
from tsconv.eval.context import SequencesContext
from tsconv.runtime.model import SparseLlama

N_BATCH = 2048  # tokens that are computed together, as llama-perplexity's default


@dataclass(frozen=True)
class Windows:
    """Tokens int32 [n_windows, n_ctx], as the text has them."""

    tokens: npt.NDArray[np.int32]

    @property
    def n_ctx(self) -> int:
        return self.tokens.shape[1]

    @property
    def first(self) -> int:
        """The first position whose prediction is scored."""
        return self.n_ctx // 2

    @property
    def n_scored(self) -> int:
        """Predictions of a window that are scored."""
        return self.n_ctx - 1 - self.first

    def targets(self, i: int) -> npt.NDArray[np.int32]:
        """What window i predicts at the scored positions: int32 [n_scored]."""
        return self.tokens[i, self.first + 1 :]

    def __len__(self) -> int:
        return len(self.tokens)


def windows(model: SparseLlama, text: bytes, n_ctx: int, most: int | None = None) -> Windows:
    """The text's windows, the first `most` of them. A newline at its end does not count, as in llama-perplexity.

    Raises:
        TsconvError: the text has fewer tokens than two windows, which llama-perplexity refuses too.
    """
    tokens = model.tokenize(text.removesuffix(b"\n"), add_bos=True, special=False)
    if len(tokens) < 2 * n_ctx:
        raise TsconvError(
            "the text is too short",
            expected=f"at least {2 * n_ctx} tokens, two windows of {n_ctx}",
            found=len(tokens),
            fix="lower --ctx-size",
        )
    n = len(tokens) // n_ctx
    n = n if most is None else min(n, most)
    return Windows(np.array(tokens[: n * n_ctx], dtype=np.int32).reshape(n, n_ctx))


def scored_logits(model: SparseLlama, found: Windows, n_batch: int = N_BATCH) -> Iterator[npt.NDArray[np.float32]]:
    """float32 [n_scored, n_vocab] of each window, in order; the array is overwritten by the next one.

    Args:
        n_batch: tokens computed together: several windows, as sequences, or a part of one.

    Raises:
        BackendError: no memory for the context, or llama.cpp cannot compute.
    """
    n_ctx = found.n_ctx
    n_seq = max(1, n_batch // n_ctx)
    pieces = [slice(at, min(at + n_batch, n_ctx)) for at in range(0, n_ctx, n_batch)]
    with model.alone():
        context = _Context(model, n_ctx, n_seq, min(n_batch, n_seq * n_ctx))
        try:
            for start in range(0, len(found), n_seq):
                group = found.tokens[start : start + n_seq].copy()
                if library.llama_vocab_get_add_bos(model._model.vocab):
                    group[:, 0] = model.token_bos()
                yield from context.compute(group, found.first, pieces)
        finally:
            context.close()


class _Context(SequencesContext):
    """A context of `model` for n_seq windows of n_ctx tokens."""

    def __init__(self, model: SparseLlama, n_ctx: int, n_seq: int, n_batch: int) -> None:
        super().__init__(
            model,
            n_ctx=n_ctx * n_seq,
            n_seq=n_seq,
            n_batch=n_batch,
            shared=False,
            what=f"{n_seq} windows of {n_ctx} tokens",
            fix="lower -b or -c",
        )

    def compute(
        self, group: npt.NDArray[np.int32], first: int, pieces: list[slice]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Of each window of `group`, int32 [at most n_seq, n_ctx], its logits from position `first` on but the last."""
        self.clear()
        n_outputs = group.shape[1] - first
        rows: list[npt.NDArray[np.float32]] = []  # of a window that is computed in pieces
        for piece in pieces:
            width = piece.stop - piece.start
            self._decode(group[:, piece], piece.start, first)
            begin = max(first - piece.start, 0)
            if begin >= width:
                continue
            if len(pieces) > 1:
                rows.append(self.logits(begin, width - begin).copy())
            else:
                yield from (self.logits(i * width + begin, n_outputs)[:-1] for i in range(len(group)))
        if rows:
            yield np.concatenate(rows)[:-1]

    def _decode(self, tokens: npt.NDArray[np.int32], position: int, first: int) -> None:
        """Row i of the tokens goes to sequence i, from that position on; logits are wanted from position `first` on."""
        batch = self.batch
        batch.n_tokens = tokens.size
        at = 0
        for sequence, row in enumerate(tokens.tolist()):
            for k, token in enumerate(row):
                batch.token[at], batch.pos[at], batch.logits[at] = token, position + k, position + k >= first
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = sequence
                at += 1
        self.decode()
