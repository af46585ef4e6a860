"""The command as a whole: dispatch, exit codes, where what is printed, and what is imported for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripted
from scripted import ScriptedLLM

import puna as package
from puna.cli import run
from puna.errors import CheckpointError, PunaError
from puna.settings import COMMANDS

SOURCE = Path(package.__file__).parent.parent
Puna = Callable[..., Any]
Program = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_overview_lists_every_command(puna: Puna, words: tuple[str, ...]) -> None:
    said = puna(*words)
    assert (said.code, said.err) == (0, "")
    assert all(f"\n  {name} " in said.out for name in COMMANDS)
    assert "\n  quantize " not in said.out  # planned


def test_version(puna: Puna) -> None:
    assert puna("--version").out == f"puna {package.__version__}\n"


def test_help_of_a_command(puna: Puna) -> None:
    said = puna("run", "--help")
    assert said.code == 0
    assert "--min-p X" in said.out
    assert puna("run", "x", "-h").out == said.out


def test_an_unknown_command_is_an_input_error(puna: Puna) -> None:
    said = puna("shwo")
    assert (said.code, said.out) == (2, "")
    assert said.err == "puna: puna has no command 'shwo'.\nDid you mean show?\n"


def test_errors_are_documents_too(puna: Puna) -> None:
    said = puna("run", "--json", "--sed", "1")
    assert said.code == 2
    assert said.json()["error"]["kind"] == "UsageError"
    assert said.json()["error"]["remedy"] == "Did you mean --seed?"
    assert "--seed" in said.err
    assert puna("run", "--sed", "--", "--json").out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("x.bin: damaged.", remedy="Fetch it again."), 2, "puna: x.bin: damaged.\nFetch it again.\n"),
        (PunaError("no.", remedy=""), 1, "puna: no.\n"),
        (KeyboardInterrupt(), 130, "puna: Interrupted.\n"),
        (PermissionError(13, "Permission denied", "f"), 1, "puna: Permission denied: f.\n"),
        (MemoryError(), 1, "puna: There is not enough memory."),
        (KeyError("k"), 1, "puna: Unexpected error: KeyError: 'k'\nThis is a fault in Puna."),
    ],
)
def test_exit_codes(puna: Puna, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str) -> None:
    def fail(settings: object) -> None:
        raise error

    monkeypatch.setattr(run, "_load", fail)
    said = puna("run", "cria", "x")
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith(message)
    assert "Traceback" not in said.err
    as_json = puna("run", "cria", "x", "--json")
    assert as_json.code == code
    assert list(as_json.json()) == ["error"]


def test_tracebacks_only_when_asked(puna: Puna, model: Puna, monkeypatch: pytest.MonkeyPatch) -> None:
    model(ScriptedLLM(error=RuntimeError("broken")))
    assert "Traceback" not in puna("run", "cria", "x").err
    assert "Traceback" in puna("run", "cria", "x", "--debug").err
    monkeypatch.setenv("PUNA_DEBUG", "1")
    assert "RuntimeError: broken" in puna("run", "cria", "x").err
    monkeypatch.setenv("PUNA_DEBUG", "0")
    assert "Traceback" not in puna("run", "cria", "x").err


def piped_into_head(*arguments: str) -> tuple[bytes, bytes, int]:
    """stdout's first ten bytes, stderr, and the exit code of `python ARGUMENTS | head -c 10`."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    first = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert first.stdout is not None
    start = first.stdout.read(10)
    first.stdout.close()
    assert first.stderr is not None
    with first.stderr:
        said = first.stderr.read()
    return start, said, first.wait(20)


def test_a_closed_pipe_ends_the_answer_quietly() -> None:
    script = json.dumps({"pieces": ["x" * 100] * 200, "delay": 0.01})
    assert piped_into_head(scripted.__file__, script, "run", "cria", "hi") == (b"x" * 10, b"", 1)


def test_a_closed_pipe_ends_a_table_quietly() -> None:
    start, said, code = piped_into_head("-m", "puna", "models")
    assert (start, said) == (b"SHORT NAME", b"")
    assert code in (0, 1)  # 0: all of it fitted into the pipe before it was closed


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_streams_that_were_closed_before_the_start() -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    for arguments, closed, code in (("models", ">&-", 0), ("run nothing-of-that-name x", ">&- 2>&-", 2)):
        program = f"exec '{sys.executable}' -m puna {arguments} {closed}"
        done = subprocess.run(["sh", "-c", program], env=environment, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_help_and_version_import_nothing_heavy(program: Program) -> None:
    code = "import sys; from puna.cli.main import main; main(sys.argv[1:]); print(*sorted(sys.modules))"
    for words in (["--help"], ["--version"], ["run", "--help"], ["models"]):
        loaded = program("-c", code, *words).stdout.decode().splitlines()[-1].split()
        heavy = {"numpy", "rich", "torch", "tokenizers", "huggingface_hub", "jinja2", "sentencepiece", "asyncio"}
        assert heavy.isdisjoint(loaded), words


def test_an_answer_imports_nothing_it_does_not_need(program: Program, reference: Path) -> None:
    code = "import sys; from puna.cli.main import main; main(sys.argv[1:]); print(); print(*sorted(sys.modules))"
    folder = reference / "checkpoints" / "stories260K"
    words = [
        "run",
        str(folder / "stories260K.bin"),
        "x",
        "--tokenizer",
        str(folder / "tok512.bin"),
        "--max-tokens",
        "1",
    ]
    loaded = program("-c", code, *words).stdout.decode().splitlines()[-1].split()
    assert "numpy" in loaded
    heavy = {"rich", "torch", "tokenizers", "huggingface_hub", "jinja2", "sentencepiece", "tiktoken", "asyncio"}
    assert heavy.isdisjoint(loaded)
