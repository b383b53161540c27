"""What is chosen for a machine: threads, and the weights that belong in RAM."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

from support import tiny
from support.placements import machine, placement_for
from tsconv.errors import ModelFileError
from tsconv.format.header import read_header
from tsconv.machine.limits import available_memory, usable_cores
from tsconv.native.library import load_backend
from tsconv.placement.fit import MARGIN_BYTES, fit


def fitted(model: Path, **changes: object):
    arguments = {"sidecar_bytes": 1 << 20, "sparsity": "predictor", "n_ctx": 512, "cores": 2}
    arguments |= {"available_bytes": 8 << 30, "machine": machine()}
    return fit(read_header(model), **arguments | changes)


def ffn_bytes(model: Path) -> int:
    parts = (".ffn_gate.", ".ffn_up.", ".ffn_down.", ".ffn_gate_exps.", ".ffn_up_exps.", ".ffn_down_exps.")
    return sum(t.n_bytes for t in read_header(model).tensors if any(part in t.name for part in parts))


@pytest.mark.parametrize(
    ("profile", "here", "given", "expected"), [(64, 2, None, 2), (2, 64, None, 2), (64, 2, 5, 5), (1, 8, None, 1)]
)
def test_threads(profile, here, given, expected):
    found = fitted(tiny.converted(), machine=machine(profile), cores=here, n_threads=given)
    assert (found.n_threads, found.threads_given) == (expected, given is not None)


def test_cores_of_this_process():
    assert fitted(tiny.converted(), machine=machine(10**6), cores=None).n_threads == usable_cores()
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("name", ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"])
def test_all_in_ram_when_it_fits(name):
    model = tiny.converted(name)
    keys = read_header(model).keys
    enough = fitted(model, n_ctx=1024)
    assert enough.strategy == "all"
    n_layer, n_head = keys["llama.block_count"], keys["llama.attention.head_count"]
    kv = 1024 * n_layer * 2 * 2 * keys["llama.attention.head_count_kv"] * keys["llama.embedding_length"] // n_head
    assert enough.context_bytes == kv
    assert enough.needed_bytes == model.stat().st_size + (1 << 20) + kv + MARGIN_BYTES
    assert enough.hot.shape == (n_layer, max(1, keys.get("llama.expert_count", 0)))
    assert (enough.hot == keys["llama.feed_forward_length"]).all()
    assert enough.hot_bytes == ffn_bytes(model)
    assert (enough.lock, enough.read_ahead) == (False, True)
    assert fitted(model, n_ctx=1024, available_bytes=enough.needed_bytes).strategy == "all"

    less = fitted(model, n_ctx=1024, available_bytes=enough.needed_bytes - 1)
    assert less.strategy == "on_demand"
    assert not less.hot.any()
    assert (less.lock, less.read_ahead) == (True, False)
    assert fitted(model, machine=machine(8, enough.needed_bytes - 1), n_ctx=1024).strategy == "on_demand"
    assert fitted(model, n_ctx=2048, available_bytes=enough.needed_bytes).strategy == "on_demand"
    exact = fitted(model, sparsity="exact", available_bytes=enough.needed_bytes // 2)
    assert (exact.strategy, exact.read_ahead) == ("on_demand", True), "every gate row is read"
    moved = fitted(model, sparsity="predictor:1", available_bytes=enough.needed_bytes // 2)
    assert (moved.strategy, moved.read_ahead) == ("on_demand", False), "a predictor picks rows at any threshold"


def test_nothing_is_locked_when_the_rest_has_no_room():
    assert not fitted(tiny.converted(), available_bytes=MARGIN_BYTES // 2).lock


def test_placement_is_followed_as_far_as_it_fits():
    model = tiny.converted("tiny-turbosparse-mixtral")
    ram = [[10 * e + layer for e in range(8)] for layer in range(3)]
    placement = placement_for(model, ram)
    found = fitted(model, placement=placement)
    assert (found.strategy, found.hot.tolist(), found.gpu_neurons) == ("placement", ram, 0)
    assert found.hot_bytes == found.asked_bytes
    assert (found.lock, found.read_ahead) == (True, False)
    assert fitted(model, placement=placement_for(model, [[9] * 8] * 3, gpu=4)).gpu_neurons == 4 * 8 * 3

    fixed = found.needed_bytes - ffn_bytes(model)
    half = fitted(model, placement=placement, available_bytes=fixed + found.asked_bytes // 2)
    np.testing.assert_array_equal(half.hot, np.array(ram) // 2)
    assert half.hot_bytes <= found.asked_bytes // 2
    nothing = fitted(model, placement=placement, available_bytes=fixed // 2)
    assert not nothing.hot.any()


@pytest.mark.parametrize(
    "changes", [{"fingerprint": "0" * 64}, {"pair_id": "0" * 32}, {"neuron_order": "hot_first"}, {"layers": ()}]
)
def test_placement_of_another_model(changes):
    model = tiny.converted()
    ram = [[1]] * 6
    if changes == {"layers": ()}:
        ram, changes = [[1]] * 5, {}
    with pytest.raises(ModelFileError, match="placement"):
        fitted(model, placement=placement_for(model, ram, **changes))


# ---- what the system allows


def fake_proc(folder: Path, cgroup: str, mounts: str, available_kb: int = 10_000_000) -> Path:
    """A /proc with the files that are read; {root} in `mounts` stands for `folder`."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {available_kb} kB\n")
    (folder / "proc" / "self" / "cgroup").write_text(cgroup)
    (folder / "proc" / "self" / "mountinfo").write_text(mounts.format(root=folder))
    return folder / "proc"


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def available(proc: Path) -> int:
    """available_memory, of which the native library has one of its own."""
    native = ctypes.CDLL(str(load_backend().path)).tsffn_available_memory
    native.argtypes, native.restype = [ctypes.c_char_p], ctypes.c_uint64
    found = available_memory(proc)
    assert native(os.fsencode(proc)) == found
    return found


