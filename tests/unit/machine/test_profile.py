"""Machine profiles: reading, the rules they must keep, what is filled in, writing."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT
from tsconv.cli.text import table as as_text
from tsconv.errors import OutputError, TsconvError
from tsconv.machine import profile as machines
from tsconv.machine.profile import (
    GIB,
    Cpu,
    Disk,
    Gpu,
    Machine,
    described,
    load_machine,
    machine_names,
    save_machine,
)
from tsconv.machine.schema import SCHEMA

PROFILES = ROOT / "profiles"

WHOLE = """\
name = "mine"
[cpu]
model = "A"
cores = 6
memory_gib = 31.25
memory_gbps = 40
random_gbps = 35.5
[disk]
sequential_gbps = 3.1
random_gbps = 0.5
[gpu]
model = "B"
memory_gib = 8
memory_gbps = 448
pcie_gbps = 12.25
pcie_latency_us = 8.5
"""
MACHINE = Machine(
    "mine",
    Cpu("A", 6, 31 * GIB + GIB // 4, 40.0, 35.5),
    Disk(3.1, 0.5),
    Gpu("B", 8 * GIB, 448.0, 12.25, 8.5),
)


@pytest.fixture
def profile(tmp_path):
    """Writes a profile: `profile(text)` or bytes."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "m.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def without(text: str, *keys: str) -> str:
    for key in keys:
        text, n = re.subn(rf"^{key} = .*\n", "", text, count=1, flags=re.MULTILINE)
        assert n == 1
    return text


def table(text: str, name: str) -> str:
    """`text` without the table `name`."""
    return re.sub(rf"\[{name}\]\n(\w.*\n)*", "", text)


# ---- shipped profiles


def test_shipped():
    assert machine_names() == sorted(path.stem for path in PROFILES.glob("*.toml"))
    assert {"pc-2080ti", "pc-laptop", "cpu-only"} <= set(machine_names())
    for name in machine_names():
        assert load_machine(name).name == name


def test_shipped_figures():
    desktop, laptop, plain = map(load_machine, ("pc-2080ti", "pc-laptop", "cpu-only"))
    assert (desktop.cpu.memory_bytes, desktop.cpu.sequential_gbps, desktop.cpu.cores) == (64 * GIB, 38.4, 8)
    assert desktop.gpu is not None
    assert (desktop.gpu.memory_bytes, desktop.gpu.memory_gbps) == (11 * GIB, 616)
    assert desktop.gpu.pcie_gbps == 12.6  # 8e9 x 128/130 x 16 lanes / 8 bits x 0.8
    assert desktop.assumed == ("cpu.random_gbps", "gpu.pcie_gbps", "gpu.pcie_latency_us")
    assert laptop.gpu is not None
    assert (laptop.cpu.memory_bytes, laptop.cpu.sequential_gbps) == (32 * GIB, 67.2)
    assert (laptop.gpu.memory_bytes, laptop.gpu.pcie_gbps) == (16 * GIB, 25.2)
    assert plain.gpu is None
    assert plain.disk == Disk(3.5, 0.35)


def test_unknown_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TsconvError, match=r"no machine profile 'pc-2080i': expected cpu-only, .*; did you mean 'pc-2080ti'\?"
    ):
        load_machine("pc-2080i")
    with pytest.raises(TsconvError, match=r"'zzz': .*tsconv profile --machine writes one"):
        load_machine("zzz")
    with pytest.raises(TsconvError, match=r"zzz\.toml: machine profile cannot be read: No such file"):
        load_machine("zzz.toml")
    with pytest.raises(TsconvError, match="dir/zzz: machine profile cannot be read: No such file"):
        load_machine("dir/zzz")
    (tmp_path / "zzz").write_text(WHOLE)  # a file without the suffix is found all the same
    assert load_machine("zzz") == MACHINE


