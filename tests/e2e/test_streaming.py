"""Models larger than memory: neurons come from disk (native/src/cache/neuron_cache.h), and nothing else changes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

import tsconv
from support import ROOT, synthetic, tiny
from support.memory_map import cached_bytes, drop_cache
from support.serving import serving
from support.streamed import fewest_bytes, streaming
from tsconv.bench.synthetic import Shape
from tsconv.bench.worker import Sequences
from tsconv.errors import BackendError, TsconvError
from tsconv.format.header import read_header
from tsconv.format.pair import sidecar_path
from tsconv.format.summary import ffn_bytes
from tsconv.runtime.model import SparseLlama
from tsconv.runtime.programs import check_devices, command, environment, model_arguments
from tsconv.runtime.streaming import choose_budget, parse_budget

pytestmark = pytest.mark.sanitized
NAMES = ("tiny-turbosparse-mistral", "tiny-turbosparse-mixtral")
TEXT = b"And it came to pass in those days that there was a man of the house of Israel"


def logits(model: SparseLlama) -> list[np.ndarray]:
    """Of one token at a time, and of all at once."""
    tokens = model.tokenize(TEXT)
    return [model.token_logits(tokens, n_batch=1), model.token_logits(tokens)]


def total(model: SparseLlama, key: str) -> float:
    return sum(layer[key] for layer in model.ffn_stats())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("outtype", "sparsity"), [("f32", "predictor"), ("q4_0", "predictor"), ("q4_0", "exact")])
def test_logits_are_those_of_the_model_in_memory(monkeypatch, name, outtype, sparsity):
    path = tiny.converted(name, outtype)
    options = {"sparsity": sparsity, "n_threads": 2, "n_ctx": 256}
    model = tsconv.load(path, ram_budget="off", **options)
    expected = logits(model)
    assert total(model, "neurons_needed") == 0
    model.close()
    fewest = fewest_bytes(path)
    for n_bytes, reads, ahead in (
        (fewest, "pool", "on"),
        (fewest, "", "off"),
        (fewest, "", "on"),
        (fewest + 200_000, "", ""),  # tried every other token
        (1 << 28, "", "on"),
    ):
        monkeypatch.setenv("TSFFN_READS", reads)
        monkeypatch.setenv("TSFFN_LOOK_AHEAD", ahead)
        with streaming(monkeypatch, n_bytes):
            model = tsconv.load(path, **options)
        for _ in range(2):
            for found, right in zip(logits(model), expected, strict=True):
                np.testing.assert_array_equal(found, right)
        everything_fits = n_bytes == 1 << 28
        assert (total(model, "neurons_missing") == 0) == (total(model, "bytes_disk") == 0) == everything_fits
        assert total(model, "neurons_needed") > 0
        can_look_ahead = name == NAMES[0] and sparsity == "predictor" and ahead != "off" and not everything_fits
        assert (total(model, "neurons_ahead") > 0) == can_look_ahead
        assert total(model, "neurons_ahead") <= total(model, "neurons_missing")
        model.close()


def test_models_in_one_process_and_their_sequences(monkeypatch):
    """Each has neurons of its own, and what one context leaves in memory does not change another's text."""
    paths = [tiny.converted(name, "q4_0") for name in NAMES]
    prompts = ("And it came to pass", "In the beginning")

    def texts(models: list[SparseLlama]) -> list[str]:
        completed = [
            model.create_completion(prompt, max_tokens=12, temperature=0) for prompt in prompts for model in models
        ]
        return [answer["choices"][0]["text"] for answer in completed]

    mapped = [tsconv.load(path, n_threads=2, ram_budget="off") for path in paths]
    expected = texts(mapped)
    streamed = []
    for path in paths:
        with streaming(monkeypatch, fewest_bytes(path)):
            streamed.append(tsconv.load(path, n_threads=2))
    assert texts(streamed) == expected
    for model in (*mapped, *streamed):
        model.close()


