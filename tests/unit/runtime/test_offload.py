"""What goes to GPUs: counted from a model's header, for GPUs that need not be there."""

from __future__ import annotations

import dataclasses
import re

import pytest

from support import tiny
from tsconv.errors import TsconvError
from tsconv.format.header import Header, read_header
from tsconv.format.kv_cache import kv_bytes_per_token
from tsconv.native.devices import Gpu
from tsconv.runtime.offload import MARGIN_BYTES, Wanted, choose, layer_bytes
from tsconv.runtime.programs import FFN_WEIGHTS

BIG = Gpu("BIG0", "", 1 << 40, 1 << 40, False)
INTEGRATED = Gpu("SMALL0", "", 1 << 40, 1 << 40, True)


@pytest.fixture(scope="module", params=["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def header(request) -> Header:
    return read_header(tiny.converted(request.param))


def test_bytes_of_layers(header):
    """Output first, then the layers from the last one on: every tensor but the embedding is counted once, beside keys
    and values."""
    n_ctx = 300  # llama.cpp makes 512 of it
    with_ffn, without = layer_bytes(header, n_ctx, with_ffn=True), layer_bytes(header, n_ctx)
    n_layer = len(without) - 1
    keys_and_values = 512 * kv_bytes_per_token(header)
    sizes = {tensor.name: tensor.n_bytes for tensor in header.tensors}
    ffn = {name: size for name, size in sizes.items() if re.search(FFN_WEIGHTS, name)}
    assert len(ffn) == 3 * n_layer
    in_output = sizes.get("output.weight", sizes["token_embd.weight"]) + sizes["output_norm.weight"]
    assert with_ffn[0] == without[0] == in_output
    assert sum(with_ffn) - sum(without) == sum(ffn.values())
    last = sum(size for name, size in sizes.items() if name.startswith(f"blk.{n_layer - 1}.") and name not in ffn)
    assert without[1] == last + keys_and_values


def test_auto(header):
    costs = layer_bytes(header, 512)
    for n in range(len(costs) + 1):
        for spare in (0, 1):
            free = MARGIN_BYTES + sum(costs[:n]) - spare
            found = choose(header, [dataclasses.replace(BIG, free_bytes=free)], n_ctx=512)
            assert found.n_gpu_layers == max(0, n - spare)
    assert choose(header, [], n_ctx=512).n_gpu_layers == 0


@pytest.mark.parametrize(
    ("there", "wanted", "names"),
    [
        ([BIG, INTEGRATED], "auto", ["BIG0"]),
        ([INTEGRATED], "auto", []),
        ([INTEGRATED], "all", ["SMALL0"]),
        ([BIG, INTEGRATED], "all", ["BIG0"]),
        ([BIG, INTEGRATED], 0, []),
    ],
)
def test_integrated_gpus(header, there, wanted, names):
    """They are taken when they are named, or when layers are asked for and there is no other."""
    found = choose(header, there, Wanted(wanted), n_ctx=512)
    assert [gpu.name for gpu in found.gpus] == names
    assert (found.n_gpu_layers > 0) == bool(names)
    named = choose(header, there, Wanted(device="small0"), n_ctx=512)
    assert [gpu.name for gpu in named.gpus] == ["SMALL0"] and named.n_gpu_layers == named.n_layers
    assert named.arguments() == ["--n-gpu-layers", str(named.n_layers), "--device", "SMALL0"]


@pytest.mark.parametrize("wanted", ["some", -2, 1.5])
def test_wrong_numbers(header, wanted):
    with pytest.raises(TsconvError, match="layers for a GPU: expected auto, all or a number, found"):
        choose(header, [BIG], Wanted(wanted), n_ctx=512)
