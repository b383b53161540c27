"""What a benchmark computes: tests named as in llama-bench, and the numbers of threads that it computes them with."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from tsconv.errors import TsconvError

MAX_TOKENS = 1024  # of a test, in one sequence
MAX_SEQUENCES = 16
MAX_THREADS = 512  # ggml's GGML_MAX_N_THREADS


@dataclass(frozen=True)
class Workload:
    """`ppN`: N tokens together. `tgN`: N tokens one by one. `tgNxB`: the same in each of B sequences, one token of all
    of them at a time. Always from an empty context. Of a `pp` only the last token's logits are asked for, so that
    llama.cpp computes the last layer's FFN for that token alone: models of few layers are no measure of prefill."""

    kind: str
    n: int
    n_seq: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}{self.n}" + (f"x{self.n_seq}" if self.n_seq > 1 else "")

    @property
    def n_tokens(self) -> int:
        """Of all sequences."""
        return self.n * self.n_seq

    @property
    def n_steps(self) -> int:
        """Times that the weights are read."""
        return 1 if self.kind == "pp" else self.n

    def cut(self, n_tokens: int) -> Workload:
        """The same with at most `n_tokens` tokens in a sequence."""
        return dataclasses.replace(self, n=min(self.n, n_tokens))


def parse_workload(text: str) -> Workload:
    """'pp512', 'tg128', 'tg32x4' -> Workload.

    Raises:
        TsconvError: anything else, or more tokens or sequences than the limits.
    """
    match = re.fullmatch(r"(?:(pp|tg)([0-9]{1,6})|(tg)([0-9]{1,6})x([0-9]{1,6}))", text)
    if match is not None:
        workload = Workload(match[1], int(match[2])) if match[1] else Workload("tg", int(match[4]), int(match[5]))
        if 1 <= workload.n <= MAX_TOKENS and 1 <= workload.n_seq <= MAX_SEQUENCES:
            return workload
    raise TsconvError(
        "not a test",
        expected=f"pp512, tg128, tg32x4, ... with 1 to {MAX_TOKENS} tokens, 1 to {MAX_SEQUENCES} sequences",
        found=repr(text),
    )


def parse_counts(text: str, what: str = "threads") -> tuple[int, ...]:
    """'2' or '1,2,4' -> the numbers, each once; `what` they count.

    Raises:
        TsconvError: not numbers from 1 to MAX_THREADS.
    """
    counts = [int(part) if re.fullmatch(r"[0-9]{1,6}", part) else 0 for part in text.split(",")]
    if not all(1 <= count <= MAX_THREADS for count in counts):
        raise TsconvError(what, expected=f"numbers from 1 to {MAX_THREADS}, such as 2 or 1,2", found=repr(text))
    return tuple(dict.fromkeys(counts))
