"""Options of `tsconv run` that other programs have too: drafts, prompt caches, grammars, adapters, output."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import tsconv
from support import tiny
from support.synthetic import save_adapter
from support.terminal import Terminal

PROMPT = "In the beginning"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny.converted()


def run(model: Path, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    return tiny.run("run", model, "-t", 1, "--temp", 0, *arguments, env=env)


def answer(model: Path, *arguments: object) -> dict[str, object]:
    done = run(model, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def error(model: Path, *arguments: object) -> str:
    line = tiny.error_line(run(model, "-p", PROMPT, "-n", 4, *arguments))
    assert line.startswith("error: ") and "\n" not in line
    return line


# ---- drafts


@pytest.mark.parametrize("options", [("-n", 200), ("-n", 60, "--chat"), ("-n", 100, "--sparsity", "exact")])
def test_drafts_leave_greedy_text_as_it_is(model: Path, options: tuple[object, ...]) -> None:
    plain, drafted = (answer(model, "-p", PROMPT, *options, *more) for more in ((), ("--draft", "prompt-lookup")))
    assert drafted["text"] == plain["text"]
    assert drafted["n_generated"] == plain["n_generated"]


def test_drafts_until_the_context_is_full() -> None:
    """They end where the context does. The text of these random weights need not be the same: two tokens of it may be
    equally likely but for rounding."""
    found = answer(tiny.of_bytes(), "-p", "abc", "-n", -1, "-c", 256, "--draft", "prompt-lookup")
    assert found["finish_reason"] == "length"
    assert found["n_prompt"] + found["n_generated"] == found["n_ctx"] == 256


# ---- prompt caches


def test_a_prompt_cache_is_gone_on_from(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = ("-p", PROMPT, "-n", 20)
    plain = answer(model, *options)
    first, second = (answer(model, *options, "--prompt-cache", cache) for _ in range(2))
    assert first["text"] == second["text"] == plain["text"]
    assert first["n_cached"] == 0
    assert second["n_cached"] == first["n_prompt"] - 1, "the last one is computed again for its logits"
    longer = ("-p", PROMPT + str(plain["text"]) + " And", "-n", 12)
    on = answer(model, *longer, "--prompt-cache", cache)
    assert on["n_cached"] > second["n_prompt"]
    assert on["text"] == answer(model, *longer)["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_prompt_caches_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    long = ("-p", "In the beginning God created. " * 40, "-n", 2, "-c", 1024, "--prompt-cache", cache)
    assert run(model, *long).returncode == 0
    of_another = f"{cache}: the prompt cache is of another model, or of another --sparsity or --lora"
    before = cache.read_bytes()
    assert of_another in error(tiny.converted(outtype="q8_0"), "--prompt-cache", cache)
    assert of_another in error(model, "--prompt-cache", cache, "--sparsity", "exact")
    assert f"{cache}: the prompt cache cannot be used" in error(model, "--prompt-cache", cache, "-c", 256)
    assert cache.read_bytes() == before
    cache.write_bytes(before[: len(before) // 2])
    assert f"{cache}: the prompt cache cannot be used" in error(model, "--prompt-cache", cache, "-c", 1024)
    cache.write_bytes(b"text")
    assert f"{cache}: not a prompt cache" in error(model, "--prompt-cache", cache)
    assert "folder of the output does not exist" in error(model, "--prompt-cache", tmp_path / "none" / "cache")
    assert "is a directory" in error(model, "--prompt-cache", tmp_path)


def test_a_chat_has_a_prompt_cache_too(model: Path, tmp_path: Path) -> None:
    prefilled = []
    for _ in range(2):
        terminal = Terminal(model, "-c", 256, "--temp", 0, "-n", 8, "--prompt-cache", tmp_path / "cache")
        terminal.wait_for(rb"> ")
        terminal.type("Who is he\n")
        terminal.wait_for(rb"\n> ")
        terminal.type("/exit\n")
        status, stderr = terminal.end()
        assert status == 0
        prefilled.append(int(re.search(r"prefill (\d+) tokens", stderr)[1]))
    assert prefilled[1] == 1 < prefilled[0]


# ---- grammars


def test_a_grammar_is_followed(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "grammar"
    file.write_text('root ::= "yes" | "no"')
    assert answer(model, "-p", PROMPT, "--grammar-file", file)["text"] in ("yes", "no")
    file.write_text(json.dumps(SCHEMA))
    for schema in (file, json.dumps(SCHEMA)):
        text = answer(model, "-p", PROMPT, "--json-schema", schema)["text"]
        assert isinstance(json.loads(str(text))["a"], int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('root ::= "yes', "the grammar cannot be used: found parse: error parsing grammar"),
        ('answer ::= "yes"', "the grammar cannot be used: found no rule named root"),
        ("", "the grammar cannot be used"),
        ("root ::= root", "the grammar cannot be used"),
    ],
)
def test_bad_grammars(model: Path, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "grammar"
    file.write_text(text)
    assert message in error(model, "--grammar-file", file)


def test_bad_schemas(model: Path, tmp_path: Path) -> None:
    assert "the JSON schema is not JSON" in error(model, "--json-schema", "{")
    assert "the JSON schema cannot be used: found Unrecognized" in error(model, "--json-schema", '{"type": "x"}')
    missing = tmp_path / "none.json"
    assert f"{missing}: cannot read the JSON schema: No such file" in error(model, "--json-schema", missing)
    assert f"{tmp_path}: cannot read the grammar: Is a directory" in error(model, "--grammar-file", tmp_path)
    both = error(model, "--grammar-file", missing, "--json-schema", missing)
    assert "--grammar-file and --json-schema exclude each other" in both


# ---- sampling, adapters, output


def test_min_p_and_repeat_penalty(model: Path) -> None:
    plain = answer(model, "-p", PROMPT, "-n", 40)["text"]
    assert answer(model, "-p", PROMPT, "-n", 40, "--repeat-penalty", 1.8)["text"] != plain
    # Only the likeliest token is as likely as itself.
    assert answer(model, "-p", PROMPT, "-n", 40, "--temp", 1.5, "--min-p", 1)["text"] == plain
    assert "--min-p" in error(model, "--min-p", 2)
    assert "--repeat-penalty" in error(model, "--repeat-penalty", 0)


def test_adapters(model: Path, tmp_path: Path) -> None:
    shape = {t.name: t.shape for t in tsconv.load(model, n_ctx=256, n_threads=1).header.tensors}
    fits = save_adapter(tmp_path / "fits.gguf", "blk.0.attn_output.weight", shape["blk.0.attn_output.weight"])
    plain = answer(model, "-p", PROMPT, "-n", 12)
    assert answer(model, "-p", PROMPT, "-n", 12, "--lora", fits)["text"] == plain["text"], "it adds nothing"
    fused = save_adapter(tmp_path / "q.gguf", "blk.0.attn_q.weight", shape["blk.0.attn_output.weight"])
    line = error(model, "--lora", fused)
    assert "the adapter changes blk.0.attn_q.weight, which is part of blk.0.attn_qkv.weight" in line
    assert "--no-fuse-qkv" in line
    assert str(tmp_path / "none.gguf") in error(model, "--lora", tmp_path / "none.gguf")


def test_text_into_a_file(model: Path, tmp_path: Path) -> None:
    plain = run(model, "-p", PROMPT, "-n", 12).stdout
    file = tmp_path / "text"
    done = run(model, "-p", PROMPT, "-n", 12, "-o", file)
    assert (done.returncode, done.stdout) == (0, b"")
    assert file.read_bytes() == plain
    assert f"{file}: the file exists; choose another name" in error(model, "-o", file)
    assert "folder of the output does not exist" in error(model, "-o", tmp_path / "none" / "text")
    done = run(model, "-p", PROMPT, "-n", 12, "--json", "-o", tmp_path / "json")
    assert json.loads((tmp_path / "json").read_text())["text"] == plain.decode().removesuffix("\n")


# ---- variables, and what every program has


def test_variables_are_defaults(model: Path) -> None:
    env = {"TSCONV_MODEL": str(model), "TSCONV_THREADS": "1", "TSCONV_CTX_SIZE": "700"}
    done = tiny.run("run", "-p", PROMPT, "-n", 2, "--json", env=env)
    found = json.loads(done.stdout)
    assert (found["model"], found["n_threads"], found["n_ctx"]) == (str(model), 1, 768)
    done = tiny.run("run", model, "-p", PROMPT, "-n", 2, "-c", 256, "--json", env=env | {"TSCONV_MODEL": "/none.gguf"})
    assert json.loads(done.stdout)["n_ctx"] == 256
    line = tiny.error_line(tiny.run("run", model, "-p", "x", env={"TSCONV_THREADS": "many"}))
    assert "many" in line
    text = tiny.run("run", "--help").stdout.decode()
    assert all(name in text for name in env)


def test_version() -> None:
    assert tiny.run("-V").stdout == tiny.run("--version").stdout == f"tsconv, version {tsconv.__version__}\n".encode()


def test_completion() -> None:
    env = {"COMP_WORDS": "tsconv ru", "COMP_CWORD": "1", "_TSCONV_COMPLETE": "bash_complete"}
    code = "import sys; sys.argv = ['tsconv']; from tsconv.cli import main; main()"
    done = subprocess.run([tiny.TSCONV[0], "-c", code], capture_output=True, env=env, check=False)
    assert done.stdout == b"plain,run\n"
