"""What the engine promises, one case each, over the checksum model; `test_traffic` mixes them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from checksum_model import CONTEXT, VOCAB, ChecksumRunner, HalfRight, Rule, install, plainly

from puna.engine import scheduler
from puna.engine import turns as turns_module
from puna.engine.engine import SPARE_DEADLINES, Engine, Progress
from puna.engine.sampler import sample as real_sample
from puna.errors import ContextError, DeviceError, NothingLeftError, PunaError, QueueFullError, UsageError
from puna.types import Sampling


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def greedy(tokens: int | None = 10, **more: Any) -> Sampling:
    return Sampling(temperature=0, max_tokens=tokens, **more)


def make(pages: int = 60, page: int = 4, **options: Any) -> Engine:
    return Engine(ChecksumRunner(page), pages=pages, **options)


def finish(engine: Engine) -> dict[tuple[int, int], tuple[list[int], Progress]]:
    """Step until all is done: the tokens of each (request, choice), and its last report."""
    tokens: dict[tuple[int, int], list[int]] = {}
    last: dict[tuple[int, int], Progress] = {}
    for _ in range(2000):
        if engine.idle:
            return {key: (tokens[key], last[key]) for key in last}
        for report in engine.step():
            tokens.setdefault(report[:2], []).extend(report.tokens)
            last[report[:2]] = report
        engine.check()
    raise AssertionError("it does not end")


def answer(engine: Engine, prompt: list[int], sampling: Sampling, **options: Any) -> tuple[list[int], Progress]:
    request = engine.submit(prompt, sampling, **options)
    return finish(engine)[request, 0]


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + salt) % VOCAB for i in range(length)]


@pytest.mark.parametrize("step_tokens", [1, 7, 64])
@pytest.mark.parametrize("length", [1, 4, 5, 63, 80])
def test_chunks_do_not_change_an_answer(length: int, step_tokens: int) -> None:
    tokens, last = answer(make(step_tokens=step_tokens), prompt_of(length), greedy())
    assert (tokens, last.finish, last.prefilled) == (plainly(prompt_of(length), 10)[0], "length", length)


def test_a_step_takes_all_answers_and_what_is_left_of_prompts() -> None:
    engine = make(step_tokens=16)
    runner: Any = engine._runner
    for salt in range(4):
        engine.submit([salt], greedy(30))
    engine.step()
    engine.submit(prompt_of(50), greedy(1))
    for _ in range(3):
        before = runner.computed
        assert sorted(len(report.tokens) for report in engine.step()) == [0, 1, 1, 1, 1]
        assert runner.computed - before == 16
    finish(engine)
    assert runner.widest == 16


def test_the_shortest_prompt_is_read_first_and_every_fourth_step_is_a_turn() -> None:
    engine = make(step_tokens=8, prefix_cache=False)
    long = [engine.submit(prompt_of(70, salt), greedy(1)) for salt in (1, 2)]
    short = engine.submit([9, 9], greedy(1))
    seen = [{report.request for report in engine.step()} for _ in range(8)]
    first, second = ({request} for request in long)
    assert seen == [{short, long[0]}, first, first, second, first, first, first, second]


def test_answers_wait_for_few_tokens_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "BESIDE_ANSWERS", 16)
    engine = make(step_tokens=80, prefix_cache=False)
    runner: Any = engine._runner
    engine.submit(prompt_of(70), greedy(9))
    engine.step()
    assert runner.computed == 70  # nobody waits for it
    engine.submit(prompt_of(70, 1), greedy(9))
    engine.step()
    assert runner.computed == 70 + 1 + 16


def test_the_higher_priority_goes_first_and_the_lower_gives_way() -> None:
    engine = make(pages=6, max_running=2)
    low = engine.submit(prompt_of(12), greedy(8))
    answers = {low: list(engine.step()[0].tokens)}
    high = engine.submit(prompt_of(12, 3), greedy(8), priority=1)
    answers[high] = []
    order = []
    while not engine.idle:
        for report in engine.step():
            answers[report.request] += report.tokens
            if report.finish:
                order.append(report.request)
        engine.check()
    assert order == [high, low]
    assert answers == {low: plainly(prompt_of(12), 8)[0], high: plainly(prompt_of(12, 3), 8)[0]}
    assert engine.statistics().preemptions > 0


def test_the_next_turn_computes_only_what_is_new() -> None:
    engine = make()
    runner: Any = engine._runner
    first = prompt_of(30)
    tokens, _ = answer(engine, first, greedy())
    before = runner.computed
    second = [*first, *tokens, 3, 1, 4]
    again, last = answer(engine, second, greedy())
    assert again == plainly(second, 10)[0]
    assert last.reused == len(first) + len(tokens) - 1  # the last token of the answer was never computed
    assert runner.computed - before == len(second) - last.reused + 9


def test_a_page_is_reused_up_to_where_it_differs() -> None:
    engine = make()
    answer(engine, [1, 2, 3, 4, 5, 6], greedy())
    tokens, last = answer(engine, [1, 2, 3, 9, 9], greedy())
    assert (tokens, last.reused) == (plainly([1, 2, 3, 9, 9], 10)[0], 3)
    tokens, last = answer(engine, [1, 2, 3, 9, 9], greedy())
    assert (tokens, last.reused) == (plainly([1, 2, 3, 9, 9], 10)[0], 4)  # the last one's logits are wanted


def test_a_prompt_that_many_share_is_computed_once() -> None:
    engine = make(step_tokens=16, pages=200)
    runner: Any = engine._runner
    shared = prompt_of(40)
    asked = [engine.submit([*shared, salt], greedy(3)) for salt in range(16)]
    done = finish(engine)
    assert [done[each, 0][0] for each in asked] == [plainly([*shared, salt], 3)[0] for salt in range(16)]
    assert runner.computed == 40 + 16 * (1 + 2)
    assert sum(done[each, 0][1].reused for each in asked) == 15 * 40  # they took turns at it


def test_a_namespace_sees_only_its_own() -> None:
    engine = make()
    prompt = prompt_of(30)
    answer(engine, prompt, greedy(), namespace="a")
    assert answer(engine, prompt, greedy(), namespace="b")[1].reused == 0
    assert answer(engine, prompt, greedy(), namespace="a")[1].reused == 29


def test_without_a_prefix_cache_nothing_is_reused() -> None:
    engine = make(prefix_cache=False)
    for _ in range(2):
        tokens, last = answer(engine, prompt_of(30), greedy())
        assert (tokens, last.reused) == (plainly(prompt_of(30), 10)[0], 0)
    assert engine.statistics().pages_free == 60


def test_what_was_used_longest_ago_is_evicted_first() -> None:
    engine = make(pages=12)  # room for two of these texts, not three
    old, middle, new = prompt_of(16, 1), prompt_of(16, 2), prompt_of(16, 3)
    for prompt in (old, middle, old, new):
        answer(engine, prompt, greedy(3))
    assert answer(engine, old, greedy(3))[1].reused == 15
    assert answer(engine, middle, greedy(3))[1].reused < 15


def test_choices_share_the_prompt_and_go_their_own_ways() -> None:
    engine = make(prefix_cache=False)
    runner: Any = engine._runner
    prompt = prompt_of(22)
    request = engine.submit(prompt, greedy(n=4))
    most = 0
    done: dict[int, list[int]] = {choice: [] for choice in range(4)}
    while not engine.idle:
        for report in engine.step():
            done[report.choice] += report.tokens
        engine.check()
        most = max(most, engine.statistics().pages_used)
    assert done == {choice: plainly(prompt, 10, choice=choice)[0] for choice in range(4)}
    assert runner.computed == 22 + 4 * 9
    assert most <= 5 + 4 * 3  # the prompt's five full pages once
    assert request == 1


@pytest.mark.parametrize("options", [{"max_running": 2}, {"pages": 9}])
def test_choices_that_find_no_room_wait(options: dict[str, int]) -> None:
    engine = make(**options)
    prompt = prompt_of(22)
    request = engine.submit(prompt, greedy(n=4))
    assert {key: tokens for key, (tokens, _) in finish(engine).items()} == {
        (request, choice): plainly(prompt, 10, choice=choice)[0] for choice in range(4)
    }


@pytest.mark.parametrize("when", ["waiting", "prompt", "answer"])
def test_a_cancelled_request_gives_its_pages_back_at_once(when: str) -> None:
    engine = make(step_tokens=8, prefix_cache=False, max_running=1)
    first = engine.submit(prompt_of(24), greedy())
    for _ in range({"waiting": 0, "prompt": 1, "answer": 5}[when]):
        engine.step()
    assert (engine.statistics().pages_used > 0) == (when != "waiting")
    engine.cancel(first)
    engine.check()
    assert (engine.idle, engine.statistics().pages_free) == (True, 60)
    engine.cancel(first)  # once more does nothing
    assert engine.step() == []


def test_one_choice_can_be_cancelled() -> None:
    engine = make()
    request = engine.submit([1, 2, 3], greedy(n=3))
    engine.step()
    engine.cancel(request, choice=1)
    done = finish(engine)
    assert {choice for (_, choice) in done} == {0, 2}


def test_one_choice_can_be_cancelled_before_they_part() -> None:
    engine = make(step_tokens=2)
    prompt = prompt_of(9)
    request = engine.submit(prompt, greedy(n=3))
    engine.step()
    engine.cancel(request, choice=0)
    done = {choice: tokens for (_, choice), (tokens, last) in finish(engine).items() if last.finish}
    assert done == {choice: plainly(prompt, 10, choice=choice)[0] for choice in (1, 2)}
    request = engine.submit(prompt_of(9, 3), greedy(n=2))
    for choice in range(2):
        engine.cancel(request, choice)
    assert engine.idle


def test_deadlines() -> None:
    now = [0.0]
    engine = make(max_running=1, clock=lambda: now[0])
    running = engine.submit([1, 2], greedy(90), deadline=5)
    waiting = engine.submit([3, 4], greedy(n=2), deadline=3)
    free = engine.submit([5, 6], greedy(4))
    ends = []
    for _ in range(12):
        now[0] += 1
        ends += [(now[0], *report[:2], report.finish) for report in engine.step() if report.finish]
        engine.check()
    assert ends[:3] == [(3, waiting, 0, "deadline"), (3, waiting, 1, "deadline"), (5, running, 0, "deadline")]
    assert ends[3] == (8, free, 0, "length")


def test_a_full_queue_and_a_request_too_large_are_refused() -> None:
    engine = make(pages=5, max_waiting=2)
    for _ in range(2):
        engine.submit([1], greedy())
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.submit([1], greedy())
    with pytest.raises(ContextError, match="room in the KV cache of 20 by 5 tokens"):
        engine.submit([1] * 15, greedy())
    with pytest.raises(ContextError, match=f"model's context of {CONTEXT} by 1 tokens"):
        make().submit([1] * CONTEXT, greedy(None))
    with pytest.raises(UsageError, match="no tokens"):
        engine.submit([], greedy())
    with pytest.raises(UsageError, match="Token 61 is outside"):
        engine.submit([3, 61], greedy())
    with pytest.raises(UsageError, match="step_tokens must be"):
        make(step_tokens=0)
    assert len(finish(engine)) == 2


def test_ends() -> None:
    whole = plainly([5, 6], 20)[0]
    stop = frozenset({whole[4]})
    at = whole.index(whole[4])
    tokens, last = answer(make(), [5, 6], greedy(20), stop_ids=stop)
    assert (tokens, last.finish, last.tokens) == (whole[:at], "stop", ())
    assert answer(make(), [5, 6], greedy(20, ignore_eos=True), stop_ids=stop)[0] == whole
    tokens, last = answer(make(), [1] * (CONTEXT - 3), greedy(None))
    assert (tokens, last.finish) == (plainly([1] * (CONTEXT - 3), 3)[0], "context")
    tokens, last = answer(make(pages=3), [1] * 9, greedy(None))
    assert (tokens, last.finish) == (plainly([1] * 9, 3)[0], "context")


def test_a_grammar_that_is_not_ready_holds_up_nobody() -> None:
    engine = make()
    ready: Future[Any] = Future()
    broken: Future[Any] = Future()
    ruled, failed = engine.submit([1, 2], greedy(), constraint=ready), engine.submit([1], greedy(), constraint=broken)
    free = engine.submit([3], greedy(2))
    assert {report.request for _ in range(3) for report in engine.step()} == {free}
    assert (engine.statistics().compiling, engine.statistics().pages_used, engine.idle) == (2, 0, False)
    ready.set_result(Rule())
    broken.set_exception(UsageError("no such schema"))
    done = finish(engine)
    assert done[ruled, 0][0] == plainly([1, 2], 10, ruled=True)[0]
    assert str(done[failed, 0][1].error) == "no such schema"


def test_who_left_while_its_grammar_was_compiled_is_forgotten() -> None:
    """Nothing steps an idle engine, so its queue must have room again at once."""
    engine = make(max_waiting=1)
    engine.cancel(engine.submit([1, 2], greedy(), constraint=Future()))
    assert (engine.idle, engine.statistics().compiling) == (True, 0)
    engine.check()
    assert answer(engine, [1, 2], greedy(3))[0] == plainly([1, 2], 3)[0]


def test_forced_tokens_are_not_drawn() -> None:
    """The rule gives two tokens after every one that is 3 modulo 11: they come in one report."""
    engine = make()
    prompt = next([i, j] for i in range(60) for j in range(60) if plainly([i, j], 1, ruled=True)[0][0] % 11 == 3)
    engine.submit(prompt, greedy(), constraint=Rule())
    (report,) = engine.step()
    assert list(report.tokens) == plainly(prompt, 3, ruled=True)[0]
    finish(engine)


@pytest.mark.parametrize("choices", [1, 3])
def test_guesses_save_steps_and_change_nothing(choices: int) -> None:
    plain, guessing = make(), make(speculate=HalfRight)
    for engine in (plain, guessing):
        engine.submit(prompt_of(9), greedy(60, n=choices))
    expected, found = finish(plain), finish(guessing)
    assert [tokens for tokens, _ in found.values()] == [tokens for tokens, _ in expected.values()]
    right = guessing.statistics().right_guesses
    assert 10 < right < guessing.statistics().guessed_tokens
    if choices == 1:
        assert guessing.statistics().steps == plain.statistics().steps - right


def test_an_error_in_a_step_ends_those_it_may_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(max_running=2)
    for salt in range(3):
        engine.submit([salt], greedy(5))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", lambda batch: 1 / 0)
        reports = engine.step()
    assert [report.request for report in reports] == [1, 2]
    assert all("ZeroDivisionError" in str(report.error) for report in reports)
    engine.check()
    assert list(finish(engine)) == [(3, 0)]
    monkeypatch.setattr(engine._runner, "run", lambda batch: (_ for _ in ()).throw(DeviceError("no memory")))
    engine.submit([1], greedy(n=2))
    assert [(report.choice, str(report.error)) for report in engine.step()] == [(0, "no memory"), (1, "no memory")]
    assert engine.statistics().pages_used == 0


def test_a_step_that_fails_leaves_alone_whom_it_did_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(step_tokens=8)
    for salt in range(3):
        engine.submit(prompt_of(12, salt), greedy(5))
    engine.step()
    assert engine.statistics().running == 3
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", lambda batch: 1 / 0)
        reports = engine.step()  # four tokens are left of the first, four fit of the second
    assert [report.request for report in reports] == [1, 2]
    engine.check()
    assert finish(engine)[3, 0][0] == plainly(prompt_of(12, 2), 5)[0]
    assert finish(engine) == {}


def test_logits_that_are_not_numbers_end_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(logits: np.ndarray, samplers: Any, masks: Any) -> Any:
        bad = [i for i, row in enumerate(logits) if row.argmax() == broken]
        if bad:
            error = FloatingPointError("the logits are not numbers")
            error.row = bad[0]  # type: ignore[attr-defined]
            raise error
        return good(logits, samplers, masks)

    good: Any = turns_module.sample  # type: ignore[attr-defined]
    broken = plainly([1], 1)[0][0]
    monkeypatch.setattr(turns_module, "sample", sample)
    engine = make()
    for prompt in ([1], [2], [3]):
        engine.submit(prompt, greedy(1))
    reports = engine.step()
    assert [report.finish for report in reports] == [None, "length", "length"]
    assert isinstance(reports[0].error, PunaError)
    assert "After 1 tokens the logits are not numbers" in str(reports[0].error)
    assert engine.idle
    engine.check()


def test_a_grammar_that_fails_ends_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Rule):
        def mask(self) -> np.ndarray:
            raise RuntimeError("lost")

    engine = make()
    engine.submit([1], greedy(1), constraint=Broken())
    engine.submit([2], greedy(1))
    first, second = engine.step()
    assert "lost" in str(first.error)
    assert (list(second.tokens), second.error) == (plainly([2], 1)[0], None)


class Sentence(Rule):
    """Three tokens, each of which may be a 7 or a 9; after two it may end (with a 0), after three it has to."""

    def __init__(self, said: int = 0) -> None:
        self.said = said

    @property
    def finished(self) -> bool:  # type: ignore[override]
        return self.said == 3

    def mask(self) -> np.ndarray:
        return np.array([1 << 7 | 1 << 9 | (self.said > 1), 0], np.uint32)

    def accept(self, token: int) -> None:
        self.said += 1

    def forced(self) -> list[int]:
        return []


@pytest.mark.parametrize(("least", "made"), [(0, 2), (2, 2), (3, 3), (4, 3)])
def test_a_grammar_ends_no_sooner_than_asked(least: int, made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "sample", real_sample)
    engine = make()
    sampling = greedy(logit_bias=((0, 50.0),), min_tokens=least)  # it would end as soon as it may
    tokens, last = answer(engine, [5, 6], sampling, stop_ids=frozenset({0}), constraint=Sentence())
    assert len(tokens) == made
    assert set(tokens) <= {7, 9}
    if least < 4:
        assert (last.finish, last.error) == ("stop", None)
    else:
        assert isinstance(last.error, NothingLeftError)
        assert "after 3 tokens, nothing may follow, and min_tokens asks for 4" in str(last.error)
    engine.check()


def test_a_grammar_cannot_ignore_its_end() -> None:
    engine = make()
    with pytest.raises(UsageError, match="ignore_eos cannot be honoured beside a grammar"):
        engine.submit([5], greedy(ignore_eos=True), constraint=Rule())
    assert engine.idle


def test_deadlines_of_requests_that_are_over_do_not_pile_up() -> None:
    engine = make(clock=lambda: 0.0)
    kept = engine.submit([1], greedy(5), deadline=1e9)
    for i in range(1000):
        engine.cancel(engine.submit([1], greedy(5), deadline=1e6 + i))
    assert len(engine._deadlines) <= SPARE_DEADLINES + 2
    assert (1e9, kept) in engine._deadlines


def test_it_says_when_grammars_are_all_it_waits_for() -> None:
    now = 3.0
    engine = make(clock=lambda: now)
    assert (engine.blocked, engine.seconds_left) == (False, None)
    grammar: Future[Any] = Future()
    engine.submit([1, 2], greedy(1), constraint=grammar, deadline=5)
    assert (engine.blocked, engine.seconds_left) == (True, 2.0)
    engine.submit([3, 4], greedy(1))
    assert not engine.blocked
    engine.step()
    assert engine.blocked
    now = 9.0
    assert engine.seconds_left == 0
    grammar.set_result(Rule())
    assert not engine.blocked


def test_the_books_are_checked() -> None:
    engine = make()
    engine.submit(prompt_of(9), greedy())
    engine.step()
    engine._scheduler.pool.users[5] += 1
    with pytest.raises(AssertionError, match="count of users"):
        engine.check()


def test_a_grammar_that_is_ready_while_it_is_asked_is_not_forgotten() -> None:
    class Late(Future[Any]):
        """Done a moment after it was asked whether it is."""

        def done(self) -> bool:
            was = super().done()
            if not was:
                self.set_result(Rule())
            return was

    engine = make()
    request = engine.submit([1, 2], greedy(), constraint=Late())
    assert finish(engine)[request, 0][0] == plainly([1, 2], 10, ruled=True)[0]


def test_forced_tokens_keep_to_what_a_step_takes() -> None:
    class Long(Rule):
        def forced(self) -> list[int]:
            return [1] * 30

    engine = make(step_tokens=8)
    runner: Any = engine._runner
    for salt in range(4):
        engine.submit([salt], greedy(40), constraint=Long())
    finish(engine)
    assert runner.widest <= 8 + 4


def test_stop_tokens_beyond_the_vocabulary_never_come() -> None:
    engine = make()
    request = engine.submit([1, 2], greedy(4, min_tokens=2), stop_ids=frozenset({VOCAB + 7}))
    (sequence,) = engine._requests[request].live
    sequence.sampler.edit(np.zeros(VOCAB, np.float32))  # has no place to bar it at
    assert finish(engine)[request, 0][0] == plainly([1, 2], 4)[0]
