"""Every example runs as it stands, and the Python in README and guides does too."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [
    ROOT / "README.md",
    *(page for room in ("guides", "concepts") for page in sorted((ROOT / "docs" / room).glob("*.md"))),
]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script: Path) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert 5 <= len(script.read_text().splitlines()) <= 40


def test_the_count_in_the_example_is_the_published_one() -> None:
    done = subprocess.run([sys.executable, ROOT / "examples" / "shapes.py"], capture_output=True, text=True, check=True)
    assert "1,235,814,400 parameters" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_in_the_pages(page: Path) -> None:
    names: dict[str, object] = {"__name__": "__page__"}  # a page is read from top to bottom: later blocks go on
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
