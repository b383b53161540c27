"""Checkpoints from the Hub: huggingface_hub against a small server that speaks the Hub's HTTP API, and without any."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest

from support import ROOT
from support.hub import COMMIT, endpoint, environment, serve
from support.synthetic import SHAPES, random_tensors, save, write_predictors

HUB = 7


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    shape = SHAPES["bamboo"]
    directory = save(tmp_path / "remote", shape, random_tensors(shape))
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (directory / "pytorch_model.bin").write_bytes(b"not wanted")
    write_predictors(tmp_path / "remote-predictors", shape, [32, 64])
    with serve({"owner/Bamboo-Tiny": directory, "owner/predictors": tmp_path / "remote-predictors"}) as server:
        yield server


def convert(tmp_path: Path, endpoint: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tsconv", "convert", *arguments]
    outfile = ["--outfile", str(tmp_path / "m.gguf")]
    env = environment(tmp_path / "cache", endpoint) | more
    return subprocess.run([*command, *outfile], capture_output=True, text=True, cwd=ROOT, check=False, env=env)


def keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_download_then_offline(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    arguments = ("owner/Bamboo-Tiny", "--predictor", "owner/predictors")
    done = convert(tmp_path, endpoint(hub), *arguments)
    assert done.returncode == 0, done.stderr
    model = keys(tmp_path / "m.gguf")
    assert model["general.name"] == "Bamboo-Tiny"
    assert model["general.license"] == "apache-2.0"
    assert model["general.source.url"] == "https://huggingface.co/owner/Bamboo-Tiny"
    assert (model["turbosparse.source.repo"], model["turbosparse.source.revision"]) == ("owner/Bamboo-Tiny", COMMIT)
    assert model["turbosparse.predictor.kind"] == "external"
    assert not any("pytorch_model.bin" in path for path in hub.RequestHandlerClass.requested)

    hub.RequestHandlerClass.requested.clear()
    again = convert(tmp_path, endpoint(hub), *arguments, "--force", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert keys(tmp_path / "m.gguf")["turbosparse.source.revision"] == COMMIT
    assert hub.RequestHandlerClass.requested == []


@pytest.mark.parametrize(
    ("repo", "options", "parts"),
    [
        ("owner/nothing", (), ["owner/nothing", "no such repository"]),
        ("owner/gated", (), ["owner/gated", "gated", "HF_TOKEN"]),
        ("owner/Bamboo-Tiny", ("--revision", "v9"), ["owner/Bamboo-Tiny@v9", "no such revision"]),
    ],
)
def test_refused_by_the_hub(
    repo: str, options: tuple[str, ...], parts: list[str], hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    check_refused(convert(tmp_path, endpoint(hub), repo, *options), tmp_path, parts)


def test_interrupted_download_is_finished_by_the_next_run(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    handler, shard = hub.RequestHandlerClass, "model-00002-of-00002.safetensors"
    handler.broken.add(shard)
    done = convert(tmp_path, endpoint(hub), "owner/Bamboo-Tiny")
    check_refused(done, tmp_path, ["owner/Bamboo-Tiny", "download failed", "418", "run it again"])
    handler.broken.clear()
    handler.requested.clear()
    again = convert(tmp_path, endpoint(hub), "owner/Bamboo-Tiny")
    assert again.returncode == 0, again.stderr
    fetched = {path.rsplit("/", 1)[1] for path in handler.requested if "/resolve/" in path}
    assert shard in fetched
    assert "model-00001-of-00002.safetensors" not in fetched


def test_offline_without_a_cached_copy(tmp_path: Path, silent: str) -> None:
    done = convert(tmp_path, silent, "owner/Bamboo-Tiny", HF_HUB_OFFLINE="1")
    check_refused(done, tmp_path, ["owner/Bamboo-Tiny", "offline"])


def test_hub_cannot_be_reached(tmp_path: Path, silent: str) -> None:
    done = convert(tmp_path, silent, "owner/Bamboo-Tiny")
    check_refused(done, tmp_path, ["owner/Bamboo-Tiny", "cannot be reached"])


def check_refused(done: subprocess.CompletedProcess[str], tmp_path: Path, parts: list[str]) -> None:
    assert (done.returncode, done.stdout) == (HUB, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert not list(tmp_path.glob("m.gguf*"))
