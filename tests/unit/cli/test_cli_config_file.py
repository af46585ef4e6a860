"""A command's configuration file: what flags say, strictly read, and written back as it was read."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.cli import config_file, flags
from puna.errors import UsageError
from puna.settings import ServeSettings

FULL = """
models = ["cria", "llama3.2:1b"]
host = "::1"
port = 8000
memory = 12
keep-alive = -1
invariant = true
kernels = "reference"

[alias]
"gpt-4o" = "llama3.2:1b"
small = "cria"

[option."llama3.2:1b"]
quant = "Q4_K_M"
kv-memory = 1.5

[option."*"]
kv-type = "q8_0"
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    """A configuration file with this text."""

    def write(text: str) -> Path:
        path = tmp_path / "puna.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_says_what_flags_say(file: Callable[[str], Path]) -> None:
    path = file(FULL)
    read = flags.read(ServeSettings, ["--config", str(path)])
    typed = flags.read(
        ServeSettings,
        [
            "cria", "llama3.2:1b", "--host", "::1", "--port", "8000", "--memory", "12", "--keep-alive=-1",
            "--invariant", "--kernels", "reference", "--alias", "gpt-4o=llama3.2:1b", "--alias", "small=cria",
            "--option", "llama3.2:1b.quant=Q4_K_M", "--option", "llama3.2:1b.kv-memory=1.5",
            "--option", "*.kv-type=q8_0", "--config", str(path),
        ],
    )  # fmt: skip
    assert read == typed
    assert read.keep_alive == -1.0
    assert isinstance(read.memory, float)


def test_what_is_typed_goes_before_the_file(file: Callable[[str], Path]) -> None:
    path = str(file(FULL))
    read = flags.read(ServeSettings, ["other", "--port", "8080", "--config", path, "--alias", "a=cria"])
    assert read.models == ("other",)
    assert read.port == 8080  # the default, and typed
    assert read.alias == ("a=cria",)
    assert read.host == "::1"


def test_what_is_written_reads_as_it_was(file: Callable[[str], Path]) -> None:
    read = flags.read(ServeSettings, ["--config", str(file(FULL))])
    text = config_file.written(read)
    again = flags.read(ServeSettings, ["--config", str(file(text))])
    assert again == read
    assert tomllib.loads(text)["option"]["llama3.2:1b"] == {"quant": "Q4_K_M", "kv-memory": "1.5"}


@given(
    st.lists(st.text(min_size=1).filter(lambda name: "=" not in name), unique=True, max_size=3),
    st.text(min_size=1),
)
def test_any_name_survives(names: list[str], value: str) -> None:
    settings = ServeSettings(
        models=tuple(names),
        alias=tuple(f"{name}={value}" for name in names),
        option=tuple(f"{name}.quant={value}" for name in names),
    )
    found = tomllib.loads(config_file.written(settings).encode("utf-8", "surrogatepass").decode())
    assert found.get("models", []) == names
    assert found.get("alias", {}) == dict.fromkeys(names, value)
    assert found.get("option", {}) == {name: {"quant": value} for name in names}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "there is no setting 'prot'"),
        ("json = true", "there is no setting 'json'"),
        ("config = 'x'", "there is no setting 'config'"),
        ("port = '1'", "port must be a whole number, not '1'"),
        ("port = true", "port must be a whole number, not True"),
        ("port = 1.5", "port must be a whole number, not 1.5"),
        ("memory = '1'", "memory must be a number, not '1'"),
        ("memory = false", "memory must be a number, not False"),
        ("invariant = 1", "invariant must be true or false, not 1"),
        ("host = 1", "host must be a text, not 1"),
        ("kernels = 'fast'", "kernels must be one of auto, reference, scalar, avx2, avx512, neon, not 'fast'"),
        ("models = 'cria'", "models must be a list of texts, not 'cria'"),
        ("models = [1]", "models must be a list of texts"),
        ("alias = ['a=b']", "alias must be a table"),
        ("[alias]\nx = [1]", "alias.x is no text or number"),
        ("[option.a.b.c]\nd = 1", "option.a.b is no text or number"),
        ("[alias]\n'a=b' = 'c'", "'a=b' is no name"),
        ("port = ", "is not TOML"),
        ("port = 1\nport = 2", "is not TOML"),
    ],
)
def test_what_is_refused(file: Callable[[str], Path], text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        config_file.read(ServeSettings, file(text))
    assert said in str(error.value)


def test_the_nearest_name_is_offered(file: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="Did you mean keep-alive"):
        config_file.read(ServeSettings, file("keep_alive = 1"))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        config_file.read(ServeSettings, tmp_path / "nothing.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        config_file.read(ServeSettings, tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        config_file.read(ServeSettings, bad)
    bad.write_bytes(b"#" * (config_file.LARGEST + 1))
    with pytest.raises(UsageError, match="larger than"):
        config_file.read(ServeSettings, bad)
    bad.write_bytes(b"a = " + b"[" * 100_000)
    with pytest.raises(UsageError, match="is not TOML"):
        config_file.read(ServeSettings, bad)


def test_it_is_on_the_command_line_too(puna: Any, file: Callable[[str], Path]) -> None:
    said = puna("serve", "--config", str(file("port = 'x'")), "--json")
    assert said.code == 2
    assert said.json()["error"]["kind"] == "UsageError"
