"""Imports point one way: a module imports only from rows above its own, or from its own package.

What it is: a walk over the syntax of every source file, so imports inside functions and under TYPE_CHECKING count too.
What is surprising: two packages of one row may not import each other, and a dynamic import must spell its module out,
because a name built at run time cannot be checked here.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pytest
from import_walk import imported

ROWS = {
    "errors": -2, "types": -1, "settings": 0,  # one row of plain data, in its own order: settings hold types
    "kernels": 1, "catalog": 1,
    "models": 2, "text": 2,
    "weights": 3,
    "quantize": 4, "engine": 4, "plan": 4, "forecast": 4,
    "images": 4.5, "sessions": 4.5, "stream": 4.5,  # parts of the LLM
    "llm": 5, "gateway": 5.5,  # the local backend is an LLM in a thread
    "train": 6, "evaluate": 6, "knowledge": 6,
    "server": 7, "bench": 7,
    "cli": 8,
    "__main__": 9,
}  # fmt: skip

ROOT_FACTS = {"__version__"}
"""Names of `puna/__init__.py` that belong to no row: any module may have them."""

ORACLES = {"transformers", "peft", "llama_cpp", "lm_eval", "accelerate"}
"""What tests and benchmarks compare with; the package never imports them, but for the place below."""

PEERS = "puna/bench/peers/"
"""Programs that run other engines, in processes of their own and where those are installed."""


def room(path: PurePosixPath) -> str:
    """The top-level package or module a file belongs to: `puna/kernels/ops.py` → `kernels`; the root is `__init__`."""
    return path.parts[1].removesuffix(".py")


def faults(path: PurePosixPath, tree: ast.Module) -> list[str]:
    """What a file imports that it must not, a sentence each."""
    own, found = room(path), []
    if own != "__init__" and own not in ROWS:
        return [f"{path}: {own!r} stands in no row of the table"]
    for line, name in imported(path, tree):
        where = f"{path}:{line}"
        parts = name.split(".")
        if "?" in ".".join(parts[:2]):
            found.append(f"{where} imports a module whose name is built at run time")
        elif parts[0] != "puna":
            continue
        elif len(parts) == 1:
            found.append(f"{where} imports all of puna; name the module")
        elif parts[1] in ROOT_FACTS or parts[1] == own:
            continue
        elif own == "__init__":
            if parts[1] != "llm":
                found.append(f"{where} imports {name}; the package's root may hand out puna.llm only")
        elif parts[1] not in ROWS:
            found.append(f"{where} imports {name}, and {parts[1]!r} stands in no row of the table")
        elif ROWS[parts[1]] >= ROWS[own]:
            found.append(f"{where} imports {name} (row {ROWS[parts[1]]}) from row {ROWS[own]}")
    return found


def undeclared(path: PurePosixPath, tree: ast.Module, declared: set[str]) -> list[str]:
    """Third-party modules a file imports that pyproject.toml does not declare for the package."""
    if str(path).startswith(PEERS):
        return []
    allowed = declared | set(sys.stdlib_module_names) | {"puna", "?", "__future__"}
    tops = ((line, name.split(".")[0]) for line, name in imported(path, tree) if not name.startswith("."))
    return [f"{path}:{line} imports {top}, which is not declared" for line, top in tops if top not in allowed]


def test_imports_point_one_way(sources: Mapping[PurePosixPath, ast.Module]) -> None:
    assert [fault for path, tree in sources.items() for fault in faults(path, tree)] == []


def test_third_party_imports_are_declared(sources: Mapping[PurePosixPath, ast.Module]) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    stated = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.split(r"[^A-Za-z0-9_-]", line)[0].replace("-", "_").lower() for line in stated}
    declared.add("triton")  # comes with torch
    declared.add("PIL")  # the package that pillow fills
    declared.add("opentelemetry")  # the package that opentelemetry-sdk and its exporters fill
    assert [fault for path, tree in sources.items() for fault in undeclared(path, tree, declared)] == []
    assert not declared & ORACLES


def test_nothing_imports_the_programs_that_run_other_engines(sources: Mapping[PurePosixPath, ast.Module]) -> None:
    place = PEERS.rstrip("/").replace("/", ".")
    every = ((path, name) for path, tree in sources.items() for _, name in imported(path, tree))
    assert [(path, name) for path, name in every if name.startswith(place)] == []


def test_the_programs_that_run_other_engines_need_nothing_of_puna_but_the_protocol(
    sources: Mapping[PurePosixPath, ast.Module],
) -> None:
    peers = [path for path in sources if str(path).startswith(PEERS)]
    assert len(peers) > 4
    found = {name for path in peers for _, name in imported(path, sources[path]) if name.split(".")[0] == "puna"}
    assert found == {"puna.bench.protocol.serve", "puna.bench.over_http.ServerUnderLoad"}
    for file in ("protocol", "load", "over_http"):  # and what that needs in turn
        path = PurePosixPath(f"puna/bench/{file}.py")
        own = {name for _, name in imported(path, sources[path]) if not name.startswith("puna.bench.load.")}
        assert {name.split(".")[0] for name in own} <= {*sys.stdlib_module_names, "__future__"}


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        ("puna/models/decoder.py", "from puna.weights import names", "imports puna.weights.names (row 3) from row 2"),
        ("puna/models/decoder.py", "import puna.text.chat", "imports puna.text.chat (row 2) from row 2"),
        ("puna/kernels/ops.py", "def f():\n    from puna.models import tree", ":2 imports puna.models.tree"),
        ("puna/types.py", "from puna.settings import puna_home", "imports puna.settings.puna_home (row 0) from row -1"),
        ("puna/errors.py", "if TYPE_CHECKING:\n    import puna.cli.main", ":2 imports puna.cli.main (row 8)"),
        ("puna/server/app.py", "from puna import cli", "imports puna.cli (row 8) from row 7"),
        ("puna/server/app.py", "from puna import LLM", "'LLM' stands in no row"),
        ("puna/cli/main.py", "import puna", "name the module"),
        ("puna/cli/main.py", "from puna import novelty", "'novelty' stands in no row"),
        ("puna/novelty/x.py", "import os", "'novelty' stands in no row"),
        ("puna/models/tree.py", "from ..weights import load", "imports puna.weights.load (row 3)"),
        ("puna/models/tree.py", "from .. import weights", "imports puna.weights (row 3)"),
        ("puna/kernels/cpu/__init__.py", "from ...engine import step", "imports puna.engine.step (row 4)"),
        ("puna/text/chat.py", "importlib.import_module('puna.engine')", "imports puna.engine (row 4)"),
        ("puna/text/chat.py", "importlib.import_module(name)", "built at run time"),
        ("puna/cli/main.py", "importlib.import_module(f'puna.{name}')", "built at run time"),
        ("puna/text/chat.py", "importlib.import_module(f'puna.engine.{name}')", "imports puna.engine.? (row 4)"),
        ("puna/__init__.py", "import puna.cli", "may hand out puna.llm only"),
    ],
)
def test_a_wrong_import_is_found(path: str, code: str, said: str) -> None:
    found = faults(PurePosixPath(path), ast.parse(code))
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("puna/cli/main.py", "from puna import __version__\nfrom puna.cli.run import run\nimport puna.server.app"),
        ("puna/models/tree.py", "from . import rope\nfrom .rope import Rope\nfrom puna.kernels import ops"),
        ("puna/kernels/cpu/__init__.py", "from .. import layouts\nfrom puna.kernels import _cpu\nimport numpy"),
        ("puna/__init__.py", "from puna.llm import LLM"),
        ("puna/cli/main.py", "importlib.import_module(f'puna.cli.{name}')"),
        ("puna/settings.py", "from puna.types import Sampling\nfrom puna.errors import UsageError"),
    ],
)
def test_a_right_import_is_let_through(path: str, code: str) -> None:
    assert faults(PurePosixPath(path), ast.parse(code)) == []


def test_an_undeclared_import_is_found() -> None:
    tree = ast.parse("import json\ndef f():\n    import transformers.models\n    from numpy import array")
    found = undeclared(PurePosixPath("puna/cli/main.py"), tree, {"numpy"})
    assert found == ["puna/cli/main.py:3 imports transformers, which is not declared"]
