"""`tsconv tools`: llama.cpp's own programs with a converted model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from tsconv.cli.output import echo

HELP = """Usage: tsconv tools [PROGRAM [OPTIONS]]

  Run one of llama.cpp's programs, with a converted model or any other:

    tsconv tools llama-perplexity -m NAME.gguf -f text.txt

  All options are the program's own; tsconv tools PROGRAM --help lists them.

Programs:"""


@click.command(
    "tools", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, add_help_option=False
)
@click.argument("program", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(*, program: str | None, arguments: tuple[str, ...]) -> None:
    """Run one of llama.cpp's programs with a converted model."""
    import os

    from tsconv.runtime.programs import PROGRAMS, Command, program_path, with_model

    if program in (None, "-h", "--help"):
        echo("\n".join([HELP, *(f"  {name}" for name in PROGRAMS)]))
        return
    if program not in PROGRAMS:
        raise click.BadParameter(f"{program!r} is not one of {', '.join(PROGRAMS)}.", param_hint="PROGRAM")
    model = _converted_model(arguments)
    if model is None:
        Command([str(program_path(program)), *arguments], dict(os.environ)).execute()
    else:
        with_model(program, arguments, model).execute()


def _converted_model(arguments: Sequence[str]) -> Path | None:
    """The model that -m or --model names, when tsconv converted it."""
    from tsconv.format.header import read_header
    from tsconv.format.keys import ARCHITECTURE

    for option, value in zip(arguments, [*arguments[1:], None], strict=True):
        if option in ("-m", "--model") and value is not None:
            header = read_header(Path(value))
            return Path(value) if header.keys.get("general.architecture") == ARCHITECTURE else None
    return None
