"""A draft model's guesses: made together, forgotten where they were wrong, and never heard in the answer."""

from __future__ import annotations

from typing import Any

import pytest
from checksum_model import VOCAB, ChecksumRunner, Doubtful, install, plainly

from puna.engine.draft import DraftModel, Guessed
from puna.engine.engine import Engine
from puna.engine.speculation import StepCost, Together, Wanted
from puna.errors import PunaError
from puna.types import Sampling


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setattr(StepCost, "seconds", lambda self, rows: 1.0)  # beside which a guess costs nothing


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + salt) % VOCAB for i in range(length)]


def answers(engine: Engine, prompts: list[list[int]], most: int) -> list[list[int]]:
    made: dict[int, list[int]] = {
        engine.submit(prompt, Sampling(temperature=0, max_tokens=most)): [] for prompt in prompts
    }
    while not engine.idle:
        for report in engine.step():
            assert report.error is None, report.error
            made[report.request] += report.tokens
        engine.check()
    return list(made.values())


def test_a_perfect_draft_saves_nearly_every_step() -> None:
    small = Engine(ChecksumRunner(), pages=60)
    draft = DraftModel(small)
    assert isinstance(draft, Together)
    engine = Engine(ChecksumRunner(), pages=60, speculate=draft)
    assert answers(engine, [prompt_of(9)], 60) == [plainly(prompt_of(9), 60)[0]]
    counts = engine.statistics()
    assert counts.right_guesses == counts.guessed_tokens > 45
    assert counts.steps == 60 - counts.right_guesses
    draft.check()


def test_wrong_guesses_leave_the_drafts_cache_as_it_was() -> None:
    """After each wrong guess the draft computes only what it had not, and guesses as from a fresh cache."""
    runner = Doubtful()
    draft = DraftModel(Engine(runner, pages=60))
    engine = Engine(ChecksumRunner(), pages=60, speculate=draft)
    assert answers(engine, [prompt_of(9)], 70) == [plainly(prompt_of(9), 70)[0]]
    counts = engine.statistics()
    assert 40 < counts.right_guesses < counts.guessed_tokens
    # the text once, and what was guessed beside it; reading all of it anew each time would be thrice as much
    assert runner.computed < 79 + counts.guessed_tokens + 2 * counts.steps
    draft.check()


def test_guesses_for_all_are_made_in_the_same_steps() -> None:
    small = Engine(ChecksumRunner(), pages=200)
    draft = DraftModel(small)
    engine = Engine(ChecksumRunner(), pages=200, speculate=draft)
    prompts = [prompt_of(5 + i, i) for i in range(8)]
    assert answers(engine, prompts, 40) == [plainly(prompt, 40)[0] for prompt in prompts]
    assert small.statistics().made_tokens == engine.statistics().guessed_tokens > 8 * 25
    assert small.statistics().steps < small.statistics().made_tokens / 6


def test_who_is_behind_waits_and_what_was_read_is_kept() -> None:
    runner = ChecksumRunner()
    draft = DraftModel(Engine(runner, pages=60, step_tokens=8))
    proposer: Any = draft()
    text = prompt_of(50)
    got = []
    for _ in range(6):
        draft.prepare([Wanted(proposer, text, 2, "")])
        got.append(proposer.propose(text, 2))
        draft.check()
    assert got[:2] == [[], []]  # three steps of eight tokens each
    assert got[2:] == [plainly(text, 2)[0]] * 4
    assert runner.computed < 50 + 5 * 4


def test_guesses_are_for_the_text_they_were_made_after() -> None:
    proposer = Guessed()
    proposer.after, proposer.tokens = 5, [1, 2, 3]
    assert proposer.propose([0] * 5, 2) == [1, 2]
    assert proposer.propose([0] * 6, 2) == []


def test_preempted_and_among_many() -> None:
    draft = DraftModel(Engine(Doubtful(), pages=12))
    engine = Engine(ChecksumRunner(), pages=14, max_running=4, speculate=draft)
    prompts = [prompt_of(9 + i, i) for i in range(6)]
    assert answers(engine, prompts, 30) == [plainly(prompt, 30)[0] for prompt in prompts]
    assert engine.statistics().preemptions > 0
    assert engine.statistics().right_guesses > 20
    draft.check()


def test_a_text_longer_than_the_drafts_cache_has_no_guesses() -> None:
    draft = DraftModel(Engine(ChecksumRunner(), pages=5))
    engine = Engine(ChecksumRunner(), pages=60, speculate=draft)
    assert answers(engine, [prompt_of(9)], 70) == [plainly(prompt_of(9), 70)[0]]
    assert 0 < engine.statistics().guessed_tokens <= 20 - 9


def test_a_draft_that_costs_more_than_it_saves_rests() -> None:
    draft = DraftModel(Engine(ChecksumRunner(), pages=60))
    draft.FORGET = 1.0  # type: ignore[misc]
    draft.seconds = 2.0  # of a step of one
    engine = Engine(ChecksumRunner(), pages=60, speculate=draft)
    assert answers(engine, [prompt_of(9)], 80) == [plainly(prompt_of(9), 80)[0]]
    assert engine.statistics().guessed_tokens <= 3  # one each 32 tokens, to see


def test_a_draft_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Engine(ChecksumRunner(), pages=60)
    draft = DraftModel(small)
    engine = Engine(ChecksumRunner(), pages=60, speculate=draft)
    engine.submit(prompt_of(5), Sampling(temperature=0, max_tokens=20))
    engine.step()
    monkeypatch.setattr(small._runner, "run", lambda batch: 1 / 0)
    (report,) = engine.step()
    assert isinstance(report.error, PunaError)
    assert "ZeroDivisionError" in str(report.error)
    assert small.idle
    assert engine.idle
