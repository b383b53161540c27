"""What counting costs: prefill with activation statistics beside plain prefill, on a generated model of a real shape.

    python -m tsconv.bench.profile [--layers N] [--outtype q4_0] [--rounds N]

Both run in turn in one process. Plain prefill is what `tsconv run` does with a prompt of as many tokens as a chunk:
sparse, and with the logits of the last token only.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from tsconv.bench.activity import ActiveWeights
from tsconv.bench.generate import PRESETS
from tsconv.bench.synthetic import write_checkpoint
from tsconv.machine.cpu import cpu_model

PRESET = PRESETS["turbosparse-mistral-7b"]


def measure(layers: int, outtype: str, n_tokens: int, rounds: int, directory: str | None) -> dict[str, Any]:
    """Generates a model, times both ways of computing `n_tokens` tokens in turn, deletes the model."""
    from tsconv.commands.convert import convert
    from tsconv.native.library import load_backend
    from tsconv.runtime.layers import LayersContext
    from tsconv.runtime.model import load

    shape = PRESET.shape(layers)
    with tempfile.TemporaryDirectory(dir=directory, prefix="tsconv-bench-") as folder:
        checkpoint, path = Path(folder) / "checkpoint", Path(folder) / "model.gguf"
        click.echo(f"generating {layers} layers of a 7B model in {folder}", err=True)
        write_checkpoint(checkpoint, shape, weights=ActiveWeights(shape, PRESET.active))
        convert(checkpoint, path, outtype)
        for shard in checkpoint.iterdir():
            shard.unlink()
        tokens = np.random.default_rng(0).integers(3, 256, n_tokens).tolist()
        llama = load(path, n_ctx=n_tokens, n_batch=n_tokens)

        def plain() -> None:
            llama.reset()
            llama.eval(tokens)

        with LayersContext(llama, n_tokens) as context:

            def counting() -> None:
                with llama.profiling():
                    context.compute(tokens)

            seconds = in_turn({"plain": plain, "counting": counting}, rounds)
        llama.reset_ffn_stats()
        plain()
        predicted = statistics.fmean(layer["predicted"] / layer["n_ff"] for layer in llama.ffn_stats())
        result = {
            "shape": f"{layers} layers of 7B",
            "outtype": outtype,
            "n_tokens": n_tokens,
            "n_threads": llama.n_threads,
            "isa": load_backend().isa,
            "predicted": predicted,
            "plain_tokens_per_s": n_tokens / statistics.median(seconds["plain"]),
            "counting_tokens_per_s": n_tokens / statistics.median(seconds["counting"]),
            "ratios": sorted(p / c for p, c in zip(seconds["plain"], seconds["counting"], strict=True)),
            "cpu": cpu_model(),
        }
        llama.close()
    return result


def in_turn(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turn `rounds` times after one call that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@click.command()
@click.option("--layers", default=8, show_default=True, help="Layers of the generated model.")
@click.option("--outtype", default="q4_0", show_default=True, help="Type of the weights.")
@click.option("--tokens", "n_tokens", default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--rounds", default=5, show_default=True, help="Times that each way is measured.")
@click.option("--directory", help="Where to put the model, which is deleted afterwards.  [default: the temp folder]")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def main(layers: int, outtype: str, n_tokens: int, rounds: int, directory: str | None, as_json: bool) -> None:
    """Measure what counting activations costs."""
    result = measure(layers, outtype, n_tokens, rounds, directory)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    ratios = result["ratios"]
    click.echo(
        f"{result['shape']}, {outtype}, {result['predicted']:.1%} predicted, {n_tokens} tokens:"
        f" plain prefill {result['plain_tokens_per_s']:.0f}, counting {result['counting_tokens_per_s']:.0f} tokens/s,"
        f" ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f});"
        f" {result['n_threads']} threads, {result['isa']}, {result['cpu']}"
    )


if __name__ == "__main__":
    main()
