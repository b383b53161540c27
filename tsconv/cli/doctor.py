"""`tsconv doctor`: prints what tsconv.runtime.doctor finds."""

from __future__ import annotations

import dataclasses

import click

from tsconv.cli.output import echo, json_text
from tsconv.cli.text import table


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """Check this installation and say how to mend it. Exits with 1 when something does not work."""
    from tsconv.runtime.doctor import diagnose, is_healthy

    checks = diagnose()
    healthy = is_healthy(checks)
    if as_json:
        echo(json_text({"healthy": healthy, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        echo(table([(check.status, check.name, check.value) for check in checks]))
        for check in checks:
            if check.fix:
                echo(f"{check.status}: {check.name}: {check.fix}")
        if healthy:
            echo("everything needed is there")
    if not healthy:
        raise click.exceptions.Exit(1)
