"""`tsconv reorder` and `tsconv convert --profile`: the same rows in the stated order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from support.panels import write_rows
from support.random_stats import expected_order, random_stats, save_stats
from support.refused import sidecar_of
from support.reordered import check_alike, check_rows, make
from support.synthetic import SHAPES, random_tensors, save, write_predictors
from tsconv import convert
from tsconv.bench.synthetic import Shape, write_checkpoint
from tsconv.commands import reorder as reordering
from tsconv.commands.reorder import reorder
from tsconv.format.header import read_header
from tsconv.format.order import neuron_order
from tsconv.write import stream

KEY, PAIR_ID, CRC32 = "turbosparse.neuron_order", "turbosparse.pair_id", "turbosparse.tensor_crc32"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """(a dense model, statistics of it)"""
    model = make(tmp_path, "mistral")
    return model, save_stats(random_stats(model), tmp_path / "stats.gguf")


# ---- what is in the files


def fields(path: Path) -> dict[str, bytes]:
    """Key -> its bytes in the file: name, type and value."""
    return {
        name: b"".join(part.tobytes() for part in field.parts)
        for name, field in gguf.GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


def check_keys(original: Path, reordered: Path) -> None:
    """All keys have the bytes they had, but those that the order changes."""
    before, after = fields(original), fields(reordered)
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    extra = {key for key in after if key.startswith(f"{KEY}.")}
    assert changed - extra <= {PAIR_ID, KEY, CRC32} and PAIR_ID in changed
    assert {key for key in before if not key.startswith(f"{KEY}.")} == set(after) - extra
    assert b"hot_first" in after[KEY]


@pytest.mark.parametrize("sparsity", ["predictor", "exact"])
@pytest.mark.parametrize("outtype", ["f32", "q4_0", "q8_0"])
@pytest.mark.parametrize("family", SHAPES)
def test_rows_move_whole(family: str, outtype: str, sparsity: str, tmp_path: Path) -> None:
    model = make(tmp_path, family, outtype)
    stats = random_stats(model, sparsity)
    result = reorder(model, save_stats(stats, tmp_path / "s.gguf"), tmp_path / "hot.gguf")
    order = expected_order(stats)
    check_rows(model, result.model, order)
    check_keys(model, result.model)
    assert (result.sidecar is None) == (family == "bamboo")
    if result.sidecar is not None:
        check_rows(sidecar_of(model), result.sidecar, order)
        check_keys(sidecar_of(model), result.sidecar)
        assert not [key for key in fields(result.sidecar) if key.startswith(f"{KEY}.")]
        assert fields(result.sidecar)[PAIR_ID] == fields(result.model)[PAIR_ID]
    keys = read_header(result.model).keys
    assert keys[f"{KEY}.profile"] == "some/text plain at 0123abc: 60 tokens" == result.profile
    assert keys[f"{KEY}.sparsity"] == sparsity == result.sparsity
    assert neuron_order(read_header(result.model)).tolist() == order
    assert result.notes == ()
    assert result.model_bytes == result.model.stat().st_size


@pytest.mark.parametrize("outtype", ["f32", "q4_0"])
@pytest.mark.parametrize("family", [*SHAPES, "external"])
def test_convert_with_a_profile_is_convert_and_reorder(family: str, outtype: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if family == "external":
        family, options = "bamboo", {"predictor": tmp_path / "p"}
        write_predictors(tmp_path / "p", SHAPES[family], [32, 64])
    model = make(tmp_path, family, outtype, **options)
    profile = save_stats(random_stats(model), tmp_path / "stats.gguf")
    two = reorder(model, profile, tmp_path / "two.gguf")
    one = convert(tmp_path / "c", tmp_path / "one.gguf", outtype, profile=profile, **options)
    assert one.neuron_order == "hot_first"
    assert (one.sidecar is None) == (two.sidecar is None)
    check_alike(one.model, two.model)


def test_convert_with_a_profile_in_several_slabs(tmp_path: Path) -> None:
    """Matrices of more than one slab, whose rows are scattered over all of it."""
    shape = Shape(320, 1024, 9216, 8, 8, 1, ranks=(64,))
    checkpoint = save(tmp_path / "c", shape, random_tensors(shape))
    model = convert(checkpoint, tmp_path / "m.gguf", "q8_0").model
    profile = save_stats(random_stats(model), tmp_path / "stats.gguf")
    two = reorder(model, profile)
    one = convert(checkpoint, tmp_path / "one.gguf", "q8_0", profile=profile)
    check_alike(one.model, two.model)


@pytest.mark.parametrize("outtype", ["q4_0", "q8_0"])
def test_small_pieces_give_the_same_bytes(outtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels that are made in many pieces, of a matrix whose last rows are no panel."""
    shape = Shape(320, 64, 164, 4, 2, 2, ranks=(32, 96))
    checkpoint = save(tmp_path / "c", shape, random_tensors(shape))
    kinds = {"outtype": "f16", "predictor_outtype": outtype}
    model = convert(checkpoint, tmp_path / "m.gguf", **kinds).model
    profile = save_stats(random_stats(model), tmp_path / "stats.gguf")
    hot = reorder(model, profile, tmp_path / "hot.gguf").model
    check_rows(sidecar_of(model), sidecar_of(hot), expected_order(random_stats(model)))
    monkeypatch.setattr(stream, "SLAB_BYTES", 3000)
    monkeypatch.setattr(reordering, "PIECE", 1000)
    check_alike(model, convert(checkpoint, tmp_path / "m2.gguf", **kinds).model)
    check_alike(hot, convert(checkpoint, tmp_path / "hot2.gguf", profile=profile, **kinds).model)
    check_alike(hot, reorder(model, profile, tmp_path / "hot3.gguf").model)


