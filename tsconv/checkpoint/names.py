"""Names of tensors as the model's own code has them, without what wrappers that were saved with it put before them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tsconv.errors import CheckpointError

# torch.nn.DataParallel and DistributedDataParallel, torch.compile, FSDP, activation checkpointing, PEFT.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.")
LORA = (".lora_", ".base_layer.")  # parts of names in a model whose adapter was not merged into it
SAVE_PLAIN = "save the model itself, not its wrapper, with save_pretrained()"
MERGE = "merge the adapter into its base model (PEFT: merge_and_unload(), then save_pretrained()) and convert that"


def plain_names(names: Iterable[str], where: Path) -> dict[str, str]:
    """Stored name -> the same without the wrappers' prefixes, which all names must share.

    Raises:
        CheckpointError: only some names have the prefix, a wrapper is inside the model, or an adapter is not merged.
    """
    plain = {name: name for name in names}
    while prefix := _wrapper(plain.values()):
        without = [name for name in plain.values() if not name.startswith(prefix)]
        if without:
            with_it = next(name for name in plain.values() if name.startswith(prefix))
            raise CheckpointError(
                f"some tensors' names begin with {prefix!r} and others do not: {with_it}, {without[0]}",
                where=where,
                fix=SAVE_PLAIN,
            )
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    for name, short in plain.items():
        if any(part in short for part in LORA):
            raise CheckpointError(f"{name} is of an adapter that is not merged", where=where, fix=MERGE)
        if wrapper := next((w for w in WRAPPERS[:-1] if f".{w}" in short), None):
            raise CheckpointError(f"a part of the model is wrapped ({wrapper!r}): {name}", where=where, fix=SAVE_PLAIN)
    return plain


def _wrapper(names: Iterable[str]) -> str | None:
    """A wrapper's prefix that at least one name has. A training class that calls the model `model` is a wrapper too."""
    names = list(names)
    for prefix in WRAPPERS:
        if any(name.startswith(prefix) for name in names):
            return prefix
    return "model." if any(name.startswith("model.model.") for name in names) else None


def refuse_adapter_folder(directory: Path) -> None:
    """Raises CheckpointError for a folder with a PEFT adapter, which transformers would apply to its base model."""
    path = directory / "adapter_config.json"
    if path.exists():
        beside = (directory / "config.json").exists()
        what = "an adapter (PEFT) beside config.json" if beside else "the folder holds an adapter (PEFT), not a model"
        fix = f"{MERGE}; or move the adapter's files away to convert the model without it" if beside else MERGE
        raise CheckpointError(what, where=path, fix=fix)
