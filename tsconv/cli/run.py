"""`tsconv run`: generates text on stdout, or talks with the user on a terminal."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.machine import load_model, machine_options
from tsconv.cli.models import ModelName, model_name
from tsconv.cli.options import finite, model_options, warn_of_long_context
from tsconv.cli.output import echo, json_text, say
from tsconv.errors import TsconvError
from tsconv.signals import interruptible

if TYPE_CHECKING:
    from tsconv.runtime.generate import Generation, GenerationSummary, Sampling
    from tsconv.runtime.model import SparseLlama

DEFAULT_LIMIT = 256
INTERRUPTED = 130


@click.command("run")
@model_name
@model_options
@machine_options
@click.option("-p", "--prompt", help="Text to continue.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="File with the text to continue, - for stdin.")
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(min=-1),
    help=f"Most tokens to generate, -1 until the context is full.  [default: {DEFAULT_LIMIT}; in a chat -1]",
)
@click.option(
    "--temp", type=click.FloatRange(min=0), default=0.8, show_default=True, callback=finite, help="0: greedy."
)
@click.option("--top-k", type=click.IntRange(min=0), default=40, show_default=True, help="0: all tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    callback=finite,
    help="1: off.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="For the same text again.  [default: random]")
@click.option("--chat/--no-chat", default=None, help="Wrap the prompt in the model's chat template.")
@click.option("--system", metavar="TEXT", help="What the model is told before a chat.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def command(
    *,
    model: ModelName,
    prompt: str | None,
    prompt_file: str | None,
    n_predict: int | None,
    temp: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    chat: bool | None,
    system: str | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Generate text or chat.

    MODEL is a file, a name that tsconv list shows, or OWNER/NAME[:TYPE]: a repository on the Hugging Face Hub. What
    comes from there is downloaded, and converted if it is a checkpoint, once.

    The prompt comes from -p, -f, or stdin. With none of them, on a terminal, this is a chat.
    """
    if n_predict == 0:
        raise click.BadParameter("0 is neither -1 nor at least 1.", param_hint="-n")
    prompt = _prompt(prompt, prompt_file)
    if prompt is None and (as_json or chat is False):
        raise click.UsageError("A prompt is needed: -p, -f or stdin.")
    if system is not None and prompt is not None and not chat:
        raise click.UsageError("--system is for a chat: with a prompt it needs --chat.")

    from tsconv.runtime.generate import Generation, Sampling, chat_tokens, prompt_tokens

    llama, chosen = load_model(model=model.find(), **loading)
    sampling = Sampling(temperature=temp, top_k=top_k, top_p=top_p, seed=seed)
    if prompt is None:
        _chat(llama, system, None if n_predict is None or n_predict < 0 else n_predict, sampling)
        return
    tokens = chat_tokens(llama, _messages(system, prompt)) if chat else prompt_tokens(llama, prompt)
    warned = warn_of_long_context(llama, len(tokens))
    limit = DEFAULT_LIMIT if n_predict is None else None if n_predict < 0 else n_predict
    with interruptible() as interrupted:
        generation = Generation(llama, tokens, limit, sampling, should_stop=interrupted)
        text = "".join(generation) if as_json else _stream(generation)
    summary = generation.summary
    if as_json:
        answer = _as_dict(llama, prompt, text, summary)
        echo(json_text(answer if chosen is None else answer | {"machine": chosen}))
    else:
        echo("" if text.endswith("\n") else "\n", nl=False)
    if not warned:
        warn_of_long_context(llama, summary.n_prompt + summary.n_generated)
    say(_line(summary))
    if summary.finish_reason == "interrupted":
        raise click.exceptions.Exit(INTERRUPTED)


def _prompt(text: str | None, file: str | None) -> str | None:
    """The prompt without the newline that ends its last line; None on a terminal with neither -p nor -f."""
    if text is not None and file is not None:
        raise click.UsageError("-p and -f exclude each other.")
    if text is None:
        if file is None and sys.stdin is not None and sys.stdin.isatty():
            return None
        try:
            with click.open_file(file or "-", "rb") as stream:
                text = stream.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise TsconvError(f"cannot read the prompt: not UTF-8 text ({error})", where=file or "stdin") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: stdin is closed
            reason = getattr(error, "strerror", None) or error
            raise TsconvError(f"cannot read the prompt: {reason}", where=file or "stdin") from None
    if not text:
        raise TsconvError("the prompt is empty", fix="give one with -p, -f or on stdin")
    return text


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def _stream(generation: Generation) -> str:
    """Writes the text while it comes, and returns it."""
    pieces = []
    for piece in generation:
        echo(piece, nl=False)
        pieces.append(piece)
    return "".join(pieces)


def _chat(llama: SparseLlama, system: str | None, limit: int | None, sampling: Sampling) -> None:
    """Talks with the user, and says at the end what all answers together took."""
    from tsconv.cli.chat import Chat
    from tsconv.runtime.conversation import Conversation
    from tsconv.runtime.generate import combined

    chat = Chat(llama, Conversation(llama, system), limit, sampling)  # a model that cannot chat says so at once
    chat.loop()
    if chat.summaries:
        say(_line(combined(chat.summaries)))


def _as_dict(llama: SparseLlama, prompt: str, text: str, summary: GenerationSummary) -> dict[str, Any]:
    return {
        "model": llama.model_path,
        "sparsity": llama.sparsity,
        "n_threads": llama.n_threads,
        "n_ctx": llama.n_ctx(),
        "prompt": prompt,
        "text": text,
        **dataclasses.asdict(summary),
        "prefill_tokens_per_s": summary.prefill_tokens_per_s,
        "decode_tokens_per_s": summary.decode_tokens_per_s,
    }


def _line(summary: GenerationSummary) -> str:
    """The measurements in one line."""
    rate = summary.decode_tokens_per_s
    decode = "no decode" if rate is None else f"decode {summary.n_decoded} tokens, {rate:.1f} tokens/s"
    return (
        f"prefill {summary.n_prompt - summary.n_cached} tokens, {summary.prefill_tokens_per_s:.1f} tokens/s; {decode}; "
        f"active {summary.active:.0f} of {summary.n_ff} neurons ({100 * summary.active_share:.1f} %); "
        f"predictor {100 * summary.predictor_share:.1f} % of the time"
    )
