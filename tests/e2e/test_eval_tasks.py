"""`tsconv eval tasks` beside lm_eval's own model "hf", which computes the same checkpoint with PyTorch in float32."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'tsconv[eval]'")
pytest.importorskip("transformers", reason="needs transformers and accelerate")

import datasets
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

import tsconv
from support import CHECKPOINTS, tiny
from support.harness import hf_model
from tsconv.errors import OutputError, TsconvError
from tsconv.eval.answers import Answers
from tsconv.eval.harness import TsconvLM
from tsconv.eval.tasks import Score, Wanted, files_of, run_task, task_manager, wanted

MISTRAL, MIXTRAL = "tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"
TEXT = (CHECKPOINTS / "heldout.txt").read_text()
VERSES = [line for line in TEXT.splitlines() if 60 < len(line) < 200][:60]
MULTI_BYTE = " é中🐋"

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "num_fewshot": 2,
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "letters": {  # answers of one token
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
    "last": {  # the error of a perplexity is found by bootstrapping
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": [",", " of the L"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def words(verse: str, first: int, end: int) -> str:
    return " ".join(verse.split()[first:end])


def documents(name: str, n: int) -> list[dict[str, Any]]:
    generator = random.Random(name)
    if name == "rolling":
        return [{"page": "\n".join(VERSES[6 * i : 6 * i + 1 + 2 * i]) + MULTI_BYTE} for i in range(5)]
    if name == "generate":
        return [{"q": words(v, 0, 8), "a": words(v, 8, 10)} for v in VERSES[:n]]
    found = []
    for i in range(n):
        verse = VERSES[i % len(VERSES)]
        choices = [
            words(verse, 8, 12),
            *(words(v, 8, 8 + generator.randint(1, 6)) for v in generator.sample(VERSES, 3)),
        ]
        choices = [choice or "and" for choice in choices]
        generator.shuffle(choices)
        question = words(verse, 0, 8) + (MULTI_BYTE if i % 3 == 0 else "")
        found.append({"q": question, "choices": choices, "gold": generator.randrange(4)})
    return found


def write_task(folder: Path, name: str, n: int = 10, **keys: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents(name, n)))
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | where | TASKS[name] | keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        write_task(folder, name)
    return folder


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory) -> Iterator[None]:
    """No network, caches in folders of the tests, one thread for PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manager(folder) -> Any:
    return task_manager(folder, TASKS)


@pytest.fixture(scope="module")
def llama() -> Iterator[tsconv.SparseLlama]:
    model = load(MISTRAL)
    yield model
    model.close()


def load(name: str, **options: Any) -> tsconv.SparseLlama:
    """With keys and values in f32, as PyTorch has them."""
    f32 = llama_cpp.GGML_TYPE_F32
    return tsconv.load(tiny.converted(name), n_threads=2, type_k=f32, type_v=f32, **options)


def resps(sample: dict[str, Any]) -> list[Any]:
    """Of each request of a sample: (log likelihood, is greedy), log likelihood, or text."""
    return [tuple(r[0]) if isinstance(r[0], list | tuple) else r[0] for r in sample["resps"]]


def assert_same(found: Any, expected: Any) -> None:
    """Texts and flags equal, log likelihoods to 1e-4 of their size."""
    if isinstance(expected, tuple):
        assert found[1] == expected[1]
        found, expected = found[0], expected[0]
    assert found == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-4, abs=1e-4))


# ---- as lm_eval --model hf


