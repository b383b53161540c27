"""Machine profiles: what bounds the speed on one machine; TOML files (profiles/README.md).

A profile may leave out what it does not know. Such a field gets the value of a stated rule (`ASSUMPTIONS`) and is
listed in `Machine.assumed`, so that whoever uses it can say so.
"""

from __future__ import annotations

import dataclasses
import re
import sysconfig
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

import tsconv
from tsconv.errors import OutputError, TsconvError
from tsconv.machine.schema import SCHEMA, check_table, did_you_mean
from tsconv.write import writer

GIB = 1 << 30
MAX_FILE_BYTES = 1 << 20  # a profile has some dozen lines; a model given by mistake is not read
MAX_NAME = 100


@dataclass(frozen=True)
class Cpu:
    """Processor and main memory.

    Attributes:
        model: for people.
        cores: threads up to which FFNs get faster: no hyper-threads, no cores so slow that the others wait for them.
        memory_bytes: main memory, or the part of it that may be used.
        sequential_gbps: reading with all `cores`, 1e9 bytes/s.
        random_gbps: likewise, rows of single neurons here and there, asked for in advance.
    """

    model: str
    cores: int
    memory_bytes: int
    sequential_gbps: float
    random_gbps: float


@dataclass(frozen=True)
class Disk:
    """The disk that models are read from, 1e9 bytes/s, past the page cache; random_gbps counts the neurons' bytes, not
    the pages around them."""

    sequential_gbps: float
    random_gbps: float


@dataclass(frozen=True)
class Gpu:
    """A GPU: its memory, and the way there (pcie_gbps: 1e9 bytes/s of data in one direction; latency: one transfer)."""

    model: str
    memory_bytes: int
    memory_gbps: float
    pcie_gbps: float
    pcie_latency_us: float


@dataclass(frozen=True)
class Machine:
    """A machine. `disk` and `gpu` are None where there is none.

    Attributes:
        assumed: the fields ("gpu.pcie_gbps") that a rule filled in, see `ASSUMPTIONS`.
        notes: how the figures came about, one line each; written into a profile as comments, not read back.
    """

    name: str
    cpu: Cpu
    disk: Disk | None
    gpu: Gpu | None
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)


# ---- what a profile may leave out

# Memory gives nearly as much for rows here and there, asked for in advance, as in sequence; but a core can have only so
# many cache lines under way: 6.7 GB/s for rows of 2304 bytes where it read 13 GB/s in sequence (two of them 10 to
# 12.5 and 20 to 22; Sapphire Rapids class, pages of 4 KB as mapped files have).
RANDOM_SHARE, RANDOM_GBPS_PER_CORE = 0.9, 6.5
# NVMe drives: a page takes about 0.1 ms, so eight cores waiting for one each get 0.3 GB/s of 3.
DISK_RANDOM_SHARE = 0.1
# Packet headers, acknowledgements and flow control; 12 to 13 GB/s of 15.75 are usual for 3.0 x16.
PCIE_PAYLOAD = 0.8
# Starting one copy and waiting for it, of any size up to some KB.
PCIE_LATENCY_US = 10.0
# PCI Express base specification: transfers/s per lane in 1e9, bits of data in bits sent.
PCIE_LANE = {1: (2.5, 8 / 10), 2: (5.0, 8 / 10), 3: (8.0, 128 / 130), 4: (16.0, 128 / 130), 5: (32.0, 128 / 130)}
PCIE_LANE[6] = (64.0, 236 / 256)

ASSUMPTIONS = {
    "cpu.random_gbps": f"{RANDOM_SHARE:.0%} of memory_gbps, but no more than {RANDOM_GBPS_PER_CORE} GB/s per core",
    "disk.random_gbps": f"{DISK_RANDOM_SHARE:.0%} of sequential_gbps",
    "gpu.pcie_gbps": f"{PCIE_PAYLOAD:.0%} of the PCIe link's rate",
    "gpu.pcie_latency_us": f"{PCIE_LATENCY_US:g} us",
}


def pcie_gbps(link: str) -> float | None:
    """Data rate in one direction of a link such as "3.0 x16", 1e9 bytes/s; None when it is not written so."""
    match = re.fullmatch(r"([1-6])(?:\.0)? ?x(1|2|4|8|12|16|32)", link)
    if match is None:
        return None
    transfers, coding = PCIE_LANE[int(match[1])]
    return rounded(transfers * coding / 8 * int(match[2]) * PCIE_PAYLOAD)


# ---- the file


