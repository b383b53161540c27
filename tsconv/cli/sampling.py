"""How `tsconv run` chooses tokens: the options, and the grammar that a text follows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tsconv.cli.options import finite
from tsconv.errors import TsconvError

OPTIONS = (
    click.option(
        "--temp",
        "temperature",
        type=click.FloatRange(min=0),
        default=0.8,
        show_default=True,
        callback=finite,
        help="0: greedy.",
    ),
    click.option("--top-k", type=click.IntRange(min=0), default=40, show_default=True, help="0: all tokens."),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.95,
        show_default=True,
        callback=finite,
        help="1: off.",
    ),
    click.option(
        "--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True, callback=finite, help="0: off."
    ),
    click.option(
        "--repeat-penalty",
        type=click.FloatRange(0, min_open=True),
        default=1.0,
        show_default=True,
        callback=finite,
        help="Above 1: the last 64 tokens are less likely to come again.",
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="For the same text again.  [default: random]"),
    click.option("--grammar-file", metavar="FILE", help="Grammar (GBNF) that the text follows."),
    click.option("--json-schema", metavar="FILE|JSON", help="Schema of the JSON that the text is."),
)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of OPTIONS, passed on as `sampling`: arguments of tsconv.runtime.generate.Sampling."""

    @functools.wraps(function)
    def with_sampling(
        *args: Any,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repeat_penalty: float,
        seed: int | None,
        grammar_file: str | None,
        json_schema: str | None,
        **kwargs: Any,
    ) -> Any:
        sampling = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repeat_penalty": repeat_penalty,
            "seed": seed,
            "grammar": _grammar(grammar_file, json_schema),
        }
        return function(*args, sampling=sampling, **kwargs)

    for option in reversed(OPTIONS):
        with_sampling = option(with_sampling)
    return with_sampling


def _grammar(file: str | None, schema: str | None) -> str | None:
    if file is not None and schema is not None:
        raise click.UsageError("--grammar-file and --json-schema exclude each other.")
    if file is not None:
        return _text_of(file, "grammar")
    if schema is None:
        return None
    from tsconv.runtime.grammar import from_json_schema

    return from_json_schema(schema if schema.lstrip().startswith("{") else _text_of(schema, "JSON schema"))


def _text_of(file: str, what: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TsconvError(f"cannot read the {what}: not UTF-8 text", where=file) from None
    except OSError as error:
        raise TsconvError(f"cannot read the {what}: {error.strerror}", where=file) from None
