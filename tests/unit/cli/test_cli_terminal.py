"""What is shown beside the output: plain text, whatever characters it has."""

from __future__ import annotations

import io
import sys
import time

import pytest

from puna.cli import terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_square_brackets_of_a_path_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    with terminal.Waiting(lambda: "Loading a[bold]b[/x]c ..."):
        end = time.monotonic() + 5
        while "c ..." not in screen.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert "Loading a[bold]b[/x]c ..." in screen.getvalue()
    with terminal.bar() as show:
        assert show is not None
        show("writing [/x]", 1, 2)
    assert "writing [/x]" in screen.getvalue()
