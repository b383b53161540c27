"""From a name to a model that can be loaded: a file, a kept model, or a repository on the Hub, whose converted model is
downloaded, or whose checkpoint is downloaded and converted, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, LlamaFileType

from tsconv.checkpoint.source import CHECKPOINT_FILES, Listing, list_files, resolve
from tsconv.commands.convert import convert, read_known_config
from tsconv.commands.kept import DEFAULT_TYPE, Name, alone, find, link, model_path, parse_name
from tsconv.errors import CheckpointError, HubError, ModelFileError, OutputError
from tsconv.format.mixes import MIXES, parse_outtype
from tsconv.format.pair import SIDECAR_SUFFIX, open_pair
from tsconv.progress import Progress
from tsconv.transform.quantize import TYPES

CHECKPOINT_BYTES = 2  # per weight: the families' checkpoints are in bf16 or f16
MODEL_FILES = "*.gguf"


@dataclass(frozen=True)
class Reporter:
    """How the user hears of it.

    Attributes:
        say: prints a line.
        size: bytes as text.
        bar: shows the progress of what it names.
    """

    say: Callable[[str], None]
    size: Callable[[float], str]
    bar: Callable[[str], AbstractContextManager[Progress | None]]


def find_model(text: str, reporter: Reporter) -> Path:
    """The model file that `text` names: a file, [OWNER/]REPO[:TYPE] of a kept model, or OWNER/REPO[:TYPE] on the Hub.

    A file that there is goes before a name. What is kept is found without any request.

    Raises:
        ModelFileError: there is no such file, and no kept model of this name.
        HubError, CheckpointError, OutputError: see `fetch`.
    """
    if os.path.isdir(text) and not text.endswith(".gguf"):
        raise ModelFileError("is a folder", where=text, fix=f"name a .gguf file; tsconv convert {text} makes one")
    if os.path.lexists(text):
        return Path(text)
    name = parse_name(text)
    if name is None:
        return Path(text)  # whoever reads it says that it is missing
    kept = find(name)
    if kept is not None:
        return kept.path
    if name.repository is None:
        fix = "tsconv list shows the names; a repository on the Hub is OWNER/NAME"
        raise ModelFileError("no such file, and no kept model of this name", where=text, fix=fix)
    return fetch(name, reporter)


def find_repository(text: str, reporter: Reporter) -> Path:
    """As `find_model`, of OWNER/REPO[:TYPE] only, whatever files there are."""
    name = parse_name(text)
    if name is None or name.repository is None:
        raise HubError("not a repository on the Hub", where=text, expected="OWNER/NAME or OWNER/NAME:TYPE")
    kept = find(name)
    return kept.path if kept is not None else fetch(name, reporter)


def fetch(name: Name, reporter: Reporter) -> Path:
    """Makes a kept model of a repository on the Hub: of its converted model, if it has one of that type, or else of its
    checkpoint.

    Where another process does the same, this waits for it and takes what it made.

    Raises:
        HubError: the repository does not exist, is private or gated, cannot be reached, or a download was cut.
        CheckpointError: it is not a checkpoint that tsconv converts, or damaged.
        ModelFileError: its converted model is damaged.
        OutputError: there is not enough room.
        TsconvError: the type is unknown.
    """
    repo = name.repository
    assert repo is not None
    kind = parse_outtype(name.type).name if name.type is not None else None
    path = model_path(repo, kind or DEFAULT_TYPE)

    def waiting() -> None:
        reporter.say(f"another process prepares {repo}; waiting for it")

    with alone(path, waiting):
        kept = find(name)
        if kept is not None:
            return kept.path
        listing = list_files(repo, (*CHECKPOINT_FILES, MODEL_FILES))
        model = None if listing is None else _converted_model(listing, kind)
        if listing is not None and model is not None:
            return _download(listing, model, kind, reporter)
        _convert(repo, listing, kind or DEFAULT_TYPE, path, reporter)
    return path


# ---- a converted model


def _converted_model(listing: Listing, kind: str | None) -> str | None:
    """The file name of the model in a pair NAME.gguf, NAME.predictor.gguf: of the type that is asked for, else of
    DEFAULT_TYPE, else the only one. None when there is no such pair.

    Raises:
        HubError: several pairs, and nothing tells which.
    """
    names = {file.name for file in listing.files}
    models = [n for n in sorted(names, key=lambda n: (len(n), n)) if n.removesuffix(".gguf") + SIDECAR_SUFFIX in names]
    models = [n for n in models if n.endswith(".gguf")]
    typed = [n for n in models if _type_in(n) == (kind or DEFAULT_TYPE)]
    if typed or kind is not None:
        return typed[0] if typed else None
    if len(models) > 1 and "config.json" not in names:
        types = ", ".join(f"{listing.repo}:{found}" for found in map(_type_in, models) if found)
        fix = f"name one of {types}" if types else "download one, and name the file"
        raise HubError(f"the repository has {len(models)} converted models", where=listing.repo, fix=fix)
    return models[0] if len(models) == 1 else None


def _type_in(name: str) -> str | None:
    """The type that a file's name has as a part: NAME-q4_0.gguf."""
    parts = name.lower().rsplit("/", 1)[-1].replace(".", "-").split("-")
    return next((known for known in (*TYPES, *MIXES) if known.lower() in parts), None)


