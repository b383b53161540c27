"""Trains one of the two small checkpoints beside this file, from the King James Version (see corpus.py).

    bible -f gen1:1-rev22:21 > kjv.txt
    python checkpoints/train.py --model tiny-turbosparse-mistral --text kjv.txt

1. the tokenizer, then the language model with all neurons computed and a small penalty for dense activations
2. the predictors alone, on the frozen model: which neurons have gate > 0 and up > 0
3. all together, with the predictors' hard mask in the forward pass, a constant of the language model's loss
4. the predictors alone again, with missed neurons costing more
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import card
import corpus
import evaluate
import export
import tokenizer
import torch
import torch.nn.functional as F
from reference import FFN, Config, Reference
from torch import Tensor

HERE = Path(__file__).resolve().parent
N_PIECE = 1024  # of the sentencepiece model; the added tokens follow, and rows up to N_VOCAB stay unused
N_VOCAB = 1056
WINDOW = 4096


@dataclass(frozen=True)
class Recipe:
    config: Config
    ranks: tuple[int, ...]
    steps: tuple[int, int, int, int]  # of the phases
    density_weight: float = 0.06  # of the penalty L1 / L2 on each layer's activations
    missed_weight: float = 10.0  # in phase 3: how much heavier L1 counts activations that the mask removes
    balance_weight: float = 0.0  # of the router's load-balancing loss
    positive_weight: tuple[float, ...] = (0, 3, 3, 8)  # per phase, in the predictors' cross entropy: favours recall


RECIPES = {
    "tiny-turbosparse-mistral": Recipe(
        Config(N_VOCAB, n_embd=128, n_ff=512, n_layer=6, n_head=4, n_head_kv=2, rope_theta=10000.0, window=WINDOW),
        ranks=(96, 64, 32, 32, 64, 64),
        steps=(600, 200, 500, 120),
    ),
    "tiny-turbosparse-mixtral": Recipe(
        Config(
            N_VOCAB, n_embd=96, n_ff=192, n_layer=3, n_head=3, n_head_kv=1, n_expert=8, n_expert_used=2, rope_theta=1e6
        ),
        ranks=(64, 32, 32),
        steps=(900, 250, 750, 150),
        balance_weight=0.02,
    ),
}
N_TOKEN = 4096  # per step
LENGTHS = (128, 128, 256, 256)  # of the sequences, per phase
SIDE_ROWS = 4  # phases 1 and 3: side losses look at every 4th row; same mean, a quarter of the time
MUON_RATE = 2e-2  # peak, matrices of the layers
ADAM_RATE = 4e-3  # peak, everything else: embeddings, output, norms, router
RATE_SHARE = (1.0, 0.5, 0.4, 0.3)  # of these peaks, per phase
PREDICTORS_ALONE = (1, 3)  # phases, counted from 0
MASKED = 2
WARMUP = 100  # steps


def initialise(ref: Reference) -> None:
    """Normal weights of variance 1 / n_in; what writes to the residual is smaller by sqrt(2 n_layer)."""
    for name, w in ref.named_parameters():
        if w.ndim == 2:
            scale = 1 / math.sqrt(2 * ref.config.n_layer) if "down_proj" in name or "o_proj" in name else 1.0
            torch.nn.init.normal_(w, std=scale * (0.3 if "embed" in name else 1.0) / math.sqrt(w.shape[1]))


class SideLosses:
    """Collects, during one forward pass, what the language model's loss does not see."""

    def __init__(self, recipe: Recipe, phase: int):
        self.positive_weight = torch.tensor(float(recipe.positive_weight[phase]))
        self.missed_weight = recipe.missed_weight if phase == MASKED else 0.0
        self.density: list[Tensor] = []  # per FFN: L1 / L2 of the activations, whatever their scale
        self.predictor: list[Tensor] = []  # per FFN: cross entropy of the predictor, times its rows
        self.balance: list[Tensor] = []  # per MoE layer
        self.rows = 0

    def probe(self, ffn: FFN, p: Tensor, gate: Tensor, h: Tensor, logit: Tensor | None) -> None:
        if h.requires_grad:
            p, h, logit = p[::SIDE_ROWS], h[::SIDE_ROWS], None if logit is None else logit[::SIDE_ROWS]
            l1 = h
            if self.missed_weight:  # the text's loss no longer sees these, so nothing else would switch them off
                l1 = h * (1 + self.missed_weight * ~ffn.predicted(logit))
            self.density.append(l1.mean() / (h.square().mean() + 1e-12).sqrt())
        if logit is not None:
            # Positively homogeneous: dividing by rms(p) changes no sign, and every token weighs the same.
            logit = logit / (p.detach().square().mean(-1, keepdim=True) + 1e-12).sqrt()
            loss = F.binary_cross_entropy_with_logits(logit, (h > 0).float(), pos_weight=self.positive_weight)
            self.predictor.append(loss * len(h))
            self.rows += len(h)

    def route(self, share: Tensor, chosen: Tensor) -> None:
        """n_expert * sum over experts of (fraction of calls) * (mean router share): 1 when balanced."""
        n = share.shape[1]
        calls = torch.zeros(n).index_add(0, chosen.flatten(), torch.ones(chosen.numel())) / chosen.numel()
        self.balance.append(n * (calls * share.mean(0)).sum())


