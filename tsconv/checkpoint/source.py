"""SRC on the command line: a local directory, or a repository on the Hugging Face Hub that is downloaded first.

Downloads go to the Hub's cache and are resumed from it; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
work as usual.
"""

from __future__ import annotations

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

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk. `repo` and `revision` (a commit hash) are None for a local directory."""

    directory: Path
    name: str
    repo: str | None = None
    revision: str | None = None


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
    from huggingface_hub import errors, snapshot_download

    named = repo if revision is None else f"{repo}@{revision}"
    try:
        with _bars_on_terminals_only():
            snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
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
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise HubError(f"download failed ({reason})", where=named, fix="run it again: it resumes") from None
    return Source(snapshot, repo.split("/")[1], repo, snapshot.name)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """The library draws its progress bars into log files too."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