def _download(listing: Listing, model: str, kind: str | None, reporter: Reporter) -> Path:
    files = (model, model.removesuffix(".gguf") + SIDECAR_SUFFIX)
    missing = _missing_bytes(listing, files)
    reporter.say(f"{listing.repo}: {model} and its predictors, {reporter.size(missing)} to download to {listing.cache}")
    _check_room(listing.repo, {listing.cache: missing})
    source = resolve(listing.repo, listing.revision, files)
    pair = open_pair(source.directory / model)
    found = kind or _type_in(model) or _type_of_file(pair.model.keys.get("general.file_type"))
    path = model_path(listing.repo, found)
    link(path, source.directory / model)
    return path


def _type_of_file(file_type: object) -> str:
    """'q8_0' of LlamaFileType.MOSTLY_Q8_0; 'other' of what is none."""
    try:
        name = LlamaFileType(file_type).name
    except ValueError:
        return "other"
    return name.removeprefix("ALL_").removeprefix("MOSTLY_").lower().removesuffix("_s").removesuffix("_m")


# ---- a checkpoint


def _convert(repo: str, listing: Listing | None, kind: str, path: Path, reporter: Reporter) -> None:
    """Converts the checkpoint of a repository to `path`; `listing` None: what the Hub's cache has of it."""
    if listing is None:
        source = resolve(repo, None, CHECKPOINT_FILES)
        reporter.say(f"{repo}: converting it to {kind} in {path.parent}, once")
    else:
        _plan(listing, kind, path, reporter)
        source = resolve(repo, listing.revision, CHECKPOINT_FILES)
    with reporter.bar("converting") as progress:
        # What there is by this name is no pair, or `find` would have found it.
        result = convert(repo, path, kind, revision=source.revision, force=True, progress=progress)
    reporter.say(
        f"kept as {repo}:{kind}, {reporter.size(result.model_bytes + result.sidecar_bytes)}; "
        f"the checkpoint stays in {source.directory}: hf cache rm model/{repo} frees its room"
    )


def _plan(listing: Listing, kind: str, path: Path, reporter: Reporter) -> None:
    """Says what will be downloaded and made, once it is known to be a checkpoint for which there is room.

    Raises:
        CheckpointError: no checkpoint, or of another family.
        OutputError: not enough room.
    """
    weights = [file for file in listing.files if file.name.endswith(".safetensors")]
    if not weights or not any(file.name == "config.json" for file in listing.files):
        raise CheckpointError(
            "the repository has neither a converted model of this type nor a checkpoint",
            where=f"{listing.repo}:{kind}",
            expected="NAME.gguf with NAME.predictor.gguf, or config.json with *.safetensors",
        )
    read_known_config(resolve(listing.repo, listing.revision, ("config.json",)).directory)  # before gigabytes come
    wanted = [file.name for file in listing.files if not file.name.endswith(".gguf")]
    missing = _missing_bytes(listing, wanted)
    block, block_bytes = GGML_QUANT_SIZES[parse_outtype(kind).kind]
    made = sum(file.n_bytes for file in weights) // CHECKPOINT_BYTES * block_bytes // block
    size = reporter.size
    reporter.say(
        f"{listing.repo}: {size(missing)} to download to {listing.cache}, then to be converted to {kind}, "
        f"about {size(made)} in {path.parent}; once"
    )
    _check_room(f"{listing.repo}:{kind}", {listing.cache: missing, path.parent: made})


def _missing_bytes(listing: Listing, names: list[str] | tuple[str, ...]) -> int:
    """Of those files that are not here yet."""
    return sum(file.n_bytes for file in listing.files if file.name in names and not file.is_here)


def _check_room(what: str, needed: dict[Path, int]) -> None:
    """Raises OutputError when the file systems of the folders have less room than is needed in all of these."""
    of_device: dict[int, list[Path]] = {}
    for folder in needed:
        of_device.setdefault(os.stat(_existing(folder)).st_dev, []).append(folder)
    for folders in of_device.values():
        wanted, free = sum(needed[folder] for folder in folders), shutil.disk_usage(_existing(folders[0])).free
        if wanted > free:
            raise OutputError(
                f"not enough room for {what}",
                where=" and ".join(map(str, folders)),
                expected=f"about {wanted:,} bytes free",
                found=f"{free:,}",
                fix="free some, or choose other folders with HF_HOME (downloads) and XDG_CACHE_HOME (models)",
            )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
