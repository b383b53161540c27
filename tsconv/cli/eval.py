"""`tsconv eval`: how good a model is."""

from __future__ import annotations

import click

from tsconv.cli.lazy import LazyGroup

MODULES = {
    "ppl": ("tsconv.cli.perplexity", "Measure perplexity on a text, as llama-perplexity does."),
    "kld": ("tsconv.cli.kld", "Measure the KL divergence from another model, as llama-perplexity does."),
    "sweep": ("tsconv.cli.sweep", "Measure quality and speed at many sparsities."),
    "predictor": ("tsconv.cli.eval_predictor", "Measure what the predictors miss, layer by layer."),
    "tasks": ("tsconv.cli.tasks", "Measure on downstream tasks, with lm-evaluation-harness."),
}


@click.group("eval", cls=LazyGroup, modules=MODULES)
def command() -> None:
    """Measure how good a converted model is."""
