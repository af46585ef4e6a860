"""What the tests of the command line share: the command in this process, as a program, and at a pseudo-terminal."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import puna as package
from puna.cli import run
from puna.cli.main import main

HERE = Path(__file__).resolve().parent
SOURCE = Path(package.__file__).resolve().parents[1]
"""Where the package under test lies, so that programs import the same one: installed, or this checkout's."""
SECONDS = 20.0
"""How long a test waits for a program before it fails; none needs a tenth of it."""


@dataclass
class Said:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """stdout as its one JSON document; anything else there fails."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PUNA_HOME and a hub cache of the test's own."""
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PUNA_DEBUG", raising=False)
    return tmp_path / "home"


@pytest.fixture
def puna(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Run `puna` with these arguments in this process."""

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        code = main(arguments)
        return Said(code, *capfd.readouterr())

    return call


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Have `puna run` use this model."""

    def use(llm: Any) -> Any:
        monkeypatch.setattr(run, "_load", lambda settings: llm)
        return llm

    return use


@pytest.fixture
def program() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Run `python ARGUMENTS` as a program, this checkout's package on its path."""

    def call(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        environment = os.environ | {"PYTHONPATH": str(SOURCE)}
        return subprocess.run(
            [sys.executable, *arguments], input=stdin, capture_output=True, env=environment, timeout=SECONDS
        )

    return call


class Terminal:
    """A program at a pseudo-terminal: what it shows is read up to an expected text, keys are pressed."""

    def __init__(self, arguments: list[str]) -> None:
        import pty

        environment = os.environ | {"PYTHONPATH": str(SOURCE), "TERM": "xterm", "COLUMNS": "200"}
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, *arguments], environment)
        self.shown = ""
        self._raw = b""

    def until(self, text: str) -> str:
        """Wait for a text; returns all that was shown up to it since the last wait."""
        end = time.monotonic() + SECONDS
        while text.encode() not in self._raw:
            readable, _, _ = select.select([self.file], [], [], max(0.0, end - time.monotonic()))
            assert readable, f"{text!r} was not shown; shown was {self._raw!r} after {self.shown!r}"
            data = self._read()
            assert data, f"the program ended without {text!r}: {self._raw!r} after {self.shown!r}"
            self._raw += data
        before, found, self._raw = self._raw.partition(text.encode())
        self.shown += (before + found).decode()
        return before.decode()

    def press(self, keys: str) -> None:
        """Type keys."""
        os.write(self.file, keys.encode())

    def leave(self) -> int:
        """Wait for the program's end; returns its exit code."""
        while data := self._read():
            self._raw += data
        self.shown += self._raw.decode()
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End a program that a failed test left running."""
        if self.pid:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self.file)

    def _read(self) -> bytes:
        try:
            return os.read(self.file, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            return b""


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start `python ARGUMENTS` at a pseudo-terminal."""
    if sys.platform == "win32":
        pytest.skip("needs a POSIX pseudo-terminal")
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(list(arguments)))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def scripted_program(terminal: Callable[..., Terminal]) -> Callable[..., Terminal]:
    """`puna` with a scripted model (keywords as ScriptedLLM's) at a pseudo-terminal."""
    return lambda *arguments, **script: terminal(str(HERE / "scripted.py"), json.dumps(script), *arguments)
