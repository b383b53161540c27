"""A conversation with a model: what was said, what of it fits the context, and the answers, as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tsconv.errors import TsconvError
from tsconv.runtime.generate import Generation, GenerationSummary, Sampling, chat_tokens
from tsconv.runtime.model import SparseLlama

ROOM_SHARE = 4  # an answer finds a quarter of the context free, or as much as it may take if that is less
N_SEEDS = 2**32 - 1
DEFAULT = Sampling()

Message = dict[str, str]  # role, content


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


class Answer:
    """One answer: iterate over it for pieces of text. When they have all come, it is part of the conversation.

    Attributes:
        n_dropped: turns that were forgotten to make room for it.
    """

    def __init__(self, generation: Generation, n_dropped: int, n_ctx: int, done: Callable[[str], None]) -> None:
        self._generation, self._n_ctx, self._done = generation, n_ctx, done
        self.n_dropped = n_dropped

    def __iter__(self) -> Iterator[str]:
        pieces = []
        for piece in self._generation:
            pieces.append(piece)
            yield piece
        self._done("".join(pieces))

    @property
    def summary(self) -> GenerationSummary:
        """Raises TsconvError while the answer is not complete."""
        return self._generation.summary

    @property
    def cut_by(self) -> str | None:
        """What ended it before the model did: "limit", "context", or None."""
        if self.summary.finish_reason != "length":
            return None
        full = self.summary.n_prompt + self.summary.n_generated >= self._n_ctx
        return "context" if full else "limit"


class Conversation:
    """Turns with a model, under a system message that is never forgotten.

    Args:
        system: what the model is told before everything else; None for nothing.

    Raises:
        ModelFileError: the model has no chat template, or it takes no system message.
        TsconvError: the system message does not fit the context.
    """

    def __init__(self, llama: SparseLlama, system: str | None = None) -> None:
        self._llama, self._system = llama, system
        self._n_again = 0  # answers to the last question before the one that counts
        self.turns: list[Turn] = []
        Generation(llama, self._tokens([], "Hello."))

    @property
    def messages(self) -> list[Message]:
        """All that was said and is not forgotten, as a chat template takes it."""
        return self._messages(self.turns)

    def ask(
        self,
        question: str,
        limit: int | None = None,
        sampling: Sampling = DEFAULT,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """The model's answer; the oldest turns go when there is no room for it. Arguments are those of `Generation`.

        Raises:
            TsconvError: the question does not fit the context beside the system message. Nothing is forgotten then.
        """
        self._n_again = 0
        return self._ask(self.turns, question, limit, sampling, should_stop)

    def again(
        self,
        limit: int | None = None,
        sampling: Sampling = DEFAULT,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Another answer to the last question, which takes the place of the one there was. A seed counts on.

        Raises:
            TsconvError: there was no question yet.
        """
        if not self.turns:
            raise TsconvError("there is no answer yet")
        self._n_again += 1
        if sampling.seed is not None:
            sampling = dataclasses.replace(sampling, seed=(sampling.seed + self._n_again) % N_SEEDS)
        return self._ask(self.turns[:-1], self.turns[-1].question, limit, sampling, should_stop)

    def clear(self) -> None:
        """Forgets all turns, not the system message."""
        self.turns = []

    def as_markdown(self) -> str:
        """What was said, for people."""
        return "\n".join(f"## {message['role']}\n\n{message['content'].strip()}\n" for message in self.messages)

    def _ask(
        self,
        turns: list[Turn],
        question: str,
        limit: int | None,
        sampling: Sampling,
        should_stop: Callable[[], bool],
    ) -> Answer:
        n_ctx = self._llama.n_ctx()
        room = min(n_ctx // ROOM_SHARE, n_ctx if limit is None else limit)
        n_dropped, tokens = 0, self._tokens(turns, question)
        while n_dropped < len(turns) and len(tokens) + room > n_ctx:
            n_dropped += 1
            tokens = self._tokens(turns[n_dropped:], question)
        generation = Generation(self._llama, tokens, limit, sampling, should_stop)

        def done(text: str) -> None:
            self.turns = [*turns[n_dropped:], Turn(question, text)]

        return Answer(generation, n_dropped, n_ctx, done)

    def _tokens(self, turns: list[Turn], question: str) -> list[int]:
        return chat_tokens(self._llama, [*self._messages(turns), {"role": "user", "content": question}])

    def _messages(self, turns: list[Turn]) -> list[Message]:
        messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages
