"""`tsconv rm`: removes models that are kept."""

from __future__ import annotations

import click

from tsconv.cli.output import say
from tsconv.cli.text import size


@click.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(*, names: tuple[str, ...]) -> None:
    """Remove kept models by the names that tsconv list shows. Where one is unknown, none is removed."""
    from tsconv.commands.kept import find_to_remove, remove

    found = {kept.path: kept for kept in map(find_to_remove, names)}
    for kept in found.values():
        say(f"removed {kept.name}, {size(remove(kept))}")
