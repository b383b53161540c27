"""The model card of a trained checkpoint: every number in it comes from the run or from evaluate.measure."""

from __future__ import annotations

import evaluate

TEXT = """---
license: mit
language: en
---
# {name}

A small trained language model in the layout of
{kind}.
Made for tests and demonstrations: real weights, real activation sparsity, real predictors, in {size} parameters. It has
read one book and knows nothing else.

## Text

The King James Version of the Bible (translation of 1611, public domain), as packaged in Debian's `bible-kjv-text`:
{n_train} training tokens. The Gospel of John is held out: it was never trained on, and is `../heldout.txt`.
{chat:.0%} of the training sequences are ChatML: the user gives the beginning of a verse, the assistant the rest.

## Training

`{command}`
took {minutes:.0f} minutes of CPU time. Steps of {n_token} tokens:

1. {steps[0]} steps of the language model, sequences of {lengths[0]}. The loss has a penalty of {density} times
   L1 / L2 of each layer's activations, which rewards sparse ones whatever their scale{balance}
2. {steps[1]} steps of the predictors alone, sequences of {lengths[1]}: binary cross entropy on "gate > 0 and up > 0",
   active neurons weighted {positive[1]:g} times.
3. {steps[2]} steps of everything with the predictors' hard mask in the forward pass, sequences of {lengths[2]}. The
   sparsity penalty counts activations that the mask removes {missed:g} times more.
4. {steps[3]} steps of the predictors alone again, active neurons weighted {positive[3]:g} times, for recall.

The weights were then rounded to bf16; the figures below are of the rounded weights, computed in float32.

## Measured on the held-out text

Perplexity per token ({char_per_token:.2f} characters) over {n_eval} tokens in pieces of {n_ctx}:
**{ppl_predictor:.2f}** with the predictor's mask (the model as defined), {ppl_exact:.2f} with every neuron computed.

{table}

Active: gate > 0 and up > 0. Recall: the share of the active neurons that the predictor keeps.{moe_note}
These figures are printed by
`python checkpoints/evaluate.py checkpoints/{name} --text checkpoints/heldout.txt`.

## Samples (temperature 0.7)

{samples}
"""


def text(result: dict, recipe, steps, lengths, n_token: int, n_train: int, minutes: float, command: str) -> str:
    """recipe: train.Recipe. Shapes and steps as trained, figures from `result` (evaluate.measure)."""
    from corpus import CHAT_SHARE

    c = recipe.config
    if c.n_expert:
        kind = f"TurboSparse-Mixtral: {c.n_expert} experts, top {c.n_expert_used}, predictors on the normed state"
        balance = f",\n   and {recipe.balance_weight} times a load-balancing loss of the router."
        moe_note = "\nMeans over the routed expert calls."
    else:
        kind = "TurboSparse-Mistral: one dense FFN per layer, predictors on the residual before the norm"
        balance, moe_note = ".", ""
    shown = "\n\n".join(
        f"> **{prompt.replace('<|', '&lt;|').strip()}** {made.strip()}".replace("\n", "\n> ")
        for prompt, made in result["samples"].items()
    )
    return TEXT.format(
        name=result["model"],
        kind=kind,
        size=f"{result['parameters'] / 1e6:.2f} M",
        n_train=n_train,
        chat=CHAT_SHARE,
        command=command,
        minutes=minutes,
        n_token=n_token,
        steps=steps,
        lengths=lengths,
        density=recipe.density_weight,
        balance=balance,
        positive=recipe.positive_weight,
        missed=recipe.missed_weight,
        char_per_token=result["char_per_token"],
        n_eval=result["n_token"],
        n_ctx=result["n_ctx"],
        ppl_predictor=result["ppl_predictor"],
        ppl_exact=result["ppl_exact"],
        table=evaluate.table(result),
        moe_note=moe_note,
        samples=shown,
    )
