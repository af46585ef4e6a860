"""What every test may ask for: the folder of real files, and nothing global."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def reference_folder() -> Path | None:
    """Where the real checkpoints, tokenizers and texts lie: PUNA_REFERENCE, else ../shared/reference."""
    folder = Path(os.environ.get("PUNA_REFERENCE") or REPOSITORY.parent / "shared" / "reference")
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def reference() -> Path:
    """The reference folder; the test is skipped, saying so, where there is none."""
    folder = reference_folder()
    if folder is None:
        pytest.skip("needs the reference folder (set PUNA_REFERENCE, or lay it at ../shared/reference)")
    return folder
