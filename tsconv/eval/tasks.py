"""Downstream tasks of lm-evaluation-harness (lm_eval) on a converted model, and the sets of them that papers report."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsconv.cache import cache_folder
from tsconv.errors import HubError, TsconvError
from tsconv.eval.ppl import neuron_shares
from tsconv.extras import require

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from tsconv.eval.harness import TsconvLM

# lm_eval's defaults
RANDOM_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234

OFFLINE = "without a network use local tasks and data (--include-path), or data that is in the Hub's cache"


@dataclass(frozen=True)
class Wanted:
    """A task, group or tag of lm_eval. `n_shot`: examples before each question, None for the task's own number."""

    name: str
    n_shot: int | None = None


# open-llm: the Open LLM Leaderboard's, with 8 examples for GSM8K (TurboSparse, Table 6). commonsense: Table 13.
PRESETS = {
    "open-llm": (
        Wanted("arc_challenge", 25),
        Wanted("hellaswag", 10),
        Wanted("mmlu", 5),
        Wanted("truthfulqa_mc2", 0),
        Wanted("winogrande", 5),
        Wanted("gsm8k", 8),
    ),
    "commonsense": (Wanted("piqa", 0), Wanted("sciq", 0), Wanted("arc_easy", 0), Wanted("openbookqa", 0)),
}


@dataclass(frozen=True)
class Score:
    """A metric of a task or group. `error`: its standard error, None where there is none. `n_samples`: questions."""

    task: str
    n_shot: int | None
    metric: str
    filter: str
    value: float
    error: float | None
    n_samples: int | None


@dataclass(frozen=True)
class TaskResult:
    """What a task, group or tag gave.

    Attributes:
        scores: of the group itself first.
        n_known: answers that came from an earlier run; the rest of this is about the others.
        predicted, active: mean shares of the neurons, None where nothing was computed.
        n_tokens: computed; what several texts begin with counts once.
        seconds: of computing them.
        samples: lm_eval's, of each task, where they were asked for.
    """

    name: str
    scores: tuple[Score, ...]
    n_known: int
    predicted: float | None
    active: float | None
    n_tokens: int
    seconds: float
    samples: dict[str, list[dict[str, Any]]] | None = None

    @property
    def tokens_per_s(self) -> float | None:
        return self.n_tokens / self.seconds if self.seconds else None


def task_manager(include_path: Path | None = None, names: Collection[str] = ()) -> TaskManager:
    """Knows the tasks of the YAML files in a folder and lm_eval's own, whose thousands of files take it ten seconds or
    more to read: they are left out where `names`, if there are any, are all in the folder.

    Raises:
        TsconvError: lm_eval is missing, or a file is no task.
    """
    require("lm_eval", "tsconv eval tasks")
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    try:
        local = TaskManager(include_path=str(include_path), include_defaults=False)
        if names and set(names) <= set(local.all_tasks):
            return local
        return TaskManager(include_path=str(include_path))
    except Exception as error:  # of YAML, or of what lm_eval makes of it
        raise TsconvError(f"tasks that cannot be read ({_reason(error)})", where=include_path) from None


def wanted(names: Iterable[str], manager: TaskManager, n_shot: int | None = None) -> list[Wanted]:
    """Tasks, groups, tags and PRESETS by their names. `n_shot` overrides the number of examples.

    Raises:
        TsconvError: there is none of that name; says which names are like it.
    """
    found = [w for name in names for w in PRESETS.get(name, (Wanted(name),))]
    known = set(manager.all_tasks)
    for w in found:
        if w.name not in known:
            like = difflib.get_close_matches(w.name, [*PRESETS, *known], n=5)
            raise TsconvError(
                "no such task",
                where=w.name,
                expected=f"one like {', '.join(like)}" if like else f"{', '.join(PRESETS)} or a task of lm_eval",
                fix=f"tsconv eval tasks --list shows all {len(known)}",
            )
    return [Wanted(w.name, w.n_shot if n_shot is None else n_shot) for w in found]