def test_contexts_of_one_model_at_once(monkeypatch):
    """They take turns with its neurons."""
    path = tiny.converted(NAMES[0], "q4_0")

    def decoded(model: SparseLlama, seeds: Sequence[int]) -> list[np.ndarray]:
        """The last logits of a text for each seed, computed at the same time."""
        contexts = [Sequences(model, 64, 1, n_threads=1) for _ in seeds]

        def decode(k: int) -> np.ndarray:
            for position, token in enumerate(np.random.default_rng(seeds[k]).integers(3, 200, 40).tolist()):
                contexts[k].decode([token], position)
            found = llama_cpp.llama_get_logits_ith(contexts[k]._context.ctx, 0)
            return np.ctypeslib.as_array(found, (model.n_vocab(),)).copy()

        with ThreadPoolExecutor(len(seeds)) as pool:
            logits = list(pool.map(decode, range(len(seeds))))
        for context in contexts:
            context.close()
        return logits

    model = tsconv.load(path, n_threads=1, ram_budget="off")
    expected = decoded(model, (1, 2, 3))
    model.close()
    with streaming(monkeypatch, fewest_bytes(path)):
        model = tsconv.load(path, n_threads=1)
    for found, right in zip(decoded(model, (1, 2, 3)), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    assert total(model, "neurons_missing") > 0
    model.close()


# ---- loading

SHAPE = Shape(synthetic.N_VOCAB, 512, 2048, 8, 8, 2, ranks=(128, 128))


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """A model of 32 MB, 25 of them neurons, on the disk only where the file system allows."""
    directory = tmp_path_factory.mktemp("streaming")
    checkpoint = synthetic.save(directory / "checkpoint", SHAPE, synthetic.random_tensors(SHAPE))
    result = tsconv.convert(checkpoint, directory / "m.gguf", "f32")
    assert result.sidecar is not None
    for file in (result.model, result.sidecar):
        drop_cache(file)
        if cached_bytes(file) != 0:
            pytest.skip("this file system keeps files in memory")
    return result.model


def test_loading_reads_only_what_is_kept(monkeypatch, larger):
    """And neither that nor computing leaves the file in the page cache."""
    kept = larger.stat().st_size - ffn_bytes(read_header(larger))
    filled = 1024 * 3 * 512 * 4  # the fewest neurons of a cache, their three rows of f32
    before = read_bytes()
    with streaming(monkeypatch, fewest_bytes(larger)):
        model = tsconv.load(larger, n_threads=1, n_ctx=64)
    assert 0.9 * kept < read_bytes() - before < kept + sidecar_path(larger).stat().st_size + filled + (2 << 20)
    model.token_logits([1, 2, 3])
    assert total(model, "bytes_disk") > 0
    assert cached_bytes(larger) < 1 << 20
    model.close()


def read_bytes() -> int:
    """Bytes that this process had read from disks."""
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])


