"""Rows of `tsconv bench` from made-up measurements, their table, and the change since an older result."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tsconv.bench.compare import Row, Weights, _row
from tsconv.bench.workload import Workload, parse_counts, parse_workload
from tsconv.cli.bench_table import changes, formatted, read_results
from tsconv.errors import TsconvError

COMMON = {
    "model_filename": "some.gguf",
    "model_size": 5 * 10**9,
    "n_threads": 2,
    "baseline": "llama.cpp",
    "engine": "tsconv",
    "predictor_type": "q8_0",
    "load_seconds": 1.25,
    "dense_load_seconds": 2.0,
    "cpu_info": "a processor",
    "backend": "TSFFN ref",
    "build": "tsconv 1",
}


def layer(attention: float, **fields: float) -> dict[str, float]:
    """Counters of a layer of 100 neurons."""
    counted = {"n_ff": 100, "predicted": 12, "active": 9, "bytes_read": 1000, "bytes_dense": 8000}
    return counted | {"seconds_predictor": 0.1, "seconds_ffn": 0.2, "seconds_attention": attention} | fields


def row(workload: Workload, ours: list[float], theirs: list[float], layers: list[dict[str, float]], **fields) -> Row:
    answers = [{"seconds": seconds, "layers": layers, "peak_bytes": 10**9} for seconds in ours]
    dense = [{"seconds": seconds, "peak_bytes": 2 * 10**9} for seconds in theirs]
    return _row(workload, answers, dense, Weights(dense=9000, other=500), 20.0, COMMON | fields)


LAYERS = [layer(0.0), layer(0.3), layer(0.5)]


def test_parts_of_a_step():
    """Layer 0's attention is taken for the mean of the others; all parts make the time of a step."""
    found = row(Workload("tg", 4), [4.0, 2.0, 3.0], [8.0, 8.0, 3.0], LAYERS)
    assert found.avg_ts == 4 / 3.0
    assert found.dense_avg_ts == 4 / 8.0
    assert (found.ratio, found.ratio_min, found.ratio_max) == (2.0, 1.0, 4.0)
    assert found.ms_attention == pytest.approx(1e3 * (0.3 + 0.5) * 3 / 2 / 4)
    assert found.ms_predictor == pytest.approx(1e3 * 0.3 / 4)
    assert found.ms_ffn == pytest.approx(1e3 * 0.6 / 4)
    total = found.ms_attention + found.ms_predictor + found.ms_ffn + found.ms_rest
    assert total == pytest.approx(1e3 * 3.0 / 4)
    assert (found.predicted, found.active) == (pytest.approx(0.12), pytest.approx(0.09))
    assert found.bytes_per_token == 500 + 3000 / 4
    assert found.dense_bytes_per_token == 9000
    assert found.gbps == pytest.approx((500 + 3000 / 4) / (3.0 / 4) / 1e9)
    assert found.roofline_ratio == pytest.approx(9000 / 1250)


def test_one_layer_has_no_attention_time():
    found = row(Workload("tg", 4), [4.0], [8.0], LAYERS[:1])
    assert found.ms_attention is None
    assert found.ms_predictor + found.ms_ffn + found.ms_rest == pytest.approx(1e3)
    assert "| - " in formatted([found], "md") or " - |" in formatted([found], "md")


def test_sequences_together():
    """Tokens of all sequences count; what a dense model would have read is counted, since they may share experts."""
    found = row(Workload("tg", 4, 3), [4.0], [8.0], LAYERS)
    assert found.avg_ts == 4 * 3 / 4.0
    assert found.dense_bytes_per_token == 500 + 3 * 8000 / 4
    assert found.ms_ffn == pytest.approx(1e3 * 0.6 / 4), "of a step, not of a token"
    batch = row(Workload("pp", 4), [4.0], [8.0], LAYERS)
    assert batch.avg_ts == 1.0
    assert batch.roofline_ratio is batch.roofline_reached is None
    assert batch.ms_ffn == pytest.approx(1e3 * 0.6)


def test_parts_are_of_the_median_run():
    """Not means, which a disturbed repetition would spoil: they would not add up to the median time."""
    answers = [
        {"seconds": seconds, "layers": [layer(0.0), layer(seconds / 2)], "peak_bytes": 1}
        for seconds in (9.0, 2.0, 1.0, 4.0)
    ]
    three = _row(Workload("tg", 1), answers[:3], answers[:3], Weights(9000, 500), 20.0, COMMON)
    assert three.avg_ts == pytest.approx(1 / 2.0)
    assert three.ms_attention == pytest.approx(2 * 1e3 * 2.0 / 2)
    four = _row(Workload("tg", 1), answers, answers, Weights(9000, 500), 20.0, COMMON)
    assert four.avg_ts == pytest.approx(1 / 3.0)
    assert four.ms_attention == pytest.approx(2 * 1e3 * 3.0 / 2)


