"""`tsconv run` as a user calls it, on the tiny checkpoint."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

import tsconv
from support import ROOT, tiny
from support.edited import edited
from support.terminal import Terminal
from tsconv.runtime.generate import Generation, Sampling, chat_tokens, combined, prompt_tokens

PROMPT = "In the beginning"
SUMMARY = re.compile(
    r"prefill (\d+) tokens, [\d.]+ tokens/s; decode (\d+) tokens, [\d.]+ tokens/s; "
    r"active (\d+) of 512 neurons \([\d.]+ %\); predictor [\d.]+ % of the time"
)


def run(model: Path, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """One thread: more of them wait for each other actively, which is slow on a busy machine."""
    return tiny.run("run", "-m", model, "-t", 1, *arguments, stdin=stdin)


@pytest.fixture(scope="module")
def model():
    return tiny.converted()


@pytest.fixture(scope="module")
def llama(model):
    llama = tsconv.load(model, n_ctx=1024, n_threads=1)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def expected(llama) -> str:
    """What llama-cpp-python's own loop makes of the prompt."""
    return llama.create_completion(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]


def test_text(model, expected):
    result = run(model, "-p", PROMPT, "-n", 24, "--temp", 0)
    assert result.returncode == 0
    assert result.stdout.decode() == expected + "\n"
    lines = result.stderr.decode().splitlines()
    assert len(lines) == 1, "llama.cpp's log must be silent"
    match = SUMMARY.fullmatch(lines[0])
    assert match, lines[0]
    assert int(match[2]) == 23
    assert 0 < int(match[3]) < 512


def test_json(model, llama, expected):
    result = run(model, "-p", PROMPT, "-n", 24, "--temp", 0, "--json", "-c", 300)
    assert result.returncode == 0
    (line,) = result.stdout.decode().splitlines()
    answer = json.loads(line)
    assert answer["text"] == expected
    assert answer["prompt"] == PROMPT
    assert answer["model"] == str(model)
    assert answer["sparsity"] == "predictor"
    assert answer["n_threads"] == 1
    assert answer["n_ctx"] == 512, "llama.cpp rounds up to a multiple of 256"
    assert answer["n_prompt"] == len(llama.tokenize(PROMPT.encode()))
    assert (answer["n_cached"], answer["n_generated"], answer["n_decoded"]) == (0, 24, 23)
    assert answer["finish_reason"] == "length"
    assert answer["n_ff"] == 512
    assert 0 < answer["active_share"] < 0.5
    assert 0 < answer["bytes_share"] < 1
    assert 0 < answer["predictor_share"] < 1
    assert answer["decode_tokens_per_s"] == pytest.approx(23 / answer["seconds_decode"])
    assert answer["prefill_tokens_per_s"] == pytest.approx(answer["n_prompt"] / answer["seconds_prefill"])