@pytest.mark.parametrize(("version", "outtype"), [(1, "q4_0"), (2, "q4_0"), (3, "q3_nl")])
@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_sidecar_in_rows_stays_in_rows(family: str, version: int, outtype: str, tmp_path: Path) -> None:
    model = make(tmp_path, family, predictor_outtype=outtype)
    panels = sidecar_of(model).replace(tmp_path / "panels.gguf")
    write_rows(panels, sidecar_of(model), version)
    stats = random_stats(model)
    hot = reorder(model, save_stats(stats, tmp_path / "s.gguf"), tmp_path / "hot.gguf")
    check_keys(sidecar_of(model), hot.sidecar)
    check_rows(sidecar_of(model), hot.sidecar, expected_order(stats))
    check_rows(panels, hot.sidecar, expected_order(stats))


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_an_order_is_of_the_checkpoint_whatever_came_before(family: str, tmp_path: Path) -> None:
    """Reordering again gives the same bytes; by other statistics, what these give from the beginning."""
    model = make(tmp_path, family)
    first = save_stats(random_stats(model, seed=1), tmp_path / "1.gguf")
    second = save_stats(random_stats(model, seed=2), tmp_path / "2.gguf")
    once = reorder(model, first, tmp_path / "once.gguf")
    check_alike(once.model, reorder(model, first, tmp_path / "repeated.gguf").model)
    check_alike(once.model, reorder(once.model, first, tmp_path / "twice.gguf").model)
    direct = reorder(model, second, tmp_path / "direct.gguf")
    check_alike(direct.model, reorder(once.model, second, tmp_path / "detour.gguf").model)
    assert expected_order(random_stats(model, seed=1)) != expected_order(random_stats(model, seed=2))


def test_statistics_of_another_conversion(tmp_path: Path) -> None:
    """Statistics of the f16 model, itself reordered, order the q4_0 model."""
    q4_0 = make(tmp_path, "mistral")
    f16 = convert(tmp_path / "c", tmp_path / "f16.gguf", "f16").model
    hot = reorder(f16, save_stats(random_stats(f16, seed=3), tmp_path / "s.gguf")).model
    stats = random_stats(hot)
    result = reorder(q4_0, save_stats(stats, tmp_path / "s.gguf"), tmp_path / "hot.gguf")
    check_rows(q4_0, result.model, expected_order(stats))


