"""Fine-tunes one of the two small checkpoints beside this file on other text, as somebody would who knows nothing of
predictors: all neurons are computed, and the predictors stay as they were. What is written has stale ones.

    python checkpoints/finetune.py --model tiny-turbosparse-mistral --text FILE --out FOLDER

FILE is plain text. FOLDER receives a checkpoint in the same layout.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import export
import numpy as np
import tokenizer
import torch
import torch.nn.functional as F
from reference import Reference

HERE = Path(__file__).resolve().parent
LENGTH, BATCH = 128, 16  # tokens of a sequence, sequences of a step


def batches(ids: list[int], bos: int, seed: int) -> Iterator[torch.Tensor]:
    """int64 [BATCH, LENGTH + 1], from random places of the text."""
    rng, text = np.random.default_rng(seed), np.array(ids)
    while True:
        starts = rng.integers(0, len(text) - LENGTH, BATCH)
        yield torch.from_numpy(np.stack([[bos, *text[start : start + LENGTH]] for start in starts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint, which must not exist")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak of AdamW's rate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    source = HERE / args.model
    ref = Reference.load(source)
    ids = tokenizer.load(source).encode(args.text.read_text())
    trained = [(name, w) for name, w in ref.named_parameters() if ".predictor." not in name]
    for _, w in ref.named_parameters():
        w.requires_grad_(False)
    for _, w in trained:
        w.requires_grad_(True)
    optimizer = torch.optim.AdamW([w for _, w in trained], lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    sequences = batches(ids, 1, args.seed)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 20) * (1 - step / args.steps)
        tokens = next(sequences)
        loss = F.cross_entropy(ref(tokens[:, :-1], False).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for _, w in trained], 1.0)
        optimizer.step()
        if step % 25 == 24:
            print(f"step {step + 1}/{args.steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    shutil.copytree(source, args.out, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    export.write_shards(export.tensors(ref), args.out)


if __name__ == "__main__":
    main()
