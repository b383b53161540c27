"""Small activation statistics with the samples behind them, so that every number can be worked out again from those."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from tsconv.stats.counts import Counts, Part, Source, Stats, Subject

# Edges of the histograms' bins, from their definition: four linear steps to each octave from 2^-20 to 2^12.
EDGES = [2.0**octave * (1 + step / 4) for octave in range(-20, 12) for step in range(4)] + [2.0**12]


@dataclass(frozen=True)
class Sample:
    """One neuron of an FFN that saw one token of a text: its gate . x, its up . x, and whether it was predicted."""

    text: int
    token: int
    layer: int
    ffn: int
    neuron: int
    gate: float
    up: float
    predicted: bool

    @property
    def active(self) -> bool:
        return self.gate > 0 and self.up > 0

    @property
    def product(self) -> float:
        return max(0.0, self.gate) * max(0.0, self.up)


def source(text: int) -> Source:
    return Source(f"some/text-{text}", "plain" if text else "", "", 16, "q4_0")


def sampled(
    n_expert: int = 0,
    sparsity: str = "predictor",
    n_texts: int = 1,
    n_layer: int = 2,
    n_ff: int = 11,
    n_tokens: int = 14,
    seed: int = 0,
) -> tuple[Stats, list[Sample]]:
    """Statistics of random samples. Two neurons of each FFN are never active; the last of three or more experts sees no
    token in layer 0."""
    rng = np.random.default_rng(seed)
    subject = Subject("0f" * 32, "Sampled", n_layer, 8, n_ff, n_expert, min(2, n_expert), sparsity)
    bias = rng.normal(-0.4, 1, (n_layer, subject.n_ffn, n_ff))
    bias[..., :2] = -100
    samples = []
    for text in range(n_texts):
        drift = rng.normal(0, 0.5, bias.shape)
        for token in range(n_tokens + text):
            for layer in range(n_layer):
                experts = n_expert - 1 if n_expert > 2 and layer == 0 else n_expert
                for ffn in rng.choice(experts, subject.n_expert_used, replace=False).tolist() if n_expert else [0]:
                    for neuron in range(n_ff):
                        gate = float(bias[layer, ffn, neuron] + drift[layer, ffn, neuron] + rng.normal()) / 4
                        up = float(rng.normal() * 10.0 ** rng.integers(-8, 3))
                        likely = 0.9 if gate > 0 and up > 0 else 0.2
                        predicted = sparsity == "exact" or bool(rng.random() < likely)
                        samples.append(Sample(text, token, layer, ffn, neuron, gate, up, predicted))
    parts = tuple(
        Part(source(text), n_tokens + text, 1, (text,) if text else (), _counts(subject, samples, text))
        for text in range(n_texts)
    )
    return Stats(subject, parts), samples


def _counts(subject: Subject, samples: list[Sample], text: int) -> Counts:
    counts = Counts.zeros(subject)
    for s in samples:
        if s.text != text:
            continue
        counts.tokens[s.layer, s.ffn] += s.neuron == 0
        flags = (s.gate > 0, s.up > 0, s.active, s.predicted, s.predicted and s.gate > 0, s.predicted and s.active)
        counts.neurons[:, s.layer, s.ffn, s.neuron] += flags
        for k, value in enumerate((abs(s.gate), abs(s.up), s.product)):
            counts.histograms[s.layer, k, bisect_right(EDGES, value)] += 1
    return counts
