"""Chat templates of a checkpoint folder. Each must parse: llama_cpp.Llama parses all of a file's when it loads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tsconv.checkpoint.lfs import refuse_pointer
from tsconv.errors import CheckpointError

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"


def read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Jinja sources by name. chat_template.jinja replaces the default one of tokenizer_config.json.

    Args:
        config: the content of tokenizer_config.json.

    Raises:
        CheckpointError: a template cannot be read, or does not parse.
    """
    value = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        try:
            templates = {str(entry["name"]): str(entry["template"]) for entry in value}
        except (TypeError, KeyError):
            raise CheckpointError(
                "chat_template is damaged", where=directory / CONFIG_FILE, expected="name and template for each entry"
            ) from None
    elif value is not None:
        raise CheckpointError("chat_template is damaged", where=directory / CONFIG_FILE, expected="a text or a list")
    path = directory / TEMPLATE_FILE
    if path.exists():
        refuse_pointer(path)
        try:
            templates["default"] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the chat template cannot be read ({error})", where=path) from None
    for name, template in templates.items():
        where = path if name == "default" and path.exists() else directory / CONFIG_FILE
        if any("\ud800" <= character <= "\udfff" for character in name + template):
            raise CheckpointError(f"chat template {name!r} is not valid Unicode", where=where)
        _parse(name, template, where)
    return templates


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
