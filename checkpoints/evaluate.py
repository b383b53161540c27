"""Measures a checkpoint as it lies on disk, with the reference model.

    python checkpoints/evaluate.py checkpoints/tiny-turbosparse-mistral --text checkpoints/heldout.txt [--json]

Perplexity per token with the predictor's mask and with every neuron computed, activity per layer, samples.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import tokenizer
import torch
import torch.nn.functional as F
from reference import Reference

N_CTX = 256
PROMPTS = ("And it came to pass", "The LORD is my", "Blessed are they", "In those days")
CHAT_PROMPT = "<|im_start|>user\nAnd God said<|im_end|>\n<|im_start|>assistant\n"


def chunks(ids: list[int], n_ctx: int) -> list[list[int]]:
    """The text in pieces of n_ctx - 1 tokens, <s> before each: every token is predicted once."""
    return [[tokenizer.BOS, *ids[i : i + n_ctx - 1]] for i in range(0, len(ids), n_ctx - 1)]


def perplexity(ref: Reference, ids: list[int], sparsity: str, n_ctx: int = N_CTX) -> float:
    """exp of the mean negative log likelihood per token."""
    loss = 0.0
    for piece in chunks(ids, n_ctx):
        logits = ref.logits(piece[:-1], sparsity)
        loss += F.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
    return math.exp(loss / len(ids))


def activity(ref: Reference, ids: list[int], n_ctx: int = N_CTX) -> list[dict]:
    """Reference.activity over the whole text: the chunks' means weighted by their calls; adds rank and recall."""
    runs = [ref.activity(piece) for piece in chunks(ids, n_ctx)]
    rows = []
    for block, layer in zip(ref.model.layers, zip(*runs, strict=True), strict=True):
        calls = sum(row["calls"] for row in layer)
        mean = {
            key: sum(row[key] * row["calls"] for row in layer) / calls
            for key in ("predicted", "gate", "active", "predicted_active")
        }
        rows.append(
            mean
            | dict(
                recall=mean["predicted_active"] / max(mean["active"], 1e-12),
                calls=calls,
                n_ff=layer[0]["n_ff"],
                rank=block.ffns[0].predictor.fc1.weight.shape[0],
            )
        )
    return rows


def generate(
    ref: Reference, ids: list[int], n: int, temperature: float, seed: int, stop: set[int], sparsity: str = "predictor"
) -> list[int]:
    """Up to n sampled tokens after ids; ends after a token in stop. Temperature 0 is greedy."""
    rng = torch.Generator().manual_seed(seed)
    made: list[int] = []
    while len(made) < n and not (made and made[-1] in stop):
        logits = ref.logits(ids + made, sparsity)[-1]
        if temperature == 0:
            made.append(int(logits.argmax()))
        else:
            made.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)))
    return made


def samples(ref: Reference, tok, n: int = 60) -> dict[str, str]:
    stop = {tok.encode("<|im_end|>")[0], 2}
    texts = {
        prompt: tok.decode(generate(ref, [tokenizer.BOS, *tok.encode(prompt)], n, 0.7, i, stop))
        for i, prompt in enumerate(PROMPTS)
    }
    made = generate(ref, [tokenizer.BOS, *tok.encode(CHAT_PROMPT)], n, 0.7, 0, stop)
    return texts | {CHAT_PROMPT: tok.decode(made) + ("<|im_end|>" if made[-1] in stop else "")}


def measure(directory: Path, text: str) -> dict:
    ref, tok = Reference.load(directory), tokenizer.load(directory)
    ids = tok.encode(text)
    return dict(
        model=directory.name,
        parameters=sum(p.numel() for p in ref.parameters()),
        n_token=len(ids),
        char_per_token=len(text) / len(ids),
        n_ctx=N_CTX,
        ppl_predictor=perplexity(ref, ids, "predictor"),
        ppl_exact=perplexity(ref, ids, "exact"),
        layers=activity(ref, ids),
        samples=samples(ref, tok),
    )


def table(result: dict) -> str:
    """The activity per layer as a Markdown table, in per cent of the neurons."""
    lines = ["| layer | rank | neurons | active % | predicted % | gate > 0 % | recall % |", "|---" * 7 + "|"]
    for i, row in enumerate(result["layers"]):
        shares = " | ".join(f"{100 * row[key]:.1f}" for key in ("active", "predicted", "gate", "recall"))
        lines.append(f"| {i} | {row['rank']} | {row['n_ff']} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    result = measure(args.directory, args.text.read_text())
    if args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    print(
        f"{result['model']}: {result['parameters']} parameters; {result['n_token']} tokens at n_ctx {N_CTX}: "
        f"ppl {result['ppl_predictor']:.3f} (predictor), {result['ppl_exact']:.3f} (exact)"
    )
    print(table(result))
    for prompt, text in result["samples"].items():
        print(f"{prompt!r} -> {text!r}")


if __name__ == "__main__":
    main()
