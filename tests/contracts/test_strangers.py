"""Nothing of a stranger's is run or fetched: no code from a file or a request, no pickle, no address from a client.

What is surprising: it looks at the source. A test that sends one hostile file finds that one; here a new way in is
found where it is opened.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import PurePosixPath

import pytest

RUNS = frozenset({"eval", "exec", "compile", "__import__"})
READS_CODE = frozenset({"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"})
FETCHES = frozenset({"urllib.request", "http.client", "httpx", "httpx2", "requests", "aiohttp", "urllib3", "ftplib"})
FETCHER = PurePosixPath("puna/server/elsewhere.py")
"""The one that may: pictures, from hosts that an operator named."""
LISTENS = frozenset({"multiprocessing.connection", "multiprocessing.managers", "xmlrpc", "socketserver"})


def doors(path: PurePosixPath, tree: ast.Module) -> list[str]:
    """What would let a stranger's code or address in."""
    found = []
    inside = ("server" in path.parts or "gateway" in path.parts) and path != FETCHER
    barred = READS_CODE | LISTENS | (FETCHES if inside else frozenset())
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in RUNS:
                found.append(f"{path}:{node.lineno}: {called.id}")
            if isinstance(called, ast.Attribute) and called.attr == "load" and ast.unparse(called.value) == "torch":
                found.append(f"{path}:{node.lineno}: torch.load")
            found += [f"{path}:{node.lineno}: {k.arg}" for k in node.keywords if k.arg == "trust_remote_code"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"{path}:{node.lineno}: {n}" for n in names if n in barred or n.split(".")[0] in barred]
    return found


def test_nothing_of_a_strangers_is_run_or_fetched(sources: Mapping[PurePosixPath, ast.Module]) -> None:
    assert [each for path, tree in sources.items() for each in doors(path, tree)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from multiprocessing.connection import Listener",
        "eval(text)",
        "torch.load(path)",
        "load(trust_remote_code=True)",
        "from urllib.request import urlopen",
        "from urllib import request",
        "import httpx2 as h",
    ],
)
def test_a_door_that_is_opened_is_found(code: str) -> None:
    assert doors(PurePosixPath("puna/server/new.py"), ast.parse(code))
