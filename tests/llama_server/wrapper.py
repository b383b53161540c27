"""`llama-server OPTIONS` as `tsconv serve`: options that tsconv has go to it, the others after `--`."""

from __future__ import annotations

import os
import sys

# Each of them has a value.
OF_SERVE = ("--model", "--ctx-size", "--threads", "--host", "--port", "--parallel", "--api-key", "--lora")


def translate(arguments: list[str]) -> list[str]:
    """The arguments of tsconv."""
    own, others = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in OF_SERVE:
            own += [argument, next(rest)]
        else:
            others.append(argument)
    return ["serve", *own, "--", *others]


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "tsconv", *translate(sys.argv[1:])])