@pytest.mark.parametrize(
    ("name", "sparsity", "n_ctx"),
    [(MISTRAL, "predictor", 512), (MISTRAL, "exact", 64), (MIXTRAL, "predictor", 96)],
)
def test_as_pytorch(name, sparsity, n_ctx, manager):
    """Accuracies, perplexities, and every answer; a small context cuts questions, texts and prompts."""
    theirs = simple_evaluate(
        model=hf_model(CHECKPOINTS / name, sparsity, n_ctx), tasks=[*TASKS], task_manager=manager, bootstrap_iters=0
    )
    model = load(name, sparsity=sparsity)
    lm = TsconvLM(model, n_ctx=n_ctx)
    for task in TASKS:
        result = run_task(lm, Wanted(task), manager, samples=True)
        expected = theirs["samples"][task]
        assert len(result.samples[task]) == len(expected) >= 5
        for a, b in zip(result.samples[task], expected, strict=True):
            assert a["arguments"] == b["arguments"]
            for x, y in zip(resps(a), resps(b), strict=True):
                assert_same(x, y)
        for score in result.scores:
            want = theirs["results"][task][f"{score.metric},{score.filter}"]
            assert score.value == pytest.approx(want, rel=1e-4), (task, score.metric)
            assert score.task == task and score.n_samples == len(expected)
        assert {s.metric for s in result.scores} == {m["metric"] for m in TASKS[task]["metric_list"]}
        assert 0.05 < result.active <= result.predicted <= 1 and result.tokens_per_s > 0 and result.n_known == 0
    texts = [resps(sample)[0] for sample in result.samples["generate"]]
    assert any(text and "," not in text for text in texts) and all("," not in text for text in texts)
    lm.close()
    model.close()


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


PAIRS = [
    ("", "And it came to pass"),
    ("", MULTI_BYTE),
    ("And it came", " to pass"),
    ("And it came ", "to pass"),  # the blank goes to the continuation
    ("And it came  ", ""),  # which then is all of it
    ("   ", "And"),
    ("<s>And it came", " to pass"),  # the begin-of-text token by its name: it is not put there twice
    ("And it<|im_end|>\n", "<|im_start|>came"),
    ("Ωmega é", "中🐋" * 5),
    ("And it came to pass", " " + " ".join(TEXT.split()[:12])),
    ("\n".join(VERSES[:9]), " And"),
    ("In the beginning", " God"),
    ("In the beginning", " God"),
]


@pytest.fixture(scope="module")
def hf() -> HFLM:
    return hf_model(CHECKPOINTS / MISTRAL, "predictor", 64, logits_cache=False)


def test_texts_of_all_kinds(hf, llama):
    lm = TsconvLM(llama, n_ctx=64)
    expected = hf.loglikelihood(requests("loglikelihood", [p for p in PAIRS if p[1]]))
    found = lm.loglikelihood(requests("loglikelihood", [p for p in PAIRS if p[1]]))
    for x, y in zip(found, expected, strict=True):
        assert_same(x, y)
    for text in (*(text for pair in PAIRS for text in pair), TEXT[:600]):
        assert lm.tok_encode(text) == hf.tok_encode(text), text
    lm.close()


def test_empty_continuations(llama):
    """lm_eval's own models fail for them: nothing is to be predicted, with probability 1."""
    lm = TsconvLM(llama, n_ctx=64)
    pairs = [("And", ""), ("And it", " came"), ("", ""), ("And it ", ""), ("a", "b")]
    assert lm.tok_encode("ab")[2:] == []  # the last one has no token of its own either
    found = scores(lm, pairs)
    assert found[0] == found[2] == found[3] == found[4] == (0.0, True)
    assert found[1][0] < -0.01
    lm.close()


@pytest.mark.parametrize("until", ["the", "e", "\n", ["XXX"], [" L", "nd"], [], ["the LORD", "t"]])
def test_stop_sequences(until, hf, llama):
    lm = TsconvLM(llama, n_ctx=64)
    arguments = [(words(v, 0, n), {"until": until, "max_gen_toks": 12}) for v in VERSES[:3] for n in (3, 30)]
    assert lm.generate_until(requests("generate_until", arguments)) == hf.generate_until(
        requests("generate_until", arguments)
    )
    lm.close()


# ---- computed together, and once


def scores(lm: TsconvLM, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests("loglikelihood", pairs))


def test_what_is_common_is_computed_once(llama):
    """The question of several answers, the examples before several questions, also from one batch to the next."""
    lm = TsconvLM(llama, n_ctx=512, n_batch=512, n_seq=3)
    examples = "\n".join(VERSES[:4])
    questions = [f"{examples}\n{words(v, 0, 6)}" for v in VERSES[10:16]]
    pairs = [(q, f" {answer}") for q in questions for answer in ("and", "the LORD", "of them", "the land")]
    sequences = [(lm.tok_encode(q + a))[:-1] for q, a in pairs]
    beginnings = {tuple(s[: k + 1]) for s in sequences for k in range(len(s))}
    found = scores(lm, pairs)
    # The node whose logits are wanted is computed again where it ends what was kept.
    assert len(beginnings) <= lm.n_tokens <= len(beginnings) + len(pairs) < sum(map(len, sequences)) / 8
    alone = TsconvLM(llama, n_ctx=512, n_seq=1)
    for x, pair in zip(found, pairs, strict=True):
        assert_same(x, scores(alone, [pair])[0])
    assert alone.n_tokens <= sum(map(len, sequences))
    alone.close()
    lm.close()


