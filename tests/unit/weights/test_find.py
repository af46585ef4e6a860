"""From what a person types to a place: paths that are not there are called paths, names are looked up."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.errors import CheckpointError, HubError, UsageError
from puna.weights.find import find_model


def test_a_file_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "herd").mkdir()
    (tmp_path / "herd" / "tiny").mkdir()
    assert find_model("herd/tiny") == Path("herd/tiny")
    assert find_model("cria").name == "cria"


@pytest.mark.parametrize("typed", ["./x", "models/llama/7B", "models/", "C:\\models\\llama", "m/x.bin"])
def test_what_looks_like_a_path_is_called_one(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        find_model(typed)


def test_other_names_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    with pytest.raises(HubError, match="no model called 'lama3'"):
        find_model("lama3")
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_model("x" * 5000)
    with pytest.raises(UsageError, match="home folder"):
        find_model("~nobody-of-that-name/x")
