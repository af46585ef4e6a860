"""Where state lies, by environment and platform."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from puna.errors import UsageError
from puna.settings import puna_home, typed_path


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "~/.local/share/puna"),
        ("linux", {"XDG_DATA_HOME": "/data"}, "/data/puna"),
        ("linux", {"XDG_DATA_HOME": "relative"}, "~/.local/share/puna"),
        ("darwin", {"XDG_DATA_HOME": "/data"}, "~/Library/Application Support/puna"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/puna"),
        ("win32", {}, "~/AppData/Local/puna"),
        ("linux", {"PUNA_HOME": "/mine", "XDG_DATA_HOME": "/data"}, "/mine"),
        ("darwin", {"PUNA_HOME": "~/mine"}, "~/mine"),
        ("linux", {"PUNA_HOME": ""}, "~/.local/share/puna"),
    ],
)
def test_puna_home(monkeypatch: pytest.MonkeyPatch, platform: str, environment: dict[str, str], expected: str) -> None:
    for name in ("PUNA_HOME", "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert puna_home() == Path(expected).expanduser()


def test_relative_puna_home_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PUNA_HOME", "here")
    assert puna_home() == tmp_path / "here"


def test_a_home_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed_path("~/x") == Path.home() / "x"
    with pytest.raises(UsageError, match="~nobody-of-that-name/x: there is no such home folder"):
        typed_path("~nobody-of-that-name/x")
    monkeypatch.setenv("PUNA_HOME", "~nobody-of-that-name/x")
    with pytest.raises(UsageError, match="home folder"):
        puna_home()
