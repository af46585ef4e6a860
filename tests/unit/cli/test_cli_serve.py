"""`puna serve`: what it says, refuses, and how it ends. Its answers are the server's tests."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna as package
from puna.cli.serve import options_of
from puna.errors import UsageError
from puna.gateway.shelf import ModelOptions

SOURCE = Path(package.__file__).resolve().parents[1]
SECONDS = 30.0
Puna = Callable[..., Any]


def test_from_the_start_to_the_end() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "puna", "serve", "cria", "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )  # fmt: skip
    try:
        assert program.stdout is not None
        said = json.loads(program.stdout.readline())
        assert said["model"] == "cria"
        assert said["pid"] == program.pid
        assert said["url"].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(said["url"] + "/", timeout=SECONDS) as answer:
            assert answer.status == 200
        words = shlex.split(said["curl"])  # a shell takes it apart as it was meant
        assert words[:2] == ["curl", said["url"] + "/v1/completions"]
        assert json.loads(words[words.index("-d") + 1])["model"] == "cria"
        program.send_signal(signal.SIGTERM)
        out, err = program.communicate(timeout=SECONDS)
    finally:
        program.kill()
        program.wait()
    assert program.returncode == 0
    assert out == b""
    text = err.decode()
    assert "Loading cria ..." in text
    assert f"Puna answers at {said['url']}" in text
    assert "Key: none is needed" in text
    assert said["curl"] in text
    assert text.endswith("Stopped.\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0", "--port", "0"], "--host 0.0.0.0 lets other machines in"),
        (["--host", "::", "--port", "0"], "--host :: lets other machines in"),
        (["--port", "70000"], "--port must be a port"),
        (["--port=-1"], "--port must be a port"),
        (["--memory", "0"], "--memory must be gigabytes"),
        (["--memory", "nan"], "--memory must be gigabytes"),
        (["--on-demand"], "no model is named"),
        (["--keep-alive", "inf"], "--keep-alive must be seconds"),
        (["--drain-seconds=-1"], "--drain-seconds must be seconds"),
        (["--connections", "0"], "--connections must be a whole number"),
        (["", "--port", "0"], "MODEL is empty"),
        (["nothing-of-this-name", "--port", "0"], "nothing-of-this-name"),
        (["./nothing.gguf", "--port", "0"], "./nothing.gguf: no such file or folder"),
        (["--image-hosts", "https://a.example"], "--image-hosts 'https://a.example' is no name of a host"),
        (["--image-hosts", "a.example,127.0.0.1"], "--image-hosts '127.0.0.1' is no name of a host"),
        (["--alias", "x"], "--alias takes NAME=VALUE"),
        (["--alias", "x=cria", "--alias", "x=cria"], "An alias is given twice"),
        (["--alias", "x=other"], "The alias x is for other, which is not served"),
        (["--alias", "cria=cria"], "The alias cria is a model's name"),
        (["--option", "cria.speed=9"], "'speed' is no option of a model"),
        (["--option", "other.quant=Q8_0"], "There are options for other, which is not served"),
        (["--memory", "0.0001", "cria", "--port", "0"], "cria takes"),
        (["cria", "--guard-off", "S1"], "--guard-off goes with --guard"),
        (["cria", "--guard-judges", "asked"], "--guard-judges goes with --guard"),
        (["cria", "--guard", "cria", "--guard-category", "x"], "--guard-category takes NAME=VALUE"),
        (["cria", "--guard", "cria", "--port", "0"], "cria is no guard model"),
    ],
)
def test_what_is_refused(puna: Puna, words: list[str], said: str) -> None:
    answer = puna("serve", *words)
    assert answer.code in (1, 2)
    assert said in answer.err
    assert answer.out == ""


def test_what_holds_can_be_printed(puna: Puna, tmp_path: Path) -> None:
    guard = ["--guard", "g", "--guard-judges", "asked", "--guard-off", "S6", "--guard-category", "Rivals=Not them."]
    said = puna("serve", "cria", "--port", "1", "--alias", "a=cria", *guard, "--print-config")
    assert said.code == 0
    path = tmp_path / "puna.toml"
    path.write_text(said.out)
    assert puna("serve", "--config", str(path), "--print-config").out == said.out
    assert 'models = ["cria"]' in said.out
    assert '[alias]\na = "cria"' in said.out
    assert 'guard = "g"\nguard-judges = "asked"\nguard-off = ["S6"]' in said.out
    assert '[guard-category]\nRivals = "Not them."' in said.out


def test_options_of_models() -> None:
    found = options_of(("llama3.2:1b.quant=Q4_K_M", "*.kv-memory=1.5", "llama3.2:1b.kv-type=q8_0", "a.b.draft=x=y"))
    assert found == {
        "llama3.2:1b": ModelOptions(quant="Q4_K_M", kv_type="q8_0"),
        "*": ModelOptions(kv_memory=1.5),
        "a.b": ModelOptions(draft="x=y"),
    }
    for word, said in (
        ("a.quant=Q9", "must be one of"),
        ("quant=Q8_0", "is no option of a model"),
        ("a.temperature=1", "is no option of a model"),
        ("a.kv-memory=x", "must be a number"),
    ):
        with pytest.raises(UsageError, match=said):
            options_of((word,))
    with pytest.raises(UsageError, match="given twice"):
        options_of(("a.quant=Q8_0", "a.quant=Q8_0"))
