"""Guesses: where prompt lookup finds them, what it costs, and how many are made."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna import LLM
from puna.engine.engine import Engine
from puna.engine.speculation import REST, WIDEST, Drafts, PromptLookup, Proposer, StepCost
from puna.types import Sampling


def test_what_followed_before_is_guessed_again() -> None:
    lookup = PromptLookup()
    text = [1, 2, 3, 4, 5, 6, 7, 9, 9, 9, 2, 3]
    assert lookup.propose(text, 3) == [4, 5, 6]
    assert lookup.propose([*text, 8], 3) == []  # 3, 8 was never seen
    assert lookup.propose([*text, 8, 9, 9], 2) == [2, 3]  # 9, 9 was last followed so


def test_the_longest_run_counts_and_of_its_places_the_newest() -> None:
    text = [1, 2, 3, 4, 50, 0, 3, 4, 60, 0, 1, 2, 3, 4]
    assert PromptLookup().propose(text, 1) == [50]
    assert PromptLookup().propose([*text, 70, 3, 4], 1) == [70]


def test_token_by_token_it_guesses_as_from_the_whole() -> None:
    draw = random.Random(0)
    text = [draw.randrange(4) for _ in range(300)]
    grown = PromptLookup()
    for end in range(1, 300):
        assert grown.propose(text[:end], 5) == PromptLookup().propose(text[:end], 5)


def test_a_token_costs_microseconds() -> None:
    draw = random.Random(0)
    text = [draw.randrange(1000) for _ in range(20_000)]
    lookup = PromptLookup()
    lookup.propose(text[:10_000], 8)
    began = time.perf_counter()
    for end in range(10_000, 11_000):
        lookup.propose(text[:end], 8)
    copies = time.perf_counter()
    for end in range(10_000, 11_000):
        text[:end]
    spent = (copies - began) - (time.perf_counter() - copies)
    assert spent / 1000 < 500e-6  # about 20e-6; a look at each token would be above


def test_a_long_prompt_holds_up_no_step() -> None:
    """Its first look is the dear one: 2 ms for 100,000 tokens. A dictionary of its runs takes 70."""
    draw = random.Random(0)
    text = [draw.randrange(100_000) for _ in range(100_000)] + [1, 2, 3, 1, 2]
    spent = []
    for _ in range(3):
        lookup = PromptLookup()
        began = time.perf_counter()
        assert lookup.propose(text, 1) == [3]
        spent.append(time.perf_counter() - began)
    assert min(spent) < 0.03


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 7))
def test_it_finds_what_a_search_finds(text: list[int], most: int) -> None:
    found: list[int] = []
    for run in (2, 4):  # the longest last
        places = [at for at in range(run, len(text)) if text[at - run : at] == text[-run:]]
        found = text[places[-1] : places[-1] + most] if places else found
    assert PromptLookup().propose(text, most) == found


class Fixed:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def propose(self, tokens: list[int], most: int) -> list[int]:
        self.asked.append(most)
        return [0] * most


def test_as_many_guesses_as_pay() -> None:
    drafts = Drafts(Fixed())
    assert drafts.width(0.3) == 1  # an even chance to begin with: a half is worth it, a quarter is not
    for _ in range(30):
        drafts.judge(4, 4)
    assert drafts.width(0.5) > 4
    assert drafts.width(0.001) == WIDEST
    for _ in range(30):
        drafts.judge(4, 0)
    assert drafts.width(0.05) == 0


def test_what_does_not_pay_is_tried_again_after_a_rest() -> None:
    proposer = Fixed()
    drafts = Drafts(proposer)
    for _ in range(30):
        drafts.judge(4, 0)
    for length in range(1, 4 * REST):
        drafts.propose([0] * length, 8, 0.5)
    assert proposer.asked == [1, 1, 1]


def test_the_cost_of_a_row_is_the_slope() -> None:
    cost = StepCost()
    assert cost.share(4) == pytest.approx(1 / WIDEST)
    for rows in (1, 2, 5, 40, 3):
        cost.add(rows, 0.040 + 0.002 * rows)
    assert cost.share(1) == pytest.approx(0.002 / 0.042)
    assert cost.share(16) == pytest.approx(0.002 / 0.072)


def test_the_widest_guess_leaves_every_bit_as_it_is() -> None:
    llm = LLM("cria")
    prompt = llm.encode("Once upon a time there was a little girl", raw=True)

    def answer(speculate: Callable[[], Proposer] | None) -> tuple[list[int], list[float | None], int]:
        engine = Engine(llm._runner, pages=4, prefix_cache=False, speculate=speculate)
        engine.submit(prompt, Sampling(temperature=0, max_tokens=80, logprobs=0, ignore_eos=True))
        tokens: list[int] = []
        logprobs: list[float | None] = []
        widest = 0
        while not engine.idle:
            for report in engine.step():
                tokens += report.tokens
                logprobs += [draw.logprob for draw in report.logprobs or ()]
                widest = max(widest, len(report.tokens))
        return tokens, logprobs, widest

    plain = answer(None)

    class Right:
        def propose(self, tokens: list[int], most: int) -> list[int]:
            at = len(tokens) - len(prompt)
            return plain[0][at : at + most]

    found = answer(Right)
    assert found == (*plain[:2], WIDEST + 1)
