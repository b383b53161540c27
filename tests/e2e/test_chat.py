"""A chat: the conversation by itself, and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tsconv
from support import tiny
from support.terminal import Terminal
from tsconv.errors import TsconvError
from tsconv.runtime.conversation import Conversation
from tsconv.runtime.generate import Generation, Sampling, chat_tokens
from tsconv.runtime.model import SparseLlama

GREEDY = Sampling(temperature=0)
SYSTEM = "Speak as the prophets do."
LONG = "And it came to pass in those days. " * 3 + "Amen."


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny.converted()


@pytest.fixture(scope="module")
def llama(model: Path) -> Iterator[SparseLlama]:
    llama = tsconv.load(model, n_ctx=256, n_threads=1)
    yield llama
    llama.close()


# ---- the conversation


def said(conversation: Conversation, question: str, limit: int = 12) -> tuple[str, int]:
    answer = conversation.ask(question, limit, GREEDY)
    return "".join(answer), answer.n_dropped


def test_turns_are_remembered(llama: SparseLlama) -> None:
    conversation = Conversation(llama, SYSTEM)
    first, _ = said(conversation, "Who is he?")
    second, _ = said(conversation, "And then?")
    assert conversation.messages == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Who is he?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": second},
    ]
    tokens = chat_tokens(llama, conversation.messages[:-1])
    assert "".join(Generation(llama, tokens, 12, GREEDY)) == second
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": SYSTEM}]


def test_the_oldest_turns_go_and_the_system_message_stays(llama: SparseLlama) -> None:
    conversation = Conversation(llama, SYSTEM)
    n_dropped = n_asked = 0
    while n_dropped == 0:
        _, n_dropped = said(conversation, f"{LONG} {n_asked}")
        n_asked += 1
        assert n_asked < 50
    assert n_asked > 2
    assert conversation.messages[0] == {"role": "system", "content": SYSTEM}
    questions = [turn.question for turn in conversation.turns]
    assert questions == [f"{LONG} {n}" for n in range(n_dropped, n_asked)]
    # As if the conversation had begun there.
    tokens = chat_tokens(llama, conversation.messages[:-1])
    assert len(tokens) + 12 <= llama.n_ctx()
    assert "".join(Generation(llama, tokens, 12, GREEDY)) == conversation.turns[-1].answer


def test_a_question_that_is_too_long_changes_nothing(llama: SparseLlama) -> None:
    conversation = Conversation(llama)
    said(conversation, "Who is he?")
    before = conversation.messages
    with pytest.raises(TsconvError, match="the prompt does not fit the context: expected at most 255 tokens"):
        conversation.ask("word " * 300)
    assert conversation.messages == before
    with pytest.raises(TsconvError, match="does not fit"):
        Conversation(llama, "word " * 300)


def test_another_answer(llama: SparseLlama) -> None:
    conversation = Conversation(llama)
    with pytest.raises(TsconvError, match="there is no answer yet"):
        conversation.again()
    sampling = Sampling(temperature=1.5, seed=7)
    texts = ["".join(conversation.ask("Who is he?", 16, sampling))]
    texts += ["".join(conversation.again(16, sampling)) for _ in range(2)]
    assert len(set(texts)) == 3
    assert [turn.answer for turn in conversation.turns] == texts[-1:]
    assert "".join(conversation.ask("And then?", 4, sampling))
    assert len(conversation.turns) == 2


def test_what_cut_an_answer(llama: SparseLlama) -> None:
    conversation = Conversation(llama)
    answer = conversation.ask("Who is he?", 2, GREEDY)
    assert "".join(answer)
    assert answer.cut_by == "limit"
    endless = tsconv.load(tiny.of_bytes(), n_ctx=256, n_threads=1)
    answer = Conversation(endless).ask("go on", None, GREEDY)
    assert "".join(answer)
    assert answer.cut_by == "context"
    answer = Conversation(endless).ask("go on", None, GREEDY, lambda: True)
    assert "".join(answer)
    assert (answer.summary.finish_reason, answer.cut_by) == ("interrupted", None)
    endless.close()


# ---- on a terminal


def chat(model: Path, *lines: str, options: tuple[object, ...] = ("-n", 8)) -> tuple[list[str], list[str]]:
    """What is shown between the prompts for these lines, and the lines on stderr."""
    terminal = Terminal(model, "-c", 256, "--temp", 0, *options)
    shown = []
    terminal.wait_for(rb"> ")
    for line in lines:
        terminal.type(line + "\n")
        terminal.wait_for(re.escape(line[-3:].encode()) + rb" ?\r\n")  # long lines are wrapped before
        shown.append(terminal.wait_for(rb"(?:^|\n)[.>] ").decode().replace("\r\n", "\n")[:-2].strip())
    terminal.type("/exit\n")
    status, stderr = terminal.end()
    assert status == 0
    return shown, stderr.splitlines()


def test_commands(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.md"
    lines = ("/regen", "/save", "Who is he?", "/regen", f"/save {file}", f"/save {file}", "/what", "/help")
    shown, stderr = chat(model, *lines, options=("-n", 8, "--system", SYSTEM))
    assert shown[2] and shown[2] == shown[3], "greedy"
    assert file.read_text() == f"## system\n\n{SYSTEM}\n\n## user\n\nWho is he?\n\n## assistant\n\n{shown[2]}\n"
    assert stderr[1:3] == ["error: there is no answer yet", "error: /save needs the name of a file"]
    assert stderr.count("(cut after 8 tokens: -n)") == 2
    assert f"saved in {file}" in stderr
    assert f"error: {file}: the file exists; choose another name" in stderr
    assert "/what: no such command; /help lists them" in stderr
    assert any(line.startswith("/regen ") for line in stderr)


def test_lines_that_go_on(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.md"
    chat(model, "one\\", "two\\", "three", f"/save {file}")
    assert file.read_text().startswith("## user\n\none\ntwo\nthree\n\n## assistant\n\n")


def test_a_full_context_is_said(model: Path) -> None:
    _, stderr = chat(model, *[LONG] * 6)
    assert any(line.startswith("(the context is full: the oldest ") for line in stderr)
    _, stderr = chat(tiny.of_bytes(), "go on", options=("-n", -1))
    assert "(cut: the context of 256 tokens is full: -c)" in stderr


def test_a_system_message_is_for_chats(model: Path) -> None:
    line = tiny.error_line(tiny.run("run", model, "-p", "x", "--system", "y"))
    assert "--system is for a chat: with a prompt it needs --chat" in line
    done = tiny.run("run", model, "-t", 1, "-p", "x", "--system", SYSTEM, "--chat", "-n", 4, "--temp", 0, "--json")
    assert done.returncode == 0
    without = tiny.run("run", model, "-t", 1, "-p", "x", "--chat", "-n", 4, "--temp", 0, "--json")
    assert b'"n_prompt"' in done.stdout and done.stdout != without.stdout
