"""Random damage in the headers of a model and its sidecar, opened through the C library: opens, or one line.

usage, in tests/: python -m support.fuzz_headers MODEL SEED N     (MODEL and its sidecar are overwritten)
Prints how many opened and were refused; before each try, file and seed on stderr, so that a crash can be repeated.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

from tsconv.errors import ModelFileError
from tsconv.format.header import read_header
from tsconv.runtime.binding import open_model

EXTREMES = (b"\xff" * 8, b"\0" * 8, *(n.to_bytes(8, "little") for n in (1, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1)))


def damaged(header: bytes, rng: random.Random) -> bytearray:
    """`header` with 1 to 16 flipped bits, changed bytes, or extreme 8-byte numbers."""
    data = bytearray(header)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, kind = rng.randrange(len(data)), rng.random()
        if kind < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.75:
            data[at] = rng.choice((0, 1, 8, 9, 127, 128, 255))
        else:
            data[at : at + 8] = rng.choice((*EXTREMES, rng.randbytes(8)))[: len(data) - at]
    return data


def fuzz(model: Path, file: Path, seed: int, n: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    header = file.read_bytes()[: min(tensor.offset for tensor in read_header(file).tensors)]
    size = file.stat().st_size
    with open(file, "r+b", buffering=0) as stream:
        for i in range(n):
            print(file.name, seed, i, file=sys.stderr)
            rng = random.Random(f"{seed} {i}")
            stream.truncate(rng.randrange(size) if rng.random() < 0.1 else size)
            end = stream.seek(0, 2)
            stream.seek(0)
            stream.write(damaged(header, rng)[:end])
            stream.truncate(end)
            try:
                open_model(model, None, None).close()
                counts["opened"] += 1
            except ModelFileError as error:
                assert str(model.parent) in str(error), error
                assert str(error).isprintable(), error
                counts["refused"] += 1
        stream.truncate(size)
        stream.seek(0)
        stream.write(header)
    return counts


def main() -> None:
    model, seed, n = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    counts = fuzz(model, model, seed, n) + fuzz(model, model.with_suffix(".predictor.gguf"), seed, n)
    for key, value in counts.items():
        print(key, value)


if __name__ == "__main__":
    main()
