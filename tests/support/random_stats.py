"""Activation statistics of random counts, for any converted model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tsconv.format.header import read_header
from tsconv.stats import file as stats_file
from tsconv.stats.collect import subject_of
from tsconv.stats.counts import COUNTS, Counts, Part, Source, Stats

TEXT = Source("some/text", "plain", "0123abc", 512, "q4_0")


def random_stats(model: Path, sparsity: str = "predictor", seed: int = 0, **changes: Any) -> Stats:
    """Statistics that fit `model`; `changes` replace fields of their subject."""
    subject = subject_of(read_header(model), sparsity)
    subject = dataclasses.replace(subject, **changes)
    rng = np.random.default_rng(seed)
    zeros = Counts.zeros(subject)
    tokens = rng.integers(20, 60, zeros.tokens.shape)  # few, so that many neurons are equally hot
    neurons = rng.integers(0, 1 + tokens[None, :, :, None], (len(COUNTS), *zeros.neurons.shape[1:]))
    part = Part(TEXT, 60, 1, (), Counts(tokens, neurons, zeros.histograms))
    return Stats(subject, (part,))


def save_stats(stats: Stats, path: Path) -> Path:
    """`stats` as a file; returns `path`."""
    stats_file.save(stats, path, force=True)
    return path


def expected_order(stats: Stats) -> list[list[list[int]]]:
    """[n_layer][n_ffn][n_ff] neurons by the definition of heat, one at a time."""
    counts, subject = stats.total, stats.subject

    def heat(layer: int, ffn: int, neuron: int) -> int:
        def count(name: str) -> int:
            return int(counts.neurons[COUNTS.index(name), layer, ffn, neuron])

        if subject.sparsity == "exact":
            return int(counts.tokens[layer, ffn]) + count("gate_positive") + count("active")
        return count("predicted") + count("predicted_gate") + count("predicted_active")

    return [
        [sorted(range(subject.n_ff), key=lambda i: (-heat(layer, ffn, i), i)) for ffn in range(subject.n_ffn)]
        for layer in range(subject.n_layer)
    ]
