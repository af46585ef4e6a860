"""The records of what was pulled: whole or refused, never half understood."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import HubError
from puna.weights.installed import (
    PulledFile,
    Record,
    delete_record,
    installed,
    is_whole,
    read_record,
    records,
    with_commit,
    write_record,
)

FILE = PulledFile("model.safetensors", 3, "sha256:aa", "aa", 7)
RECORD = Record("herd/tiny", "hub", "/nowhere", "main", "c1", "2026-01-02T03:04:05+00:00", True, ("c1",), (FILE,))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    return tmp_path


def test_record_comes_back_as_it_was_written(home: Path) -> None:
    write_record(RECORD)
    assert read_record("herd/tiny") == RECORD
    assert [path.name for path in (home / "models").iterdir()] == ["herd--tiny.json"]
    assert records() == [RECORD]
    delete_record("herd/tiny")
    assert (read_record("herd/tiny"), records()) == (None, [])


def test_record_is_whole_only_with_every_file(home: Path) -> None:
    here = Record(**{**asdict(RECORD), "folder": str(home), "files": (FILE,)})
    assert not is_whole(here)
    (home / "model.safetensors").write_bytes(b"abc")
    assert is_whole(here)
    (home / "model.safetensors").write_bytes(b"ab")
    assert not is_whole(here)


def test_commits_are_remembered_until_removal() -> None:
    begun = Record("herd/tiny", "hub", "/n", "main", "c2", RECORD.pulled, False)
    assert with_commit(None, begun).commits == ("c2",)
    assert with_commit(RECORD, begun) == Record(**{**asdict(RECORD), "commits": ("c1", "c2"), "files": (FILE,)})


def damaged(**changes: Any) -> bytes:
    return json.dumps({"format": 1, **asdict(RECORD), **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        damaged(format=2),
        damaged(complete="yes"),
        damaged(source="ftp"),
        damaged(pulled="yesterday"),
        damaged(extra=1),
        damaged(files=[{"path": "x"}]),
        damaged(files=[{**asdict(FILE), "path": "../x"}]),
        damaged(files=[{**asdict(FILE), "size": True}]),
        damaged(commits=None),
    ],
)
def test_damaged_record_is_named(home: Path, content: bytes) -> None:
    path = home / "models/herd--tiny.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(HubError, match=r"herd--tiny\.json cannot be understood") as caught:
        installed()
    assert "Delete that file" in caught.value.remedy


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*asdict(RECORD)]), inner),
        max_leaves=12,
    ),
    key=st.sampled_from([*asdict(RECORD)]),
)
def test_any_json_is_a_record_or_an_error(home: Path, value: Any, key: str) -> None:
    path = home / "models/herd--tiny.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(**{key: value}))
    try:
        found = read_record("herd/tiny")
    except HubError:
        return
    assert isinstance(found, Record)


def test_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "file"))
    with pytest.raises(HubError, match="cannot be written") as caught:
        write_record(RECORD)
    assert "PUNA_HOME" in caught.value.remedy
