"""Options that several commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.output import say
from tsconv.predictor import TARGET_MISS

if TYPE_CHECKING:
    from tsconv.runtime.model import SparseLlama

DEFAULT_CONTEXT = 4096
DEFAULT_WINDOW = 512  # of `eval_options`, which pass None on


class Size(click.ParamType):
    """'9GiB', '9 GB', '500M', '0': bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from tsconv.machine.size import EXAMPLES, parse_size

        if isinstance(value, int):
            return value
        n_bytes = parse_size(value)
        if n_bytes is None:
            self.fail(f"{value!r} is not a size: {EXAMPLES}.", param, ctx)
        return n_bytes


class Rank(click.ParamType):
    """Of predictors: a multiple of 32, or with `auto` that word."""

    name = "rank"

    def __init__(self, auto: bool = False) -> None:
        self.auto = auto

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value).strip().lower()
        if self.auto and text == "auto":
            return text
        if not text.isdecimal() or not text.isascii() or not 1 <= int(text) <= 1 << 17 or int(text) % 32:
            self.fail(f"{value!r} is {'neither auto nor' if self.auto else 'not'} a multiple of 32.", param, ctx)
        return int(text)


class SparsityText(click.ParamType):
    """'exact', 'topk:0.9', ...: as `tsconv.load` takes it."""

    name = "sparsity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from tsconv.errors import TsconvError
        from tsconv.runtime.sparsity import parse_sparsity

        try:
            parse_sparsity(value)
        except TsconvError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class GpuLayers(click.ParamType):
    """'auto', 'all', or a number: as `tsconv.load` takes it."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value).strip().lower()
        if text in ("auto", "all"):
            return text
        if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) is None:
            self.fail(f"{value!r} is neither auto, all nor a number.", param, ctx)
        return int(text)


class TextName(click.ParamType):
    """A file, or the name of a text that `tsconv.eval.text.read_text` knows."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from tsconv.eval.text import KNOWN

        if value not in KNOWN and not Path(value).is_file():
            self.fail(f"{value!r} is neither a file nor one of {', '.join(KNOWN)}.", param, ctx)
        return str(value)


model_option = click.option("-m", "--model", required=True, metavar="FILE", help="Converted model, NAME.gguf.")
threads_option = click.option(
    "-t",
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    envvar="TSCONV_THREADS",
    help="Threads.  [env: TSCONV_THREADS; default: physical cores, as far as the CPU quota goes]",
)
target_miss_option = click.option(
    "--target-miss",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=TARGET_MISS,
    show_default=True,
    help="Share of each FFN's output energy that may be missed on the text that thresholds are chosen on.",
)
predictor_option = click.option(
    "--predictor",
    "predictor_path",
    metavar="FILE",
    help="Predictor sidecar of the model.  [default: NAME.predictor.gguf beside it]",
)
profile_option = click.option(
    "--profile",
    required=True,
    metavar="STATS",
    type=click.Path(path_type=Path),
    help="Statistics of the same checkpoint, written by tsconv profile.",
)
sparsity_option = click.option(
    "--sparsity",
    type=SparsityText(),
    metavar="predictor|exact|topk:S|predictor:D",
    help="predictor: the checkpoint's own mask. exact: every neuron that is not zero. topk:S: of each token's neurons "
    "the share S with the smallest |gate * up| is dropped; to measure what that costs, since gate and up of all are "
    "computed. predictor:D: the mask with D added to its threshold.  [default: what the model has]",
)
ram_budget_option = click.option(
    "--ram-budget",
    metavar="SIZE|auto|off",
    default="auto",
    envvar="TSCONV_RAM_BUDGET",
    help="Memory for weights and context, such as 3G. A larger model reads neurons from disk when it needs them."
    "  [env: TSCONV_RAM_BUDGET; default: auto, what is free]",
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the commands that run a model beside its name, passed on as n_ctx, n_threads, sparsity,
    predictor_path, ram_budget, verbose."""
    for option in reversed(
        (
            click.option(
                "-c",
                "--ctx-size",
                "n_ctx",
                type=click.IntRange(min=1),
                default=DEFAULT_CONTEXT,
                envvar="TSCONV_CTX_SIZE",
                help="Tokens of prompt and answer together, rounded up to a multiple of 256."
                f"  [env: TSCONV_CTX_SIZE; default: {DEFAULT_CONTEXT}]",
            ),
            threads_option,
            sparsity_option,
            predictor_option,
            ram_budget_option,
            click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
        )
    ):
        function = option(function)
    return function


def gpu_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """What goes to GPUs, passed on as n_gpu_layers, device, main_gpu, vram_budget: as `tsconv.load` takes them."""
    for option in reversed(
        (
            click.option(
                "-ngl",
                "--n-gpu-layers",
                type=GpuLayers(),
                metavar="auto|all|N",
                default="auto",
                envvar="TSCONV_N_GPU_LAYERS",
                help="Layers whose attention and KV cache go to a GPU, counting the output as one; 0: nothing goes "
                "there, hot neurons neither.  [env: TSCONV_N_GPU_LAYERS; default: as many as fit, 0 without a GPU]",
            ),
            click.option("--device", metavar="NAME[,NAME...]", help="GPUs to use, as tsconv doctor names them."),
            click.option(
                "--main-gpu", type=click.IntRange(min=0), metavar="N", help="Use one GPU alone: the first is 0."
            ),
            click.option(
                "--vram-budget",
                type=Size(),
                metavar="SIZE",
                help="Most that goes to GPUs, such as 9GiB: layers as -ngl says, then predictors and hot neurons."
                "  [default: what is free, less 1 GiB of each]",
            ),
        )
    ):
        function = option(function)
    return function


def text_option(help: str, required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A text to measure on, passed on as text: str, None without one."""
    return click.option(
        "-f",
        "--file",
        "--text",
        "text",
        required=required,
        metavar="FILE|wikitext-2|fineweb",
        type=TextName(),
        help=f"{help}: a file, or one from the Hub by its name.",
    )


def eval_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How a text is taken, passed on as n_ctx, chunks, n_batch."""
    for option in reversed(
        (
            click.option(
                "-c",
                "--ctx-size",
                "n_ctx",
                type=click.IntRange(min=4),
                help=f"Tokens of a window.  [default: {DEFAULT_WINDOW}]",
            ),
            click.option("--chunks", type=click.IntRange(min=1), help="At most so many windows.  [default: all]"),
            click.option(
                "-b",
                "--batch-size",
                "n_batch",
                type=click.IntRange(min=1),
                default=2048,
                show_default=True,
                help="Tokens computed together: several windows, or a part of one.",
            ),
        )
    ):
        function = option(function)
    return function


def read_text(name: str) -> bytes:
    """Of `text_option`; what is to be said of it goes to stderr. Raises as `tsconv.eval.text.read_text`."""
    from tsconv.eval import text

    found = text.read_text(name)
    if found.note is not None:
        say(f"note: {found.note}")
    return found.data


def finite(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Callback that refuses nan and inf, which a FloatRange lets through."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number to calculate with.", ctx, parameter)
    return value


def warn_of_long_context(llama: SparseLlama, n_tokens: int) -> bool:
    """Warns on stderr when `n_tokens` tokens are more than the checkpoint was made for; returns whether it did."""
    warning = llama.context_warning(n_tokens)
    if warning is not None:
        say(f"warning: {warning}")
    return warning is not None