def test_profiles_of_an_installed_package(tmp_path):
    """As a wheel leaves it: the package without the checkout around it, profiles in tsconv/profiles."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "tsconv", site / "tsconv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROFILES, site / "tsconv" / "profiles")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.meta_path = [f for f in sys.meta_path "
        "if not type(f).__name__.startswith('ScikitBuild')]\n"
        "import tsconv; from tsconv.machine.profile import load_machine, machine_names, profile_folders\n"
        "print(tsconv.__file__, profile_folders()[0], machine_names(), load_machine('cpu-only').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 2)[:2] == [f"{site}/tsconv/__init__.py", f"{site}/tsconv/profiles"]
    assert done.stdout.rstrip().endswith("cpu-only")


def test_readme_names_every_key():
    table_of_keys = (PROFILES / "README.md").read_text().partition("What is left out")[0]
    documented = re.findall(r"^\| `(?:(\w+)\.)?(\w+)` \|", table_of_keys, re.MULTILINE)
    keys = [(name, key) for name, keys in SCHEMA.items() for key, rule in keys.items() if rule.kind is not dict]
    assert sorted(documented) == sorted(keys)


# ---- reading


def test_whole(profile):
    assert load_machine(str(profile(WHOLE))) == MACHINE
    assert load_machine(profile(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())) == MACHINE
    assert load_machine(profile(table(table(WHOLE, "gpu"), "disk"))) == dataclasses.replace(
        MACHINE, gpu=None, disk=None
    )


def test_what_is_left_out(profile):
    text = without(WHOLE, "random_gbps", "pcie_gbps", "pcie_latency_us").replace(
        'model = "B"', 'model = "B"\npcie="4 x8"'
    )
    machine = load_machine(profile(without(text, "random_gbps")))
    assert machine.cpu.random_gbps == 36  # 90 % of 40
    assert machine.disk is not None and machine.disk.random_gbps == 0.31
    assert machine.gpu is not None
    assert (machine.gpu.pcie_gbps, machine.gpu.pcie_latency_us) == (12.6, 10)
    assert machine.assumed == ("cpu.random_gbps", "disk.random_gbps", "gpu.pcie_gbps", "gpu.pcie_latency_us")
    few = load_machine(profile(without(text, "random_gbps").replace("cores = 6", "cores = 2")))
    assert few.cpu.random_gbps == 13  # what two cores can ask for


def test_what_is_given_is_not_assumed(profile):
    machine = load_machine(profile(WHOLE.replace('model = "B"', 'model = "B"\npcie = "1.0 x1"')))
    assert machine == MACHINE


@pytest.mark.parametrize(
    ("link", "rate"),
    [("1.0 x16", 3.2), ("2.0 x16", 6.4), ("3.0 x4", 3.15), ("4.0 x16", 25.2), ("5 x16", 50.4), ("6.0 x16", 94.4)],
)
def test_pcie(link, rate):
    assert machines.pcie_gbps(link) == rate


def replaced(old: str, new: str) -> str:
    assert old in WHOLE
    return WHOLE.replace(old, new, 1)


REFUSED = {
    "unknown key": (replaced("cores", "core"), r"m\.toml: cpu: unknown key 'core': .*did you mean 'cores'\?"),
    "unknown table": (WHOLE + "[gpus]\n", r"m\.toml: unknown table 'gpus': expected name, .*; did you mean 'gpu'\?"),
    "strange key": (WHOLE + "zzzz = 1\n", r"gpu: unknown key 'zzzz': .*; profiles/README\.md says what they mean"),
    "missing name": (without(WHOLE, "name"), r"m\.toml: missing key: expected name"),
    "missing cpu": (table(WHOLE, "cpu"), r"m\.toml: missing table: expected \[cpu\]"),
    "missing cores": (without(WHOLE, "cores"), r"cpu: missing key: expected cores"),
    "missing memory": (without(WHOLE, "memory_gib"), "cpu: missing key: expected memory_gib"),
    "missing rate": (without(WHOLE, "memory_gbps"), "cpu: missing key: expected memory_gbps"),
    "missing pcie": (without(WHOLE, "pcie_gbps"), "gpu: missing key: expected pcie = '4.0 x16', or pcie_gbps"),
    "missing disk rate": (without(WHOLE, "sequential_gbps"), "disk: missing key: expected sequential_gbps"),
    "text for a number": (replaced("= 40", '= "40"'), r"cpu\.memory_gbps: bad value: expected GB/s .*, found '40'"),
    "truth for a number": (replaced("= 6", "= true"), r"cpu\.cores: bad value: expected a whole number .*, found True"),
    "fraction of a core": (replaced("= 6", "= 6.0"), r"cpu\.cores: .*whole number from 1 to 4096, found 6\.0"),
    "number for text": (replaced('"A"', "7"), r"cpu\.model: bad value: expected text, found 7"),
    "date for text": (replaced('"mine"', "2024-01-01"), r"m\.toml: name: bad value: expected text, found datetime"),
    "empty name": (replaced('"mine"', '""'), "name: bad value: expected text, found nothing"),
    "long name": (replaced("mine", "n" * 101), "name: bad value: expected 1 to 100 printable characters"),
    "name of two lines": (replaced("mine", "a\\nb"), r"name: bad value: expected 1 to 100 .*, found 'a\\nb'"),
    "value for a table": (
        table(WHOLE, "disk").replace("[cpu]", "disk = 3\n[cpu]"),
        "disk: bad value: expected a table",
    ),
    "list of tables": (WHOLE.replace("[gpu]", "[[gpu]]"), r"m\.toml: gpu: bad value: expected a table, found \["),
    "zero": (replaced("= 6", "= 0"), r"cpu\.cores: .*found 0"),
    "negative": (replaced("= 40", "= -40"), r"cpu\.memory_gbps: bad value: .*found -40$"),
    "nan": (replaced("= 40", "= nan"), r"cpu\.memory_gbps: bad value: .*found nan$"),
    "infinite": (replaced("= 448", "= inf"), r"gpu\.memory_gbps: bad value: .*found inf$"),
    "huge integer": (replaced("= 6", "= 9223372036854775807"), r"cpu\.cores: bad value: "),
    "MB/s": (
        replaced("= 40", "= 38400"),
        r"cpu\.memory_gbps: bad value: expected GB/s \(1e9 bytes/s\) from 0\.1 to 5000, found 38400; "
        r"write 38\.4 if that is in MB/s",
    ),
    "MiB": (replaced("= 31.25", "= 65536"), r"cpu\.memory_gib: .*found 65536; write 64 if that is in MiB"),
    "MiB of a GPU": (replaced("gib = 8", "gib = 11264"), r"gpu\.memory_gib: .*; write 11 if that is in MiB"),
    "ns": (replaced("= 8.5", "= 12000"), r"gpu\.pcie_latency_us: .*; write 12 if that is in ns"),
    "random above sequential": (
        replaced("= 35.5", "= 41"),
        r"cpu\.random_gbps: .*no more than memory_gbps \(40\), found 41",
    ),
    "disk: random above": (replaced("= 0.5", "= 3.2"), r"disk\.random_gbps: .*no more than sequential_gbps \(3\.1\)"),
    "pcie": (
        replaced("pcie_gbps = 12.25", 'pcie = "x16"'),
        r"gpu\.pcie: bad value: expected .*'4\.0 x16', found 'x16'",
    ),
    "pcie lanes": (replaced("pcie_gbps = 12.25", 'pcie = "4.0 x5"'), r"gpu\.pcie: bad value"),
    "assumed": ('assumed = ["cpu.cores"]\n' + WHOLE, r"assumed: bad value: expected some of .*, found 'cpu\.cores'"),
    "assumed of what is not there": (
        'assumed = ["disk.random_gbps"]\n' + table(WHOLE, "disk"),
        r"assumed: bad value: .*found 'disk\.random_gbps'",
    ),
    "assumed numbers": ("assumed = [1]\n" + WHOLE, r"assumed: bad value: expected a list of field names, found \[1\]"),
    "not TOML": (replaced("cores = 6", "cores 6"), r"not valid TOML: found .*line 4"),
    "twice": (replaced("cores = 6", "cores = 6\ncores = 6"), r"not valid TOML: found .*line 5"),
    "nothing": ("", r"m\.toml: missing key: expected name"),
    "UTF-16": (WHOLE.encode("utf-16"), "not a machine profile: expected UTF-8 text, found other bytes in line 1"),
    "Latin-1": (
        replaced('"A"', '"Prozessor für"').encode("latin-1"),
        "expected UTF-8 text, found other bytes in line 3",
    ),
    "nested": ("a = " + "[" * 100000, "m.toml: not a machine profile"),
    "a model": (b"GGUF" + bytes(2 << 20), "not a machine profile: expected at most 1,048,576 bytes of TOML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(profile, case):
    text, message = REFUSED[case]
    path = profile(text)
    with pytest.raises(TsconvError, match=message) as caught:
        load_machine(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_not_a_file(tmp_path):
    with pytest.raises(TsconvError, match="machine profile cannot be read: Is a directory"):
        load_machine(str(tmp_path))


# ---- writing


def test_round_trip(tmp_path):
    for machine in (MACHINE, dataclasses.replace(MACHINE, gpu=None, disk=None), *map(load_machine, machine_names())):
        path = tmp_path / f"{machine.name}-{machine.gpu is None}.toml"
        save_machine(machine, path)
        assert load_machine(path) == machine
    odd = dataclasses.replace(MACHINE, cpu=Cpu("A", 6, 25276501984, 40.0, 35.5), name='quotes " and ünï \\')
    save_machine(odd, tmp_path / "odd.toml")
    assert load_machine(tmp_path / "odd.toml") == odd


def test_notes_are_comments(tmp_path):
    path = tmp_path / "m.toml"
    noted = dataclasses.replace(MACHINE, notes=("measured\nname = 'evil'", "word " * 60, "x" * 300))
    save_machine(noted, path)
    assert load_machine(path) == MACHINE
    head = path.read_text().split('name = "mine"')[0].splitlines()
    assert head[0] == "# measured name = 'evil'"
    assert len(head) > 3 and all(line.startswith("# ") for line in head)


def test_output_refused(tmp_path):
    path = tmp_path / "m.toml"
    save_machine(MACHINE, path)
    before = path.read_text()
    with pytest.raises(OutputError, match=r"m\.toml: output exists; choose another name, or --force to replace it"):
        save_machine(dataclasses.replace(MACHINE, name="other"), path)
    assert path.read_text() == before
    save_machine(dataclasses.replace(MACHINE, name="other"), path, force=True)
    assert load_machine(path).name == "other"
    with pytest.raises(OutputError, match=r"a machine profile is a \.toml file; name it NAME\.toml"):
        save_machine(MACHINE, tmp_path / "model.gguf", force=True)
    with pytest.raises(OutputError, match="missing: folder of the output does not exist; make it, or name another"):
        save_machine(MACHINE, tmp_path / "missing" / "m.toml")
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(OutputError, match="output is a directory"):
        save_machine(MACHINE, tmp_path / "d.toml", force=True)
    assert sorted(os.listdir(tmp_path)) == ["d.toml", "m.toml"]


def test_nothing_half_written(tmp_path):
    """A limit on the size of files stands in for a full disk: what was there before stays, and no .part is left."""
    path = tmp_path / "m.toml"
    save_machine(MACHINE, path)
    before = path.read_text()
    code = f"""
