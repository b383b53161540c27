"""`tsconv serve` through the openai client, on a loopback port that the system chooses."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator

import openai
import pytest

import tsconv
from support import ROOT, tiny
from support.serving import Server, serving

MESSAGES = [{"role": "user", "content": "In the beginning"}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def expected() -> str:
    llama = tsconv.load(tiny.converted(), n_ctx=512, n_threads=1)
    answer = llama.create_chat_completion(MESSAGES, max_tokens=16, temperature=0)
    llama.close()
    return answer["choices"][0]["message"]["content"]


def test_chat(server, expected):
    answer = server.client().chat.completions.create(model="any", messages=MESSAGES, max_tokens=16, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 16


def stream(server: Server, n: int) -> list[str]:
    chunks = server.client().chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=n, stream=True, **GREEDY
    )
    return [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]


def test_chat_streamed(server, expected):
    pieces = stream(server, 16)
    assert "".join(pieces) == expected
    assert len(pieces) > 5


def test_two_clients_at_once(server, expected):
    """A second request waits for the first and does not cut it off."""
    answers: list[str] = []
    threads = [threading.Thread(target=lambda: answers.append("".join(stream(server, 16)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(tiny.TIMEOUT_S)
    assert answers == [expected] * 3


def test_completion_and_models(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny-turbosparse-mistral"]
    completion = client.completions.create(model="any", prompt="In the beginning", max_tokens=5, temperature=0)
    assert completion.choices[0].text
    assert completion.usage.completion_tokens == 5


def test_names_and_addresses():
    with serving("--host", "127.0.0.1,::1", "--", "--alias", "one,two") as server:
        assert server.url.startswith("http://127.0.0.1:")
        for url in (server.url, server.url.replace("127.0.0.1", "[::1]")):
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            assert [model.id for model in client.models.list()] == ["one"]
            assert client.completions.create(model="two", prompt="In", max_tokens=2).usage.completion_tokens == 2


def test_prompt_that_does_not_fit(server):
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        server.client().completions.create(model="any", prompt="word " * 5000, max_tokens=5)


def test_api_key():
    with serving("--api-key", "secret") as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("guess").models.list()
        assert server.client("secret").models.list().data
        status, log = server.stop()
    assert status == 0
    assert log.count("\n") == 1, log


def test_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = tiny.run("serve", "-m", tiny.converted(), "--port", port)
    line = tiny.error_line(result)
    assert line == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; use another --port"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", 0, "--host", "no.such.host.invalid"), "error: cannot listen on no.such.host.invalid"),
        (("--port", 70000), "70000"),
        (("--port", 0, "-c", 0), "--ctx-size"),
    ],
)
def test_mistakes(arguments, message):
    assert message in tiny.error_line(tiny.run("serve", "-m", tiny.converted(), *arguments))


def test_missing_model(tmp_path):
    line = tiny.error_line(tiny.run("serve", "-m", tmp_path / "none.gguf", "--port", 0))
    assert line.startswith("error: ")
    assert "none.gguf" in line


def test_open_to_others_without_a_key():
    process = subprocess.Popen(
        [*tiny.TSCONV, "serve", "-m", str(tiny.converted()), "-t", "1", "--host", "0.0.0.0", "--port", "0"],
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    try:
        assert process.stderr.readline().startswith("warning: everyone who can reach 0.0.0.0 can use this server")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
