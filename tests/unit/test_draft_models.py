"""Guesses with real models: the same text with and without, fewer steps, and no model of another vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna import LLM
from puna.engine.speculation import StepCost
from puna.errors import UsageError

PROMPTS = ("Once upon a time", "The dog ran to the park and the dog ran to the")


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("cria", invariant=True)


@pytest.mark.parametrize("options", [{"draft": "cria"}, {"speculate": "lookup"}])
def test_the_text_is_the_same(plain: LLM, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "share", lambda self, rows: 0.05)  # the same widths on every machine
    monkeypatch.setattr(StepCost, "seconds", lambda self, rows: 1.0)
    llm = LLM("cria", invariant=True, **options)  # type: ignore[arg-type]
    asked = [(prompt, sampling) for prompt in PROMPTS for sampling in ({"temperature": 0}, {"seed": 4})]
    streams = [llm.stream(prompt, max_tokens=50, **sampling) for prompt, sampling in asked]  # type: ignore[arg-type]
    for (prompt, sampling), stream in zip(asked, streams, strict=True):
        want = plain.generate(prompt, max_tokens=50, **sampling)  # type: ignore[arg-type]
        assert ("".join(stream), stream.answer.token_ids) == (want.text, want.token_ids)
    counts = llm._engine.statistics()
    assert counts.guessed_tokens > counts.right_guesses >= (80 if "draft" in options else 1)
    assert counts.steps < (20 if "draft" in options else 55)
    llm._engine.check()
    assert (llm.notes != plain.notes) == ("draft" in options)
    if "draft" in options:
        assert llm.cache.draft_pages == -(-llm.config.context_length // 64) < llm.cache.pages
        assert llm.notes[-1].startswith(f"of the cache's {llm.cache.nbytes / 1e6:,.0f} MB the draft model's takes ")


def test_a_draft_of_other_tokens_is_refused(reference: Path) -> None:
    folder = reference / "checkpoints" / "stories260K"
    with pytest.raises(UsageError, match="its tokens are not those of cria"):
        LLM("cria", draft=folder / "stories260K.bin")


def test_what_excludes_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        LLM("cria", draft="cria", speculate="lookup")
    with pytest.raises(UsageError, match="--speculate tree"):
        LLM("cria", speculate="tree")
