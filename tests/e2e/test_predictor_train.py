"""`tsconv predictor train`: what it records is PyTorch's, what it writes every command takes and does what it says, and
a run that is cut ends with the same file."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from reference import Reference

import tsconv
from support import CHECKPOINTS, ROOT, q3_nl, tiny
from support.panels import naive_rows
from support.predictor_recipe import train_recipe
from tsconv.commands.predictor_train import TrainResult, train
from tsconv.eval.predictor import down_energies, measure_predictor
from tsconv.eval.windows import windows
from tsconv.predictor.train import objective
from tsconv.predictor.train.samples import HELD, TRAINED, open_samples
from tsconv.runtime.layers import LayersContext

NAMES = ("tiny-turbosparse-mistral", "tiny-turbosparse-mixtral")
HELDOUT = CHECKPOINTS / "heldout.txt"
SMALL = ("--calib", HELDOUT, "--tokens", "6k", "--chunk", 128, "--rank", 32, "--epochs", 2, "-t", 1)
OPTIONS = ("--calib", HELDOUT, "--tokens", "8k", "--chunk", 128, "--rank", 32, "--epochs", 8, "-t", 1)


def trained(model: Path, out: Path, **options: object) -> TrainResult:
    arguments = {"n_tokens": 8000, "chunk": 128, "rank": 32, "epochs": 8, "n_threads": 1, "outtype": "q3_nl"}
    arguments["target_miss"] = 0.01  # what so little text is enough for
    return train(model, str(HELDOUT), out, **arguments | options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory) -> tuple[str, Path, TrainResult]:
    """A checkpoint's name, the converted model, and the predictors that were trained for it."""
    model = tiny.converted(request.param)
    return request.param, model, trained(model, tmp_path_factory.mktemp("made") / "new.predictor.gguf")


# ---- what is recorded


