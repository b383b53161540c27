"""What imports what: packages in layers, of which none imports a higher one, and no circles among modules."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from support import ROOT
from tsconv.extras import EXTRAS

PACKAGE = ROOT / "tsconv"
# The packages and modules right under tsconv/, lowest first. Imports inside functions and for type checking count too.
LAYERS = (
    "errors",
    "extras",
    "cache",
    "progress",
    "signals",
    "native",
    "transform",
    "checkpoint",
    "arch",
    "format",
    "write",
    "machine",
    "runtime",
    "stats",
    "placement",
    "report",
    "eval",
    "predictor",
    "commands",
    "bench",
    "cli",
)
ENTRANCES = {"tsconv", "tsconv.__main__"}  # they name what users may import, and are imported for __version__ only
# Large, and needed by one command, or by one of its options.
LATE = (*EXTRAS, "huggingface_hub")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of tsconv that `module` imports, anywhere in it."""
    return frozenset(_imports(MODULES[module]))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from (name for name in ([whole] if whole in MODULES else [node.module]) if name in MODULES)


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def test_the_layers_are_what_there_is() -> None:
    assert {name.split(".")[1] for name in MODULES if name not in ENTRANCES} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_imports_a_higher_one(name: str) -> None:
    mine = [module for module in MODULES if module not in ENTRANCES and module.split(".")[1] == name]
    higher = [
        f"{module} imports {other}"
        for module in mine
        for other in sorted(imports(module) - ENTRANCES)
        if layer(other) > layer(module)
    ]
    assert not higher


def test_no_circles_among_modules() -> None:
    graph = {module: imports(module) - ENTRANCES - {module} for module in MODULES if module not in ENTRANCES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_what_one_command_needs_is_imported_when_it_is_needed() -> None:
    modules = sorted(name for name in MODULES if name.startswith(("tsconv.cli", "tsconv.commands")))
    code = f"import sys, {', '.join(modules)}; print([n for n in {LATE} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_nothing_that_is_imported_is_missing() -> None:
    """Also where the import stands in a function that few calls reach."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tsconv":
                assert node.module in MODULES, f"{module} imports {node.module}"
                defined = _names(MODULES[node.module])
                for alias in node.names:
                    assert f"{node.module}.{alias.name}" in MODULES or alias.name in defined, f"{module}: {alias.name}"


@cache
def _names(path: Path) -> frozenset[str]:
    """What a module defines or imports at its top level, and what it names in __all__."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)