import resource, signal; from pathlib import Path
from tsconv.machine.profile import load_machine, save_machine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
save_machine(load_machine("cpu-only"), Path({str(path)!r}), force=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"OutputError: {path}: cannot be written: File too large" in done.stderr
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["m.toml"]


@pytest.mark.parametrize(
    "broken",
    [
        dataclasses.replace(MACHINE, name=""),
        dataclasses.replace(MACHINE, cpu=dataclasses.replace(MACHINE.cpu, cores=0)),
        dataclasses.replace(MACHINE, cpu=dataclasses.replace(MACHINE.cpu, sequential_gbps=float("inf"))),
        dataclasses.replace(MACHINE, disk=Disk(float("nan"), 0.1)),
    ],
)
def test_a_broken_machine_is_not_written(tmp_path, broken):
    with pytest.raises(TsconvError, match="bad value"):
        save_machine(broken, tmp_path / "m.toml")
    assert os.listdir(tmp_path) == []


def test_describe():
    text = as_text(described(load_machine("pc-2080ti")))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["cpu.memory_gbps"].split()[1:] == ["38.4", "GB/s"]
    assert lines["cpu.random_gbps"].endswith(
        "34.6 GB/s                   assumed: " + machines.ASSUMPTIONS["cpu.random_gbps"]
    )
    assert lines["disk"].split() == ["disk", "none"]
    assert "assumed" not in as_text(described(MACHINE))
