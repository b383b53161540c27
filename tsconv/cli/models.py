"""Which model a command runs: MODEL, -m or -hf."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tsconv.cli.output import progress_bar, say
from tsconv.cli.text import size


@dataclass(frozen=True)
class ModelName:
    """What the user named; `is_repository`: with -hf, so that no file is meant."""

    text: str
    is_repository: bool

    def find(self) -> str:
        """The file, after it was downloaded and converted where that had to be. Raises as tsconv.commands.fetch."""
        from tsconv.commands.fetch import Reporter, find_model, find_repository

        reporter = Reporter(say, size, progress_bar_once_it_moves)
        found: Path = (find_repository if self.is_repository else find_model)(self.text, reporter)
        return str(found)


def progress_bar_once_it_moves(what: str) -> Any:
    """A bar that is not yet drawn while the Hub's library draws its own."""
    return progress_bar(what, delay=0.1)


def model_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument MODEL and the options -m and -hf, of which one is needed, passed on as `model`, a ModelName."""

    @functools.wraps(function)
    def with_model(*args: Any, argument: str | None, option: str | None, hub: str | None, **kwargs: Any) -> Any:
        context = click.get_current_context()
        if context.get_parameter_source("option") == ParameterSource.ENVIRONMENT and (argument or hub):
            option = None
        given = [text for text in (argument, option, hub) if text is not None]
        if len(given) != 1:
            found = "more than one is given" if given else "none is given"
            raise click.UsageError(f"One model is needed, as MODEL, with -m or with -hf; {found}.")
        return function(*args, model=ModelName(given[0], hub is not None), **kwargs)

    for decorate in (
        click.option(
            "-hf", "-hfr", "--hf-repo", "hub", metavar="OWNER/NAME[:TYPE]", help="A repository on the Hugging Face Hub."
        ),
        click.option(
            "-m", "--model", "option", metavar="MODEL", envvar="TSCONV_MODEL", help="As MODEL.  [env: TSCONV_MODEL]"
        ),
        click.argument("argument", required=False, metavar="[MODEL]"),
    ):
        with_model = decorate(with_model)
    return with_model
