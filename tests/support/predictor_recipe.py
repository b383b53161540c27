"""The published way to train predictors, as a baseline: that of Deja Vu (arXiv 2310.17157), of THUNLP for ReluLLaMA and
ProSparse, and of Polar Sparsity. fc1 and fc2 without biases and a ReLU between, binary cross-entropy on "active" with
negatives weighted by the density + 0.005, AdamW at 1e-3, the epoch with the highest recall kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RATE, BATCH, MARGIN = 1e-3, 512, 0.005


def train_recipe(
    x: Tensor, active: Tensor, held: tuple[Tensor, Tensor], rank: int, epochs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """fc1 [rank, n_embd] and fc2 [n_ff, rank]; a neuron is on where fc2 . relu(fc1 . x) > 0.

    Args:
        x: float32 [n, n_embd].
        active: bool [n, n_ff].
        held: the same of other tokens.
    """
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], rank, bias=False),
        torch.nn.ReLU(),
        torch.nn.Linear(rank, active.shape[1], bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    negative = float(active.float().mean()) + MARGIN
    best, kept = -1.0, (model[0].weight, model[2].weight)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            y = active[rows].float()
            weight = torch.where(active[rows], 1.0, negative)
            loss = F.binary_cross_entropy_with_logits(model(x[rows]), y, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            on = model(held[0]) > 0
            recall = float((on & held[1]).sum() / held[1].sum())
        if recall > best:
            best, kept = recall, (model[0].weight.detach().clone(), model[2].weight.detach().clone())
    return kept
