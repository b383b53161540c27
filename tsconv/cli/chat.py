"""The chat of `tsconv run` on a terminal: lines and commands in, answers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tsconv.cli.options import warn_of_long_context
from tsconv.cli.output import echo, say
from tsconv.errors import OutputError, TsconvError
from tsconv.signals import interruptible

if TYPE_CHECKING:
    from tsconv.runtime.conversation import Answer, Conversation
    from tsconv.runtime.generate import GenerationSummary, Sampling
    from tsconv.runtime.model import SparseLlama

HINT = "/exit or Ctrl-D leaves, /help lists the commands, Ctrl-C stops an answer."
HELP = """/help        this list
/regen       another answer to the last question
/clear       forget the conversation
/save FILE   write the conversation to a new file, as Markdown
/exit        leave (Ctrl-D too)
A line that ends with \\ goes on in the next."""


@dataclass
class Chat:
    """A conversation on this process's terminal.

    Attributes:
        limit: most tokens of an answer; None for as many as the context holds.
        summaries: of all answers.
    """

    llama: SparseLlama
    conversation: Conversation
    limit: int | None
    sampling: Sampling
    summaries: list[GenerationSummary] = field(default_factory=list)
    warned: bool = False

    def loop(self) -> None:
        """Reads and answers until /exit or the end of the input."""
        import readline  # noqa: F401 - editing and history for input()

        say(HINT)
        while True:
            try:
                text = _read()
            except KeyboardInterrupt:
                echo()
                continue
            except EOFError:
                echo()
                return
            if text == "/exit":
                return
            try:
                self._obey(text)
            except TsconvError as error:
                say(f"error: {error}")

    def _obey(self, text: str) -> None:
        """Does what a command says, or answers. Raises TsconvError."""
        word, _, rest = text.partition(" ")
        if not text:
            return
        if word == "/help":
            say(HELP)
        elif word == "/clear":
            self.conversation.clear()
        elif word == "/save":
            self._save(rest.strip())
        elif word == "/regen":
            self._show(lambda stop: self.conversation.again(self.limit, self.sampling, stop))
        elif word.startswith("/") and word[1:].isalpha():
            say(f"{word}: no such command; /help lists them")
        else:
            self._show(lambda stop: self.conversation.ask(text, self.limit, self.sampling, stop))

    def _show(self, begin: Callable[[Callable[[], bool]], Answer]) -> None:
        """Writes an answer while it comes, and what is to be said about it."""
        with interruptible() as interrupted:
            answer = begin(interrupted)
            if answer.n_dropped:
                turns = "turn was" if answer.n_dropped == 1 else f"{answer.n_dropped} turns were"
                say(f"(the context is full: the oldest {turns} forgotten)")
            last = ""
            for piece in answer:
                echo(piece, nl=False)
                last = piece
        echo("" if last.endswith("\n") else "\n", nl=False)
        if answer.cut_by == "limit":
            say(f"(cut after {answer.summary.n_generated} tokens: -n)")
        elif answer.cut_by == "context":
            say(f"(cut: the context of {self.llama.n_ctx()} tokens is full: -c)")
        self.summaries.append(answer.summary)
        if not self.warned:
            n_tokens = answer.summary.n_prompt + answer.summary.n_generated
            self.warned = warn_of_long_context(self.llama, n_tokens)

    def _save(self, name: str) -> None:
        from tsconv.write.writer import write_file

        if not name:
            raise TsconvError("/save needs the name of a file")
        if not self.conversation.turns:
            raise TsconvError("there is nothing to save yet")
        path = Path(name).expanduser()
        if path.exists():
            raise OutputError("the file exists", where=path, fix="choose another name")
        write_file(path, self.conversation.as_markdown().encode("utf-8", errors="surrogateescape"), force=False)
        say(f"saved in {path}")


def _read() -> str:
    """What the user says: a line, and those it goes on in. Raises EOFError, KeyboardInterrupt."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines).strip()
