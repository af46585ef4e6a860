"""Pictures in a prompt: seen once, shared by what they show and by nothing else, refused where they cannot be honoured.

Random traffic with pictures is in test_traffic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checksum_model import VOCAB, ChecksumRunner, Pixels, install, plainly

from puna.engine import sampler, turns
from puna.engine.draft import DraftModel
from puna.engine.engine import Engine
from puna.engine.pictures import Run, Shown, keys, words
from puna.errors import UsageError
from puna.types import Sampling

CAT, DOG = Pixels(5000, 6, False), Pixels(7000, 6, False)
ALL_SEE = Pixels(9000, 1, True)
START = [7, 8, 9, 7]


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def prompt(*pictures: Pixels, end: int = 11) -> tuple[list[int], tuple[Shown, ...]]:
    """A start, pictures each with a word behind it, and the last word."""
    tokens, shown = list(START), []
    for pixels in pictures:
        shown.append(pixels.shown(len(tokens)))
        tokens += [VOCAB + 1] * pixels.tokens + [3]
    return [*tokens, end], tuple(shown)


def answer(engine: Engine, asked: tuple[list[int], tuple[Shown, ...]], **options: Any) -> tuple[list[int], int]:
    """Tokens and how many of the prompt's were reused; it must be what the definition says."""
    tokens, pictures = asked
    request = engine.submit(tokens, Sampling(temperature=0, max_tokens=8), pictures=pictures, **options)
    made: list[int] = []
    reused = 0
    while not engine.idle:
        for report in engine.step():
            if report.error is not None:
                raise report.error
            if report.request == request:
                made += report.tokens
                reused = report.reused
        engine.check()
    assert made == plainly(tokens, 8, pictures=pictures)[0]
    return made, reused


def make(**options: Any) -> tuple[Engine, ChecksumRunner]:
    runner = ChecksumRunner(4)
    return Engine(runner, pages=40, **options), runner


def test_keys_are_the_pictures_and_words_are_not() -> None:
    tokens, pictures = prompt(CAT)
    (shown,) = pictures
    known = keys(tokens, pictures)
    assert known[:4] == START
    assert known[10:] == tokens[10:]
    assert len(set(known[4:10])) == 6
    assert max(known[4:10]) < 0
    assert known[4:10] != keys(tokens, (shown._replace(digest=b"\1" * 32),))[4:10]
    assert keys([5, 5, *tokens], (shown._replace(at=6),))[6:12] == known[4:10]  # wherever it stands
    assert list(words(tokens, pictures)) == [*START, 3, 11]


@pytest.mark.parametrize("step_tokens", [1, 3, 64])
def test_a_picture_is_seen_once_and_shared_by_what_it_shows(step_tokens: int) -> None:
    engine, runner = make(step_tokens=step_tokens)
    first = answer(engine, prompt(CAT))
    assert first[1] == 0
    assert answer(engine, prompt(CAT)) == (first[0], 11)  # all but the last
    assert answer(engine, prompt(DOG))[1] == 4  # the same ids, another picture
    assert answer(engine, (prompt(CAT)[0], (CAT.shown(4)._replace(digest=b"\1" * 32),)))[1] == 4
    assert runner.seen == [CAT, DOG, CAT]
    tokens = [token if token < VOCAB else 5 for token in prompt(CAT)[0]]
    assert answer(engine, (tokens, ()))[1] == 4


def test_features_are_not_needed_once_they_are_in_the_cache_and_what_all_attend_to_is() -> None:
    engine, runner = make(sight_bytes=1)
    answer(engine, prompt(CAT))
    answer(engine, prompt(CAT, end=12))
    assert runner.seen == [CAT]
    answer(engine, prompt(ALL_SEE))
    answer(engine, prompt(CAT, end=13))
    answer(engine, prompt(ALL_SEE, end=12))
    assert runner.seen == [CAT, ALL_SEE]
    assert engine._sights.nbytes == 1


def test_another_namespace_does_not_learn_that_a_picture_was_shown() -> None:
    engine, runner = make()
    answer(engine, prompt(CAT))
    assert answer(engine, prompt(CAT), namespace="other")[1] == 0
    assert runner.seen == [CAT, CAT]


