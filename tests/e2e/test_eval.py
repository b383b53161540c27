"""`tsconv eval ppl` and `kld` beside llama-perplexity itself, and beside PyTorch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import Reference

import tsconv
from support import CHECKPOINTS, tiny
from tsconv.errors import BackendError, TsconvError
from tsconv.eval.base_file import BaseFile, BaseWriter
from tsconv.eval.kld import measure_kld, of_model
from tsconv.eval.ppl import measure_ppl
from tsconv.eval.windows import scored_logits, windows
from tsconv.runtime.programs import OURS, program_path, with_model

NAMES = ("tiny-turbosparse-mistral", "tiny-turbosparse-mixtral")
HELDOUT = CHECKPOINTS / "heldout.txt"
N_CTX, CHUNKS = 128, 6
OPTIONS = ("-c", N_CTX, "--chunks", CHUNKS, "-t", 1)


def llama_perplexity(model: Path, *options: object, until: str) -> str:
    """What it prints; `until` is in its last line. A thread of its own writes the log, and what it has not written when
    the program ends is lost: the backend's counters go to a pipe, at whose end the program waits for us."""
    try:
        command = with_model("llama-perplexity", [str(o) for o in ("-m", model, *OPTIONS, *options)], model)
    except BackendError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as folder:
        counters = Path(folder) / "counters"
        os.mkfifo(counters)
        with subprocess.Popen(
            command.arguments,
            env=command.environment | {"TSFFN_STATS": str(counters)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if until in line:
                    counters.read_text()
    text = "".join(lines)
    assert until in text and process.returncode == 0, text
    return text


def evaluate(*arguments: object) -> str:
    done = tiny.run("eval", *arguments, "-t", 1)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def running(text: str) -> list[float]:
    """What "[1]5.1234," says."""
    return [float(value) for value in re.findall(r"\[\d+\](\d+\.\d+),", text)]


def table(text: str) -> dict[str, list[float]]:
    """The figures of the block about divergence, by their names."""
    found = {}
    for name, rest in re.findall(
        r"^ *([A-Z\d.][^:\n]*?) *: +(.*)$", text[text.index("====== Perplexity") :], re.MULTILINE
    ):
        if not re.match(r"\d+\.\d+\.\d+", name):  # a line of the log
            found[name] = [float(value) for value in re.findall(r"-?\d+\.\d+", rest)]
    return found


def assert_like(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    """All figures, within 1e-4 and half of what the last digit shows."""
    assert found.keys() >= expected.keys() and len(expected) > 30
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=2e-3 if "Δp" in name or "%" in name else 3e-6), name


@pytest.fixture(scope="module", params=NAMES)
def model(request) -> Path:
    return tiny.converted(request.param)


@pytest.fixture(scope="module")
def by_llama(model, tmp_path_factory) -> tuple[Path, str]:
    """llama-perplexity's base file of the model with exact sparsity would be another function: the model's own."""
    path = tmp_path_factory.mktemp("base") / "base.kld"
    return path, llama_perplexity(model, "-f", HELDOUT, "--kl-divergence-base", path, until="Final estimate")


def test_ppl_is_llama_perplexitys(model, by_llama, tmp_path):
    """The running values, the estimate and its error; the base files hold the same."""
    base, expected = by_llama
    found = evaluate("ppl", "-m", model, "-f", HELDOUT, *OPTIONS[:4], "--save-base", tmp_path / "own.kld")
    assert running(found) == pytest.approx(running(expected), rel=1e-4)
    assert len(running(found)) == CHUNKS
    estimate = r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)"
    assert [float(x) for x in re.search(estimate, found).groups()] == pytest.approx(
        [float(x) for x in re.search(estimate, expected).groups()], rel=1e-4
    )
    ours, theirs = BaseFile(tmp_path / "own.kld"), BaseFile(base)
    assert (ours.windows.tokens == theirs.windows.tokens).all()
    for a, b in zip(ours.log_probabilities(), theirs.log_probabilities(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=16 / 65535)
        assert np.abs(a - b).mean() < 1e-5


def test_each_reads_the_others_base(by_llama, model, tmp_path):
    """Of a model in q4_0 from the one in f32."""
    rounded = tiny.converted(model.stem, "q4_0")
    base, _ = by_llama
    own = tmp_path / "own.kld"
    evaluate("ppl", "-m", model, "-f", HELDOUT, *OPTIONS[:4], "--save-base", own)
    expected = table(llama_perplexity(rounded, "--kl-divergence", "--kl-divergence-base", own, until="Same top p:"))
    assert expected["Mean    KLD"][0] > 1e-4
    for path in (base, own):
        assert_like(table(evaluate("kld", "-m", rounded, "--base", path)), expected)


def test_a_base_of_a_dense_model(model, tmp_path):
    """One that llama-perplexity made without our backend, of another function with the same vocabulary."""
    base = tmp_path / "dense.kld"
    program = program_path("llama-perplexity")
    options = ("-m", model, "--override-kv", "general.architecture=str:llama", "-f", HELDOUT, *OPTIONS)
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    command = [program, *map(str, options), "--kl-divergence-base", base]
    subprocess.run(command, env=environment, capture_output=True, check=True, timeout=tiny.TIMEOUT_S)
    expected = table(llama_perplexity(model, "--kl-divergence", "--kl-divergence-base", base, until="Same top p:"))
    found = table(evaluate("kld", "-m", model, "--base", base))
    assert expected["Mean    KLD"][0] > 1
    for name in ("Mean PPL(Q)", "Mean PPL(base)", "Mean    KLD", "Maximum KLD", "Median  KLD", "Same top p"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


# ---- beside PyTorch


@pytest.fixture(scope="module")
def loaded() -> tsconv.SparseLlama:
    model = tsconv.load(tiny.converted(NAMES[0]), n_threads=1)
    yield model
    model.close()


def test_ppl_is_pytorchs(loaded):
    texts = windows(loaded, HELDOUT.read_bytes(), N_CTX, CHUNKS)
    reference = Reference.load(CHECKPOINTS / NAMES[0])
    nll = []
    for row in texts.tokens.tolist():
        logits = reference.logits([loaded.token_bos(), *row[1:]], sparsity="predictor").double()
        half = len(row) // 2
        log_p = torch.log_softmax(logits, dim=1)[half:-1]
        nll += (-log_p[range(len(log_p)), row[half + 1 :]]).tolist()
    found = measure_ppl(loaded, texts)
    assert found.n_tokens == len(nll) == CHUNKS * (N_CTX - 1 - N_CTX // 2)
    assert found.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-3)
    assert found.error == pytest.approx(np.exp(np.mean(nll)) * np.std(nll) / np.sqrt(len(nll) - 1), rel=1e-3)


def test_kld_of_a_model_with_itself(loaded, tmp_path):
    """0 through logits; through the file what its 16 bits round: a step of 16 / 65535 at most."""
    texts = windows(loaded, HELDOUT.read_bytes(), N_CTX, CHUNKS)
    same = measure_kld(loaded, texts, list(map(np.copy, of_model(loaded, texts)))).divergence
    assert abs(same.divergence[0]) < 1e-7 and same.same_top[0] == 1
    with BaseWriter(tmp_path / "base", texts, loaded.n_vocab()) as base:
        measure_ppl(loaded, texts, base=base)
    rounded = measure_kld(loaded, texts, BaseFile(tmp_path / "base").log_probabilities()).divergence
    assert 0 < np.abs(np.concatenate(rounded.values)).max() < 16 / 65535
    assert abs(rounded.divergence[0]) < 1e-5


@pytest.mark.parametrize("n_batch", [1, 50, 64, 128, 300, 1024])
def test_how_windows_are_computed_together_does_not_matter(loaded, n_batch):
    texts = windows(loaded, HELDOUT.read_bytes(), 64, 5)
    expected = [logits.copy() for logits in scored_logits(loaded, texts, 64)]
    found = [logits.copy() for logits in scored_logits(loaded, texts, n_batch)]
    assert [logits.shape for logits in found] == [(31, loaded.n_vocab())] * 5
    assert tiny.nmse(np.array(found), np.array(expected)) < 1e-6


def test_two_models(loaded, tmp_path):
    """The base from a model is the base from its file, but for rounding."""
    rounded = tiny.converted(NAMES[0], "q4_0")
    evaluate("ppl", "-m", tiny.converted(NAMES[0]), "-f", HELDOUT, *OPTIONS[:4], "--save-base", tmp_path / "base")
    by_file = json.loads(evaluate("kld", "-m", rounded, "--base", tmp_path / "base", "--json"))
    arguments = ("--baseline", tiny.converted(NAMES[0]), "-f", HELDOUT, *OPTIONS[:4], "--json")
    by_model = json.loads(evaluate("kld", "-m", rounded, *arguments))
    for name in ("perplexity", "base_perplexity", "divergence", "divergence_error", "same_top", "correlation"):
        assert by_model[name] == pytest.approx(by_file[name], rel=2e-3), name
    assert by_file["n_tokens"] == CHUNKS * 63


# ---- what cannot be


def refused(*arguments: object) -> str:
    return tiny.error_line(tiny.run("eval", *arguments, "-t", 1))


def test_short_text(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("And it came to pass")
    line = refused("ppl", "-m", tiny.converted(), "-f", text, "-c", 64)
    assert "the text is too short: expected at least 128 tokens, two windows of 64, found" in line


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], "was cut short: expected"),
        (lambda data: data[:12], "not a file of log probabilities"),
        (lambda data: b"GGUF" + data[4:], "not a file of log probabilities"),
        (lambda data: data + b"\0", "bytes too many"),
        (lambda data: data[:16] + b"\xff" * 4 + data[20:], "a damaged file of log probabilities"),
        (lambda data: data[:20] + b"\xff" * 4 + data[24:], "tokens that its vocabulary does not have"),
    ],
)
def test_damaged_bases(loaded, tmp_path, spoil, message):
    texts = windows(loaded, HELDOUT.read_bytes(), 64, 2)
    with BaseWriter(tmp_path / "base", texts, loaded.n_vocab()) as base:
        measure_ppl(loaded, texts, base=base)
    (tmp_path / "spoilt").write_bytes(spoil((tmp_path / "base").read_bytes()))
    line = refused("kld", "-m", tiny.converted(), "--base", tmp_path / "spoilt")
    assert message in line and str(tmp_path / "spoilt") in line


