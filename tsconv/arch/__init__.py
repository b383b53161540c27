"""The model families that tsconv converts: `architectures[0]` of config.json -> family."""

from __future__ import annotations

from tsconv.arch import bamboo, turbosparse_mixtral
from tsconv.arch.family import Family

FAMILIES: dict[str, Family] = {
    "BambooForCausalLM": bamboo.FAMILY,
    "TurboSparseMixtralForCausalLM": turbosparse_mixtral.FAMILY,
}