# ---- the command line


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 110 MB, 100 of them neurons."""
    directory = tmp_path_factory.mktemp("large")
    shape = Shape(synthetic.N_VOCAB, 512, 8192, 8, 8, 2, ranks=(128, 128))
    checkpoint = synthetic.save(directory / "checkpoint", shape, synthetic.random_tensors(shape))
    return tsconv.convert(checkpoint, directory / "m.gguf", "f32").model


def test_what_is_left_for_neurons(large):
    header = read_header(large)
    budget = choose_budget(header, 1000, 256, "auto", available=120_000_000)
    assert budget.total == 90_000_000  # a quarter stays free
    assert (budget.given, budget.predictors, budget.missing) == (False, 1000, 0)
    assert budget.ffn == ffn_bytes(header) == header.file_bytes - budget.weights
    assert budget.neurons == 90_000_000 - budget.weights - 1000 - budget.context
    assert choose_budget(header, 1000, 256, "auto", available=200_000_000) is None
    with pytest.raises(TsconvError, match="does not fit in memory, even with its neurons on disk"):
        choose_budget(header, 1000, 256, "auto", available=20_000_000)


def test_run(large):
    arguments = ("run", "-m", large, "-p", "And it came to pass", "-n", 8, "--temp", 0, "-c", 256, "-t", 1, "--json")
    mapped, streamed = (tiny.run(*arguments, "--ram-budget", budget) for budget in ("off", "80M"))
    assert (mapped.returncode, streamed.returncode) == (0, 0), streamed.stderr
    expected, found = json.loads(mapped.stdout), json.loads(streamed.stdout)
    assert found["text"] == expected["text"]
    assert (expected["memory_share"], expected["disk_bytes"], expected["disk_share"]) == (1, 0, 0)
    assert 0.1 < found["memory_share"] < 1
    assert found["disk_bytes"] > 1e6
    assert 0 < found["disk_share"] < 1
    first, *_, last = streamed.stderr.decode().splitlines()
    assert re.match(r"memory: 83.9 MB given; .* of 101 MB neurons \(\d+ %\); others are read from disk", first)
    assert re.search(r"\d % of the neurons were in memory, [\d.]+ MB per token came from disk, which was waited", last)
    assert b"memory" not in mapped.stderr


@pytest.fixture
def small_machine(tmp_path) -> Path:
    """With 1.16 GB of memory: 1 GiB less than what the large model is left 80 MB of."""
    text = (ROOT / "profiles" / "cpu-only.toml").read_text()
    memory = re.search(r"^memory_gib = (.*)$", text, re.MULTILINE)
    assert memory is not None
    path = tmp_path / "small.toml"
    path.write_text(text.replace(memory[0], f"memory_gib = {((1 << 30) + 80_000_000) / (1 << 30)}", 1))
    return path


def test_a_machine_that_is_too_small(large, small_machine):
    """What a machine's profile leaves for neurons counts as --ram-budget does, which counts if both are given."""
    arguments = ("run", "-m", large, "-p", "And it came to pass", "-n", 8, "--temp", 0, "-c", 256, "-t", 1, "--json")
    mapped, streamed, given, off = (
        tiny.run(*arguments, *options)
        for options in (
            (),
            ("--machine", small_machine),
            ("--machine", small_machine, "--ram-budget", "70MB"),
            ("--machine", small_machine, "--ram-budget", "off"),
        )
    )
    for done in (mapped, streamed, given, off):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["text"] == json.loads(mapped.stdout)["text"]
    assert [0 < json.loads(done.stdout)["memory_share"] < 1 for done in (streamed, given, off)] == [True, True, False]
    assert b"memory: 80 MB given; " in streamed.stderr and b"memory: 70 MB given; " in given.stderr
    assert b"others are read from disk" not in off.stderr and b"FFN: " in off.stderr
    with serving("--machine", small_machine, "-c", 256, model=large) as server:
        completions = server.client().completions
        answer = completions.create(model="m", prompt="And it came to pass", max_tokens=8, temperature=0)
        assert any("others are read from disk" in line for line in server.log)
    assert answer.choices[0].text == json.loads(mapped.stdout)["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ram-budget", "20M"), "does not fit in memory, even with its neurons on disk: expected at least"),
        (("--ram-budget", "much"), "RAM budget: expected auto, off, or a number and a unit"),
    ],
)
def test_budgets_that_are_refused(large, options, message):
    for name, *rest in (("run", "-p", "a"), ("serve", "--port", "0")):
        line = tiny.error_line(tiny.run(name, "-m", large, *rest, *options))
        assert message in line


