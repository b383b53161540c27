"""All documents: lines fit a screen, links and paths lead somewhere, commands, options and targets are real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest

from support import ROOT
from tsconv.cli import COMMANDS, cli

README = ROOT / "README.md"
FOLDERS = ("docs", "tsconv", "native", "checkpoints", "profiles", "tests")
FOUND = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in (README, *FOUND)}
MAX_COLUMNS, MAX_LINES = 120, 80

LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`([^`]+)`")
ENDING = re.compile(r"\.(py|c|h|md|txt|toml|json)$")
OTHER_NAMES = {"perplexity"}  # of commands
SHELL_OPERATORS = {"|", ";", "&&", "#"}

documents = pytest.mark.parametrize("name", DOCUMENTS)


def text_of(name: str) -> str:
    return DOCUMENTS[name].read_text(encoding="utf-8")


def spans(text: str) -> list[str]:
    """What is set as code between backticks, with line breaks as spaces."""
    return [" ".join(span.split()) for span in INLINE.findall(FENCED.sub("", text))]


def code(text: str) -> Iterator[str]:
    """Spans, and the lines of code blocks with continued lines as one."""
    yield from spans(text)
    for block in FENCED.findall(text):
        yield from block.replace("\\\n", " ").splitlines()


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def calls(text: str) -> Iterator[list[str]]:
    """The words of each call of tsconv, from the command on; of `COMMAND --option` without tsconv too."""
    for line in code(text):
        try:
            words = [] if "\\" in line else shlex.split(line, comments=True)  # \n and such: not a command
        except ValueError:  # half a quotation: neither
            continue
        if len(words) > 1 and words[0] in COMMANDS and words[1].startswith("-"):
            yield words
        for i, word in enumerate(words):
            if word == "tsconv" and (i == 0 or words[i - 1] in SHELL_OPERATORS):
                after = words[i + 1 :]
                end = next((k for k, other in enumerate(after) if other in SHELL_OPERATORS), len(after))
                yield _command_first(after[:end])


def _command_first(words: list[str]) -> list[str]:
    """The words with the name of a group and of its command as one."""
    is_group = words and words[0] in COMMANDS and isinstance(cli.get_command(click.Context(cli), words[0]), click.Group)
    return [" ".join(words[:2]), *words[2:]] if is_group and len(words) > 1 else words


def commands(group: click.Group = cli) -> dict[str, click.Command]:
    """By name; those of a group as "GROUP NAME"."""
    context = click.Context(group)
    found = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": sub for inner, sub in commands(command).items()}
        elif command is not None:
            found[name] = command
    return found


def options(command: click.Command) -> set[str]:
    found = {"--help", "-h"}
    return found.union(*(set(p.opts) | set(p.secondary_opts) for p in command.params if isinstance(p, click.Option)))


@documents
def test_lines_fit(name: str) -> None:
    """But for tables, and what is quoted as it is."""
    lines = enumerate(text_of(name).splitlines(), 1)
    long = [number for number, line in lines if len(line) > MAX_COLUMNS and not line.startswith(("|", ">"))]
    assert long == []


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= MAX_LINES


@documents
def test_links_lead_somewhere(name: str) -> None:
    text = text_of(name)
    missing = []
    for link in LINK.findall(FENCED.sub("", text)):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (DOCUMENTS[name].parent / target).resolve() if target else DOCUMENTS[name]
        exists = path.exists() and path.is_relative_to(ROOT)
        if not exists or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            missing.append(link)
    assert missing == []


@documents
def test_paths_exist(name: str) -> None:
    """Of what begins with a folder of this repository, or lies in its root and ends like a file; * as in a shell."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build"}
    missing = []
    for span in spans(text_of(name)):
        for word in span.split():
            first, slash, rest = word.partition("/")
            is_path = slash and first in folders and (not rest or ENDING.search(word) or word.endswith("/"))
            if is_path and "NAME" not in word and not list(ROOT.glob(word)):
                missing.append(word)
    assert missing == []


@documents
def test_commands_and_options_exist(name: str) -> None:
    known = {command: options(found) for command, found in commands().items()}
    wrong = []
    for words in calls(text_of(name)):
        if not words or words[0] in ("COMMAND", "--help"):
            continue
        if words[0] not in known:
            wrong.append(words)
            continue
        if words[0] == "tools":  # options of llama.cpp's programs
            continue
        own = words[1 : words.index("--") if "--" in words else None]
        given = [word.partition("=")[0] for word in own if re.match("--?[A-Za-z]", word)]
        wrong += [[words[0], option] for option in given if option not in known[words[0]]]
    assert wrong == []


@documents
def test_options_that_stand_alone_are_of_some_command(name: str) -> None:
    known = set().union(*map(options, commands().values()))
    alone = {span.split()[0] for span in spans(text_of(name)) if re.match("--[a-z]", span)}
    assert alone - known == set()


@documents
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {match[1] for line in code(text_of(name)) if (match := re.match(r"make ([a-z][\w-]*)", line))}
    assert named - targets == set()


def test_every_command_stands_in_the_readme() -> None:
    named = {words[0] for words in calls(text_of("README.md")) if words}
    assert set(commands()) - OTHER_NAMES <= named
