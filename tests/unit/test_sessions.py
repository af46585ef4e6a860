"""Saved sessions of a real model: a restart costs nothing, changes nothing, and believes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna import LLM
from puna.cli.chat import chat, load_session
from puna.errors import CheckpointError, UsageError
from puna.settings import RunSettings

TEXT = "Once upon a time there was a little girl named Lily. She loved to play outside in the park. " * 12


@pytest.fixture(scope="module")
def computed() -> LLM:
    return LLM("cria", invariant=True)


@pytest.fixture(scope="module")
def ids(computed: LLM) -> list[int]:
    return computed.encode(TEXT)


@pytest.fixture(scope="module")
def answer(computed: LLM, ids: list[int]) -> tuple[int, ...]:
    return computed.generate(ids, seed=3, max_tokens=30).token_ids


@pytest.fixture
def file(computed: LLM, ids: list[int], answer: tuple[int, ...], tmp_path: Path) -> Path:
    assert computed.save_session(tmp_path / "s", ids) == len(ids) // 64 * 64 >= 192
    return tmp_path / "s"


def test_a_restart_computes_only_what_is_not_in_the_file(file: Path, ids: list[int], answer: tuple[int, ...]) -> None:
    llm = LLM("cria", invariant=True)
    found = llm.load_session(file)
    assert (list(found.token_ids), found.tokens, found.note) == (ids, len(ids) // 64 * 64, "")
    assert llm.generate(found.token_ids, seed=3, max_tokens=30).token_ids == answer
    assert llm._engine.statistics().reused_tokens == found.tokens
    llm._engine.check()


def test_a_damaged_page_and_those_after_it_are_computed_again(
    file: Path, ids: list[int], answer: tuple[int, ...]
) -> None:
    data = bytearray(file.read_bytes())
    llm = LLM("cria", invariant=True)
    step = -(-llm._runner.page_bytes // 64) * 64
    data[len(data) - step * (len(ids) // 64 - 1) + 9] ^= 1  # in the second page
    file.write_bytes(data)
    found = llm.load_session(file)
    assert found.tokens == 64
    assert "computed again: the file is damaged" in found.note
    assert llm.generate(ids, seed=3, max_tokens=30).token_ids == answer
    assert llm._engine.statistics().reused_tokens == 64


@pytest.mark.parametrize(
    "options", [{"kv_type": "q8_0"}, {"quant": "Q8_0"}, {"kernels": "scalar"}, {"invariant": False}]
)
def test_what_another_model_computed_is_not_used(file: Path, options: dict[str, Any]) -> None:
    found = LLM("cria", **{"invariant": True} | options).load_session(file)
    assert found[:2] == ((), 0)
    assert "saved with another" in found.note
    assert "Nothing of it is used" in found.note


def test_a_file_of_another_kind_is_noted_and_none_is_an_error(computed: LLM, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a diary")
    found = computed.load_session(tmp_path / "x")
    assert found[:2] == ((), 0)
    assert "not a saved session" in found.note
    with pytest.raises(CheckpointError, match="no such file"):
        computed.load_session(tmp_path / "none")
    with pytest.raises(UsageError, match="no saved session"):
        computed.save_session(tmp_path / "x", [1, 2])
    assert (tmp_path / "x").read_text() == "a diary"


def test_a_chat_that_was_left_goes_on_without_computing_it_again(tmp_path: Path, ids: list[int]) -> None:
    lines = iter([TEXT, EOFError(), TEXT, EOFError()])

    def ask(_: str) -> str:
        line = next(lines)
        if isinstance(line, EOFError):
            raise line
        return line

    asked = RunSettings(max_tokens=5, temperature=0, session=tmp_path / "talk")
    first, second = (LLM("cria", invariant=True) for _ in range(2))
    assert chat(first, asked, ask=ask) == 0
    assert chat(second, asked, ask=ask) == 0
    assert second._engine.statistics().reused_tokens == len(ids) // 64 * 64
    assert [message.content for message in load_session(tmp_path / "talk").messages[1::2]] == [
        first.generate(ids, max_tokens=5, temperature=0).text
    ] * 2
