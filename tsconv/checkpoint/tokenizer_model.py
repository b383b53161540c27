"""Reads `tokenizer.model`: a sentencepiece model, which is one protobuf message.

    ModelProto        1: repeated SentencePiece    2: TrainerSpec    3: NormalizerSpec
    SentencePiece     1: piece (string)    2: score (float)    3: type (enum; the numbers are GGUF's token types)
    TrainerSpec       3: model_type (enum)    24: treat_whitespace_as_suffix    45..48: unk, bos, eos, pad piece
    NormalizerSpec    2: precompiled_charsmap    3: add_dummy_prefix    4: remove_extra_whitespaces
                      5: escape_whitespaces

Source: sentencepiece_model.proto of the sentencepiece project.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

from gguf import TokenType

from tsconv.checkpoint.lfs import refuse_pointer
from tsconv.checkpoint.vocabulary import Vocabulary
from tsconv.errors import CheckpointError

MODEL_TYPES: dict[object, str] = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
SPECIAL_PIECES = {"unk": (45, "<unk>"), "bos": (46, "<s>"), "eos": (47, "</s>"), "pad": (48, "<pad>")}
MAX_VARINT_BYTES = 10
FIXED_BYTES = {1: 8, 5: 4}  # wire type -> size


def read_tokenizer_model(path: Path) -> Vocabulary:
    """The pieces of a sentencepiece BPE model with byte fallback and without normalization (Llama, Mistral).

    Raises:
        CheckpointError: the file is missing or damaged, or the model does something that llama.cpp's SPM does not.
    """
    refuse_pointer(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the tokenizer: {error.strerror}", where=path) from None
    try:
        return _read(data, path)
    except (_DamagedError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"not a sentencepiece model, or a damaged one ({error})", where=path) from None


class _DamagedError(Exception):
    """The bytes are not a protobuf message."""


def _read(data: bytes, path: Path) -> Vocabulary:
    tokens, scores, types = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0]
            tokens.append(_bytes(piece.get(1, b"")).decode())
            scores.append(score)
            types.append(piece.get(3, TokenType.NORMAL))
            if not math.isfinite(score) or types[-1] not in TokenType.__members__.values():
                raise _DamagedError(f"piece {len(tokens) - 1} has score {score} and type {types[-1]}")
        elif field == 2:
            trainer = dict(_fields(_bytes(value)))
        elif field == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not tokens:
        raise _DamagedError("it has no pieces")

    model_type = trainer.get(3, 1)
    if model_type != 2:
        raise CheckpointError(
            "unsupported sentencepiece model type",
            where=path,
            expected="bpe",
            found=MODEL_TYPES.get(model_type, model_type),
        )
    for is_unsupported, what in (
        (trainer.get(24, 0), "writes spaces after words (treat_whitespace_as_suffix)"),
        (normalizer.get(2, b""), "normalizes text before tokenizing (precompiled_charsmap)"),
        (normalizer.get(4, 1), "removes repeated spaces (remove_extra_whitespaces)"),
        (not normalizer.get(5, 1), "keeps spaces as they are (escape_whitespaces = false)"),
        (TokenType.USER_DEFINED in types, "has user-defined pieces"),
    ):
        if is_unsupported:
            raise CheckpointError(f"unsupported tokenizer: it {what}, which llama.cpp's SPM does not do", where=path)
    named = {name: _bytes(trainer.get(field, text.encode())).decode() for name, (field, text) in SPECIAL_PIECES.items()}
    return Vocabulary(
        source=path,
        tokens=tokens,
        scores=scores,
        types=[TokenType(kind) for kind in types],
        add_space_prefix=bool(normalizer.get(3, 1)),
        special={name: piece for name, piece in named.items() if piece in tokens},
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: varints as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            elif wire in FIXED_BYTES:
                size = FIXED_BYTES[wire]
            else:
                raise _DamagedError(f"wire type {wire} at byte {at}")
            if size > len(data) - at:
                raise _DamagedError(f"a field of {size} bytes at byte {at} of {len(data)}")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The base-128 number at `at` and the position behind it."""
    value = 0
    for i in range(MAX_VARINT_BYTES):
        if at + i >= len(data):
            break
        value |= (data[at + i] & 0x7F) << 7 * i
        if data[at + i] < 0x80:
            return value, at + i + 1
    raise _DamagedError(f"an unfinished number at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _DamagedError("a number where text was expected")
    return value