@pytest.mark.parametrize(("n_batch", "n_seq"), [(1, 1), (7, 3), (64, 255), (2048, 2)])
def test_how_texts_are_computed_together_does_not_matter(n_batch, n_seq, llama):
    generator = random.Random(1)
    lengths = [(generator.randint(1, 20), generator.randint(1, 6)) for _ in range(12)]
    pairs = [(words(v, 0, n), " " + words(v, n, n + m)) for v, (n, m) in zip(VERSES, lengths, strict=False)]
    pairs += [(pairs[0][0], f" {word}") for word in ("a", "the", "and the")] + pairs[:2]
    prompts = [(v, {"until": ["."], "max_gen_toks": 9}) for v, _ in pairs]
    lm, one = TsconvLM(llama, n_ctx=128, n_batch=n_batch, n_seq=n_seq), TsconvLM(llama, n_ctx=128)
    for _ in range(2):  # the second time begins with what was kept of the first
        for x, y in zip(scores(lm, pairs), scores(one, pairs), strict=True):
            assert_same(x, y)
        texts = lm.generate_until(requests("generate_until", prompts))
        assert texts == one.generate_until(requests("generate_until", prompts))
    lm.close()
    one.close()


# ---- inside lm_eval, and on the command line


def test_registered(folder, manager):
    """lm_eval finds the model by its name, and makes it of arguments."""
    arguments = {"model": str(tiny.converted()), "n_ctx": 256, "n_threads": 1}
    found = simple_evaluate(
        model="tsconv", model_args=arguments, tasks=["choice"], task_manager=manager, batch_size=1, device="cpu"
    )
    lm = TsconvLM(tiny.converted(), n_ctx=256, n_threads=1)
    expected = run_task(lm, Wanted("choice"), manager)
    lm.close()
    assert found["results"]["choice"]["acc,none"] == next(s.value for s in expected.scores if s.metric == "acc")
    assert found["n-shot"] == {"choice": 2}


def command(folder: Path, model: Path, *arguments: object) -> list[str]:
    """A context so small, one text at a time, that answers come one by one."""
    return list(map(str, ("eval", "tasks", "-m", model, "--include-path", folder, "-t", 1, "-c", 128, *arguments)))


def test_on_the_command_line(folder, manager, llama):
    """The table has what --json has, and that is what Python has; examples and a limit are taken."""
    done = tiny.run(*command(folder, tiny.converted(), "choice,last", "generate", "--limit", 5, "--num-fewshot", 1))
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.decode().splitlines()
    assert head.split() == ["task", "shots", "metric", "filter", "value", "active", "tokens/s"]
    assert [line.split()[0] for line in lines] == ["choice", "choice", "last", "last", "generate"]
    assert done.stderr.decode().splitlines()[0] == "every text begins with <s> (token 1)"
    values = tiny.run(*command(folder, tiny.converted(), "choice", "--limit", 5, "--num-fewshot", 1, "--json"))
    (task,) = json.loads(values.stdout)["tasks"]
    lm = TsconvLM(llama, n_ctx=128)
    expected = run_task(lm, Wanted("choice", 1), manager, limit=5)
    lm.close()
    assert [Score(**score) for score in task["scores"]] == list(expected.scores)
    assert {s.n_shot for s in expected.scores} == {1} and {s.n_samples for s in expected.scores} == {5}
    assert task["active"] == pytest.approx(expected.active, abs=0.01)
    assert task["n_tokens"] == expected.n_tokens and task["n_known"] == 0
    acc = task["scores"][0]
    shown = ["choice", "1", "acc", "none", f"{acc['value']:.4f}", "±", f"{acc['error']:.4f}", f"{task['active']:.1%}"]
    assert lines[0].split()[:-1] == shown and float(lines[0].split()[-1]) > 0