def rows() -> list[Row]:
    """Two baselines of a decoding test, and of a prefill test."""
    return [
        row(workload, [4.0], [8.0], LAYERS, baseline=baseline)
        for workload in (Workload("tg", 4, 3), Workload("pp", 40))
        for baseline in ("llama.cpp", "dense-drelu")
    ]


def test_table():
    speed, parts, machine = formatted(rows(), "md").split("\n\n", 1)[0], *formatted(rows(), "md").split("\n\n")[2:]
    assert [line.split("|")[4].strip() for line in speed.splitlines()[2:]] == ["tg4x3", "tg4x3", "pp40", "pp40"]
    assert {line.split("|")[3].strip() for line in speed.splitlines()[2:]} == {"q8_0"}
    assert " 2.00 (2.00 to 2.00) |" in speed
    assert "|    1.2 |" in speed.splitlines()[2], "load time"
    assert len({len(line) for line in speed.splitlines()}) == 1, "aligned in plain text"
    lines = parts.splitlines()
    assert len(lines) == 2 + 2, "once for all baselines"
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:9] == ["some", "tg4x3", "2", "1000.00", "300.00", "75.00", "150.00", "475.00"]
    assert machine == "a processor; TSFFN ref; tsconv 1\n"


def test_table_without_predictor_or_repacking():
    """What both engines went without is said; a model without sidecar has no type of predictor."""
    plain = row(Workload("tg", 4), [4.0], [8.0], LAYERS, predictor_type=None)
    assert formatted([plain], "md").splitlines()[2].split("|")[3].strip() == "-"
    assert "Beside" not in formatted([plain], "md")
    beside = dataclasses.replace(plain, baseline="llama.cpp-norepack", engine="tsconv-norepack")
    assert "\n\nBeside llama.cpp-norepack, tsconv-norepack: neither has llama.cpp's extra" in formatted([beside], "md")


def test_changes_of_the_same_case_only(tmp_path):
    """Model, test, threads and baseline must be equal; results from before there were baselines are of llama.cpp."""
    current = rows()
    old = [dataclasses.asdict(one) | {"avg_ts": one.avg_ts / 2} for one in current]
    del old[0]["baseline"]
    old[2]["n_threads"], old[3]["model_filename"] = 1, "another.gguf"
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert changes(current, read_results(tmp_path / "old.json")) == [
        "some tg4x3, 2 threads: 1.50 -> 3.00 tokens/s (+100.0%), ratio to llama.cpp 2.00 -> 2.00",
        "some tg4x3, 2 threads: 1.50 -> 3.00 tokens/s (+100.0%), ratio to dense-drelu 2.00 -> 2.00",
    ]


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"test": "tg1"}]', "no", '{"a": 1}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    if text == "{}":
        assert read_results(tmp_path / "old.json") == {}
        return
    with pytest.raises(TsconvError, match="not a result of tsconv bench; write one with --save"):
        read_results(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pp512", Workload("pp", 512)),
        ("tg128", Workload("tg", 128)),
        ("tg32x4", Workload("tg", 32, 4)),
        ("tg32x16", Workload("tg", 32, 16)),
        ("tg32x1", Workload("tg", 32)),
        ("pp1024", Workload("pp", 1024)),
    ],
)
def test_workloads(text, expected):
    found = parse_workload(text)
    assert found == expected
    assert parse_workload(found.name) == found
    assert found.n_steps == (1 if found.kind == "pp" else found.n)


@pytest.mark.parametrize(
    "text",
    ["", "pp", "pp0", "tg1025", "tg4x0", "tg4x17", "pp4x2", "tg4x", "tgx4", "4", "tg 4", "tg4x4x4", "tg-1", "TG4"],
)
def test_no_workloads(text):
    with pytest.raises(TsconvError, match=r"not a test: expected pp512, tg128, tg32x4, .* 1 to 16 sequences, found"):
        parse_workload(text)


def test_threads():
    assert parse_counts("2") == (2,)
    assert parse_counts("1,2,16") == (1, 2, 16)
    assert parse_counts("2,1,2") == (2, 1)
    for text in ("", "0", "1,", "1;2", "-1", "513", "1, 2", "1.5", "9999999"):
        with pytest.raises(TsconvError, match="threads: expected numbers from 1 to 512"):
            parse_counts(text)