def optimizers(named: list[tuple[str, Tensor]], share: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest, at a share of their peak rates."""
    muon = [w for name, w in named if w.ndim == 2 and ".layers." in name and "block_sparse_moe.gate" not in name]
    known = {id(w) for w in muon}
    rest = [w for _, w in named if id(w) not in known]
    made = [
        torch.optim.Muon(muon, lr=share * MUON_RATE, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ]
    if rest:
        made.append(torch.optim.AdamW(rest, lr=share * ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
    return made


def rate_at(step: int, n_step: int) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    return min(1, (step + 1) / min(WARMUP, n_step / 4)) * (0.51 + 0.49 * math.cos(math.pi * step / n_step))


def run_phase(ref: Reference, recipe: Recipe, phase: int, n_step: int, sequences: corpus.Sequences, seed: int) -> None:
    """Phases count from 0 here."""
    alone = phase in PREDICTORS_ALONE
    length = LENGTHS[phase]
    batches = sequences.batches(N_TOKEN // length, length, [seed, phase])
    for name, w in ref.named_parameters():
        w.requires_grad_(not alone or ".predictor." in name)
    trained = [(name, w) for name, w in ref.named_parameters() if w.requires_grad]
    optims = optimizers(trained, RATE_SHARE[phase])
    groups = [(group, group["lr"]) for o in optims for group in o.param_groups]
    start = time.monotonic()
    for step in range(n_step):
        for group, peak in groups:
            group["lr"] = peak * rate_at(step, n_step)
        inputs, targets = (torch.from_numpy(a) for a in next(batches))
        side = SideLosses(recipe, phase)
        logits = ref(inputs, phase == MASKED, side.probe, None if alone else side.route)
        text_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=corpus.IGNORE)
        predictor_loss = sum(side.predictor) / max(side.rows, 1) if side.predictor else torch.zeros(())
        loss = predictor_loss
        if not alone:
            # summed over layers; a MoE layer's is the mean over its experts
            density = sum(side.density) * ref.config.n_layer / len(side.density)
            loss = loss + text_loss + recipe.density_weight * density + recipe.balance_weight * sum(side.balance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for _, w in trained], 1.0)
        for o in optims:
            o.step()
            o.zero_grad()
        if step % 50 == 49 or step == n_step - 1:
            print(
                f"phase {phase + 1} step {step + 1}/{n_step} {(time.monotonic() - start) / (step + 1):.3f} s/step: "
                f"text {text_loss.item():.3f} predictors {predictor_loss.item():.3f} "
                f"balance {sum(b.item() for b in side.balance) / max(len(side.balance), 1):.3f}",
                file=sys.stderr,
            )


def progress(ref: Reference, ids: list[int], when: str) -> None:
    ids = ids[:8000]
    has = ref.model.layers[0].ffns[0].predictor is not None
    ppl = {s: round(evaluate.perplexity(ref, ids, s), 2) for s in (("predictor", "exact") if has else ("exact",))}
    row = " ".join(
        f"{r['active']:.3f}/{r['predicted']:.3f}/{r['predicted_active'] / max(r['active'], 1e-9):.3f}"
        for r in ref.activity(ids[:1000])
    )
    print(f"{when}: held-out ppl {ppl}, active/predicted/recall by layer: {row}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=RECIPES, required=True)
    parser.add_argument("--text", type=Path, required=True, help="output of: bible -f gen1:1-rev22:21")
    parser.add_argument("--out", type=Path, default=HERE, help="folder that receives the checkpoint's folder")
    parser.add_argument("--steps", type=int, nargs=4, metavar="N", help="of the phases, instead of the recipe's")
    parser.add_argument(
        "--state",
        type=Path,
        help="folder that keeps the weights after each phase; a later run with "
        "the same options starts behind the last phase found there",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.model]

    verses = corpus.read_verses(args.text)
    training = [v for v in verses if v[0] != corpus.HELD_OUT]
    heldout = corpus.flowing([v for v in verses if v[0] == corpus.HELD_OUT])
    pieces = tokenizer.train((text for _, _, text in training), N_PIECE)
    differ = tokenizer.disagreements(pieces, [text for _, _, text in verses] + list(tokenizer.ODD_TEXTS) + [heldout])
    if differ:
        sys.exit(f"tokenizer.model and tokenizer.json disagree on {len(differ)} texts, the first {differ[0]!r}")
    tok = tokenizer.SentencePiece(pieces)
    sequences = corpus.Sequences(training, tok.encode, tokenizer.BOS)
    heldout_ids = tok.encode(heldout)
    print(f"{sequences.n_token} training tokens, {len(heldout_ids)} held out", file=sys.stderr)

    torch.manual_seed(args.seed)
    ref = Reference(recipe.config)
    initialise(ref)
    steps = args.steps or recipe.steps
    cpu_s = 0.0  # of the training alone
    for phase in range(len(steps)):
        if phase == 1:
            ref.attach_predictors(list(recipe.ranks))
        state = args.state / f"{args.model}-phase{phase + 1}.pt" if args.state else None
        if state and state.exists():
            saved = torch.load(state, weights_only=True)
            ref.load_state_dict(saved["weights"])
            cpu_s = saved["cpu_s"]
        else:
            # bf16 products with f32 sums pay where the matrices are large; all measuring is done in f32
            torch.backends.mkldnn.matmul.fp32_precision = "ieee" if recipe.config.n_expert else "bf16"
            started = time.process_time()
            run_phase(ref, recipe, phase, steps[phase], sequences, args.seed)
            cpu_s += time.process_time() - started
            if state:
                args.state.mkdir(parents=True, exist_ok=True)
                torch.save(dict(weights=ref.state_dict(), cpu_s=cpu_s), state)
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        progress(ref, heldout_ids, f"after phase {phase + 1}")

    final, new = args.out / args.model, args.out / f".{args.model}.new"
    shutil.rmtree(new, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heldout.txt").write_text(heldout)
    export.write_checkpoint(ref, args.model, pieces, new)
    result = evaluate.measure(new, heldout) | {"model": args.model}
    command = shlex.join(
        ["python", "checkpoints/train.py", "--model", args.model, "--text", "kjv.txt"]
        + (["--steps", *map(str, args.steps)] if args.steps else [])
        + (["--seed", str(args.seed)] if args.seed != 1 else [])
    )
    readme = card.text(result, recipe, steps, LENGTHS, N_TOKEN, sequences.n_token, cpu_s / 60, command)
    (new / "README.md").write_text(readme)
    export.replace(new, final)
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