def test_groups_and_tags(folder, tmp_path, llama):
    """A group's own figure comes first; a tag is its tasks. What was answered in this run is not of another one."""
    for name in ("choice", "letters"):
        write_task(tmp_path, name, tag="tagged")
    means = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "both", "task": ["choice", "letters"], "aggregate_metric_list": means}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    manager = task_manager(tmp_path, ["both", "tagged"])
    with contextlib.closing(Answers(tmp_path / "answers.db")) as answers:
        lm = TsconvLM(llama, n_ctx=128, answers=answers)
        both, tagged = (run_task(lm, Wanted(n), manager, known=lambda: answers.n_found) for n in ("both", "tagged"))
        lm.close()
    (mine,) = (score for score in both.scores if score.task == "both")
    assert both.scores[0] == mine and set(both.scores[1:]) == set(tagged.scores)
    accuracies = [score.value for score in tagged.scores if score.metric == "acc"]
    assert mine.value == pytest.approx(sum(accuracies) / 2) and len(accuracies) == 2
    assert (both.n_known, tagged.n_known, tagged.n_tokens, tagged.active) == (0, 0, 0, None)


# ---- answers that are kept


def kept(cache: Path) -> int:
    """How many answers are in the only file."""
    (path,) = (cache / "tsconv" / "tasks").glob("*.db")
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        return database.execute("SELECT COUNT(*) FROM answers").fetchone()[0]


def test_a_killed_run_continues(tmp_path, manager):
    """Nothing is computed twice, the result is that of a run which was not killed, and nothing is left."""
    write_task(tmp_path, "choice", 300)
    cache, model = tmp_path / "cache", tiny.converted()
    arguments = command(tmp_path, model, "choice", "-np", 1, "-b", 16, "--json")
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen([*tiny.TSCONV, *arguments], env=environment, stdout=subprocess.PIPE) as process:
        end = time.monotonic() + tiny.TIMEOUT_S
        n = 0
        while n < 20 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            try:
                n = kept(cache)
            except (ValueError, sqlite3.Error):  # not there yet
                n = 0
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was too fast to be killed"
    n = kept(cache)
    assert 20 <= n < 1200
    done = tiny.run(*arguments, env={"XDG_CACHE_HOME": str(cache)})
    assert done.returncode == 0, done.stderr
    (task,) = json.loads(done.stdout)["tasks"]
    assert n <= task["n_known"] < 1200  # equal requests have one answer
    assert f"note: choice: {task['n_known']} answers are from a run that was interrupted" in done.stderr.decode()
    assert list((cache / "tsconv" / "tasks").iterdir()) == []
    lm = TsconvLM(model, n_ctx=128, n_threads=1)
    whole = run_task(lm, Wanted("choice"), task_manager(tmp_path, ["choice"]))
    lm.close()
    assert [s["value"] for s in task["scores"]] == [s.value for s in whole.scores]


def test_answers_are_found_again(tmp_path, llama, manager):
    """Of each kind of request; another run computes nothing."""
    first = second = None
    for _ in range(2):
        answers = Answers(tmp_path / "answers.db")
        lm = TsconvLM(llama, n_ctx=128, answers=answers)
        results = [run_task(lm, Wanted(t), manager, samples=True, known=lambda a=answers: a.n_found) for t in TASKS]
        first, second = second, results
        lm.close()
        answers.close()
    for a, b in zip(first, second, strict=True):
        assert (a.scores, a.samples) == (b.scores, b.samples)
        assert (a.n_known, b.n_tokens, b.active, b.tokens_per_s) == (0, 0, None, None)
        assert b.n_known == sum(len(sample["resps"]) for sample in b.samples[b.name])


def test_a_damaged_file_of_answers(tmp_path):
    (tmp_path / "answers.db").write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    message = r"answers.db: answers cannot be kept \(.*; remove the file, or use --no-resume"
    with pytest.raises(OutputError, match=message):
        Answers(tmp_path / "answers.db").find("loglikelihood", ("a", "b"))


# ---- what cannot be


