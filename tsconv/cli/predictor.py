"""`tsconv predictor`: making activation predictors."""

from __future__ import annotations

import click

from tsconv.cli.lazy import LazyGroup

MODULES = {
    "build": ("tsconv.cli.predictor_build", "Make predictors of the weights alone, without training."),
    "train": ("tsconv.cli.predictor_train", "Train the predictors of a converted model on a text."),
}


@click.group("predictor", cls=LazyGroup, modules=MODULES)
def command() -> None:
    """Make the predictors of a converted model."""
