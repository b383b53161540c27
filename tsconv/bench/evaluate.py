"""What perplexity costs beside plain prefill of the same batches, on a generated model of a real shape.

    python -m tsconv.bench.evaluate [--layers N] [--windows N] [--rounds N]

Both run in turn in one process. Plain prefill computes the logits of a window's last token only; perplexity those of
its second half, and looks at all of them. A model of few layers makes that look more expensive than it is.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import click
import numpy as np

from tsconv.bench.generate import generated
from tsconv.bench.profile import in_turn
from tsconv.machine.cpu import cpu_model

PRESET = "turbosparse-mistral-7b"


def measure(layers: int, outtype: str, n_ctx: int, n_windows: int, n_batch: int, rounds: int) -> dict[str, Any]:
    """Times both ways of computing n_windows windows of n_ctx random tokens in turn."""
    from tsconv.eval.ppl import measure_ppl
    from tsconv.eval.windows import Windows, scored_logits
    from tsconv.native.library import load_backend
    from tsconv.runtime.model import load

    class LastTokens(Windows):
        """Of which only the last position's logits are wanted."""

        @property
        def first(self) -> int:
            return self.n_ctx - 1

    path = generated(PRESET, layers, outtype, lambda line: click.echo(line, err=True))
    tokens = np.random.default_rng(0).integers(3, 256, (n_windows, n_ctx), dtype=np.int32)
    llama = load(path, n_ctx=256)

    def plain() -> None:
        for _ in scored_logits(llama, LastTokens(tokens), n_batch):
            pass

    seconds = in_turn({"plain": plain, "ppl": lambda: measure_ppl(llama, Windows(tokens), n_batch=n_batch)}, rounds)
    result = {
        "shape": f"{layers} layers of 7B",
        "outtype": outtype,
        "n_ctx": n_ctx,
        "n_windows": n_windows,
        "n_batch": n_batch,
        "n_threads": llama.n_threads,
        "isa": load_backend().isa,
        "plain_tokens_per_s": tokens.size / statistics.median(seconds["plain"]),
        "ppl_tokens_per_s": tokens.size / statistics.median(seconds["ppl"]),
        "ratios": sorted(p / q for p, q in zip(seconds["plain"], seconds["ppl"], strict=True)),
        "cpu": cpu_model(),
    }
    llama.close()
    return result


@click.command()
@click.option("--layers", default=32, show_default=True, help="Layers of the generated model, which is kept.")
@click.option("--outtype", default="q4_0", show_default=True, help="Type of the weights.")
@click.option("-c", "--ctx-size", "n_ctx", default=512, show_default=True, help="Tokens of a window.")
@click.option("--windows", "n_windows", default=2, show_default=True, help="Windows.")
@click.option("-b", "--batch-size", "n_batch", default=2048, show_default=True, help="Tokens computed together.")
@click.option("--rounds", default=2, show_default=True, help="Times that each way is measured.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def main(layers: int, outtype: str, n_ctx: int, n_windows: int, n_batch: int, rounds: int, as_json: bool) -> None:
    """Measure what perplexity costs beside prefill."""
    result = measure(layers, outtype, n_ctx, n_windows, n_batch, rounds)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    ratios = result["ratios"]
    click.echo(
        f"{result['shape']}, {outtype}, {n_windows} windows of {n_ctx} tokens, {n_batch} together:"
        f" plain prefill {result['plain_tokens_per_s']:.1f}, perplexity {result['ppl_tokens_per_s']:.1f} tokens/s,"
        f" ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f});"
        f" {result['n_threads']} threads, {result['isa']}, {result['cpu']}"
    )


if __name__ == "__main__":
    main()
