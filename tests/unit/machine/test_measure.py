"""Measuring this machine. Nothing here says how fast it is: figures are sane, refusals and notes are right."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import TESTS
from tsconv.errors import BackendError, TsconvError
from tsconv.machine import disk as measure_disk
from tsconv.machine import gpu as measure_gpu
from tsconv.machine import limits, measure
from tsconv.machine.profile import GIB, described, load_machine, save_machine
from tsconv.native.library import load_backend

# ---- cores


@pytest.mark.parametrize(
    ("what", "rates", "cores"),
    [
        ("one CPU", {1: 5.0}, 1),
        ("eight equal cores", {1: 1, 2: 2, 3: 2.9, 4: 3.9, 6: 5.8, 8: 7.6}, 8),
        ("hyper-threads", {1: 1, 2: 2, 3: 2.9, 4: 3.9, 6: 4.4, 8: 4.9}, 4),
        ("a quota of two CPUs", {1: 1, 2: 2, 3: 2.02, 4: 1.9}, 2),
        ("half a CPU", {1: 0.5, 2: 0.5}, 1),
        ("eight fast cores, four at half their speed", {1: 1, 2: 2, 4: 4, 6: 6, 8: 8, 12: 6}, 8),
        ("one round that something disturbed", {1: 1, 2: 2, 3: 1.1, 4: 3.9}, 4),
        ("threads that fight for a busy CPU", {1: 5.5, 2: 0.5}, 1),
    ],
)
def test_computing_cores(what, rates, cores):
    assert measure.computing_cores(rates) == cores, what


@pytest.mark.parametrize(
    ("n_cpus", "n_physical", "n_granted", "expected"),
    [
        (1, 1, 1, [1]),
        (8, 4, 4, [1, 2, 3, 4, 6, 8]),
        (20, 12, 12, [1, 2, 3, 4, 6, 8, 12, 16, 20]),
        (64, 32, 2, [1, 2, 3]),  # a quota of two CPUs: no need to try 64
        (7, 7, 7, [1, 2, 3, 4, 6, 7]),
    ],
)
def test_candidates(n_cpus, n_physical, n_granted, expected):
    assert measure.candidates(n_cpus, n_physical, n_granted) == expected


def test_affinity_is_respected():
    """A process bound to one CPU finds one core, whatever the machine has."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tsconv.machine import measure; from tsconv.native.library import load_backend\n"
        "print(measure.measure_cores(load_backend())[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_no_more_threads_than_openmp_grants():
    code = "from tsconv.native.library import load_backend; print(load_backend().measure_compute(3, 0.01))"
    env = os.environ | {"OMP_THREAD_LIMIT": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


# ---- memory


def test_rows_are_read():
    """The sum of every word of every row, over all passes: none is left out, none is read twice."""
    backend = load_backend()
    words = (ctypes.c_uint64 * (40 * 288))(*range(40 * 288))
    results = [
        backend.measure_rows(ctypes.addressof(words), 40, 2304, every=10, nth=nth, n_threads=2) for nth in range(10)
    ]
    assert sum(total for _, total in results) == sum(range(40 * 288))
    assert all(0 < seconds < float("inf") for seconds, _ in results)
    with pytest.raises(BackendError, match="memory cannot be measured"):
        backend.measure_rows(ctypes.addressof(words), 40, 2301, every=1, nth=0, n_threads=1)


def test_memory_is_measured_and_given_back(monkeypatch):
    monkeypatch.setattr(measure, "MIN_BUFFER", 64 << 20)
    monkeypatch.setattr(measure, "cache_bytes", lambda: 0)
    sequential, random, notes = measure.measure_memory(load_backend(), 2)
    assert 1e7 < random <= sequential < 1e13
    assert len(notes) == 1
    assert notes[0].startswith("memory: 0.06 GiB in pages of 4 KB, 2 threads;")


def test_a_buffer_within_the_caches_is_noted(monkeypatch):
    monkeypatch.setattr(measure.limits, "available_memory", lambda: 4 * measure.SMALLEST_BUFFER)
    monkeypatch.setattr(measure, "cache_bytes", lambda: measure.SMALLEST_BUFFER)
    _, _, notes = measure.measure_memory(load_backend(), 1)
    assert notes[1] == "memory: no more was available, and the caches hold 0.06 GiB: they are in the figures"


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(measure.limits, "available_memory", lambda: 4 * measure.SMALLEST_BUFFER - 5000)
    with pytest.raises(
        TsconvError, match="too little memory to measure it: expected 268,435,456 bytes available, found "
    ):
        measure.measure_memory(load_backend(), 1)


def test_total_memory_heeds_control_groups(tmp_path):
    group = tmp_path / "mount" / "outer" / "inner"
    group.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemAvailable:    8000000 kB\n")
    assert limits.total_memory(tmp_path) == 16 * GIB
    (tmp_path / "self" / "cgroup").write_text("0::/outer/inner\n")
    (tmp_path / "self" / "mountinfo").write_text(f"31 23 0:28 / {tmp_path}/mount rw - cgroup2 cgroup rw\n")
    (group / "memory.max").write_text("max\n")
    assert limits.total_memory(tmp_path) == 16 * GIB
    (group.parent / "memory.max").write_text(f"{6 * GIB}\n")
    assert limits.total_memory(tmp_path) == 6 * GIB


def test_busy_share(tmp_path):
    def busy_after(line: str) -> float:
        (tmp_path / "stat").write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n")
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(measure.time, "sleep", lambda _: (tmp_path / "stat").write_text(line))
        with monkeypatch.context():
            share = measure.busy_share(tmp_path)
        monkeypatch.undo()
        return share

    assert busy_after("cpu  100 0 50 890 60 0 0 0 0 0\n") == 0.0
    assert busy_after("cpu  160 10 60 810 60 0 0 0 0 0\n") == pytest.approx(0.8)
    assert busy_after("cpu  100 0 50 800 50 0 0 0 0 0\n") == 0.0
    assert busy_after("nonsense\n") == 0.0


def test_caches_of_this_machine():
    assert 0 <= measure.cache_bytes() < 64 * GIB


# ---- disk


@pytest.fixture
def small_file(monkeypatch):
    monkeypatch.setattr(measure_disk, "FILE_BYTES", 16 << 20)
    monkeypatch.setattr(measure_disk, "RANDOM_SECONDS", 0.2)


def test_disk(small_file, tmp_path):
    disk, notes = measure_disk.measure_disk(tmp_path, 2, 2304)
    assert list(tmp_path.iterdir()) == []
    if disk is None:
        # The folder of temporary files may be in memory, or on a file system that keeps its own cache.
        assert notes[0].startswith("disk: left out: ") and ("memory" in notes[0])
    else:
        assert 0 < disk.random_gbps <= disk.sequential_gbps < 1000
        assert notes[0].startswith(f"disk: {tmp_path}, a file of 16 MiB; random: rows of 2304 bytes")


def left_out(folder: Path) -> str:
    disk, notes = measure_disk.measure_disk(folder, 1, 2304)
    assert disk is None and len(notes) == 1
    return notes[0]


def test_disk_in_memory():
    folder = Path("/dev/shm")
    if measure_disk._file_system(folder) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    assert left_out(folder) == "disk: left out: /dev/shm is kept in memory (tmpfs)"


def test_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_disk, "FILE_BYTES", 1 << 60)
    assert left_out(tmp_path).endswith("bytes free, and 2,305,843,009,213,693,952 are wanted")


