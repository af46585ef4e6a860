"""The environment is read in one place, `puna/settings.py`, so that what a person may set is one page.

What it is not: a limit on libraries; huggingface_hub reads its own variables.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pytest

NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
NATIVE = re.compile(r"\b(?:secure_)?getenv\s*\(|\bsetenv\s*\(|\benviron\b")


def faults(path: PurePosixPath, tree: ast.Module) -> list[str]:
    """Where a Python file other than settings.py touches the environment, under whatever name `os` goes."""
    if str(path) == "puna/settings.py":
        return []
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "posix", "nt"):
            names = [alias.name for alias in node.names]
        found += [f"{path}:{node.lineno} uses {name}" for name in names if name in NAMES]
    return found


def test_only_settings_reads_the_environment(sources: Mapping[PurePosixPath, ast.Module]) -> None:
    assert [fault for path, tree in sources.items() for fault in faults(path, tree)] == []


def test_the_native_code_reads_none() -> None:
    source = Path(__file__).resolve().parents[2] / "src"
    native = [path for suffix in ("*.cpp", "*.h", "*.hpp", "*.cc") for path in sorted(source.rglob(suffix))]
    assert [path.name for path in native if NATIVE.search(path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "code",
    [
        "import os\nhome = os.environ['HOME']",
        "import os as system\nsystem.getenv('HOME')",
        "from os import environ",
        "def f():\n    from os import getenv as g",
    ],
)
def test_a_stray_read_is_found(code: str) -> None:
    assert len(faults(PurePosixPath("puna/cli/main.py"), ast.parse(code))) == 1
    assert faults(PurePosixPath("puna/settings.py"), ast.parse(code)) == []
    assert NATIVE.search('const char* n = std::getenv("PUNA_THREADS");')