@pytest.mark.parametrize("name", NAMES)
def test_recorded_activations_are_pytorchs(name):
    ids = [1, *range(40, 70)]
    found: dict[tuple[int, int], list[np.ndarray]] = {}

    def keep(layer, ffns, x, h):
        for e in np.unique(ffns).tolist():
            found[layer, e] = [x[ffns == e].copy(), h[ffns == e].copy()]

    model = tsconv.load(tiny.converted(name), sparsity="exact", n_threads=2)
    with LayersContext(model, 64) as layers, model.recording(range(1, 3), keep):
        layers.compute(ids)
    model.close()
    reference = Reference.load(CHECKPOINTS / name)
    at = {id(ffn): (n, e) for n, block in enumerate(reference.model.layers) for e, ffn in enumerate(block.ffns)}
    seen = 0

    def hook(ffn, arguments):
        inputs[at[id(ffn)]] = arguments[0]

    inputs: dict[tuple[int, int], torch.Tensor] = {}
    for block in reference.model.layers:
        for ffn in block.ffns:
            ffn.register_forward_pre_hook(hook)

    def probe(ffn, p, gate, h, logit):
        nonlocal seen
        key = at[id(ffn)]
        if key[0] not in (1, 2):
            return
        x, activations = found[key]
        np.testing.assert_allclose(x, inputs[key].reshape(len(x), -1), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(activations, h.reshape(len(x), -1), rtol=1e-3, atol=1e-3 * float(h.max()))
        seen += len(x)

    with torch.no_grad():
        reference(torch.tensor([ids]), False, probe)
    assert seen == sum(len(x) for x, _ in found.values()) == 2 * len(ids) * (2 if "mixtral" in name else 1)
    assert all(layer in (1, 2) for layer, _ in found)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_computed_behind_what_is_recorded(name):
    """And what is recorded is the same, chunk after chunk, in a context that was stopped before."""
    model = tsconv.load(tiny.converted(name), sparsity="exact", n_threads=2)
    chunks = [[1, *range(20, 80)], [1, *range(90, 100)]]
    seen: list[list[np.ndarray]] = []
    for stops in (False, True):
        rows: list[np.ndarray] = []
        model.reset_ffn_stats()
        with (
            LayersContext(model, 64) as layers,
            model.recording(range(2), lambda _, ffns, x, h: rows.extend((ffns.copy(), x.copy(), h.copy())), stops),  # noqa: B023
        ):
            for chunk in chunks:
                layers.compute(chunk)
        seen.append(rows)
        used = 2 if name == NAMES[1] else 1
        n = used * sum(map(len, chunks))
        tokens = [layer["tokens"] for layer in model.ffn_stats()]
        assert tokens == [n, n] + [0 if stops else n] * (len(tokens) - 2)
    assert len(seen[0]) == len(seen[1]) == 2 * 2 * 3
    for with_all, stopped in zip(*seen, strict=True):
        np.testing.assert_array_equal(with_all, stopped)
    assert model.token_logits([1, 2, 3]).shape[0] == 3  # whole again
    model.close()


def test_a_recorder_that_fails_stops_the_batch():
    model = tsconv.load(tiny.converted(), sparsity="exact", n_threads=1)

    def fails(*_):
        raise KeyError("mine")

    recording = model.recording(range(1, 2), fails, stops=True)
    with pytest.raises(KeyError, match="mine"), LayersContext(model, 8) as layers, recording:
        layers.compute([1, 2, 3])
    assert [layer["tokens"] for layer in model.ffn_stats()] == [3, 3, 0, 0, 0, 0]
    model.close()


def test_what_a_recorder_raises_is_raised():
    model = tsconv.load(tiny.converted(), sparsity="exact", n_threads=1)

    def fails(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), LayersContext(model, 8) as layers, model.recording(range(1), fails):
        layers.compute([1, 2, 3])
    with LayersContext(model, 8) as layers, pytest.raises(KeyError), model.recording(range(1), fails) as check:
        check()
        layers.compute([1, 2, 3])
        check()
        pytest.fail("was raised before")
    with pytest.raises(tsconv.errors.BackendError, match="layers to record"), model.recording(range(7, 9), fails):
        pass
    model.close()


def test_ctrl_c_while_activations_are_recorded():
    """It comes while the backend computes, whose next step is to call Python."""
    model = tsconv.load(tiny.converted(), sparsity="exact", n_threads=1)
    begun = threading.Event()

    def interrupt():
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    recording = model.recording(range(6), lambda *_: begun.set())
    with LayersContext(model, 512) as layers, recording, pytest.raises(KeyboardInterrupt):
        layers.compute([1, *range(20, 531)])
        thread.join()
    thread.join()
    model.close()


# ---- what is written


def matrices(sidecar: Path, layer: int, ffn: int | None) -> tuple[np.ndarray, np.ndarray]:
    """fc1 and fc2 of a sidecar in Q4_0 and q3_nl, from the tables of docs/format.md."""
    of_expert = "" if ffn is None else f".{ffn}"
    tensors = {t.name: t for t in GGUFReader(sidecar).tensors}
    fc1 = tensors[f"blk.{layer}.ffn_pred_fc1{of_expert}.weight"]
    fc2 = tensors[f"blk.{layer}.ffn_pred_fc2{of_expert}.weight"]
    kind = GGMLQuantizationType.Q4_0
    rows = dequantize(naive_rows(fc1.data.tobytes(), int(fc1.shape[1]), kind), kind)
    return rows, q3_nl.matrix(q3_nl.plain_rows(fc2.data.tobytes(), int(fc2.shape[1])))


def test_the_mask_is_what_the_matrices_say(made):
    """Recall, precision and predicted neurons of `eval predictor`, from the formulas in float64."""
    name, model, result = made
    llama = tsconv.load(model, predictor_path=result.outfile, n_threads=1)
    assert llama.sparsity == "predictor"
    texts = windows(llama, HELDOUT.read_bytes()[-9000:], 64, 8)
    found = measure_predictor(llama, texts)
    inputs: dict[tuple[int, int], list[np.ndarray]] = {}

    def keep(layer, ffns, x, h):
        for e in np.unique(ffns).tolist():
            inputs.setdefault((layer, e), []).append(x[ffns == e].copy())

    with LayersContext(llama, 64) as layers, llama.recording(range(len(result.layers)), keep):
        for row in texts.tokens.tolist():
            layers.compute([1, *row[1:]])
    llama.close()
    for (layer, e), x in inputs.items():
        fc1, fc2 = matrices(result.outfile, layer, e if "mixtral" in name else None)
        on = np.maximum(np.concatenate(x) @ fc1.T, 0) @ fc2.T > 1
        # the kernels round x and the hidden activations to 8 bits
        assert found.predicted[layer, e] == pytest.approx(on.sum(), rel=0.05, abs=20)


def test_it_keeps_its_promise(made):
    """The held-out share that is missed is the one asked for, and no layer computes everything for it.

    Experts that see 200 tokens of this short text may learn too little for that: a note says so.
    """
    name, _, result = made
    n_layer, n_ff = (6, 512) if name == NAMES[0] else (3, 192)
    assert len(result.layers) == n_layer
    for layer in result.layers:
        assert layer.rank == 32
        assert name == NAMES[1] or layer.figures.missed <= 0.01
        assert layer.figures.predicted < 0.8 * n_ff
    assert result.n_bytes == result.outfile.stat().st_size > sum(layer.n_bytes for layer in result.layers)
    assert not result.outfile.with_name(f"{result.outfile.name}.work").exists()
    assert any("part of its function" in note for note in result.notes)
    beyond = sum(part.missed > 0.01 * 1.001 for layer in result.layers for part in layer.experts)
    told = [note for note in result.notes if "miss more than" in note]
    assert [note.split(" predictors")[0] for note in told] == ([f"{beyond} of {n_layer * 8}"] if beyond else [])
    assert name == NAMES[1] or beyond == 0
    assert beyond < n_layer * 8 / 3


def test_a_token_sees_nearly_the_same_model(made):
    """Masked logits are close to exact ones, and nothing but neurons is left out."""
    _, model, result = made
    logits = []
    for options in ({"sparsity": "exact"}, {"predictor_path": result.outfile}):
        llama = tsconv.load(model, n_threads=1, **options)
        ids = llama.tokenize(HELDOUT.read_bytes()[-900:], special=False)
        logits.append(llama.token_logits(ids[:250]))
        llama.close()
    exact, masked = (torch.log_softmax(torch.from_numpy(values), -1) for values in logits)
    divergence = (exact.exp() * (exact - masked)).sum(-1).mean()
    assert 0 < divergence < 0.5


def test_other_commands_take_it(made, tmp_path):
    _, model, result = made
    out = ("--outfile", tmp_path / "s.gguf")
    for command in (
        ("run", "-m", model, "--predictor", result.outfile, "-p", "And God said", "-n", 4, "-t", 1),
        ("eval", "predictor", "-m", model, "--predictor", result.outfile, "-f", HELDOUT, "-c", 64, "--chunks", 1),
        ("profile", model, "--predictor", result.outfile, "--calib", HELDOUT, "--tokens", 512, "--chunk", 256, *out),
        ("inspect", "--verify", result.outfile),
    ):
        done = tiny.run(*command)
        assert done.returncode == 0, done.stderr


def test_it_beats_the_published_recipe(tmp_path):
    """At the same rank, unrounded: no more than two thirds of the neurons for the share that the recipe misses."""
    name, layer = NAMES[0], 3
    model = tiny.converted(name)
    from tsconv.predictor.train.record import record

    llama = tsconv.load(model, sparsity="exact", n_threads=1)
    ids = llama.tokenize(HELDOUT.read_bytes(), add_bos=False, special=False)
    tokens = np.array([[1, *ids[i : i + 127]] for i in range(0, 127 * 160, 127)], np.int32)
    record(llama, tokens, range(layer, layer + 1), (1, 128, 512), tmp_path)
    down = list(down_energies(llama.header))[layer][0]
    llama.close()
    splits = [open_samples(tmp_path, layer, 0, split, 128, 512) for split in (TRAINED, HELD)]
    (x, h), (held_x, held_h) = ((torch.from_numpy(a) for a in s.read(range(s.n_blocks))) for s in splits)
    fc1, fc2 = train_recipe(x.float(), h > 0, (held_x.float(), held_h > 0), 32, 12, 1)

    from tsconv.predictor.train.fit import Fit, Recipe
    from tsconv.predictor.train.ranks import UNROUNDED
    from tsconv.predictor.train.samples import values_of_codes

    values = torch.from_numpy(values_of_codes())[held_h.int()]
    fit = Fit(*splits, down, Recipe(32, UNROUNDED, 0.01, 12, 1))
    e = objective.shares(values, torch.from_numpy(down).float(), fit.state.typical)
    on = (held_x.float() @ fc1.T).relu() @ fc2.T > 0
    missed, predicted = float((e * ~on).sum() / e.sum()), float(on.float().sum(dim=1).mean())
    fit.recipe = Recipe(32, UNROUNDED, missed, 12, 1)
    ours = fit.run().figures
    assert ours.missed <= missed and ours.predicted <= 2 / 3 * predicted, (missed, predicted, ours)


# ---- refreshing


def test_refreshing_begins_with_what_is_there(made, tmp_path):
    """One more epoch from good predictors is better than one from nothing."""
    _, model, result = made
    options = {"epochs": 2, "n_tokens": 4000}
    again = trained(model, tmp_path / "a.predictor.gguf", refresh=True, predictor_path=result.outfile, **options)
    fresh = trained(model, tmp_path / "b.predictor.gguf", **options)
    assert [layer.rank for layer in again.layers] == [32] * len(again.layers)
    used = [sum(layer.figures.predicted for layer in each.layers) for each in (again, fresh)]
    assert used[0] < used[1]


def test_the_checkpoints_own_ranks(tmp_path):
    model = tiny.converted()
    result = trained(model, tmp_path / "a.predictor.gguf", refresh=True, rank="auto", n_tokens=2200, epochs=2)
    assert [layer.rank for layer in result.layers] == [96, 64, 32, 32, 64, 64]


# ---- a model that has none


def test_a_model_without_predictors(tmp_path):
    """Two commands: convert, train. The model then runs with predictors, and exactly when it is asked to."""
    model = tmp_path / "m.gguf"
    shutil.copy(tiny.converted(), model)
    path = tsconv.convert(dense(tmp_path), tmp_path / "none.gguf", "f32").model
    llama = tsconv.load(path, n_threads=1)
    assert llama.sparsity == "exact"
    llama.close()
    done = tiny.run("predictor", "train", path, "--tokens", "4k", *OPTIONS[4:])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "none.predictor.gguf").exists()
    for sparsity, expected in ((None, "predictor"), ("exact", "exact")):
        llama = tsconv.load(path, sparsity=sparsity, n_threads=1)
        assert llama.sparsity == expected
        llama.close()