def test_prompt_from_stdin_and_file(model, expected, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    for arguments, stdin in (((), PROMPT.encode() + b"\n"), (("-f", "-"), PROMPT.encode()), (("-f", file), b"")):
        result = run(model, "-n", 24, "--temp", 0, *arguments, stdin=stdin)
        assert result.stdout.decode() == expected + "\n"


def test_seed(model):
    texts = [run(model, "-p", PROMPT, "-n", 20, "--temp", 1.5, "--seed", seed).stdout for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_chat_wraps_the_prompt(model, llama):
    messages = [{"role": "user", "content": PROMPT}]
    expected = llama.create_chat_completion(messages, max_tokens=16, temperature=0)
    result = run(model, "-p", PROMPT, "-n", 16, "--temp", 0, "--chat", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == expected["choices"][0]["message"]["content"]
    assert answer["n_prompt"] == expected["usage"]["prompt_tokens"]


def test_exact_sparsity(model):
    answer = json.loads(run(model, "-p", PROMPT, "-n", 8, "--sparsity", "exact", "--json").stdout)
    assert answer["sparsity"] == "exact"
    assert answer["predictor_share"] < 0.02


def test_verbose_shows_the_log(model):
    result = run(model, "-p", PROMPT, "-n", 2, "-v")
    assert result.returncode == 0
    assert b"llama_model_loader" in result.stderr
    assert b"llama_model_loader" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", ""), "the prompt is empty"),
        (("-p", "word " * 300, "-c", 64), "the prompt does not fit the context: expected at most"),
        (("-p", "x", "-n", 0), "0 is neither -1 nor at least 1"),
        (("-p", "x", "-n", "many"), "many"),
        (("-p", "x", "--temp", "-1"), "--temp"),
        (("-p", "x", "--temp", "nan"), "nan is not a number"),
        (("-p", "x", "--top-p", "1.5"), "--top-p"),
        (("-p", "x", "--seed", "-1"), "--seed"),
        (("-p", "x", "-t", "0"), "--threads"),
        (("-p", "x", "--sparsity", "none"), "--sparsity"),
        (("-p", "x", "-f", "y"), "-p and -f exclude each other"),
        (("-f", "/nonexistent/prompt.txt"), "/nonexistent/prompt.txt: cannot read the prompt: No such file"),
        (("-f", "/tmp"), "/tmp: cannot read the prompt: Is a directory"),
        ((), "the prompt is empty"),
    ],
)
def test_mistakes(model, arguments, message):
    result = run(model, *arguments)
    assert message in tiny.error_line(result)


def test_prompt_that_is_not_text(model):
    result = run(model, stdin=b"\xff\xfe\x00")
    assert "stdin: cannot read the prompt: not UTF-8 text" in tiny.error_line(result)


def test_missing_model(tmp_path):
    line = tiny.error_line(run(tmp_path / "none.gguf", "-p", "x"))
    assert line.startswith("error: ")
    assert "none.gguf" in line
    assert "\n" not in line


def begun(model: Path) -> subprocess.Popen[bytes]:
    """A run that has printed its first tokens and waits for a reader, however slow, before its last."""
    process = subprocess.Popen(
        [*tiny.TSCONV, "run", "-m", str(model), "-t", "1", "-p", PROMPT, "-n", "-1", "--temp", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        bufsize=0,
        pipesize=4096,  # bytes: less than it has to say
    )
    for _ in range(20):
        process.stdout.read(1)
    return process


def test_reader_that_goes_away(model):
    process = begun(model)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(tiny.TIMEOUT_S) == 0
    assert stderr == b""


def test_interrupt(model):
    """Ctrl-C ends the text, not the line of measurements."""
    process = begun(model)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=tiny.TIMEOUT_S)
    assert process.returncode == 130
    assert stdout.endswith(b"\n")
    assert SUMMARY.fullmatch(stderr.decode().strip())


# Library


def test_characters_made_of_several_tokens_stay_whole():
    llama = tsconv.load(tiny.of_bytes(), n_ctx=1024, n_threads=1)
    tokens = prompt_tokens(llama, "abc")
    generation = Generation(llama, tokens, 500, Sampling(temperature=1.5, top_k=0, top_p=1, seed=0))
    pieces = list(generation)
    known = llama.input_ids[len(tokens) : llama.n_tokens].tolist()  # all but the last, which was not computed
    raw = b"".join(llama.detokenize([token]) for token in known)
    assert "".join(pieces).startswith(raw.decode(errors="replace").rstrip("\ufffd"))
    assert any(ord(c) > 127 and c != "\ufffd" for piece in pieces for c in piece), "take another seed"
    llama.close()


def test_stdout_is_utf8_whatever_the_model_says():
    arguments = ("-p", "abc", "-n", 300, "--temp", 1.5, "--top-k", 0, "--top-p", 1, "--seed", 0)
    result = run(tiny.of_bytes(), *arguments)
    text = result.stdout.decode()
    assert any(ord(c) > 127 and c != "\ufffd" for c in text)
    assert json.loads(run(tiny.of_bytes(), *arguments, "--json").stdout)["text"] == text.removesuffix("\n")


def test_the_end_of_the_text_ends_it(llama):
    """<|im_end|> stops the generation and is not part of the text."""
    generation = Generation(llama, chat_tokens(llama, [{"role": "user", "content": "Hello."}]), 900, Sampling(seed=1))
    text = "".join(generation)
    assert generation.summary.finish_reason == "stop"
    assert "<|im_end|>" not in text


def test_a_continued_conversation_is_not_computed_again(llama):
    messages = [{"role": "user", "content": PROMPT}]
    first = Generation(llama, chat_tokens(llama, messages), 12, Sampling(temperature=0))
    messages += [{"role": "assistant", "content": "".join(first)}, {"role": "user", "content": "And then?"}]
    second = Generation(llama, chat_tokens(llama, messages), 12, Sampling(temperature=0))
    text = "".join(second)
    assert first.summary.n_prompt <= second.summary.n_cached < second.summary.n_prompt
    llama.reset()
    assert "".join(Generation(llama, chat_tokens(llama, messages), 12, Sampling(temperature=0))) == text
    both = combined([first.summary, second.summary])
    assert both.n_generated == first.summary.n_generated + second.summary.n_generated
    assert (
        min(first.summary.active, second.summary.active)
        <= both.active
        <= max(first.summary.active, second.summary.active)
    )


def test_the_context_limits_the_text(llama):
    tokens = prompt_tokens(llama, "word " * 400)[: llama.n_ctx() - 10]
    tokens = (tokens * 3)[: llama.n_ctx() - 10]
    generation = Generation(llama, tokens, None, Sampling(temperature=0))
    assert "".join(generation)
    assert generation.summary.n_generated <= 10


# Chat on a terminal


def test_chat_loop(model, llama):
    messages = [{"role": "user", "content": PROMPT}]
    expected = "".join(Generation(llama, chat_tokens(llama, messages), 12, Sampling(temperature=0)))
    terminal = Terminal("-m", model, "-n", 12, "--temp", 0)
    terminal.wait_for(rb"> ")
    terminal.type(PROMPT + "\n")
    terminal.wait_for(PROMPT.encode() + rb"\r\n")
    shown = terminal.wait_for(rb"\n> ").decode().replace("\r\n", "\n")
    assert shown.removesuffix("> ").rstrip("\n") == expected.rstrip("\n")
    terminal.type("/exit\n")
    status, stderr = terminal.end()
    assert status == 0
    lines = stderr.splitlines()
    assert "/exit or Ctrl-D leaves" in lines[0]
    assert lines[1] == "(cut after 12 tokens: -n)"
    assert SUMMARY.fullmatch(lines[2])
    assert len(lines) == 3


def test_a_chat_past_the_window_is_warned_of_once(model, tmp_path):
    target = edited(model, tmp_path / "m.gguf", keys={"turbosparse.source.sliding_window": 30})
    terminal = Terminal("-m", target, "--sparsity", "exact", "-n", 12, "--temp", 0)
    for _ in range(3):
        terminal.wait_for(rb"> ")
        terminal.type(PROMPT + "\n")
        terminal.wait_for(PROMPT.encode() + rb"\r\n")
    terminal.wait_for(rb"> ")
    terminal.type("/exit\n")
    status, stderr = terminal.end()
    assert status == 0
    assert stderr.count("tokens are more than the checkpoint's attention window of 30") == 1


def test_chat_loop_keys():
    """Ctrl-C stops an answer that would fill the context, and drops a line being typed; Ctrl-D leaves."""
    terminal = Terminal("-m", tiny.of_bytes(), "-c", 30000, "--temp", 0)
    terminal.wait_for(rb"> ")
    terminal.type("go on\n")
    terminal.wait_for(rb"go on\r\n(?s:.{40})")
    terminal.type("\x03")
    terminal.wait_for(rb"\n> ")
    terminal.type("half a li")
    terminal.wait_for(rb"half a li")
    # CPython's input() misses a signal between echoing a key and waiting for the next, until that comes.
    terminal.type("\x03")
    while terminal.comes(rb"\n> ", 1.0) is None:
        terminal.type("\x03")
    terminal.type("\n/clear\n")
    terminal.wait_for(rb"/clear\r\n> ")
    terminal.type("\x04")
    status, stderr = terminal.end()
    assert status == 0
    lines = [line for line in stderr.splitlines() if "trained with" not in line]  # the text may have become as long
    assert len(lines) == 2
    assert int(re.search(r"decode (\d+) tokens", lines[1])[1]) < 20000


def test_chat_loop_when_the_context_is_full(model):
    terminal = Terminal("-m", model, "-c", 64, "--temp", 0)
    terminal.wait_for(rb"> ")
    terminal.type("word " * 300 + "\n")
    terminal.wait_for(rb"word \r\n> ")
    terminal.type("/exit\n")
    status, stderr = terminal.end()
    assert status == 0
    assert "error: the prompt does not fit the context" in stderr


def test_a_chat_needs_a_template(model, tmp_path):
    """Nothing that could be typed would help."""
    without = edited(model, tmp_path / "m.gguf", without=["tokenizer.chat_template"])
    (tmp_path / "m.predictor.gguf").symlink_to(model.with_suffix(".predictor.gguf"))
    status, stderr = Terminal("-m", without).end()
    fix = "continue a text instead: -p, without --chat"
    assert (status, stderr) == (4, f"error: {without}: the model has no chat template; {fix}\n")


@pytest.mark.parametrize("option", ["--json", "--no-chat"])
def test_a_terminal_without_prompt_needs_a_chat(model, option):
    terminal = Terminal("-m", model, option)
    status, stderr = terminal.end()
    assert status != 0
    assert "A prompt is needed" in stderr


@pytest.mark.parametrize("template", [None, "{% for m in messages %}", "{{ raise_exception('no users') }}"])
def test_a_model_that_cannot_chat_says_so_at_once(tmp_path, template):
    """And not after every line that the user types."""
    keys = {"tokenizer.chat_template": template} if template else {}
    without = () if template else ("tokenizer.chat_template",)
    target = edited(tiny.converted(), tmp_path / "m.gguf", keys=keys, without=without)
    terminal = Terminal("-m", target, "--sparsity", "exact")
    status, stderr = terminal.end()
    assert status == 4
    assert stderr.startswith(f"error: {target}: the ")
    assert stderr.endswith("; continue a text instead: -p, without --chat\n")
    assert stderr.count("\n") == 1
