"""`tsconv serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import ipaddress
from typing import Any

import click

from tsconv.cli.machine import load_model, machine_options
from tsconv.cli.options import model_options
from tsconv.cli.output import say


@click.command("serve")
@model_options
@machine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free port.")
@click.option("--api-key", envvar="TSCONV_API_KEY", help="Key that clients must send.  [env: TSCONV_API_KEY]")
def command(
    *,
    verbose: bool,
    host: str,
    port: int,
    api_key: str | None,
    **loading: Any,
) -> None:
    """Serve /v1/chat/completions, /v1/completions and /v1/models over HTTP until Ctrl-C."""
    from tsconv.runtime.server import create_app, listen, serve

    with listen(host, port) as listener:
        address, bound_port = listener.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback and api_key is None:
            say(f"warning: everyone who can reach {host} can use this server; --api-key asks for a key")
        llama, _ = load_model(verbose=verbose, **loading)
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {llama.model_path} on http://{shown}:{bound_port}/v1 (Ctrl-C stops)")
        try:
            serve(create_app(llama, api_key), listener, verbose)
        except KeyboardInterrupt:
            pass
        finally:
            llama.close()