def dense(folder: Path) -> Path:
    """The shipped dense checkpoint without its predictors."""
    from safetensors.torch import load_file, save_file

    source, target = CHECKPOINTS / NAMES[0], folder / "dense"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    state = {k: v for file in sorted(source.glob("*.safetensors")) for k, v in load_file(file).items()}
    save_file({k: v for k, v in state.items() if ".predictor." not in k}, target / "model.safetensors")
    return target


# ---- runs that end early


def begun(model: Path, out: Path) -> list[str]:
    return [*tiny.TSCONV, "predictor", "train", *map(str, (model, "--out", out, "--outtype", "q3_nl", *SMALL))]


@pytest.fixture(scope="module", params=NAMES)
def whole(request, tmp_path_factory) -> tuple[Path, bytes]:
    """A model, and the file that a run makes that nothing cuts."""
    model, out = tiny.converted(request.param), tmp_path_factory.mktemp("whole") / "whole.predictor.gguf"
    subprocess.run(begun(model, out), capture_output=True, cwd=ROOT, check=True)
    return model, out.read_bytes()


def test_a_killed_run_goes_on(whole, tmp_path):
    """Killed while layer 1 is trained, again a little later, and then let run: bit for bit the same file."""
    model, expected = whole
    out = tmp_path / "killed.predictor.gguf"
    for wait in (0.0, 0.7):
        with subprocess.Popen(begun(model, out), stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("layer"):
                    time.sleep(wait)
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL and not out.exists()
    done = subprocess.run(begun(model, out), capture_output=True, cwd=ROOT, check=True, text=True)
    assert out.read_bytes() == expected
    assert "layer 0:" not in done.stderr and "layer 0 expert 0:" not in done.stderr  # it was ready
    assert os.listdir(tmp_path) == [out.name]


def test_a_full_disk(whole, tmp_path):
    """One line says so; what is ready stays, and the same command goes on."""
    model, expected = whole
    out = tmp_path / "full.predictor.gguf"
    shell = ["bash", "-c", 'ulimit -f 300; exec "$@"', "limited", *begun(model, out)]
    done = subprocess.run(shell, capture_output=True, cwd=ROOT, check=False)
    line = tiny.error_line(done)
    assert "cannot be written: File too large" in line.splitlines()[-1] and not out.exists()
    subprocess.run(begun(model, out), capture_output=True, cwd=ROOT, check=True)
    assert out.read_bytes() == expected


# ---- what cannot be


def refused(*arguments: object) -> str:
    line = tiny.error_line(tiny.run("predictor", "train", *arguments))
    assert "\n" not in line
    return line


def test_bad_arguments(tmp_path):
    model, out = tiny.converted(), tmp_path / "o.predictor.gguf"
    short = tmp_path / "short.txt"
    short.write_text("In the beginning " * 100)
    own = model.with_name(f"{model.stem}.predictor.gguf")
    before = own.read_bytes()
    assert "output exists; choose another name, or --force" in refused(model, "--calib", HELDOUT)
    assert own.read_bytes() == before
    assert "neither auto nor a multiple of 32" in refused(model, "--out", out, "--rank", 33)
    assert "0<x<1" in refused(model, "--out", out, "--target-miss", 1)
    assert "expected --budget 492kB or more, found 10,000 bytes" in refused(model, "--out", out, "--budget", "10kB")
    assert "--budget with --rank auto" in refused(model, "--out", out, "--budget", "1MB", "--rank", 32)
    assert "the text is too short to train on" in refused(model, "--out", out, "--calib", short, "--chunk", 64)
    assert "no such" in refused(tmp_path / "none.gguf", "--out", out).lower()
    assert "not a converted model" in refused(own, "--out", out)
    assert "torch cannot compute on 'cuda:77'" in refused(model, "--out", out, "--device", "cuda:77")
    assert "unknown predictor type" in refused(model, "--out", out, "--outtype", "q9")
    assert "a name that ends in" in refused(model, "--out", tmp_path / "o")
    assert not list(tmp_path.glob("o.*"))


def test_another_training_in_the_folder(tmp_path):
    model, out = tiny.converted(), tmp_path / "o.predictor.gguf"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    assert "is not a folder of this command" in refused(model, "--out", out, "--work", tmp_path / "other")
    options = ("predictor", "train", model, "--out", out, *OPTIONS)
    with subprocess.Popen([*tiny.TSCONV, *map(str, options)], stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None and process.stderr.readline().startswith(b"layer 0")
        process.send_signal(signal.SIGINT)
        process.communicate()  # it says so before it ends
    assert process.returncode == 130
    line = refused(*options[2:], "--seed", 1)
    assert "a training with other options was begun here: seed: expected 1, found 0" in line


def test_without_torch(tmp_path):
    hidden = tmp_path / "torch.py"
    hidden.write_text("raise ImportError('hidden')")
    arguments = ("predictor", "train", tiny.converted(), "--out", tmp_path / "o.predictor.gguf")
    done = tiny.run(*arguments, env={"PYTHONPATH": str(tmp_path)})
    assert "pip install 'tsconv[train]'" in tiny.error_line(done)


# ---- model_N.pt


def test_export_and_import(tmp_path):
    """The checkpoint's own predictors, written as separate ones and converted again, are the same function."""
    model = tiny.converted()
    own = model.with_name(f"{model.stem}.predictor.gguf")
    done = tiny.run("predictor", "export", own, "--out", tmp_path / "pt")
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "pt" / "model_1.pt", weights_only=True)
    reference = Reference.load(CHECKPOINTS / NAMES[0]).model.layers[1].ffns[0].predictor
    for name, weight in (("fc1", reference.fc1.weight), ("fc2", reference.fc2.weight)):
        torch.testing.assert_close(state[f"{name}.weight"].float(), weight.detach(), rtol=1e-3, atol=1e-6)
    again = tsconv.convert(dense(tmp_path), tmp_path / "again.gguf", "f32", predictor=tmp_path / "pt")
    assert again.predictor_kind == "external"
    logits = []
    for path in (model, again.model):
        llama = tsconv.load(path, n_threads=1)
        logits.append(llama.token_logits([1, *range(40, 60)]))
        llama.close()
    assert tiny.nmse(logits[1], logits[0]) < 1e-4
    line = tiny.error_line(tiny.run("predictor", "export", own, "--out", tmp_path / "pt"))
    assert "output exists" in line
    experts = tiny.converted(NAMES[1])
    experts = experts.with_name(f"{experts.stem}.predictor.gguf")
    line = tiny.error_line(tiny.run("predictor", "export", experts, "--out", tmp_path / "other"))
    assert "one predictor for each layer" in line and not (tmp_path / "other").exists()