def test_perplexity(large, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes((TEXT + b". ") * 8)
    for options in (("-c", 64), ("-c", 64, "--method", "all")):
        arguments = ("perplexity", "-m", large, "-f", text, *options, "--chunks", 2, "--json", "--ram-budget")
        mapped, streamed = (tiny.run(*arguments, budget) for budget in ("off", "80M"))
        assert mapped.returncode == 0, mapped.stderr
        expected, found = json.loads(mapped.stdout), json.loads(streamed.stdout)
        assert found["perplexity"] == expected["perplexity"]
        assert b"others are read from disk" in streamed.stderr


def test_divergence(large, tmp_path):
    """From itself, with each of the two models within its budget."""
    text = tmp_path / "text.txt"
    text.write_bytes((TEXT + b". ") * 8)
    arguments = ("eval", "kld", "-m", large, "--baseline", large, "-f", text, "-c", 64, "--chunks", 1, "--json")
    done = tiny.run(*arguments, "--ram-budget", "80M")
    assert done.returncode == 0, done.stderr
    assert abs(json.loads(done.stdout)["divergence"]) < 1e-7
    assert done.stderr.count(b"others are read from disk") == 2


def test_serve(large):
    def answer(*options: object) -> tuple[str, str]:
        with serving("-c", 256, *options, model=large) as server:
            completion = server.client().completions.create(model="", prompt="And it", max_tokens=8, temperature=0)
            return server.log[0], completion.choices[0].text

    _, expected = answer("--ram-budget", "off")
    line, found = answer("--ram-budget", "80M")
    assert found == expected
    assert line.startswith("memory: 83.9 MB given")


# ---- files that change


@pytest.fixture
def copied(tmp_path) -> Path:
    """A model that may be damaged."""
    source = tiny.converted(NAMES[0], "q4_0")
    for name in (source.name, source.name.replace(".gguf", ".predictor.gguf")):
        shutil.copy(source.with_name(name), tmp_path / name)
    return tmp_path / source.name


def test_a_file_that_is_replaced(monkeypatch, copied):
    """The model goes on with what it was loaded from."""
    with streaming(monkeypatch, fewest_bytes(copied)):
        model = tsconv.load(copied, n_threads=1, n_ctx=256)
    expected = logits(model)
    other = copied.with_name("other")
    other.write_bytes(bytes(copied.stat().st_size))
    other.rename(copied)
    for found, right in zip(logits(model), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    model.close()


@pytest.mark.parametrize(
    ("size", "message"), [(None, "the file was changed while the model is in use"), (4096, "the file is truncated")]
)
def test_a_file_that_is_damaged(monkeypatch, copied, size, message):
    with streaming(monkeypatch, fewest_bytes(copied)):
        model = tsconv.load(copied, n_threads=1, n_ctx=256)
    if size is None:
        os.utime(copied, (1, 1))
    else:
        os.truncate(copied, size)
    with pytest.raises(BackendError) as failed:
        logits(model)
    assert message in str(failed.value)
    assert "\n" not in str(failed.value)
    model.close()


# ---- budgets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3G", 3 << 30),
        ("1.5 GiB", 3 << 29),
        ("800M", 800 << 20),
        ("64B", 64),
        ("1GB", 10**9),
        ("auto", "auto"),
        ("off", "off"),
        (7, 7),
    ],
)
def test_sizes(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1G", "3X", "3 G G", "64"])
def test_sizes_that_are_none(text):
    with pytest.raises(TsconvError, match="expected auto, off, or a number and a unit, such as"):
        parse_budget(text)


def test_what_is_chosen():
    path = tiny.converted()
    header = read_header(path)
    assert choose_budget(header, 0, 256, "off", available=0) is None
    assert choose_budget(header, 0, 256, "auto", available=1 << 40) is None
    assert choose_budget(header, 0, 256, "auto", available=0) is None  # so small that nothing would be gained
    assert choose_budget(header, 0, 256, 1 << 40) is None
    with pytest.raises(TsconvError) as refused:
        choose_budget(header, 1000, 256, 100_000)
    (line,) = str(refused.value).splitlines()
    missing = re.search(r"found 100,000: ([\d,]+) are missing", line)[1]
    needed = re.search(r"expected at least ([\d,]+) bytes", line)[1]
    assert int(needed.replace(",", "")) - int(missing.replace(",", "")) == 100_000


# ---- llama.cpp's own programs


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TSFFN_NEURON_CACHE": "3G"}, "TSFFN_NEURON_CACHE: expected a number of bytes, found '3G'"),
        ({"TSFFN_NEURON_CACHE": "1000"}, "the memory for neurons is too small: expected at least"),
        ({"TSFFN_NEURON_CACHE": "1", "TSFFN_HOT": "{hot}"}, "TSFFN_NEURON_CACHE and TSFFN_HOT exclude each other"),
    ],
)
def test_wrong_variables(variables, message):
    path = tiny.converted()
    hot = ",".join(["0"] * read_header(path).keys["llama.block_count"])
    with pytest.raises(BackendError) as refused:
        check_devices("llama-server", environment(path) | {k: v.format(hot=hot) for k, v in variables.items()})
    assert message in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_programs(name, tmp_path):
    """llama-perplexity, unmodified: the same numbers, with neurons from disk."""
    path, text = tiny.converted(name, "q4_0"), tmp_path / "text.txt"
    text.write_text((TEXT.decode() + ". ") * 30)

    def measure(mode: str, **variables: str) -> tuple[str, list[dict[str, int]]]:
        stats = tmp_path / "stats.json"
        options = ["-f", str(text), "-c", "128", "-b", "128", "--chunks", "2", "-t", "2", "--load-mode", mode]
        program = command(
            "llama-perplexity",
            [*model_arguments(path), *options],
            environment(path) | {"TSFFN_STATS": str(stats)} | variables,
        )
        for _ in range(5):  # a program that ends at once may lose what it was about to log
            done = subprocess.run(
                program.arguments,
                env=program.environment,
                capture_output=True,
                text=True,
                timeout=tiny.TIMEOUT_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            found = re.search(r"Final estimate: .*", done.stdout + done.stderr)
            if found is not None:
                break
        return found[0], json.loads(stats.read_text())["layers"]

    expected, layers = measure("mmap")
    assert sum(layer["needed"] for layer in layers) == 0
    for mode in ("dio", "none"):
        found, layers = measure(mode, TSFFN_NEURON_CACHE=str(fewest_bytes(path)))
        assert found == expected
        assert sum(layer["missing"] for layer in layers) > 0
