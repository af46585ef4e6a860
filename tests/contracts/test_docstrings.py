"""Every file opens by saying what it is; every public function and class says what it does.

What is surprising: methods are left to judgement, since a property named `shape` says it all; test functions too, since
their names are sentences. Their files are not.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

REPOSITORY = Path(__file__).resolve().parents[2]


def faults(path: PurePosixPath, tree: ast.Module, *, public: bool = True) -> list[str]:
    """What in a file has no docstring: the file itself and, where `public`, its public functions and classes."""
    found = [] if ast.get_docstring(tree) else [f"{path} has no docstring"]
    for node in tree.body if public else ():
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ):
            found.append(f"{path}:{node.lineno} {node.name} has no docstring")
    return found


def test_the_package_explains_itself(sources: Mapping[PurePosixPath, ast.Module]) -> None:
    assert [fault for path, tree in sources.items() for fault in faults(path, tree)] == []


def test_files_beside_the_package_explain_themselves() -> None:
    found = []
    for folder in ("tests", "bench", "examples"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            name = PurePosixPath(path.relative_to(REPOSITORY).as_posix())
            found += faults(name, ast.parse(path.read_text("utf-8")), public=False)
    assert found == []


def test_silence_is_found() -> None:
    silent = ast.parse("def f(): pass\nasync def g(): pass\nclass C:\n    x = 1\ndef _private(): pass")
    path = PurePosixPath("puna/x.py")
    assert [fault.split()[1] for fault in faults(path, silent)] == ["has", "f", "g", "C"]
    assert faults(path, silent, public=False) == ["puna/x.py has no docstring"]
    spoken = ast.parse('"""What it is."""\ndef f():\n    """Does."""\nclass C:\n    """Is."""\n    def m(self): pass')
    assert faults(path, spoken) == []
