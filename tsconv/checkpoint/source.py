"""SRC on the command line: a local directory, or a repository on the Hugging Face Hub that is downloaded first.

Downloads go to the Hub's cache and are resumed from it; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
work as usual.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tsconv.errors import CheckpointError, HubError

# What a conversion reads: weights, configuration, tokenizer, and the model card for the licence.
CHECKPOINT_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "README.md")
PREDICTOR_FILES = ("model_*.pt", "config.json")

HTTP_UNAUTHORIZED = 401  # no token or a wrong one, for a repository that is private or that there is not
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `repo` and `revision` (a commit hash) are None for a local directory."""

    directory: Path
    name: str
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `is_here`: it is in the Hub's cache already."""

    name: str
    n_bytes: int
    is_here: bool


@dataclass(frozen=True)
class Listing:
    """Files of a repository at one commit, and the Hub's cache, where downloads go."""

    repo: str
    revision: str | None
    cache: Path
    files: tuple[RemoteFile, ...]


def resolve(src: str | Path, revision: str | None, files: tuple[str, ...]) -> Source:
    """Finds `src` on disk, or downloads the `files` (glob patterns) of the repository it names.

    Raises:
        CheckpointError: `src` is neither a directory nor a repository id, or a revision was asked of a directory.
        HubError: the repository does not exist, is gated, cannot be reached, or (offline) is not in the cache.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError("--revision is for repositories on the Hub, and this is a directory", where=path)
        return Source(path, path.resolve().name)
    if path.exists():
        raise CheckpointError("not a directory", where=path, fix=f"name the directory that holds {files[0]}")
    if not REPO_ID.fullmatch(str(src)) or str(src).startswith(("./", "../")):
        raise CheckpointError("no such directory", where=src, fix="or name a Hub repository as OWNER/NAME")
    return _download(str(src), revision, files)


def _download(repo: str, revision: str | None, files: tuple[str, ...]) -> Source:
    from huggingface_hub import snapshot_download

    with _errors_of_the_hub(repo if revision is None else f"{repo}@{revision}"), _bars_on_terminals_only():
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    return Source(snapshot, repo.split("/")[1], repo, snapshot.name)


def list_files(repo: str, files: tuple[str, ...]) -> Listing | None:
    """The `files` (glob patterns) of a repository on the Hub; None where the Hub does not say: `resolve` tells why, or
    finds a complete copy in the cache.

    Raises:
        HubError: the request failed.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    with _errors_of_the_hub(repo), _no_bars():
        try:
            found = snapshot_download(repo, allow_patterns=list(files), dry_run=True)
        except DryRunError:
            return None
    remote = tuple(RemoteFile(file.filename, file.file_size or 0, not file.will_download) for file in found)
    return Listing(repo, found[0].commit_hash if found else None, Path(constants.HF_HUB_CACHE), remote)


@contextmanager
def _errors_of_the_hub(named: str) -> Iterator[None]:
    """What huggingface_hub raises becomes a HubError about the repository `named`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise HubError("repository is gated", where=named, fix="accept its terms on the Hub and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        fix = "check the spelling; a private one needs HF_TOKEN"
        raise HubError("no such repository on the Hub, and no such directory here", where=named, fix=fix) from None
    except errors.RevisionNotFoundError:
        raise HubError("the repository has no such revision", where=named) from None
    except errors.LocalEntryNotFoundError as error:
        reason = "offline" if isinstance(error.__cause__, errors.OfflineModeIsEnabled) else "the Hub cannot be reached"
        fix = "go online (HF_HUB_OFFLINE=0) and run it again: it resumes; or name a directory that holds it"
        raise HubError(f"{reason}, and the cache has no complete copy", where=named, fix=fix) from None
    except errors.HFValidationError as error:
        raise HubError(f"not a repository id ({error})", where=named) from None
    except Exception as error:  # HTTP and connection errors of whichever client the library uses, a full disk
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free some, or set HF_HOME to another folder, and run it again: it resumes"
            raise HubError("download failed: no room in the Hub's cache", where=named, fix=fix) from None
        if getattr(getattr(error, "response", None), "status_code", None) == HTTP_UNAUTHORIZED:
            fix = "check the spelling; a private one needs HF_TOKEN, the right one"
            raise HubError("the Hub does not let you have this repository", where=named, fix=fix) from None
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise HubError(f"download failed ({reason})", where=named, fix="run it again: it resumes") from None


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """The library draws its progress bars into log files too."""
    if sys.stderr.isatty():
        yield
        return
    with _no_bars():
        yield


@contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