def profile_folders() -> list[Path]:
    """Where shipped profiles may be: the checkout of an editable install, the installed package's data."""
    # An editable install leaves the Python files in the checkout and puts data into site-packages.
    package = Path(tsconv.__file__).parent
    checkout = [package.parent / "profiles"] if (package.parent / "pyproject.toml").is_file() else []
    installed = [*map(Path, tsconv.__path__), Path(sysconfig.get_path("platlib")) / "tsconv"]
    return [*checkout, *(folder / "profiles" for folder in installed)]


def _shipped() -> dict[str, Path]:
    for folder in profile_folders():
        if found := {path.stem: path for path in sorted(folder.glob("*.toml"))}:
            return found
    return {}


def machine_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(_shipped())


def load_machine(name_or_path: str | Path) -> Machine:
    """A shipped profile by its name ("pc-2080ti"), or the one in a file.

    Raises:
        TsconvError: there is no such profile, or it breaks a rule of profiles/README.md; it says which.
    """
    text, path = str(name_or_path), Path(name_or_path)
    shipped = _shipped()
    if text in shipped:
        return read_machine(shipped[text])
    if path.suffix.lower() != ".toml" and path.name == text and not path.exists():
        raise TsconvError(
            f"no machine profile {text!r}",
            expected=", ".join(sorted(shipped)) or "the path of a .toml file",
            fix=did_you_mean(text, shipped) or "or give the path of a .toml file; tsconv profile --machine writes one",
        )
    return read_machine(path)


