"""`tsconv serve` writes what `tsconv run` and Python write, however many clients there are and however they leave."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

import tsconv
from support import tiny
from support.serving import Server, serving

NAMES = ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"]
N = 24
PROMPT = "In the beginning"
PROMPTS = [
    PROMPT,
    "And it came to pass",
    "The LORD said unto Moses",
    "Blessed are the poor",
    "Now the king",
    "Then Jesus answered",
    "And the children of Israel",
    "Hear, O heavens",
]
CLIENTS, REQUESTS = 8, 500
ROUNDING = 0.02  # of log probabilities


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(name) -> Iterator[Server]:
    with serving("-c", 1024, "--parallel", CLIENTS, model=tiny.converted(name)) as server:
        yield server


@pytest.fixture(scope="module")
def llama(name) -> Iterator[tsconv.SparseLlama]:
    llama = tsconv.load(tiny.converted(name), n_ctx=512, n_threads=1)
    yield llama
    llama.close()


def completed(client: openai.OpenAI, prompt, n: int = N) -> str:
    answer = client.completions.create(model="any", prompt=prompt, max_tokens=n, temperature=0)
    return answer.choices[0].text


def run(name: str, *arguments: object) -> str:
    result = tiny.run("run", "-m", tiny.converted(name), "-t", 1, "-n", N, "--temp", 0, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode().removesuffix("\n")


def test_completion(name, server, llama):
    served = completed(server.client(), PROMPT)
    assert served == run(name, "-p", PROMPT)
    assert served == llama.create_completion(PROMPT, max_tokens=N, temperature=0)["choices"][0]["text"]


def test_token_for_token(server, llama):
    """The ids of the prompt and of what is generated."""
    prompt = llama.tokenize(PROMPT.encode())
    generated = list(itertools.islice(llama.generate(prompt, temp=0), N))
    fields = {"prompt": prompt, "n_predict": N, "temperature": 0, "return_tokens": True}
    request = urllib.request.Request(f"{server.root}/completion", json.dumps(fields).encode())
    with urllib.request.urlopen(request, timeout=tiny.TIMEOUT_S) as answer:
        served = json.load(answer)
    assert served["tokens"] == generated
    assert served["tokens_evaluated"] == len(prompt)


def test_chat(name, server, llama):
    messages = [{"role": "user", "content": PROMPT}]
    answer = server.client().chat.completions.create(model="any", messages=messages, max_tokens=N, temperature=0)
    python = llama.create_chat_completion(messages, max_tokens=N, temperature=0)
    assert answer.choices[0].message.content == python["choices"][0]["message"]["content"]
    assert answer.usage.prompt_tokens == python["usage"]["prompt_tokens"]
    assert answer.choices[0].message.content == run(name, "--chat", "-p", PROMPT)


def likeliest(client: openai.OpenAI, prompt: str) -> list[tuple[str, float, float]]:
    """Of each generated token: its text, its log probability, how far the second one is below."""
    answer = client.completions.create(model="any", prompt=prompt, max_tokens=N, temperature=0, logprobs=2)
    found = []
    for token in answer.choices[0].logprobs.content:
        first, second = token["top_logprobs"]
        found.append((token["token"], first["logprob"], first["logprob"] - second["logprob"]))
    return found


def test_together_as_alone(server):
    """Up to rounding: llama.cpp multiplies several tokens' activations with other kernels than one token's
    (docs/notes/2026-11-28-requests-together.md). So texts may part only where two tokens are as good as equal."""
    client = server.client()
    alone = [likeliest(client, prompt) for prompt in PROMPTS]
    assert len({tuple(token for token, _, _ in found) for found in alone}) == len(PROMPTS)
    with ThreadPoolExecutor(CLIENTS) as pool:
        together = list(pool.map(lambda prompt: likeliest(client, prompt), PROMPTS))
    for one, other in zip(alone, together, strict=True):
        for (token, probability, margin), (token_2, probability_2, _) in zip(one, other, strict=False):
            if token != token_2:
                assert margin < ROUNDING
                break
            assert probability_2 == pytest.approx(probability, abs=ROUNDING)


def leave_early(server: Server, number: int) -> None:
    """Asks for a long stream, reads a little or nothing, and hangs up, sometimes with a reset."""
    host, port = server.root.removeprefix("http://").split(":")
    content = b'{"prompt": "And it came to pass", "max_tokens": 400, "stream": true}'
    with socket.create_connection((host, int(port)), tiny.TIMEOUT_S) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content[: len(content) - number % 2 * 20])
        if number % 4 == 0:
            connection.recv(300)
        if number % 3 == 0:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def test_many_requests_of_which_some_are_left(name, server):
    expected = run(name, "-p", PROMPT)
    numbers, lock = iter(range(REQUESTS)), threading.Lock()
    texts: set[str] = set()

    def work(client: openai.OpenAI) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            if number % 5 < 2:
                leave_early(server, number)
            else:
                texts.add(completed(client, PROMPT, 4))

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(work, [server.client() for _ in range(CLIENTS)]))
    assert len(texts) == 1 and expected.startswith(texts.pop())
    assert completed(server.client(), PROMPT) == expected
    assert len(server.log) == 1, server.log