def test_keys_of_every_type_and_alignment(tmp_path: Path) -> None:
    """Keys that other tools added keep their types, and tensors lie as the file aligns them."""
    model = make(tmp_path, "bamboo")
    kinds, target = gguf.GGUFValueType, tmp_path / "typed.gguf"
    reader, writer = gguf.GGUFReader(model), gguf.GGUFWriter(target, "turbosparse")
    writer.add_custom_alignment(256)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            element = field.types[-1] if field.types[0] == kinds.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    scalars = {kinds.BOOL: True, kinds.FLOAT32: 0.1, kinds.FLOAT64: 0.1, kinds.STRING: "\N{SNOWMAN}", kinds.INT64: -5}
    scalars |= {kind: 7 for kind in kinds if kind not in scalars and kind != kinds.ARRAY}
    for kind, value in scalars.items():
        writer.add_key_value(f"x.{kind.name}", value, kind)
        writer.add_key_value(f"x.{kind.name}.list", [value] * 3, kinds.ARRAY, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stats = random_stats(target)
    result = reorder(target, save_stats(stats, tmp_path / "s.gguf"))
    check_keys(target, result.model)
    check_rows(target, result.model, expected_order(stats))
    assert sum(key.startswith("x.") for key in fields(result.model)) == 24
    assert all(tensor.data_offset % 256 == 0 for tensor in gguf.GGUFReader(result.model).tensors)


def test_model_without_its_sidecar(pair: tuple[Path, Path], run: Run) -> None:
    model, profile = pair
    sidecar_of(model).unlink()
    code, stdout, stderr = run("reorder", model, "--profile", profile)
    assert code == 0
    assert stderr.startswith(f"note: there was no predictor sidecar beside {model}: ") and stderr.count("\n") == 1
    assert not sidecar_of(model.with_name("m-hot.gguf")).exists()
    check_rows(model, model.with_name("m-hot.gguf"), expected_order(random_stats(model)))
    assert [line.split()[0] for line in stdout.splitlines()] == ["model", "hottest", "next:"]


# ---- the command line


def test_summary(pair: tuple[Path, Path], run: Run) -> None:
    model, profile = pair
    code, stdout, stderr = run("reorder", model, "--profile", profile)
    assert (code, stderr) == (0, "")
    target = model.with_name("m-hot.gguf")
    lines = stdout.splitlines()
    assert lines[0].split()[:2] == ["model", str(target)]
    assert lines[1].split()[:2] == ["sidecar", str(sidecar_of(target))]
    assert lines[2] == "hottest neurons first, sparsity predictor, by some/text plain at 0123abc: 60 tokens"
    assert lines[3] == f"next: tsconv run -m {target}"
    assert sorted(p.name for p in model.parent.glob("*.part")) == []


def test_json(pair: tuple[Path, Path], run: Run) -> None:
    model, profile = pair
    code, stdout, _ = run("reorder", model, "--profile", profile, "--outfile", model.with_name("x.gguf"), "--json")
    assert code == 0
    result = json.loads(stdout)
    assert result["model"] == str(model.with_name("x.gguf"))
    assert result["sidecar_bytes"] == sidecar_of(model.with_name("x.gguf")).stat().st_size
    assert result["sparsity"] == "predictor"


def test_progress_counts_all_bytes(pair: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    reorder(*pair, progress=lambda done, total: seen.append((done, total)))
    n_bytes = sum(t.n_bytes for path in (pair[0], sidecar_of(pair[0])) for t in read_header(path).tensors)
    assert seen[-1] == (n_bytes, n_bytes)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_convert_says_it(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    arguments = ("convert", tmp_path / "c", "--outfile", tmp_path / "hot.gguf", "--profile", pair[1])
    code, stdout, _ = run(*arguments, "--dry-run", "--json")
    assert (code, json.loads(stdout)["neuron_order"]) == (0, "hot_first")
    assert not (tmp_path / "hot.gguf").exists()
    code, stdout, _ = run(*arguments)
    assert code == 0
    assert "neurons: hottest first" in stdout


# ---- memory

MEMORY = """
import resource, sys
from tsconv.commands.reorder import reorder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = reorder(*sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before << 10, result.model_bytes)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 330 MB, whose largest FFN matrix has 16 MB, is reordered in some pieces of memory."""
    write_checkpoint(tmp_path / "c", Shape(320, 1024, 4096, 8, 8, 5))
    model = convert(tmp_path / "c", tmp_path / "m.gguf", "f32").model
    profile = save_stats(random_stats(model), tmp_path / "stats.gguf")
    done = subprocess.run([sys.executable, "-c", MEMORY, model, profile], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, n_bytes = map(int, done.stdout.split())
    assert grown < 96 << 20 < n_bytes // 3
