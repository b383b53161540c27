"""Calibration text as chunks of tokens, each computed from an empty context."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

from tsconv.errors import TsconvError

# Characters tokenized at a time: llama.cpp's tokenizers keep a working entry per character and some merge in more than
# linear time, so a book is not handed over whole.
PIECE = 1 << 15

_COUNT = re.compile(r"(\d+(?:_\d+)*)(\.\d+)?([kmg]?)", re.ASCII | re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_count(text: str) -> int:
    """A number of tokens with an optional decimal unit: "1M" is 1_000_000; so "512k", "1.5M", "2_000_000", "1G".

    Raises:
        TsconvError: it is not a positive whole number.
    """
    match = _COUNT.fullmatch(text.strip())
    count = Fraction((match[1] + (match[2] or "")).replace("_", "")) * _UNITS[match[3].lower()] if match else None
    if count is None or count.denominator != 1 or count < 1:
        raise TsconvError(
            "not a number of tokens", expected="one such as 1M, 512k, 1.5M or 2_000_000", found=repr(text)
        )
    return int(count)


def pieces(document: str) -> Iterator[str]:
    """`document` in pieces of at most PIECE characters that together are the document.

    Cut behind the last line end of a piece's second half, else before its last blank (byte-level vocabularies keep a
    blank at the beginning of a word), else, in text without either, after PIECE characters.
    """
    start = 0
    while len(document) - start > PIECE:
        limit, half = start + PIECE, start + PIECE // 2
        end = document.rfind("\n", half, limit) + 1 or max(document.rfind(blank, half, limit) for blank in " \t")
        end = end if end > 0 else limit
        yield document[start:end]
        start = end
    yield document[start:]


def chunks(
    tokenize: Callable[[bytes], list[int]], bos: int | None, documents: Iterable[str], chunk: int
) -> Iterator[list[int]]:
    """Packs documents one behind the other into chunks of exactly `chunk` tokens; what is left over is dropped.

    As llama.cpp's imatrix and perplexity do, the text is one run of tokens, cut without regard to documents, and every
    chunk begins with the begin-of-text token. They write that token over the chunk's first one; here it is put before
    the text, so that no token is lost. Like them, this puts no end-of-text token between documents: a document that
    does not end with a newline gets one.

    Args:
        tokenize: UTF-8 to token ids, without begin-of-text and without reading special tokens into the text.
        bos: the begin-of-text token; None for a vocabulary without one.
        chunk: tokens of a chunk, begin-of-text among them.

    Raises:
        TsconvError: `chunk` has no room for text, or the documents do not fill one chunk.
    """
    head = [] if bos is None else [bos]
    step = chunk - len(head)
    if step < 1:
        raise TsconvError("the chunk has no room for text", expected=f"at least {len(head) + 1} tokens", found=chunk)
    pending: list[int] = []
    n_tokens = 0
    for document in documents:
        for piece in pieces(document if document.endswith("\n") else document + "\n"):
            tokens = tokenize(piece.encode("utf-8", "replace"))  # JSON can spell lone surrogates, UTF-8 cannot
            n_tokens += len(tokens)
            pending += tokens
            whole = len(pending) // step * step
            for start in range(0, whole, step):
                yield head + pending[start : start + step]
            del pending[:whole]
    if n_tokens < step:
        raise TsconvError(
            "the text does not fill one chunk",
            expected=f"at least {step} tokens",
            found=n_tokens,
            fix="lower --chunk, or take a longer text",
        )
