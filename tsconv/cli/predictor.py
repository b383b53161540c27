"""`tsconv predictor`: making activation predictors."""

from __future__ import annotations

import click

from tsconv.cli.lazy import LazyGroup

MODULES = {
    "train": ("tsconv.cli.predictor_train", "Train the predictors of a converted model on a text."),
}


@click.group("predictor", cls=LazyGroup, modules=MODULES)
def command() -> None:
    """Make the predictors of a converted model."""