def test_disk_that_fills_up(small_file, tmp_path):
    """A limit on the size of files stands in for a full disk; in a process of its own, which is the one limited."""
    code = f"""
import resource, signal; from pathlib import Path
from tsconv.machine import disk as measure_disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
print(measure_disk.measure_disk(Path({str(tmp_path)!r}), 1, 2304))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "kept in memory" in done.stdout:
        pytest.skip("the folder of temporary files is in memory")
    assert done.stdout == f"(None, ['disk: left out: {tmp_path}: File too large'])\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_disk_without_folder(tmp_path):
    assert left_out(tmp_path / "missing") == f"disk: left out: {tmp_path}/missing: No such file or directory"
    with pytest.raises(TsconvError, match="missing: not a folder; name a folder on the disk that models are read from"):
        measure.measure_machine("x", tmp_path / "missing")


def test_disk_whose_cache_cannot_be_passed_by(small_file, tmp_path, monkeypatch):
    if measure_disk.measure_disk(tmp_path, 1, 2304)[0] is None:
        pytest.skip("the folder of temporary files is in memory")
    monkeypatch.setattr(measure_disk.os, "posix_fadvise", lambda *_: None)  # nothing is dropped
    note = left_out(tmp_path)
    assert note == "disk: left out: its pages stay in memory: the page cache cannot be passed by"


# ---- GPU: the driver's interface, against a stand-in over plain memory (tests/native/cuda_double.c)


@pytest.fixture(scope="session")
def double(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("cuda") / "libcuda-double.so"
    headers = [f"-I{folder}" for folder in Path("/usr/local").glob("cuda*/include")]
    source = TESTS / "native" / "cuda_double.c"
    command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", *headers, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def reset(
    library: Path, failing: str = "", code: int = 2, devices: int = 1, total: int = 3 * GIB, free: int = 64 << 20
):
    lib = ctypes.CDLL(str(library))
    lib.double_reset(failing.encode(), code, devices, ctypes.c_size_t(total), ctypes.c_size_t(free))
    return lib


def test_gpu(double):
    lib = reset(double, total=3 * GIB + 12345)
    gpu, notes = measure_gpu.measure_gpu(str(double))
    assert gpu is not None
    assert (gpu.model, gpu.memory_bytes) == ("Double of a GPU", 3 * GIB)
    assert all(0 < value < float("inf") for value in (gpu.memory_gbps, gpu.pcie_gbps, gpu.pcie_latency_us))
    assert len(notes) == 1 and notes[0].startswith("GPU: copies of 16 MiB within its memory")
    assert lib.double_held() == 0
    reset(double, devices=2)
    assert measure_gpu.measure_gpu(str(double))[1][1] == "GPU: the first of 2; the others are left out"


@pytest.mark.parametrize("name", [name for name in measure_gpu._PROTOTYPES if "Free" not in name and "Rel" not in name])
def test_gpu_error(double, name):
    """Whatever fails, there is no GPU, the reason is told, and nothing stays allocated."""
    if name == "cuGetErrorName":
        lib = reset(double, "cuInit", 98765)  # an error that the driver has no name for
        expected = "GPU: none: cuInit: error 98765"
    else:
        lib = reset(double, name)
        expected = f"GPU: none: {name}: CUDA_ERROR_OUT_OF_MEMORY"
    assert measure_gpu.measure_gpu(str(double)) == (None, [expected])
    assert lib.double_held() == 0


def test_no_gpu(double, tmp_path):
    assert measure_gpu.measure_gpu("libcuda-not-here.so.1") == (
        None,
        ["GPU: none: libcuda-not-here.so.1 is not installed"],
    )
    reset(double, devices=0)
    assert measure_gpu.measure_gpu(str(double)) == (None, ["GPU: none: the driver shows no device"])
    reset(double, free=10000)
    assert measure_gpu.measure_gpu(str(double)) == (None, ["GPU: none: only 10,000 bytes of its memory are free"])
    _, notes = measure_gpu.measure_gpu("libc.so.6")  # a library without the driver's functions
    assert notes == ["GPU: none: libc.so.6 has no cuInit: the driver is too old"]


# ---- all of it


def test_measure_machine(small_file, double, tmp_path, monkeypatch):
    reset(double)
    monkeypatch.setattr(measure, "measure_gpu", lambda: measure_gpu.measure_gpu(str(double)))
    monkeypatch.setattr(measure, "MIN_BUFFER", 64 << 20)
    monkeypatch.setattr(measure, "cache_bytes", lambda: 0)
    monkeypatch.setattr(measure, "COMPUTE_SECONDS", 0.02)
    lines: list[str] = []
    machine = measure.measure_machine("this one", tmp_path, lines.append)
    assert machine.name == "this one"
    assert 1 <= machine.cpu.cores <= len(os.sched_getaffinity(0))
    assert machine.cpu.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.cpu.model and machine.gpu is not None and machine.assumed == ()
    assert [line.partition(":")[0] for line in lines if not line.startswith("busy")] == [
        "cores",
        "memory",
        "disk",
        "GPU",
    ]
    path = tmp_path / "this.toml"
    save_machine(machine, path)
    assert load_machine(path) == machine
    assert path.read_text().startswith("# Measured on 20")
    assert any("Double of a GPU" in row for row in described(machine))


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 101])
def test_bad_name(name):
    with pytest.raises(TsconvError, match="name of the machine: bad value: expected 1 to 100 printable characters"):
        measure.measure_machine(name)
