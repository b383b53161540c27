"""`tsconv run`: generates text on stdout, or talks with the user on a terminal."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.machine import load_model, machine_options
from tsconv.cli.models import ModelName, model_name
from tsconv.cli.options import gpu_options, model_options, warn_of_long_context
from tsconv.cli.output import echo, json_text, say
from tsconv.cli.sampling import sampling_options
from tsconv.cli.text import size
from tsconv.errors import OutputError, TsconvError
from tsconv.signals import interruptible

if TYPE_CHECKING:
    from tsconv.runtime.generate import Generation, GenerationSummary, Sampling
    from tsconv.runtime.model import SparseLlama

DEFAULT_LIMIT = 256
DRAFTED = 2  # tokens at once: on a CPU each costs almost as much as one alone
INTERRUPTED = 130


@click.command("run")
@model_name
@model_options
@machine_options
@gpu_options
@click.option("-p", "--prompt", help="Text to continue.")
@click.option("-f", "--file", "prompt_file", metavar="FILE", help="File with the text to continue, - for stdin.")
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(min=-1),
    help=f"Most tokens to generate, -1 until the context is full.  [default: {DEFAULT_LIMIT}; in a chat -1]",
)
@sampling_options
@click.option("--chat/--no-chat", default=None, help="Wrap the prompt in the model's chat template.")
@click.option("--system", metavar="TEXT", help="What the model is told before a chat.")
@click.option("--lora", "lora_path", metavar="FILE", help="LoRA adapter for the model, in GGUF.")
@click.option(
    "--draft",
    type=click.Choice(["prompt-lookup"]),
    help="Guess tokens from what was said before and check them together. Greedy text is the same but for rounding.",
)
@click.option(
    "--prompt-cache",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Keep what was computed of the text in FILE, and begin with what is there.",
)
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the text to a new file, not stdout."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def command(
    *,
    model: ModelName,
    prompt: str | None,
    prompt_file: str | None,
    n_predict: int | None,
    sampling: dict[str, Any],
    chat: bool | None,
    system: str | None,
    lora_path: str | None,
    draft: str | None,
    prompt_cache: Path | None,
    output: Path | None,
    as_json: bool,
    n_gpu_layers: int | str,
    device: str | None,
    main_gpu: int | None,
    vram_budget: int | None,
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
    if prompt is None and (as_json or output is not None or chat is False):
        raise click.UsageError("A prompt is needed: -p, -f or stdin.")
    if system is not None and prompt is not None and not chat:
        raise click.UsageError("--system is for a chat: with a prompt it needs --chat.")
    for path in (output, prompt_cache):
        if path is not None:
            _check_writable(path, replaces=path == prompt_cache)

    from tsconv.runtime.generate import Sampling

    more = {"lora_path": lora_path, "draft_model": _draft_model(draft)}
    gpu = {"n_gpu_layers": n_gpu_layers, "device": device, "main_gpu": main_gpu, "vram_budget": vram_budget}
    llama, chosen = load_model(model=model.find(), **loading, gpu=gpu, more=more)
    options = Sampling(**sampling)
    if options.grammar is not None:
        from tsconv.runtime.grammar import check

        check(llama, options.grammar)
    with _cached(llama, prompt_cache):
        if prompt is None:
            _chat(llama, system, None if n_predict is None or n_predict < 0 else n_predict, options)
            return
        limit = DEFAULT_LIMIT if n_predict is None else None if n_predict < 0 else n_predict
        summary = _generate(llama, chosen, prompt, system, chat, limit, options, output, as_json)
    say(_line(summary))
    if summary.finish_reason == "interrupted":
        raise click.exceptions.Exit(INTERRUPTED)


def _generate(
    llama: SparseLlama,
    chosen: dict[str, Any] | None,
    prompt: str,
    system: str | None,
    chat: bool | None,
    limit: int | None,
    sampling: Sampling,
    output: Path | None,
    as_json: bool,
) -> GenerationSummary:
    """Writes one text, while it comes when it goes to stdout as it is; `chosen` is what `load_model` says."""
    from tsconv.runtime.generate import Generation, chat_tokens, prompt_tokens

    tokens = chat_tokens(llama, _messages(system, prompt)) if chat else prompt_tokens(llama, prompt)
    warned = warn_of_long_context(llama, len(tokens))
    with interruptible() as interrupted:
        generation = Generation(llama, tokens, limit, sampling, should_stop=interrupted)
        text = "".join(generation) if as_json or output is not None else _stream(generation)
    summary = generation.summary
    if as_json:
        answer = _as_dict(llama, prompt, text, summary)
        text = json_text(answer if chosen is None else answer | {"machine": chosen})
    end = "" if text.endswith("\n") else "\n"
    if output is not None:
        from tsconv.write.writer import write_file

        write_file(output, (text + end).encode("utf-8", errors="surrogateescape"), force=False)
    else:
        echo(text + end if as_json else end, nl=False)
    if not warned:
        warn_of_long_context(llama, summary.n_prompt + summary.n_generated)
    return summary


def _check_writable(path: Path, replaces: bool) -> None:
    """Before a model is loaded. Raises OutputError."""
    from tsconv.write.writer import check_output

    if path.is_file() and not replaces:
        raise OutputError("the file exists", where=path, fix="choose another name")
    check_output(path, force=replaces)


def _draft_model(draft: str | None) -> Any:
    if draft is None:
        return None
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    return LlamaPromptLookupDecoding(num_pred_tokens=DRAFTED)


@contextmanager
def _cached(llama: SparseLlama, path: Path | None) -> Iterator[None]:
    """Begins with the context in a file, if it is there, and leaves what there is at the end in it."""
    if path is None:
        yield
        return
    from tsconv.runtime.session import restore, save

    if path.exists():
        restore(llama, path)
    yield
    save(llama, path)


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
        "n_gpu_layers": llama.offload.n_gpu_layers,
        "gpus": [gpu.name for gpu in llama.offload.gpus],
        "vram_bytes": llama.offload.n_bytes + (llama.gpu_share.n_bytes if llama.gpu_share else 0),
        "ffn_on_gpu": dataclasses.asdict(llama.gpu_share) if llama.gpu_share else None,
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
    disk = ""
    if summary.memory_share < 1:
        disk = (
            f"; {100 * summary.memory_share:.1f} % of the neurons were in memory, {size(summary.disk_bytes)} per token "
            f"came from disk, which was waited for {100 * summary.disk_share:.0f} % of the time"
        )
    gpu = ""
    if summary.gpu_overlap is not None:
        gpu = (
            f"; the GPU computed {100 * summary.gpu_share:.1f} % of the active neurons and was waited for "
            f"{100 * summary.gpu_wait_share:.0f} % of the time, overlap {summary.gpu_overlap:.2f}"
        )
    return (
        f"prefill {summary.n_prompt - summary.n_cached} tokens, {summary.prefill_tokens_per_s:.1f} tokens/s; {decode}; "
        f"active {summary.active:.0f} of {summary.n_ff} neurons ({100 * summary.active_share:.1f} %); "
        f"predictor {100 * summary.predictor_share:.1f} % of the time{disk}{gpu}"
    )
