"""Text to chunks of tokens, and numbers of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tsconv.errors import TsconvError
from tsconv.stats.text import chunks as module
from tsconv.stats.text.chunks import chunks, parse_count, pieces

BOS = 1000


def tokens(text: bytes) -> list[int]:
    """A tokenizer whose tokens are the text's bytes."""
    return list(text)


@pytest.mark.parametrize(("chunk", "bos"), [(8, BOS), (8, None), (2, BOS), (1, None), (50, BOS)])
def test_documents_one_behind_the_other(chunk: int, bos: int | None) -> None:
    documents = ["one two", "three\n", "été", "x" * 30]
    got = list(chunks(tokens, bos, documents, chunk))
    head = [] if bos is None else [bos]
    assert all(len(c) == chunk and c[: len(head)] == head for c in got)
    text = "one two\nthree\nété\n" + "x" * 30 + "\n"
    flat = [token for c in got for token in c[len(head) :]]
    assert flat == tokens(text.encode())[: len(flat)]
    assert len(text.encode()) - len(flat) < chunk - len(head)


def test_documents_are_taken_as_they_are_needed() -> None:
    taken = []

    def documents() -> Iterator[str]:
        for i in itertools.count():
            taken.append(i)
            yield "twelve bytes"

    assert len(list(itertools.islice(chunks(tokens, BOS, documents(), 14), 5))) == 5
    assert len(taken) == 5


@pytest.mark.parametrize("text", ["word " * 50_000, "a line of text\n" * 20_000, "字" * 100_000, "x\ty" * 50_000])
def test_long_documents_are_tokenized_in_pieces(text: str) -> None:
    given = []

    def tokenize(piece: bytes) -> list[int]:
        given.append(piece)
        return list(piece)

    got = list(chunks(tokenize, None, [text], 100))
    assert b"".join(given).rstrip(b"\n") == text.encode().rstrip(b"\n")
    assert len(given) > 2
    assert max(len(piece.decode()) for piece in given) <= module.PIECE
    assert bytes(itertools.chain(*got)) == (text if text.endswith("\n") else text + "\n").encode()[: len(got) * 100]


def test_cuts_are_between_words() -> None:
    lines = "a few words in a line\n" * 4000
    assert all(piece.endswith("line\n") for piece in pieces(lines))
    words = "word " * 30_000
    assert all(piece.endswith("word") for piece in list(pieces(words))[:-1])
    assert all(piece.startswith(" word") for piece in list(pieces(words))[1:])


def test_lone_surrogates_are_replaced() -> None:
    assert list(chunks(tokens, None, ["a\ud800b"], 4)) == [list(b"a?b\n")]


def test_too_short() -> None:
    with pytest.raises(TsconvError, match=r"expected at least 511 tokens, found 12; lower --chunk"):
        list(chunks(tokens, BOS, ["short", "texts"], 512))
    with pytest.raises(TsconvError, match=r"found 0;"):
        list(chunks(tokens, None, [], 512))
    assert list(chunks(tokens, BOS, ["abc"], 5)) == [[BOS, *b"abc\n"]]


@pytest.mark.parametrize(("chunk", "bos"), [(1, BOS), (0, None), (-5, BOS)])
def test_no_room(chunk: int, bos: int | None) -> None:
    with pytest.raises(TsconvError, match="no room"):
        next(chunks(tokens, bos, ["text"], chunk))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1),
        ("1M", 10**6),
        ("512k", 512_000),
        ("512K", 512_000),
        ("1.5M", 1_500_000),
        ("2_000_000", 2_000_000),
        ("0.25k", 250),
        ("1G", 10**9),
        (" 10k ", 10_000),
        ("1.0", 1),
    ],
)
def test_parse_count(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "k", "0", "-1M", "1.5", "0.0001k", "1T", "1Mi", "1 M", "1e6", "one", "1__0", "_1", "1_", "١", "1.M"],
)
def test_parse_count_refuses(text: str) -> None:
    with pytest.raises(TsconvError) as caught:
        parse_count(text)
    assert "not a number of tokens" in str(caught.value)
    assert "1M, 512k" in str(caught.value)
