"""The Parquet files of a dataset on the Hugging Face Hub: which ones, at which commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tsconv.errors import HubError
from tsconv.stats.text.parquet import READ_BYTES, ParquetFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# What --calib fineweb is: a random sample of 10 G tokens, at release 1.4.0 of the dataset.
FINEWEB = "HuggingFaceFW/fineweb"
FINEWEB_CONFIG = "sample-10BT"
FINEWEB_REVISION = "9bb295ddab0e05d785b879661af7260fed5140fc"

CONVERTED = "refs/convert/parquet"  # where the Hub keeps its own conversion to Parquet: CONFIG/SPLIT/NNNN.parquet
OFFLINE_WAYS = "download its Parquet files and name their folder, or use --calib builtin"
TRAIN = "train"


@dataclass(frozen=True)
class HubDataset:
    """`files` of configuration `config` ("" when it has none) of `repo`, at commit `revision`."""

    repo: str
    config: str
    revision: str
    files: list[ParquetFile]
    notes: list[str]


def find(
    repo: str, config: str | None, revision: str | None, *, split: str = TRAIN, offline: str = OFFLINE_WAYS
) -> HubDataset:
    """Asks the Hub for a split of a configuration; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as usual.

    Which files: those of the dataset card's `configs`; else the Parquet files in the folder named `config`, or all;
    else the Hub's own conversion of the dataset to Parquet. Where no file is of the training split, all are.

    Args:
        config: None for the default one.
        revision: None for the newest.
        offline: what to do without the Hub, for messages.

    Raises:
        HubError: the dataset, configuration or revision does not exist, is gated, cannot be reached, or has no Parquet.
    """
    from huggingface_hub import HfApi, HfFileSystem

    endpoint = os.environ.get("HF_ENDPOINT")  # as it is now; the library keeps the one it saw when it was imported
    api = HfApi(endpoint=endpoint)
    named = repo if revision is None else f"{repo}@{revision}"
    notes = []
    with _hub_errors(named, offline):
        info = api.dataset_info(repo, revision=revision, expand=["sha", "cardData"])
        configs = _configs(info.card_data, split)
        if configs:
            config = _chosen(named, config, [name for name, _ in configs], _default(info.card_data))
            paths = _matching(api, repo, info.sha, dict(configs)[config])
        else:
            paths = _of_split(_parquet(api, repo, info.sha, config or ""), split)
        commit = info.sha
        if not paths and revision is None:
            commit, config, paths = _converted(api, named, repo, config, split)
            notes.append(f"{repo} holds no Parquet files of its own: read the Hub's conversion of it")
    if not paths:
        of = f" of configuration {config!r}" if config else ""
        raise HubError(f"the dataset has no Parquet files{of}", where=named, fix=offline)
    fs = HfFileSystem(endpoint=endpoint, block_size=READ_BYTES, skip_instance_cache=True)
    files = [ParquetFile(fs, f"datasets/{repo}@{commit}/{path}", path, remote=True) for path in paths]
    return HubDataset(repo, config or "", commit, files, notes)


def _of_split(paths: list[str], split: str) -> list[str]:
    """The paths with the split's name in them; all of them where none is of the training split."""
    named = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
    return [path for path in paths if named.search(path)] or (paths if split == TRAIN else [])


def _configs(card: Any, split: str) -> list[tuple[str, list[str]]]:
    """(name, glob patterns of the split) of each configuration that the card's metadata lists with files."""
    configs = (card.get("configs") if card is not None else None) or []
    return [
        (str(entry["config_name"]), patterns)
        for entry in configs
        if isinstance(entry, dict) and "config_name" in entry and (patterns := _patterns(entry, split))
    ]


def _default(card: Any) -> str | None:
    return next((str(c["config_name"]) for c in card.get("configs") if isinstance(c, dict) and c.get("default")), None)


