"""The generated page of commands is current, and says everything."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from puna.cli import flags, reference
from puna.settings import COMMANDS, ENVIRONMENT

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "cli.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == reference.page(), "run `python -m puna.cli.reference > docs/reference/cli.md`"


def test_every_command_flag_and_variable_has_its_place() -> None:
    page = reference.page()
    for name, kind in COMMANDS.items():
        section = page.partition(f"## `puna {name}`\n")[2].partition("\n## ")[0]
        for each in fields(kind):
            assert f"\n| `{flags.spelling(each)}`" in section
            assert flags.flag(each).help in section
    assert all(f"| `{name}` |" in page for name in ENVIRONMENT)
