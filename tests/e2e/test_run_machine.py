"""`tsconv run` and `serve` with --machine and --placement, as a user calls them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import tsconv
from support import ROOT, tiny
from support.memory_map import locked_in_process, may_lock, present
from support.placements import machine, placement_for
from support.random_stats import random_stats, save_stats
from tsconv.commands.load import load_on_machine
from tsconv.commands.reorder import reorder
from tsconv.format.header import read_header
from tsconv.machine.limits import usable_cores
from tsconv.machine.profile import load_machine, save_machine
from tsconv.runtime.generate import Generation, Sampling, prompt_tokens

PROMPT = "In the beginning"
NAMES = ["tiny-turbosparse-mistral", "tiny-turbosparse-mixtral"]
SUMMARY = re.compile(r"prefill \d+ tokens, .*")


def run(
    model: Path, *arguments: object, preexec: Callable[[], None] | None = None, threads: int | None = 1
) -> subprocess.CompletedProcess[bytes]:
    options = ["-p", PROMPT, "-n", 16, "--temp", 0, *(["-t", threads] if threads else []), *arguments]
    return subprocess.run(
        [*tiny.TSCONV, "run", "-m", str(model), *map(str, options)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        preexec_fn=preexec,
        timeout=tiny.TIMEOUT_S,
        check=False,
    )


def notes(result: subprocess.CompletedProcess[bytes]) -> list[str]:
    """stderr without the measurements, which come last."""
    assert result.returncode == 0, result.stderr
    *lines, last = result.stderr.decode().splitlines()
    assert SUMMARY.fullmatch(last)
    return lines


@pytest.fixture(scope="module")
def hot_first(tmp_path_factory) -> dict[str, Path]:
    """Both tiny models with their neurons in an order of hotness."""
    models = {}
    for name in NAMES:
        directory = tmp_path_factory.mktemp(name)
        stats = save_stats(random_stats(tiny.converted(name)), directory / "stats.gguf")
        models[name] = reorder(tiny.converted(name), stats, directory / "hot.gguf").model
    return models


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Path:
    """A machine with 64 cores and 64 GiB."""
    path = tmp_path_factory.mktemp("machines") / "large.toml"
    save_machine(machine(64), path)
    return path


def placed(model: Path, path: Path, share: float = 0.5, **changes: object) -> Path:
    keys = read_header(model).keys
    n = int(keys["llama.feed_forward_length"] * share)
    hot = [[n] * max(1, keys.get("llama.expert_count", 0))] * keys["llama.block_count"]
    placement_for(model, hot, **changes).save(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_text_and_json(hot_first, profile, tmp_path, name):
    """The text is the same with and without; the JSON object says what was chosen and done."""
    model = hot_first[name]
    placement = placed(model, tmp_path / "placement.json")
    plain = json.loads(run(model, "--json").stdout)
    assert "machine" not in plain
    with_machine = run(model, "--json", "--machine", profile)
    with_placement = run(model, "--json", "--machine", profile, "--placement", placement)
    for result, strategy in ((with_machine, "all"), (with_placement, "placement")):
        answer = json.loads(result.stdout)
        assert answer["text"] == plain["text"] != ""
        found = answer["machine"]
        assert found["notes"] == notes(result)
        assert 2 <= len(found["notes"]) <= 5
        assert (found["machine"], found["strategy"], found["threads_given"]) == ("somewhere", strategy, True)
        assert found["n_threads"] == answer["n_threads"] == 1
        assert found["usable_cores"] == usable_cores()
        assert found["model_bytes"] == model.stat().st_size
        assert found["sidecar_bytes"] == model.with_suffix(".predictor.gguf").stat().st_size
        done = found["residency"]
        assert done["hot_resident_bytes"] == done["hot_bytes"] > 0
        assert done["sidecar_resident_bytes"] == done["sidecar_bytes"] > 0
        assert (done["random_bytes"] > 0) == (strategy == "placement")
    assert answer["machine"]["placement"] == str(placement)
    assert answer["machine"]["hot_bytes"] == answer["machine"]["asked_bytes"] == done["ffn_bytes"] // 2
    assert "all of it is brought into RAM" in notes(with_machine)[1]
    assert "read-ahead off" in notes(with_placement)[1]


def test_threads(profile):
    """Those of the profile, but no more than are here; -t wins."""
    model, here = tiny.converted(), usable_cores()
    result = run(model, "--json", "--machine", profile, threads=None)
    assert notes(result)[0] == f"threads {here}: somewhere has 64 cores, but this process may use {here}"
    assert json.loads(result.stdout)["n_threads"] == here
    result = run(model, "--json", "--machine", profile, threads=here + 1)
    assert notes(result)[0].startswith(f"threads {here + 1}: as given; somewhere has 64 cores")
    assert json.loads(result.stdout)["n_threads"] == here + 1
    assert notes(run(model, "--machine", "pc-2080ti", threads=None))[0] == (
        f"threads {min(8, here)}: pc-2080ti has 8 cores" + (f", but this process may use {here}" if here < 8 else "")
    )


def test_a_low_limit_on_locking(hot_first, profile, tmp_path):
    model = hot_first[NAMES[0]]
    placement = placed(model, tmp_path / "placement.json")
    arguments = ("--machine", profile, "--placement", placement, "--json")
    limit = 1 << 20
    result = run(model, *arguments, preexec=may_lock(limit))
    (line,) = (line for line in notes(result) if line.startswith("locked "))
    assert "the limit (ulimit -l) is 1.05 MB; raise it with" in line
    answer = json.loads(result.stdout)
    done = answer["machine"]["residency"]
    assert done["lock_limit_bytes"] == limit
    assert limit - 65536 <= done["hot_locked_bytes"] + done["sidecar_locked_bytes"] <= limit
    assert answer["text"] == json.loads(run(model, "--json").stdout)["text"]


def test_neurons_of_a_gpu(hot_first, profile, tmp_path):
    model = hot_first[NAMES[0]]
    placement = placed(model, tmp_path / "placement.json", gpu=100)
    lines = notes(run(model, "--machine", profile, "--placement", placement))
    assert lines[-1] == "600 neurons that the placement gives to a GPU are computed on the CPU, from RAM"


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_memory_that_does_not_suffice(hot_first, tmp_path, share):
    """What does not fit stays on disk until a token needs it, with a placement and without."""
    model = hot_first[NAMES[0]]
    plain = tsconv.load(model, n_threads=1)
    tokens = prompt_tokens(plain, PROMPT)
    expected = "".join(Generation(plain, tokens, 16, Sampling(temperature=0)))
    plain.close()
    needed = {}

    def load(available: int, placement: Path | None):
        llama, chosen, done = load_on_machine(
            model, machine(), placement_path=placement, n_threads=1, available_bytes=available
        )
        needed["fixed"] = chosen.needed_bytes - done.ffn_bytes
        needed["all"] = chosen.needed_bytes
        return llama, chosen, done

    llama, chosen, _ = load(1 << 40, None)
    assert chosen.strategy == "all"
    everything = len(present(model))
    llama.close()
    placement = placed(model, tmp_path / "placement.json", 1.0) if share else None
    available = int(needed["fixed"] + share * (needed["all"] - needed["fixed"])) if share else needed["all"] - 1
    before = locked_in_process()
    llama, chosen, done = load(available, placement)
    assert chosen.strategy == ("placement" if share else "on_demand")
    assert done.hot_bytes >= share * done.ffn_bytes * 0.99
    assert done.hot_bytes <= (share + 0.2) * done.ffn_bytes
    assert (done.random_bytes > 0) == (share < 1)
    assert locked_in_process() - before == done.locked_bytes
    assert len(present(model)) <= everything
    assert "".join(Generation(llama, tokens, 16, Sampling(temperature=0))) == expected
    llama.close()


def test_this_machine_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = notes(run(tiny.converted(), "--machine", "auto", threads=None))
    file = next((tmp_path / "tsconv").glob("*.toml"), None)
    if file is None:
        assert "other programs kept this machine busy: what was measured is used now, and not kept" in first
        pytest.skip("other programs keep this machine busy: nothing that is measured now may be kept")
    assert first[0] == f"measuring this machine once: {file}"
    measured = load_machine(file)
    expected = min(measured.cpu.cores, usable_cores())
    chosen = next(line for line in first if line.startswith("threads"))
    assert chosen.startswith(f"threads {expected}: {measured.name} has {measured.cpu.cores} core")
    assert notes(run(tiny.converted(), "--machine", "auto", threads=None))[0] == chosen
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    line = tiny.error_line(run(tiny.converted(), "--machine", "auto"))
    assert "cannot keep what is measured of this machine" in line
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file.write_text("name = 7")
    assert notes(run(tiny.converted(), "--machine", "auto"))[0] == first[0], "measured again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair_id": "0" * 32}, "the placement is of another model: turbosparse.pair_id differs"),
        ({"fingerprint": "f" * 64}, "the placement is of another model: turbosparse.source.fingerprint differs"),
    ],
)
def test_placement_of_another_model(hot_first, profile, tmp_path, changes, message):
    model = hot_first[NAMES[0]]
    placement = placed(model, tmp_path / "placement.json", **changes)
    result = run(model, "--machine", profile, "--placement", placement)
    assert result.returncode == 4
    assert message in tiny.error_line(result)


def test_placement_of_a_model_in_another_order(hot_first, profile, tmp_path):
    placement = placed(hot_first[NAMES[0]], tmp_path / "placement.json")
    line = tiny.error_line(run(tiny.converted(), "--machine", profile, "--placement", placement))
    assert "the placement is of another model" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--placement", "p.json"), "--placement needs --machine"),
        (("--machine", "pc-2080"), "no machine profile 'pc-2080'"),
        (("--machine", "/nonexistent/m.toml"), "/nonexistent/m.toml: machine profile cannot be read"),
        (("--machine", "pc-2080ti", "--placement", "/nonexistent/p.json"), "/nonexistent/p.json: cannot be read"),
        (("--machine", ""), "machine profile"),
    ],
)
def test_mistakes(arguments, message):
    line = tiny.error_line(run(tiny.converted(), *arguments))
    assert message in line
    assert "\n" not in line


def test_missing_files(profile, tmp_path):
    line = tiny.error_line(run(tmp_path / "none.gguf", "--machine", profile))
    assert "none.gguf: cannot be opened" in line
    alone = tmp_path / "alone.gguf"
    alone.symlink_to(tiny.converted())
    assert "the predictor sidecar is missing" in tiny.error_line(run(alone, "--machine", profile))


def test_serve(hot_first, profile, tmp_path):
    model = hot_first[NAMES[0]]
    placement = placed(model, tmp_path / "placement.json")
    options = ["-t", "1", "--port", "0", "--machine", profile, "--placement", placement]
    process = subprocess.Popen(
        [*tiny.TSCONV, "serve", "-m", str(model), *map(str, options)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
    )
    try:
        lines = []
        while not (lines and lines[-1].startswith("serving ")):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert lines[0].startswith("threads 1: as given")
        assert "the placement keeps" in lines[1]
        url = re.search(r"http://\S+/v1", lines[-1])[0]
        with urllib.request.urlopen(f"{url}/models", timeout=tiny.TIMEOUT_S) as answer:
            assert json.load(answer)["data"][0]["id"] == "hot"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(tiny.TIMEOUT_S) == 0
        process.stderr.close()


def test_a_named_sidecar(profile, tmp_path):
    """It, and not the one beside the model, is checked, counted and used."""
    source = tiny.converted()
    (model := tmp_path / "m.gguf").symlink_to(source)
    (sidecar := tmp_path / "other.gguf").symlink_to(source.with_suffix(".predictor.gguf"))
    for beside in (None, "no sidecar"):
        if beside is not None:
            model.with_suffix(".predictor.gguf").write_text(beside)
        llama, chosen, residency = load_on_machine(model, str(profile), predictor_path=sidecar, n_threads=1)
        assert llama.sparsity == "predictor"
        assert chosen.sidecar_bytes == sidecar.stat().st_size
        assert residency.sidecar_bytes > 0
        llama.close()
    answer = json.loads(run(model, "--json", "--machine", profile, "--predictor", sidecar).stdout)
    assert answer["machine"]["sidecar_bytes"] == sidecar.stat().st_size