def _patterns(entry: dict[str, Any], wanted: str) -> list[str]:
    """`data_files` is a pattern, a list of patterns, or a list of {split, path: pattern or patterns}."""
    data_files = entry.get("data_files") or ([f"{entry['data_dir']}/**"] if entry.get("data_dir") else [])
    splits: dict[str, list[Any]] = {}
    for item in data_files if isinstance(data_files, list) else [data_files]:
        split, path = (item.get("split", TRAIN), item.get("path")) if isinstance(item, dict) else (TRAIN, item)
        splits.setdefault(split, []).extend(path if isinstance(path, list) else [path])
    prefix = f"{entry['data_dir']}/" if entry.get("data_dir") and entry.get("data_files") else ""
    chosen = splits.get(wanted) or (next(iter(splits.values()), []) if wanted == TRAIN else [])
    return [prefix + path.removeprefix("./") for path in chosen if isinstance(path, str)]


def _chosen(named: str, config: str | None, names: list[str], default: str | None) -> str:
    """The configuration asked for, or the default one, or the only one."""
    for candidate in [config] if config is not None else [default, "default", *(names if len(names) == 1 else [])]:
        if candidate in names:
            return candidate
    some = ", ".join(sorted(names)[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    if config is None:
        what = "the dataset has several configurations"
        raise HubError(what, where=named, found=some, fix="choose one as OWNER/NAME:CONFIG")
    raise HubError("the dataset has no such configuration", where=named, expected=some, found=config)


def _parquet(api: HfApi, repo: str, revision: str, folder: str) -> list[str]:
    """Paths of the Parquet files below `folder`, sorted."""
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=revision, repo_type="dataset")
    try:
        return sorted(file.path for file in tree if isinstance(file, RepoFile) and file.path.endswith(".parquet"))
    except EntryNotFoundError:
        return []


def _matching(api: HfApi, repo: str, revision: str, patterns: Iterable[str]) -> list[str]:
    """Paths of the Parquet files that match one of the glob patterns, sorted."""
    from fsspec.utils import glob_translate

    found = set()
    for pattern in patterns:
        parents = pattern.split("/")[:-1]
        fixed = next((i for i, part in enumerate(parents) if re.search(r"[*?\[]", part)), len(parents))
        wanted = re.compile(glob_translate(pattern))
        found |= {path for path in _parquet(api, repo, revision, "/".join(parents[:fixed])) if wanted.match(path)}
    return sorted(found)


def _converted(api: HfApi, named: str, repo: str, config: str | None, split: str) -> tuple[str, str | None, list[str]]:
    """(commit, configuration, paths) of the Hub's own conversion; no paths when there is none."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        commit = api.dataset_info(repo, revision=CONVERTED, expand=["sha"]).sha
    except RevisionNotFoundError:
        return "", config, []
    paths = [path for path in _parquet(api, repo, commit, "") if path.count("/") == 2]
    if not paths:
        return "", config, []
    config = _chosen(named, config, sorted({path.split("/")[0] for path in paths}), None)
    return commit, config, _of_split([path for path in paths if path.startswith(f"{config}/")], split)


@contextmanager
def _hub_errors(named: str, offline: str) -> Iterator[None]:
    """What the library raises, as HubErrors."""
    from huggingface_hub import errors

    try:
        yield
    except HubError:
        raise
    except errors.GatedRepoError:
        raise HubError("dataset is gated", where=named, fix="accept its terms on the Hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        fix = "check the spelling; a private one needs HF_TOKEN"
        raise HubError("no such dataset on the Hub, and no such file or folder here", where=named, fix=fix) from None
    except errors.RevisionNotFoundError:
        raise HubError("the dataset has no such revision", where=named) from None
    except errors.OfflineModeIsEnabled:
        raise HubError("offline (HF_HUB_OFFLINE)", where=named, fix=offline) from None
    except errors.HFValidationError as error:
        raise HubError(f"not a dataset id ({error})", where=named) from None
    except Exception as error:  # HTTP and connection errors of whichever client the library uses
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise HubError(f"asking the Hub failed ({reason})", where=named, fix=offline) from None
