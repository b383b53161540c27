"""`tsconv serve`: the parts of the OpenAI API that programs use, and requests that make no sense."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from support import ROOT, tiny
from support.serving import Server, serving

MODEL = "tiny-turbosparse-mistral"
PROMPT = "In the beginning"
MESSAGES = [{"role": "user", "content": PROMPT}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks up a name.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("-c", 1024) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


def chat(client: openai.OpenAI, messages: list[dict] = MESSAGES, **options):
    options = {"max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def complete(client: openai.OpenAI, prompt, **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def test_chat(client):
    answer = chat(client)
    assert answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_streamed_with_usage(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat(client).choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_several_choices(client):
    answer = chat(client, n=2, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content


def test_content_in_parts(client):
    parts = [{"type": "text", "text": PROMPT}]
    whole = chat(client)
    answer = chat(client, [{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == whole.choices[0].message.content
    assert answer.usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("role", ["developer", "system"])
def test_instructions(client, role):
    answer = chat(client, [{"role": role, "content": "Be brief."}, *MESSAGES])
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > chat(client).usage.prompt_tokens


def test_max_completion_tokens(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=3, temperature=0)
    assert answer.usage.completion_tokens == 3


def test_json_schema(client):
    schema = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMA}}
    answer = json.loads(chat(client, response_format=schema, max_tokens=200).choices[0].message.content)
    assert answer.keys() == {"name", "old"}
    assert isinstance(answer["name"], str) and len(answer["name"]) <= 8
    assert isinstance(answer["old"], bool)


def test_tools_that_the_chat_template_has_no_words_for(client):
    """llama-server accepts them and leaves them out."""
    answer = chat(client, tools=[TOOL], tool_choice="auto")
    assert answer.choices[0].message.content == chat(client).choices[0].message.content


def test_log_probabilities(client):
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 12
    for token in content:
        others = [other.logprob for other in token.top_logprobs]
        assert others == sorted(others, reverse=True) and len(others) == 3
        assert token.logprob == others[0] <= 0  # the likeliest, at temperature 0


def test_prompts_of_every_kind(client, server):
    tokens = [[1, 400, 500], [1, 600]]
    single = [complete(client, prompt).choices[0].text for prompt in (PROMPT, "And he said", *tokens)]
    texts, ids = complete(client, [PROMPT, "And he said"]), complete(client, tokens)
    assert [choice.text for choice in sorted(texts.choices, key=lambda c: c.index)] == single[:2]
    assert [choice.text for choice in sorted(ids.choices, key=lambda c: c.index)] == single[2:]


def test_embeddings():
    with serving("-c", 512, "--", "--embeddings", "--pooling", "mean") as server:
        client = server.client()
        answer = client.embeddings.create(model=MODEL, input=["And God said", "And God saith", "7 * 8 = 56"])
        first, near, far = (np.array(item.embedding) for item in answer.data)
        assert first.shape == (128,)
        assert np.linalg.norm(first) == pytest.approx(1, abs=1e-4)
        assert first @ near > first @ far
        assert answer.usage.prompt_tokens > 0


def test_embeddings_are_refused_where_they_were_not_asked_for(client):
    with pytest.raises(openai.APIStatusError, match="embeddings"):
        client.embeddings.create(model=MODEL, input=PROMPT)


def body(**fields) -> bytes:
    return json.dumps({"prompt": PROMPT, "max_tokens": 4} | fields).encode()


def chat_body(**fields) -> bytes:
    return json.dumps({"messages": MESSAGES, "max_tokens": 4} | fields).encode()


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HOSTILE = {
    "no JSON": (COMPLETIONS, b"{prompt: 1"),
    "empty": (COMPLETIONS, b""),
    "binary": (COMPLETIONS, bytes(range(256)) * 16),
    "not UTF-8": (COMPLETIONS, b'{"prompt": "\xff\xfe"}'),
    "JSON of another type": (COMPLETIONS, b"[1, 2]"),
    "no prompt": (COMPLETIONS, b"{}"),
    "prompt of another type": (COMPLETIONS, body(prompt={"a": 1})),
    "prompt that does not fit": (COMPLETIONS, body(prompt="word " * 50000)),
    "token beyond the vocabulary": (COMPLETIONS, body(prompt=[1, 2**31 - 1])),
    "negative token": (COMPLETIONS, body(prompt=[1, -5])),
    "bad grammar": (COMPLETIONS, body(grammar="root ::= (((")),
    "max_tokens of another type": (COMPLETIONS, body(max_tokens="many")),
    "temperature of another type": (COMPLETIONS, body(temperature=[1])),
    "deep nesting": (COMPLETIONS, b'{"prompt": ' + b"[" * 20000),
    "deep list": (COMPLETIONS, b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}"),
    "no messages": (CHAT, b"{}"),
    "messages of another type": (CHAT, chat_body(messages="hello")),
    "message without content": (CHAT, chat_body(messages=[{"role": "user"}])),
    "part of an unknown type": (CHAT, chat_body(messages=[{"role": "user", "content": [{"type": "smell"}]}])),
    "an image": (
        CHAT,
        chat_body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]),
    ),
    "unknown format": (CHAT, chat_body(response_format={"type": "poem"})),
    "wrong path": ("/v1/nothing", body()),
    "path upwards": ("/../../etc/passwd", body()),
}
# llama-server says 500 where a body cannot be read, and for images, which the model does not have.
ITS_500 = {"no JSON", "empty", "binary", "not UTF-8", "deep nesting", "an image"}
INSIDE = re.compile(r"Traceback|\.py\b|\.[ch]pp\b|root:x|" + "|".join(map(re.escape, (str(ROOT), "/tmp/"))))


def post(server: Server, path: str, content: bytes) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server.root.removeprefix("http://"), timeout=tiny.TIMEOUT_S)
    connection.request("POST", path, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


@pytest.mark.parametrize("name", HOSTILE)
def test_request_that_makes_no_sense(server, name):
    status, text = post(server, *HOSTILE[name])
    assert (status == 500) if name in ITS_500 else (400 <= status < 500), text[:500]
    assert json.loads(text)["error"]["message"]
    assert not INSIDE.search(text), text[:500]
    status, text = post(server, COMPLETIONS, body())
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 4


def test_nothing_was_logged(server):
    """Requests that make no sense are their senders' mistakes: the server's own log stays readable."""
    assert len(server.log) < 3 * len(HOSTILE)
    assert not INSIDE.search("".join(server.log[1:]))
