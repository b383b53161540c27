"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tsconv.cli.output import say

if TYPE_CHECKING:
    from tsconv.runtime.model import SparseLlama

DEFAULT_CONTEXT = 4096

model_option = click.option("-m", "--model", required=True, metavar="FILE", help="Converted model, NAME.gguf.")
threads_option = click.option(
    "-t",
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
    envvar="TSCONV_THREADS",
    help="Threads.  [env: TSCONV_THREADS; default: physical cores, as far as the CPU quota goes]",
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
    type=click.Choice(["predictor", "exact"]),
    help="The checkpoint's own mask, or every neuron that is not zero.  [default: what the model has]",
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the commands that run a model beside its name, passed on as n_ctx, n_threads, sparsity,
    predictor_path, verbose."""
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
            click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
        )
    ):
        function = option(function)
    return function


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