def test_base_of_another_vocabulary(loaded, tmp_path):
    texts = windows(loaded, HELDOUT.read_bytes(), 64, 2)
    with BaseWriter(tmp_path / "base", texts, 100) as base:
        base.write(np.zeros((31, 100), np.float32))
        base.write(np.zeros((31, 100), np.float32))
    line = refused("kld", "-m", tiny.converted(), "--base", tmp_path / "base")
    assert "log probabilities of another vocabulary" in line and "found 100" in line


def test_a_base_that_is_not_finished_is_not_there(loaded, tmp_path):
    texts = windows(loaded, HELDOUT.read_bytes(), 64, 2)
    with pytest.raises(TsconvError, match="stopped"), BaseWriter(tmp_path / "base", texts, loaded.n_vocab()):
        raise TsconvError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_usage(tmp_path):
    for arguments, message in (
        (("kld", "-m", "m"), "--base FILE is needed, or --baseline MODEL and -f TEXT."),
        (("kld", "-m", "m", "--base", "b", "-c", "64"), "--base decides about --ctx-size."),
        (("ppl", "-m", "m", "-f", HELDOUT, "--method", "half", "--baseline", "b"), "--baseline goes with --method all"),
        (
            ("ppl", "-m", "m", "-f", HELDOUT, "--method", "all", "--save-base", "b"),
            "--save-base goes with --method half",
        ),
    ):
        assert message in refused(*arguments)
