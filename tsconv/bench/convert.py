"""Speed and memory of `tsconv convert`, on generated checkpoints of the real shapes.

    python -m tsconv.bench.convert [--megabytes N]                      input MB/s of layers of the 7B model
    python -m tsconv.bench.convert --memory turbosparse-mixtral-47b     peak resident memory at full size

The generated input has just been written, so it is read from the page cache as far as it fits; the speed is that of the
conversion, not of a disk.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from tsconv.bench.generate import PRESETS
from tsconv.bench.synthetic import Shape, mistral_7b, tensor_shapes, write_checkpoint
from tsconv.machine.cpu import cpu_model

# Runs in a process of its own, so that ru_maxrss is the conversion's and not that of making its input.
CHILD = "import sys; from tsconv.bench.convert import child; child(*sys.argv[1:])"


def child(checkpoint: str, outfile: str, outtype: str) -> None:
    """Converts and prints seconds, input and output bytes, processor time and peak resident memory as JSON."""
    from tsconv.commands.convert import convert

    result = convert(checkpoint, outfile, outtype)
    used = resource.getrusage(resource.RUSAGE_SELF)
    measured = {
        "seconds": result.seconds,
        "input_bytes": result.input_bytes,
        "output_bytes": result.model_bytes + result.sidecar_bytes,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_rss_bytes": used.ru_maxrss * 1024,
    }
    print(json.dumps(measured))


def measure(shape: Shape, random_layers: int | None, outtype: str, directory: str | None) -> dict[str, Any]:
    """Generates a checkpoint, converts it in a child process, deletes both and returns what was measured."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="tsconv-bench-") as folder:
        checkpoint = Path(folder) / "checkpoint"
        started = time.perf_counter()
        write_checkpoint(checkpoint, shape, random_layers=random_layers)
        generated = time.perf_counter() - started
        arguments = [sys.executable, "-c", CHILD, str(checkpoint), str(Path(folder) / "model.gguf"), outtype]
        run = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, text=True)
        on_disk = sum(path.stat().st_blocks * 512 for path in checkpoint.iterdir())
    measured = json.loads(run.stdout)
    return {
        "outtype": outtype,
        "n_layer": shape.n_layer,
        "n_expert": shape.n_expert,
        "largest_tensor_bytes": 2 * max(a * b for a, b in (s for s in tensor_shapes(shape).values() if len(s) == 2)),
        **measured,
        "mb_per_s": measured["input_bytes"] / measured["seconds"] / 1e6,
        "input_on_disk_bytes": on_disk,
        "generate_seconds": generated,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_model(),
    }


@click.command()
@click.option("--megabytes", default=2000, show_default=True, help="Size of the generated input.")
@click.option("--memory", type=click.Choice(list(PRESETS)), help="Convert a whole model of this shape instead.")
@click.option("--outtype", default="q4_0", show_default=True, help="Type of the weights.")
@click.option("--directory", help="Where to put the files, which are deleted afterwards.  [default: the temp folder]")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def main(megabytes: int, memory: str | None, outtype: str, directory: str | None, as_json: bool) -> None:
    """Measure tsconv convert on generated checkpoints of real shapes."""
    if memory is not None:
        # One layer of random weights shows that the data path is the real one; the rest are holes that take no disk.
        result = measure(PRESETS[memory].shape(PRESETS[memory].n_layer), 1, outtype, directory)
    else:
        whole, layer = (sum(2 * _product(s) for s in tensor_shapes(mistral_7b(n)).values()) for n in (0, 1))
        n_layer = max(1, round((megabytes * 1e6 - whole) / (layer - whole)))
        result = measure(mistral_7b(n_layer), None, outtype, directory)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    click.echo(
        f"{result['input_bytes'] / 1e6:,.0f} MB to {result['outtype']} in {result['seconds']:.1f} s:"
        f" {result['mb_per_s']:.0f} MB/s of input, {result['cpu_seconds']:.1f} s of processor time,"
        f" peak resident memory {result['peak_rss_bytes'] / 2**20:,.0f} MiB"
        f" (largest tensor {result['largest_tensor_bytes'] / 2**20:,.0f} MiB), {result['cores']} cores, {result['cpu']}"
    )


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


if __name__ == "__main__":
    main()
