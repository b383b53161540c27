"""`tsconv serve`: llama.cpp's server with a converted model."""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Any

import click

from tsconv.cli.machine import choose_for_machine, machine_options, say_budget, say_cost
from tsconv.cli.models import ModelName, model_name
from tsconv.cli.options import gpu_options, model_options
from tsconv.cli.output import say

OTHERS = "tsconv.others"  # key of a context's `meta`: the options for llama-server
QUIET = ("--log-verbosity", "1")  # errors only; llama-server's own default logs every request


class WithOthers(click.Command):
    """What comes after -- is not parsed here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        ctx.meta[OTHERS] = tuple(args[end + 1 :])
        return super().parse_args(ctx, args[:end])


@click.command("serve", cls=WithOthers, options_metavar="[OPTIONS]")
@click.pass_context
@model_name
@model_options
@machine_options
@gpu_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Addresses to listen on, A or A,B.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free port.")
@click.option("--api-key", envvar="TSCONV_API_KEY", help="Key that clients must send.  [env: TSCONV_API_KEY]")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    help="Requests that are computed at once; they share the context.  [default: 4]",
)
@click.option("--lora", metavar="FILE", help="LoRA adapter for the model, in GGUF.")
def command(
    ctx: click.Context,
    *,
    model: ModelName,
    n_ctx: int,
    n_threads: int | None,
    sparsity: str | None,
    predictor_path: str | None,
    verbose: bool,
    ram_budget: str,
    machine: str | None,
    placement: str | None,
    host: str,
    port: int,
    api_key: str | None,
    parallel: int | None,
    lora: str | None,
    **gpu: Any,
) -> None:
    """Serve a web page and the OpenAI API over HTTP until Ctrl-C.

    MODEL is a file, a name that tsconv list shows, or OWNER/NAME[:TYPE]: a repository on the Hugging Face Hub.

    This runs llama.cpp's llama-server. What comes after -- is passed on to it:
    tsconv serve NAME.gguf -- --metrics --embeddings
    """
    from tsconv.commands.serve import Serving, prepare
    from tsconv.runtime.offload import Wanted
    from tsconv.runtime.server import check_address, serve

    hosts = [name.strip() for name in host.split(",")]
    for name in hosts:
        port = check_address(name, port)
    if api_key is None and not all(map(_is_loopback, hosts)):
        say(f"warning: everyone who can reach {host} can use this server; --api-key asks for a key")
    path = str(model.find())
    say_cost(sparsity)
    choice = choose_for_machine(path, machine, placement, n_ctx, n_threads, sparsity, predictor_path, ram_budget)
    serving = Serving(
        path,
        predictor_path,
        sparsity,
        lora,
        n_ctx,
        n_threads,
        choice=choice,
        ram_budget=ram_budget,
        say=say_budget,
        on_gpus=Wanted(**gpu),
    )
    options = ["--host", host, "--port", str(port), *([] if verbose else QUIET)]
    if parallel is not None:
        options += ["--parallel", str(parallel)]
    url = f"http://{f'[{hosts[0]}]' if ':' in hosts[0] else hosts[0]}:{port}"
    command = prepare(serving, [*options, *ctx.meta[OTHERS]], api_key)
    begin = "\n" if verbose else ""  # llama-server may be in the middle of a line of its log
    sys.exit(serve(command, url, lambda: say(f"{begin}serving {path} on {url}/v1 (Ctrl-C stops)")))


def _is_loopback(host: str) -> bool:
    """Of a host that `check_address` has found."""
    address = socket.getaddrinfo(host, None)[0][4][0]
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback
