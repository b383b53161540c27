"""Trains the predictors of a model as others do (support/predictor_recipe.py), and writes them as a sidecar.

usage, in tests/: python -m experiments.recipe_predictors MODEL OUT TEXT TOKENS EPOCHS RANK [RANK ...]

Text, tokens, held-out chunks and rounding are those of `tsconv predictor train`. RANK: of each layer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

import tsconv
from support.predictor_recipe import train_recipe
from tsconv.commands.predictor_train import DEFAULT_CHUNK
from tsconv.format.order import shape_of
from tsconv.predictor.train import sidecar
from tsconv.predictor.train.record import record, take_chunks
from tsconv.predictor.train.rounding import Types
from tsconv.predictor.train.samples import HELD, TRAINED, open_samples
from tsconv.stats.text.corpus import open_corpus
from tsconv.transform import q3_nl

TYPES = Types(GGMLQuantizationType.Q4_0, q3_nl.KIND)


def main(model: Path, out: Path, text: str, n_tokens: int, epochs: int, ranks: list[int]) -> None:
    llama = tsconv.load(model, sparsity="exact", n_ctx=1, n_batch=1)
    n_layer, n_ffn, n_ff = shape_of(llama.header)
    n_embd = llama.header.keys["llama.embedding_length"]
    tokens = take_chunks(llama, open_corpus(text, 0), DEFAULT_CHUNK, n_tokens, 0)
    predictors = []
    with tempfile.TemporaryDirectory() as name:
        record(llama, tokens, range(n_layer), (n_ffn, n_embd, n_ff), Path(name))
        for n, rank in enumerate(ranks):
            predictors.append([])
            for e in range(n_ffn):
                both = []
                for split in (TRAINED, HELD):
                    samples = open_samples(Path(name), n, e, split, n_embd, n_ff)
                    x, h = samples.read(range(samples.n_blocks))
                    both.append((torch.from_numpy(x).float(), torch.from_numpy(h) > 0))
                fc1, fc2 = (w.numpy() for w in train_recipe(*both[0], both[1], rank, epochs, n))
                balance = q3_nl.balance(fc1, fc2)
                predictors[-1].append(
                    TYPES.store(fc1 / balance.scale[:, None], fc2 * balance.scale, balance.importance)
                )
                print(f"layer {n} FFN {e}: done", file=sys.stderr, flush=True)
    about = f"the published recipe, {tokens.size} tokens"
    sidecar.write(out, llama.header, ranks, [TYPES] * n_layer, predictors, about, True, threshold=0.0)
    llama.close()


if __name__ == "__main__":
    model, out, text, n_tokens, epochs, *ranks = sys.argv[1:]
    main(Path(model), Path(out), text, int(n_tokens), int(epochs), [int(rank) for rank in ranks])