def test_what_the_context_has_no_room_for(llama):
    lm = TsconvLM(llama, n_ctx=16)
    with pytest.raises(TsconvError, match="continuation is longer than the context: expected at most 16 tokens, found"):
        scores(lm, [("And", " ".join(VERSES[:2]))])
    with pytest.raises(TsconvError, match="no room for a prompt: expected a context of more than 16 tokens, found 16"):
        lm.generate_until(requests("generate_until", [("And", {"until": [], "max_gen_toks": 16})]))
    with pytest.raises(TsconvError, match="the task asks for random samples"):
        lm.generate_until(requests("generate_until", [("And", {"until": [], "do_sample": True, "temperature": 1.0})]))
    assert scores(lm, [("And", " it")])[0][0] < 0  # it still works
    lm.close()
    with pytest.raises(TsconvError, match="texts computed together: expected 1 to 255, found 256"):
        TsconvLM(llama, n_seq=256)


def test_data_that_is_not_there(tmp_path, llama):
    write_task(tmp_path, "choice")
    (tmp_path / "choice.jsonl").unlink()
    done = tiny.run(*command(tmp_path, tiny.converted(), "choice", "--json"))
    line = tiny.error_line(done)
    assert (
        done.returncode == 1
        and "choice" in line
        and "choice.jsonl" in line
        and "\n" not in line.split("(token 1)\n")[1]
    )
    assert list(Path(os.environ["XDG_CACHE_HOME"], "tsconv", "tasks").iterdir()) == []  # no answers, no file


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0"}])
def test_no_network(environment, tmp_path, silent):
    """A task whose data is on the Hub: the network is not to be used, or nobody answers."""
    task = TASKS["choice"] | {"task": "remote", "dataset_path": "nobody/nothing", "test_split": "test"}
    (tmp_path / "remote.yaml").write_text(yaml.safe_dump(task))
    done = tiny.run(*command(tmp_path, tiny.converted(), "remote"), env=environment | {"HF_ENDPOINT": silent})
    assert done.returncode == 7 and done.stdout == b""
    line = done.stderr.decode().split("(token 1)\n")[1]
    assert line.startswith("error: remote: the task's data cannot be had (") and line.count("\n") == 1
    assert "without a network use local tasks and data (--include-path)" in line


def test_a_broken_task(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: broken\noutput_type: [\n")
    done = tiny.run(*command(tmp_path, tiny.converted(), "broken"))
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"Traceback" not in done.stderr


def test_unknown_tasks():
    """What is like them is said, presets included. lm_eval has all tasks of the presets."""
    line = tiny.error_line(tiny.run("eval", "tasks", "-m", tiny.converted(), "piqa,hellaswg"))
    assert line.startswith("error: hellaswg: no such task: expected one like hellaswag, ")
    assert "tsconv eval tasks --list shows all" in line and "\n" not in line
    everything = task_manager()
    with pytest.raises(TsconvError, match="expected one like open-llm, "):
        wanted(["open-lm"], everything)
    with pytest.raises(TsconvError, match="xyzxyz: no such task: expected open-llm, commonsense or a task of lm_eval"):
        wanted(["xyzxyz"], everything)
    found = wanted(["commonsense", "open-llm", "piqa"], everything)
    assert [w.n_shot for w in found] == [0, 0, 0, 0, 25, 10, 5, 0, 5, 8, None]
    assert {w.n_shot for w in wanted(["open-llm"], everything, 3)} == {3}


def test_the_list():
    done = tiny.run("eval", "tasks", "--list", "open-*", "gsm8k", "arc_eas?")
    assert done.returncode == 0 and done.stdout.decode().split() == ["open-llm", "arc_easy", "gsm8k"]


def test_usage():
    for arguments in ((), ("piqa",), ("-m", "m")):
        assert "A model (-m FILE) and a TASK are needed, or --list." in tiny.error_line(
            tiny.run("eval", "tasks", *arguments)
        )


@pytest.mark.parametrize("sparsity", ["predictor", "predictor:1"])
def test_kept_answers_depend_on_the_predictor_that_runs(tmp_path: Path, sparsity: str) -> None:
    model, predictor = tmp_path / "m.gguf", tmp_path / "p.gguf"
    assert files_of(model, predictor, sparsity) == [model, predictor]
    assert len(files_of(model, None, sparsity)) == 2, "without --predictor it is the sidecar beside the model"
    assert files_of(model, predictor, "exact") == [model]
