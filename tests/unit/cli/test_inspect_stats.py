"""`tsconv inspect` on activation statistics, whole and damaged, and on models whose neurons were reordered."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from support.sampled_stats import sampled
from tsconv.format.header import read_header
from tsconv.report.summary import summarise_stats
from tsconv.report.tables import tables
from tsconv.stats import file as stats_file
from tsconv.stats.counts import COUNTS, Part, Source, Stats

Run = Callable[..., tuple[int, str, str]]
MODEL_FILE = 4


@pytest.fixture
def run(run: Run) -> Run:
    return functools.partial(run, "inspect")


@pytest.fixture(params=[(0, "predictor", 1), (0, "exact", 3), (4, "predictor", 3), (4, "exact", 1)])
def stats(request: pytest.FixtureRequest) -> Stats:
    n_expert, sparsity, n_texts = request.param
    return sampled(n_expert=n_expert, sparsity=sparsity, n_texts=n_texts)[0]


@pytest.fixture
def file(stats: Stats, tmp_path: Path) -> Path:
    path = tmp_path / "s.gguf"
    stats_file.save(stats, path)
    return path


def test_text(stats: Stats, file: Path, run: Run) -> None:
    code, stdout, stderr = run(file)
    assert (code, stderr) == (0, "")
    for part in ("s.gguf: statistics", stats.subject.name, stats.subject.fingerprint, f"{stats.n_tokens:,} tokens"):
        assert part in stdout
    shown = [line.split() for line in stdout.splitlines()]
    for table in tables(summarise_stats(stats)):
        assert table.title in stdout.splitlines()
        for row in (table.header, *table.rows):
            assert " ".join(row).split() in shown


def test_json(stats: Stats, file: Path, run: Run) -> None:
    code, stdout, _ = run(file, "--json")
    assert code == 0
    shown = json.loads(stdout, parse_constant=pytest.fail)  # no NaN, no Infinity
    expected = {"path": str(file), "kind": "statistics", "file_bytes": file.stat().st_size}
    expected |= summarise_stats(stats).as_dict()
    assert shown == json.loads(json.dumps(expected))
    counts = stats.total
    for n, layer in enumerate(shown["layers"]):
        pairs = int(counts.tokens[n].sum()) * stats.subject.n_ff
        assert layer["activity"]["active"] == int(counts.neurons[COUNTS.index("active"), n].sum()) / pairs
        assert (layer["activity"]["recall"] is None) == (stats.subject.sparsity == "exact")
    assert len(shown["texts"]) == len(stats.parts)


def test_control_characters_are_not_printed(tmp_path: Path, run: Run) -> None:
    stats, _ = sampled()
    (part,) = stats.parts
    source = Source("a\x1b[31mb\nc", "\x07" * 200, "", 16, "q4_0")
    path = tmp_path / "s.gguf"
    stats_file.save(Stats(stats.subject, (Part(source, *list(vars(part).values())[1:]),)), path)
    stdout = run(path)[1]
    assert not {c for c in stdout if not c.isprintable()} - {"\n"}
    assert json.loads(run(path, "--json")[1])["texts"][0]["source"]["dataset"] == source.dataset


# ---- damaged files


def refused(run: Run, path: Path, *parts: str) -> None:
    for options in ((), ("--json",)):
        code, stdout, stderr = run(path, *options)
        assert (code, stdout) == (MODEL_FILE, ""), stderr
        assert stderr.startswith("error: ") and stderr.count("\n") == 1
        for part in (str(path), *parts):
            assert part in stderr


def test_truncated(tmp_path: Path, run: Run) -> None:
    """Cut at every sixteenth, around the end of the header, and by its last byte."""
    path = tmp_path / "s.gguf"
    stats_file.save(sampled(n_expert=4, n_texts=3)[0], path)
    data = path.read_bytes()
    last = max(tensor.offset + tensor.n_bytes for tensor in read_header(path).tensors)
    begin = min(tensor.offset for tensor in read_header(path).tensors)
    for n in [*(len(data) * k // 16 for k in range(16)), begin - 1, begin, begin + 1, last - 1]:
        path.write_bytes(data[:n])
        refused(run, path)


def test_flipped_bytes_never_escape(file: Path, run: Run) -> None:
    """Damage is refused in one line or shows in the numbers; never a traceback."""
    data = file.read_bytes()
    rng = np.random.default_rng(1)
    codes = set()
    for _ in range(60):
        spoiled = bytearray(data)
        for at in rng.integers(0, len(data), 2):
            spoiled[at] = rng.integers(256)
        file.write_bytes(spoiled)
        code, stdout, stderr = run(file)
        codes.add(code)
        assert (code, stderr) == (0, "") or (code, stdout, stderr.count("\n")) == (MODEL_FILE, "", 1)
    assert MODEL_FILE in codes


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (b"part.0.blk.0.active", b"part.0.blk.0.asleep", "part.0.blk.0.active"),
        (b"activation-stats", b"activation-state", "turbosparse.activation"),
        (b"exact", b"exalt", "turbosparse.stats.sparsity"),
    ],
)
def test_format_violations(old: bytes, new: bytes, part: str, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "s.gguf"
    stats_file.save(sampled(sparsity="exact")[0], path)
    path.write_bytes(path.read_bytes().replace(old, new))
    refused(run, path, part)


# ---- models


def test_orders_of_neurons_take_one_line(tmp_path: Path, run: Run) -> None:
    """32 layers of long permutations: one line of text, all of them in JSON."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "another")
    orders = {f"turbosparse.neuron_order.{n}": np.random.default_rng(n).permutation(500).tolist() for n in range(32)}
    writer.add_string("turbosparse.neuron_order", "hot_first")
    writer.add_string("turbosparse.neuron_order.profile", "wikitext")
    for key, order in orders.items():
        writer.add_array(key, order)
    writer.add_tensor("a", np.zeros((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, stdout, _ = run(path)
    assert code == 0
    shown = [line.split(maxsplit=1) for line in stdout.splitlines() if line.startswith("turbosparse.neuron_order")]
    assert shown == [
        ["turbosparse.neuron_order", "'hot_first'"],
        ["turbosparse.neuron_order.profile", "'wikitext'"],
        ["turbosparse.neuron_order.N", "32 arrays of 500 neurons"],
    ]
    keys = json.loads(run(path, "--json")[1])["keys"]
    assert {key: keys[key] for key in orders} == orders
