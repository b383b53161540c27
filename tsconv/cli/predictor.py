"""`tsconv predictor`: making activation predictors."""

from __future__ import annotations

import click

from tsconv.cli.lazy import LazyGroup

MODULES = {
    "build": ("tsconv.cli.predictor_build", "Make predictors of the weights alone, without training."),
    "train": ("tsconv.cli.predictor_train", "Train the predictors of a converted model on a text."),
    "export": ("tsconv.cli.predictor_export", "Write predictors as model_N.pt files."),
}


@click.group("predictor", cls=LazyGroup, modules=MODULES)
def command() -> None:
    """Make the predictors of a converted model."""
