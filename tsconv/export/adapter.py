"""Which adapters (LoRA) fit a model."""

from __future__ import annotations

import re

from tsconv.errors import ModelFileError
from tsconv.export.gguf_header import Header
from tsconv.export.order import CHECKPOINT, kind_of
from tsconv.transform import qkv

FFN = re.compile(r"^blk\.\d+\.ffn_(gate|up|down)(_exps)?\.")  # not the router, ffn_gate_inp
LORA = re.compile(r"\.lora_[ab]$")


def refuse_adapter(model: Header, adapter: Header) -> None:
    """Refuses an adapter that changes FFN tensors of a model whose neurons are not where its training had them, or q, k
    or v of one that has them in one matrix.

    Raises:
        ModelFileError: it would be added to other neurons, or has nothing to be added to.
    """
    present = {tensor.name for tensor in model.tensors}
    for name in dict.fromkeys(LORA.sub("", tensor.name) for tensor in adapter.tensors):
        if FFN.match(name) and kind_of(model) != CHECKPOINT:
            raise ModelFileError(
                f"the adapter changes {name}, whose neurons are in another order in {model.path}",
                where=adapter.path,
                fix="use it with a model that was converted without --profile",
            )
        if qkv.PART.match(name) and name not in present and qkv.together(name) in present:
            raise ModelFileError(
                f"the adapter changes {name}, which is part of {qkv.together(name)} in {model.path}",
                where=adapter.path,
                fix="use it with a model that was converted with --no-fuse-qkv",
            )
