"""`tsconv predictor train`: parses options, calls tsconv.commands.predictor_train, prints what came out."""

from __future__ import annotations

from typing import Any

import click


@click.command("train")
@click.argument("model")
def command(*, model: str, **options: Any) -> None:
    """Train the predictors of MODEL on a text."""
    raise click.UsageError(f"{model}: not yet")
