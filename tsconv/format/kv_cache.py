"""How large llama.cpp's KV cache of a model is."""

from __future__ import annotations

from tsconv.checkpoint.config import MAX_DIM
from tsconv.format.header import Header
from tsconv.format.order import dimension

CONTEXT_STEP = 256  # llama_init_from_model pads n_ctx to a multiple of it (llama-context.cpp)
ITEM_BYTES = 2  # f16, llama.cpp's default


def padded(n_ctx: int) -> int:
    """Tokens that a context of `n_ctx` tokens has room for."""
    return -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP


def kv_bytes_per_token(header: Header) -> int:
    """Bytes of one layer's keys and values of a token; heads have n_embd / n_head elements, as in all the families.

    Raises:
        ModelFileError: the header lacks a dimension.
    """
    n_embd, n_head, n_head_kv = (
        dimension(header, f"llama.{name}", MAX_DIM)
        for name in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    return 2 * ITEM_BYTES * n_head_kv * (n_embd // n_head)
