"""What the contract tests read: every source file of the package as a syntax tree, and a child interpreter.

What it is not: rules. Each `test_*.py` here states one rule as a checker function over one file, and shows on a broken
snippet that the checker finds it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import pytest

import puna

SOURCE = Path(__file__).resolve().parents[2] / "src"
INSTALLED = Path(puna.__file__).resolve().parents[1]
"""Where the package under test lies, so that programs import the same one: installed, or this checkout's."""


@pytest.fixture(scope="session")
def sources() -> Mapping[PurePosixPath, ast.Module]:
    """Path below src (`puna/kernels/ops.py`) → syntax tree, of every Python file of the package."""
    trees = {
        PurePosixPath(path.relative_to(SOURCE).as_posix()): ast.parse(path.read_text("utf-8"), str(path))
        for path in sorted(SOURCE.rglob("*.py"))
    }
    assert len(trees) > 10, f"found almost no sources below {SOURCE}"
    return trees


@pytest.fixture(scope="session")
def child() -> Callable[..., str]:
    """Run a Python program in a fresh interpreter that imports the package under test; gives its stdout."""

    def run(program: str, *arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(INSTALLED), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
