"""What a source file imports, by any kind of import, wherever in the file it stands.

What it is not: a rule; `test_imports.py` and `test_torch.py` hold those.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath


def imported(path: PurePosixPath, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports; `from a import b` gives `a.b`, whatever b is.

    A dynamic import gives what its argument spells out, up to the first part that it does not: `puna.cli.?`, or `?`.
    """
    package = path.parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module or "") if part)
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, _spelled(node.args[0]) if node.args else "?"


def _spelled(argument: ast.expr) -> str:
    """The module a dynamic import names, `?` standing for what is known only at run time."""
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    known = ""
    for part in parts:
        if not (isinstance(part, ast.Constant) and isinstance(part.value, str)):
            return known + "?"
        known += part.value
    return known