def test_one_picture_is_looked_at_a_step() -> None:
    engine, runner = make()
    tokens, pictures = prompt(CAT, DOG)
    engine.submit([1, 2, 3], Sampling(temperature=0, max_tokens=20))
    engine.submit(tokens, Sampling(temperature=0, max_tokens=2), pictures=pictures)
    engine.step()
    assert runner.seen == [CAT]
    reports = engine.step()
    assert runner.seen == [CAT, DOG]
    assert [report.request for report in reports] == [1, 2]
    engine.check()


def test_choices_share_what_was_seen() -> None:
    for pixels in (CAT, ALL_SEE):
        engine, runner = make(max_running=2)
        tokens, pictures = prompt(pixels)
        engine.submit(tokens, Sampling(temperature=0, max_tokens=6, n=3), pictures=pictures)
        got: dict[int, list[int]] = {0: [], 1: [], 2: []}
        while not engine.idle:
            for report in engine.step():
                assert report.error is None
                got[report.choice] += report.tokens
            engine.check()
        assert got == {c: plainly(tokens, 6, choice=c, pictures=pictures)[0] for c in got}
        assert runner.seen == [pixels]


def test_a_picture_that_fails_costs_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make()

    def see(pixels: Pixels) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(runner, "see", see)
    tokens, pictures = prompt(CAT)
    well = engine.submit(START, Sampling(temperature=0, max_tokens=1))
    ill = engine.submit(tokens, Sampling(temperature=0, max_tokens=1), pictures=pictures)
    told = {report.request: report for report in engine.step()}
    assert told[well].tokens
    assert "no room" in str(told[ill].error)
    engine.check()
    assert engine.idle


def test_a_draft_model_that_does_not_see_guesses_nothing() -> None:
    small = Engine(ChecksumRunner(4), pages=40)
    engine, _ = make(speculate=DraftModel(small))
    answer(engine, prompt(CAT))
    assert small.statistics().computed_tokens == 0
    answer(engine, (START, ()))
    assert small.statistics().computed_tokens > 0


def test_what_cannot_be_honoured_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = make(sight_bytes=8)
    tokens, pictures = prompt(CAT)
    plain = Sampling(temperature=0)
    with pytest.raises(UsageError, match="prompt_logprobs"):
        engine.submit(tokens, Sampling(prompt_logprobs=0), pictures=pictures)
    engine.load_adapter("a", {"salt": 1}, 8)  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="adapter"):
        engine.submit(tokens, plain, pictures=pictures, adapter="a")
    both, two = prompt(CAT, DOG)
    with pytest.raises(UsageError, match="2 pictures takes"):
        engine.submit(both, plain, pictures=two)
    with pytest.raises(UsageError, match="outside the model's vocabulary"):
        engine.submit(tokens, plain)  # the tokens of a picture without it
    cat = pictures[0]
    for wrong in (
        [cat._replace(at=-1)],
        [cat._replace(length=0)],
        [cat._replace(length=99)],
        [cat, cat],
        [cat._replace(runs=(Run(3, 0, 2),))],
    ):
        with pytest.raises(UsageError, match="picture"):
            engine.submit(tokens, plain, pictures=wrong)
    monkeypatch.setattr(runner, "sees", False)
    with pytest.raises(UsageError, match="does not see"):
        engine.submit(tokens, plain, pictures=pictures)
    assert engine.idle


def test_penalties_know_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's token may have no logit, so nothing can be counted there."""
    monkeypatch.setattr(turns, "sample", sampler.sample)
    engine, runner = make()
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [7, 8, 5]] = 1.0, 0.9, 0.6
    monkeypatch.setattr(runner, "run", lambda batch: logits)
    tokens, pictures = prompt(CAT)
    sampling = Sampling(temperature=0, max_tokens=2, repetition_penalty=2.0)  # 7 and 8 stand in the prompt
    engine.submit(tokens, sampling, pictures=pictures)
    made = [token for _ in range(2) for report in engine.step() for token in report.tokens]
    assert made == [5, 7]