def answers_path(lm_options: dict[str, Any], files: Iterable[Path]) -> Path:
    """Where answers of a run are kept: another file for other options, model files or versions."""
    versions = [importlib.metadata.version(name) for name in ("tsconv", "lm_eval", "llama_cpp_python")]
    stats = [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    key = json.dumps([versions, stats, lm_options], sort_keys=True, default=str)
    return cache_folder() / "tasks" / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.db"


def run_task(
    lm: TsconvLM,
    task: Wanted,
    manager: TaskManager,
    *,
    limit: int | None = None,
    samples: bool = False,
    known: Callable[[], int] = lambda: 0,
) -> TaskResult:
    """
    Args:
        limit: only the first so many questions of each task.
        samples: return each question with the answer.
        known: the number of answers so far that an earlier run had found.

    Raises:
        HubError: the task's data cannot be had.
        TsconvError: the task cannot be computed.
        BackendError: llama.cpp cannot compute.
    """
    from lm_eval.evaluator import evaluate

    for library in ("lm_eval", "huggingface_hub", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    loaded = _load(task, manager)
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    for each in loaded["tasks"].values():
        # as lm_eval: a task that says 0 cannot have examples
        if each.get_config("num_fewshot") is None or (task.n_shot is not None and each.get_config("num_fewshot") != 0):
            each.set_config(key="num_fewshot", value=task.n_shot or 0)
        each.set_fewshot_seed(seed=FEWSHOT_SEED)
    lm.llama.reset_ffn_stats()
    n_tokens, seconds, n_known = lm.n_tokens, lm.seconds, known()
    try:
        # lm_eval divides by the lengths of answers, and prints when it estimates an error by bootstrapping.
        with np.errstate(divide="ignore", invalid="ignore"), contextlib.redirect_stdout(sys.stderr):
            results = evaluate(lm, loaded, limit=limit, log_samples=samples)
    except TsconvError as error:
        raise type(error)(f"{task.name}: {error}") from None
    except Exception as error:  # of a task's own functions
        raise TsconvError(f"the task failed ({_reason(error)})", where=task.name) from error
    assert results is not None
    computed = lm.n_tokens - n_tokens
    predicted, active = neuron_shares(lm.llama) if computed else (None, None)
    return TaskResult(
        name=task.name,
        scores=tuple(_scores(task.name, results)),
        n_known=known() - n_known,
        predicted=predicted,
        active=active,
        n_tokens=computed,
        seconds=lm.seconds - seconds,
        samples=results.get("samples"),
    )


def _load(task: Wanted, manager: TaskManager) -> dict[str, Any]:
    """lm_eval's TaskDict. Raises HubError or TsconvError."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return dict(manager.load([task.name]))
    except Exception as error:  # the Hub's, of the network below it, or of a task's YAML
        is_of_hub = isinstance(error, OSError) or "huggingface_hub" in type(error).__module__
        if is_of_hub and type(error) is not FileNotFoundError:  # which is of a local file
            what = f"the task's data cannot be had ({_reason(error)})"
            raise HubError(what, where=task.name, fix=OFFLINE) from None
        raise TsconvError(f"the task cannot be loaded ({_reason(error)})", where=task.name) from None


def _scores(name: str, results: Any) -> Iterable[Score]:
    """Those of the task or group `name` first, then of what is in it."""
    values = results["results"]
    for task in sorted(values, key=lambda key: (key != name, key)):
        for key, value in values[task].items():
            metric, _, of = key.partition(",")
            if not of or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values[task].get(f"{metric}_stderr,{of}")
            counts = results.get("n-samples", {}).get(task)
            yield Score(
                task=task,
                n_shot=results.get("n-shot", {}).get(task),
                metric=metric,
                filter=of,
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                n_samples=counts["effective"] if counts else None,
            )


def _reason(error: BaseException) -> str:
    """The first line of a message, or the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def files_of(model: Path, predictor: Path | None, sparsity: str) -> Sequence[Path]:
    """The files that a model's answers depend on."""
    from tsconv.format.pair import sidecar_path
    from tsconv.runtime.sparsity import parse_sparsity

    return [model, predictor or sidecar_path(model)] if parse_sparsity(sparsity).kind == "predictor" else [model]