def read_machine(path: Path) -> Machine:
    """The profile in a file. Raises TsconvError as `load_machine` does."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TsconvError(f"machine profile cannot be read: {error.strerror}", where=path) from None
    if len(data) > MAX_FILE_BYTES:
        raise TsconvError("not a machine profile", where=path, expected=f"at most {MAX_FILE_BYTES:,} bytes of TOML")
    try:
        document = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TsconvError(
            "not a machine profile", where=path, expected="UTF-8 text", found=f"other bytes in line {line}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise TsconvError("not a machine profile: it is not valid TOML", where=path, found=error) from None
    except RecursionError:
        raise TsconvError("not a machine profile: nested too deeply", where=path) from None
    return _machine(document, path)


def check_name(name: str, where: object) -> None:
    """Raises TsconvError when a machine cannot have this name."""
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        expected = f"1 to {MAX_NAME} printable characters"
        raise TsconvError("bad value", where=where, expected=expected, found=repr(name[:MAX_NAME]))


def _machine(document: dict[str, Any], where: object) -> Machine:
    """Checks a whole profile and fills in what it leaves out."""
    check_table("", document, where)
    given: dict[str, dict[str, Any]] = {table: document[table] for table in ("cpu", "disk", "gpu") if table in document}
    for table, values in given.items():
        check_table(table, values, where)
    check_name(document["name"], f"{where}: name")
    filled = {table: dict(values) for table, values in given.items()}
    _fill_in(filled, where)
    fresh = [f"{t}.{key}" for t in filled for key in filled[t] if key not in given[t]]
    stated = document.get("assumed", [])
    for field in stated:
        if field not in ASSUMPTIONS or field.partition(".")[0] not in given:
            raise TsconvError(
                "bad value", where=f"{where}: assumed", expected=f"some of {', '.join(ASSUMPTIONS)}", found=repr(field)
            )
    for table, whole in (("cpu", "memory_gbps"), ("disk", "sequential_gbps")):
        if table in filled and filled[table]["random_gbps"] > filled[table][whole]:
            raise TsconvError(
                "bad value",
                where=f"{where}: {table}.random_gbps",
                expected=f"no more than {whole} ({filled[table][whole]:g})",
                found=f"{filled[table]['random_gbps']:g}",
            )
    cpu, disk, gpu = filled["cpu"], filled.get("disk"), filled.get("gpu")
    return Machine(
        document["name"],
        Cpu(cpu["model"], cpu["cores"], _bytes(cpu), float(cpu["memory_gbps"]), float(cpu["random_gbps"])),
        None if disk is None else Disk(float(disk["sequential_gbps"]), float(disk["random_gbps"])),
        None
        if gpu is None
        else Gpu(
            gpu["model"],
            _bytes(gpu),
            float(gpu["memory_gbps"]),
            float(gpu["pcie_gbps"]),
            float(gpu["pcie_latency_us"]),
        ),
        tuple(field for field in ASSUMPTIONS if field in stated or field in fresh),
    )


def _fill_in(filled: dict[str, dict[str, Any]], where: object) -> None:
    cpu = filled["cpu"]
    cpu.setdefault("random_gbps", rounded(min(RANDOM_SHARE * cpu["memory_gbps"], RANDOM_GBPS_PER_CORE * cpu["cores"])))
    if disk := filled.get("disk"):
        disk.setdefault("random_gbps", rounded(DISK_RANDOM_SHARE * disk["sequential_gbps"]))
    if gpu := filled.get("gpu"):
        link = gpu.pop("pcie", None)
        rate = None if link is None else pcie_gbps(link)
        if link is not None and rate is None:
            raise TsconvError(
                "bad value", where=f"{where}: gpu.pcie", expected="a generation and lanes, '4.0 x16'", found=repr(link)
            )
        if link is None and "pcie_gbps" not in gpu:
            raise TsconvError("missing key", where=f"{where}: gpu", expected="pcie = '4.0 x16', or pcie_gbps")
        gpu.setdefault("pcie_gbps", rate)
        gpu.setdefault("pcie_latency_us", PCIE_LATENCY_US)


def _bytes(table: Mapping[str, Any]) -> int:
    return round(table["memory_gib"] * GIB)


def floored(n_bytes: int) -> int:
    """A size of memory to hundredths of a GiB, downwards: what a profile's memory_gib says."""
    return round(n_bytes * 100 // GIB / 100 * GIB)


def rounded(value: float, digits: int = 3) -> float:
    """To so many significant digits."""
    return float(f"{value:.{digits}g}")


# ---- writing


def to_document(machine: Machine) -> dict[str, Any]:
    """The profile as TOML tables; reading it gives an equal machine."""

    def plain(value: float) -> float:
        return int(value) if float(value).is_integer() else value

    def gib(n_bytes: int) -> float:
        short = round(n_bytes / GIB, 2)
        return plain(short if round(short * GIB) == n_bytes else n_bytes / GIB)

    cpu, disk, gpu = machine.cpu, machine.disk, machine.gpu
    document: dict[str, Any] = {"name": machine.name}
    if machine.assumed:
        document["assumed"] = list(machine.assumed)
    document["cpu"] = {
        "model": cpu.model,
        "cores": cpu.cores,
        "memory_gib": gib(cpu.memory_bytes),
        "memory_gbps": plain(cpu.sequential_gbps),
        "random_gbps": plain(cpu.random_gbps),
    }
    if disk is not None:
        document["disk"] = {
            "sequential_gbps": plain(disk.sequential_gbps),
            "random_gbps": plain(disk.random_gbps),
        }
    if gpu is not None:
        document["gpu"] = {
            "model": gpu.model,
            "memory_gib": gib(gpu.memory_bytes),
            "memory_gbps": plain(gpu.memory_gbps),
            "pcie_gbps": plain(gpu.pcie_gbps),
            "pcie_latency_us": plain(gpu.pcie_latency_us),
        }
    return document


def check_output(path: Path, force: bool) -> None:
    """Refuses an output of `save_machine` before anything is measured for it.

    Raises:
        OutputError: not a .toml file, it exists without `force`, or its folder is missing or not writable.
    """
    if path.suffix.lower() != ".toml":
        raise OutputError("a machine profile is a .toml file", where=path, fix="name it NAME.toml")
    writer.check_output(path, force)


def save_machine(machine: Machine, path: Path, force: bool = False) -> None:
    """Writes a profile, all or nothing; `machine.notes` become comments at its head.

    Raises:
        OutputError: see `check_output`; or it cannot be written.
        TsconvError: the machine breaks a rule of the format.
    """
    check_output(path, force)
    document = to_document(machine)
    _machine(document, path)  # what is written can be read
    notes = "".join(f"{line}\n" for note in machine.notes for line in _comment(note))
    writer.write_file(path, (notes + tomli_w.dumps(document)).encode(), force)


def _comment(note: str) -> list[str]:
    text = "".join(c if c.isprintable() else " " for c in note)
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)


def described(machine: Machine) -> list[tuple[str, str, str]]:
    """A row per field: its name, its value, and by which rule it was assumed if it was."""
    rows: list[tuple[str, str, str]] = [("name", machine.name, "")]
    document = to_document(machine)
    for part in ("cpu", "disk", "gpu"):
        if part not in document:
            rows.append((part, "none", ""))
        for key, value in document.get(part, {}).items():
            name, rule = f"{part}.{key}", SCHEMA[part][key]
            text = value if isinstance(value, str) else f"{value:g} {rule.unit.partition(' ')[0]}".rstrip()
            rows.append((name, text, f"assumed: {ASSUMPTIONS[name]}" if name in machine.assumed else ""))
    return rows
