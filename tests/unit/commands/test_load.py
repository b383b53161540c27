"""What a machine and a placement say about GPUs, where -ngl says nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from support import tiny
from support.placements import machine, placement_for
from tsconv.commands.load import Choice, choose
from tsconv.machine.profile import Gpu as MachineGpu
from tsconv.native.devices import Gpu
from tsconv.placement.file import LayerPlacement
from tsconv.runtime.offload import MARGIN_BYTES, Wanted

THERE = [Gpu("G0", "", 8 << 30, 8 << 30, False)]
WITH_GPU = dataclasses.replace(machine(), gpu=MachineGpu("a GPU", 4 << 30, 400.0, 12.0, 10.0))


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny.converted()


def chosen(model: Path, **changes: object) -> Choice:
    return dataclasses.replace(choose(model, WITH_GPU, n_threads=1), **changes)


def test_a_machine_without(model):
    assert chosen(model, machine=machine()).gpu(Wanted(), THERE).n_gpu_layers == 0
    # One that llama.cpp has no backend for may still take FFNs.
    assert chosen(model).gpu(Wanted(), []).n_gpu_layers == "auto"


def test_no_more_than_the_machine_has(model):
    choice = chosen(model)
    assert choice.gpu(Wanted(), THERE) == Wanted(vram_budget=(4 << 30) - MARGIN_BYTES)
    assert choice.gpu(Wanted(vram_budget=1 << 20), THERE).vram_budget == 1 << 20


@pytest.mark.parametrize(("on_gpu", "output", "n"), [(0, "cpu", 0), (0, "gpu", 1), (2, "gpu", 3)])
def test_a_placement(model, on_gpu, output, n):
    """llama.cpp counts the output as a layer, the first one that goes."""
    layers = tuple(LayerPlacement("gpu" if i < on_gpu else "cpu", "cpu", (0,), (10,)) for i in range(6))
    placement = placement_for(model, [[10]] * 6, layers=layers, output=output)
    assert chosen(model, placement=placement).gpu(Wanted(), THERE).n_gpu_layers == n


def test_neurons_of_a_placement(model):
    """Its own budget counts, if it is less than what the machine has."""
    budgets = {"vram": 1 << 30, "ram": 0, "vram_used": 0, "ram_used": 0}
    placement = placement_for(model, [[64]] * 6, gpu=32, budgets=budgets)
    for there in (THERE, []):
        found = chosen(model, placement=placement).gpu(Wanted(), there)
        assert found.vram_budget == 1 << 30 and found.gpu_hot == [(32,)] * 6
    assert chosen(model, placement=placement).gpu(Wanted(0), THERE).gpu_hot is None


def test_the_user_decides(model):
    for wanted in (0, 3, "all"):
        asked = Wanted(wanted, vram_budget=5)
        assert chosen(model, machine=machine()).gpu(asked, THERE) == asked
