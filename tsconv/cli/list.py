"""`tsconv list`: the models that are kept."""

from __future__ import annotations

import click

from tsconv.cli.output import echo, json_text, say
from tsconv.cli.text import size, table


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(*, as_json: bool) -> None:
    """List the models that tsconv keeps: converted from checkpoints on the Hub, or downloaded from there."""
    from tsconv.commands.kept import all_kept, models_folder

    found = all_kept()
    if as_json:
        rows = [
            {
                "name": kept.name,
                "type": kept.type,
                "bytes": kept.n_bytes,
                "date": kept.date.isoformat(timespec="seconds"),
                "downloaded": kept.is_downloaded,
                "path": kept.path,
            }
            for kept in found
        ]
        echo(json_text(rows, indent=2))
    elif found:
        lines = [("name", "type", "size", "date")]
        lines += [(k.name, k.type, size(k.n_bytes), f"{k.date.astimezone():%Y-%m-%d %H:%M}") for k in found]
        echo(table(lines, right=(2,)))
    else:
        say(f"no models in {models_folder()}; tsconv run OWNER/NAME gets one from the Hugging Face Hub")