def test_memory_without_control_groups(tmp_path):
    assert available(fake_proc(tmp_path, "", "")) == 10_240_000_000
    (tmp_path / "proc" / "self" / "cgroup").unlink()
    assert available(tmp_path / "proc") == 10_240_000_000


def test_limits_of_control_groups_v2(tmp_path):
    """The tightest of the groups counts; page cache can be had back."""
    proc = fake_proc(tmp_path, "0::/a/b\n", "31 23 0:28 / {root}/cg rw,relatime shared:9 - cgroup2 cgroup2 rw\n")
    statistics = "anon 1\ninactive_file 300\nactive_file 200\nfile_mapped 5"
    write(
        tmp_path / "cg" / "a" / "b", memory__max="max", memory__current="7", memory__stat=statistics, cpu__max="max 9"
    )
    assert available(proc) == 10_240_000_000
    write(tmp_path / "cg" / "a", memory__max="5000", memory__current="4000", memory__stat=statistics)
    assert available(proc) == 1500
    write(tmp_path / "cg" / "a" / "b", memory__max="6000", memory__current="5900")
    assert available(proc) == 600
    write(tmp_path / "cg" / "a" / "b", memory__current="9000")
    assert available(proc) == 0
    write(tmp_path / "cg" / "a", cpu__max="100000 100000")
    assert usable_cores(proc) == 1
    write(tmp_path / "cg" / "a", cpu__max="1000 100000")
    assert usable_cores(proc) == 1
    write(tmp_path / "cg" / "a", cpu__max="100000000 100000")
    assert usable_cores(proc) == usable_cores(tmp_path)


def test_limits_of_control_groups_v1(tmp_path):
    """A container sees its own group at the mount point, named by its path outside."""
    cgroup = "9:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n"
    mounts = "".join(
        f"3{i} 31 0:3{i} /docker/x {{root}}/cg/{name} rw - cgroup cgroup rw,{name}\n"
        for i, name in enumerate(("memory", "cpu,cpuacct"))
    )
    proc = fake_proc(tmp_path, cgroup, mounts)
    statistics = "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20"
    files = {"memory__usage_in_bytes": "900", "memory__stat": statistics}
    write(tmp_path / "cg" / "memory", memory__limit_in_bytes="1000", **files)
    assert available(proc) == 150
    write(tmp_path / "cg" / "memory", memory__limit_in_bytes=str((1 << 63) - 4096))
    assert available(proc) == 10_240_000_000
    write(tmp_path / "cg" / "cpu,cpuacct", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    assert usable_cores(proc) == 1
    write(tmp_path / "cg" / "cpu,cpuacct", cpu__cfs_quota_us="-1")
    assert usable_cores(proc) == usable_cores(tmp_path)
