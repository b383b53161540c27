"""llama-cpp-python's OpenAI-compatible server with a converted model behind it.

`llama_cpp.server` loads its models through one class, `LlamaProxy` (llama_cpp/server/model.py). `create_app` builds the
application with a subclass in its place that hands out a model which is loaded already; nothing else is changed.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from llama_cpp.server import app as llama_app
from llama_cpp.server.model import LlamaProxy
from llama_cpp.server.settings import ModelSettings, ServerSettings
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from tsconv.errors import TsconvError
from tsconv.format.keys import as_text
from tsconv.runtime.model import SparseLlama

CONFIG_VARIABLE = "CONFIG_FILE"  # llama_cpp.server would read other models from the file it names
BACKLOG = 128
SECONDS_TO_FINISH = 3


class _OnlyArguments(BaseSettings):
    """Settings that the environment (`HOST`, `PORT`, `SEED`, `CACHE`, ...) does not change behind the user's back."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class _ModelSettings(_OnlyArguments, ModelSettings):
    pass


class _ServerSettings(_OnlyArguments, ServerSettings):
    pass


def create_app(llama: SparseLlama, api_key: str | None = None) -> FastAPI:
    """The ASGI application: /v1/chat/completions, /v1/completions, /v1/models and the rest of `llama_cpp.server`.

    It serves `llama` under its file name, whatever model a request names, one request after the other. There can be
    one application per process, because `llama_cpp.server` keeps its model in a global variable.
    """

    class LoadedModel(LlamaProxy):
        @staticmethod
        def load_llama_from_model_settings(settings: ModelSettings) -> SparseLlama:
            return llama

    name = as_text(llama.model_path)
    model = _ModelSettings(model=name, model_alias=Path(name).stem)
    # interrupt_requests would let a second client cut off the answer that a first one is reading.
    server = _ServerSettings(api_key=api_key, interrupt_requests=False)
    config_file = os.environ.pop(CONFIG_VARIABLE, None)
    llama_app.LlamaProxy = LoadedModel
    try:
        return llama_app.create_app(server_settings=server, model_settings=[model])
    finally:
        llama_app.LlamaProxy = LlamaProxy
        if config_file is not None:
            os.environ[CONFIG_VARIABLE] = config_file


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Opened before a model is loaded, it tells early that a port is busy.

    Raises:
        TsconvError: the address is not one of this machine, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise TsconvError(f"cannot listen on {host}: {error.strerror}", fix="use another --host") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise TsconvError(f"cannot listen on {host} port {port}: {error.strerror}", fix="use another --port") from None
    return listener


def serve(app: FastAPI, listener: socket.socket, verbose: bool = False) -> None:
    """Answers requests until SIGINT or SIGTERM. `verbose` logs every request on stderr."""
    log = {**uvicorn.config.LOGGING_CONFIG, "handlers": {**uvicorn.config.LOGGING_CONFIG["handlers"]}}
    log["handlers"]["access"] = {**log["handlers"]["access"], "stream": "ext://sys.stderr"}
    config = uvicorn.Config(
        app,
        log_config=log,
        log_level="info" if verbose else "warning",
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
    )
    uvicorn.Server(config).run(sockets=[listener])
