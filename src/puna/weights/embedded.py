"""The model that ships inside the package: its name, and where it lies.

What it is not: how it was made (`recipes/cria`).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

EMBEDDED = "cria"
"""The name by which every command knows it."""


def embedded_folder() -> Path:
    """Its folder in the installed package."""
    return Path(str(files("puna") / "data" / EMBEDDED))
