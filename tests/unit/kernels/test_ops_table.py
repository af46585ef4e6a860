"""Which implementation serves: PUNA_CPU, and an install without the C++ extension.

What is surprising: both are asked as programs, for the choice is the process's and settled once. The extension is
hidden by an import hook, so the same test runs where it is built and where it is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.errors import UsageError
from puna.kernels import ops
from puna.types import KERNELS

STORY = ("run", "cria", "Once upon a time", "--temperature", "0", "--max-tokens", "60", "--json")
WITHOUT_EXTENSION = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "puna.kernels._cpu":
            raise ImportError("hidden by a test")
sys.meta_path.insert(0, Hide())
from puna.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice of kernels is the process's: put it back."""
    monkeypatch.delenv("PUNA_CPU", raising=False)
    before = ops._host
    yield
    ops._host = before


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` with this environment beside the process's own."""
    path = str(Path(puna.__file__).resolve().parents[1])  # the package under test, installed or this checkout's
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def answer(*arguments: str, **environment: str) -> Any:
    """The JSON document of a command that succeeds."""
    done = program(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_environment_names_what_serves_where_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_CPU", "reference")
    ops.select()
    assert {(row.implementation, row.reason) for row in ops.table()} == {
        ("NumPy reference", "asked for by PUNA_CPU=reference")
    }
    ops.select("reference")
    assert {row.reason for row in ops.table()} == {"asked for by --kernels reference"}
    monkeypatch.setenv("PUNA_CPU", "vax")
    with pytest.raises(UsageError, match=r"PUNA_CPU=vax: no such kernels\.") as caught:
        ops.select("auto")
    assert caught.value.remedy == f"One of: {', '.join(KERNELS)}."
    ops.select("reference")  # what is said on the command line goes before what lies in the environment
    ops._host = None
    with pytest.raises(UsageError, match="PUNA_CPU=vax"):
        ops.table()
    for nothing in ("", "auto"):
        monkeypatch.setenv("PUNA_CPU", nothing)
        ops.select()
        assert not any("PUNA_CPU" in row.reason for row in ops.table())


def test_the_same_tokens_on_every_simulated_machine() -> None:
    cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    expected = answer("-m", "puna", *STORY, "--kernels", "reference")["token_ids"]
    assert len(expected) == 60
    for isa in cpu.isas():
        by_environment = answer("-m", "puna", *STORY, PUNA_CPU=isa)
        by_flag = answer("-m", "puna", *STORY, "--kernels", isa)
        assert by_environment["kernels"] == by_flag["kernels"] == f"C++ {isa}"
        assert by_environment["token_ids"] == by_flag["token_ids"] == expected


def test_a_machine_that_is_not_there_is_refused() -> None:
    cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    other = "avx2" if "neon" in cpu.isas() else "neon"
    done = program("-m", "puna", "doctor", PUNA_CPU=other)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"PUNA_CPU={other}: this build of Puna does not have it." in done.stderr


def test_without_the_extension_everything_works_and_doctor_says_so() -> None:
    found = answer("-c", WITHOUT_EXTENSION, "doctor", "--json")
    assert found["kernels"] == "NumPy reference"
    assert {(row["implementation"], row["reason"]) for row in found["operations"]} == {
        ("NumPy reference", "slower: the C++ extension is not built here (hidden by a test)"),
        ("NumPy", "there is no C++ of it; faster than the reference"),
    }
    told = answer("-c", WITHOUT_EXTENSION, *STORY)
    assert told["kernels"] == "NumPy reference"
    assert told["token_ids"] == answer("-m", "puna", *STORY, "--kernels", "reference")["token_ids"]
    for asked, flags, environment in (
        ("--kernels scalar", ("--kernels", "scalar"), {}),
        ("PUNA_CPU=scalar", (), {"PUNA_CPU": "scalar"}),
    ):
        refused = program("-c", WITHOUT_EXTENSION, *STORY, *flags, **environment)
        assert refused.returncode == 2
        error = json.loads(refused.stdout)["error"]
        assert error["message"] == f"{asked} needs the C++ extension, which is not built here (hidden by a test)."
        assert "pip install" in error["remedy"]
