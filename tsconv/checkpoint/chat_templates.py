"""Chat templates of a checkpoint folder. Each must parse: llama_cpp.Llama parses all of a file's when it loads one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tsconv.checkpoint.lfs import refuse_pointer
from tsconv.errors import CheckpointError

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # NAME.jinja each
NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9]")  # gguf-py writes tokenizer.chat_template.NAME with _ in their place


def read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Jinja sources by name. As in transformers those of tokenizer_config.json count only where there are no files.

    Args:
        config: the content of tokenizer_config.json.

    Raises:
        CheckpointError: a template cannot be read or does not parse, or two names make one key of a GGUF file.
    """
    templates = {name: (path, _text(path)) for name, path in _files(directory).items()}
    templates = templates or {name: (directory / CONFIG_FILE, text) for name, text in _in_config(directory, config)}
    keys: dict[str, str] = {}
    for name, (where, template) in templates.items():
        if any("\ud800" <= character <= "\udfff" for character in name + template):
            raise CheckpointError(f"chat template {name!r} is not valid Unicode", where=where)
        other = keys.setdefault(NOT_IN_KEYS.sub("_", name), name)
        if other != name:
            raise CheckpointError(f"chat templates {other!r} and {name!r} would have one key", where=where)
        _parse(name, template, where)
    return {name: template for name, (_, template) in templates.items()}


def _files(directory: Path) -> dict[str, Path]:
    named = {path.stem: path for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
    default = directory / TEMPLATE_FILE
    return named | ({"default": default} if default.exists() else {})


def _text(path: Path) -> str:
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the chat template cannot be read ({error})", where=path) from None


def _in_config(directory: Path, config: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, source) of the templates in tokenizer_config.json."""
    value = config.get("chat_template")
    if value is None:
        return []
    if isinstance(value, str):
        return [("default", value)]
    if not isinstance(value, list):
        raise CheckpointError("chat_template is damaged", where=directory / CONFIG_FILE, expected="a text or a list")
    try:
        return [(str(entry["name"]), str(entry["template"])) for entry in value]
    except (TypeError, KeyError):
        raise CheckpointError(
            "chat_template is damaged", where=directory / CONFIG_FILE, expected="name and template for each entry"
        ) from None


def _parse(name: str, template: str, where: Path) -> None:
    """Raises CheckpointError for a template that llama_cpp, and so transformers, cannot compile."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    try:
        Jinja2ChatFormatter(template, eos_token="", bos_token="")
    except Exception as error:  # jinja2.TemplateError; SyntaxError and others of the Python code that it makes
        line = getattr(error, "lineno", None)
        raise CheckpointError(
            f"chat template {name!r} does not parse ({error})" + (f", line {line}" if line else ""),
            where=where,
            fix="correct it, or remove it to convert without",
        ) from None
