"""Structured output, speculation and batching at once, with cria: valid, and the same answer as without the other two.

A grammar forces tokens while a proposer guesses others, in the same step for one sequence beside another; what is
drawn must not notice. In float32, where how many rows share a step decides no draw.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from puna import LLM
from puna.engine.engine import Engine
from puna.engine.speculation import PromptLookup, Proposer, StepCost
from puna.types import Grammar, Sampling

TOOL = {
    "type": "object",
    "properties": {
        "name": {"const": "buy"},
        "arguments": {
            "type": "object",
            "properties": {
                "toy": {"enum": ["ball", "red ball", "kite"]},
                "count": {"type": "integer", "minimum": 1, "maximum": 99},
                "for": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
            },
            "required": ["toy", "count", "for"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
SCHEMA = Grammar("json_schema", json.dumps(TOOL))
LONGEST = 80
SEEDS = 3
"""Each is asked for as often: greedily, then drawn with seed 1, 2, ..."""
ASKED: list[tuple[str, Grammar | None]] = [
    ("Lily wanted a toy. ", SCHEMA),
    ('{"name": "buy", "arguments": {"toy": "kite", "count": 3, "for": ["Tom", "Tom"]}}\n', SCHEMA),
    ("Call me at ", Grammar("regex", r"\d{3}-\d{4}( or \d{3}-\d{4}){0,2}")),
    ("The dog was", Grammar("choice", json.dumps(["big", "big and red", "very, very happy"]))),
    ("Tom said", Grammar("lark", 'start: " " WORD (", " WORD)* "."\nWORD: /[a-z]{1,6}/')),
    ("Once upon a time", None),
    ("The cat sat. The cat ran. The cat sat. The cat", None),
]


class Wild:
    """Guesses what no grammar here allows, and what some do."""

    def propose(self, tokens: list[int], most: int) -> list[int]:
        return ([tokens[-1], tokens[0], *tokens[-5:]] * most)[:most]


def valid(text: str, grammar: Grammar | None) -> bool:
    if grammar is None:
        return True
    match grammar.kind:
        case "json_schema":
            jsonschema.validate(json.loads(text), json.loads(grammar.text))
            return True
        case "choice":
            return text in json.loads(grammar.text)
        case "lark":
            return re.fullmatch(r" [a-z]{1,6}(, [a-z]{1,6})*\.", text) is not None
        case _:
            return re.fullmatch(grammar.text, text) is not None


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("cria", dtype="fp32")


def sampling(seed: int, **more: Any) -> Sampling:
    draw = {"temperature": 0} if seed == 0 else {"temperature": 1.0, "top_p": 0.98, "seed": seed}
    return Sampling(**draw, max_tokens=LONGEST, **more)


def answers(
    llm: LLM, engine: Engine, *, together: bool, seeds: int = SEEDS, **more: Any
) -> dict[tuple[int, int, int], list[int]]:
    """The tokens of each (asked, seed, choice); asked for at once, or one after another."""
    made: dict[tuple[int, int, int], list[int]] = {}
    whose: dict[int, tuple[int, int]] = {}

    def finish() -> None:
        while not engine.idle:
            for report in engine.step():
                assert report.error is None, report.error
                made.setdefault((*whose[report.request], report.choice), []).extend(report.tokens)
            engine.check()

    for i, (prompt, grammar) in enumerate(ASKED):
        for seed in range(seeds):
            constraint = None if grammar is None else llm.grammars.compile(grammar).result()
            request = engine.submit(
                llm.encode(prompt), sampling(seed, **more), stop_ids=llm.stop_ids, constraint=constraint
            )
            whose[request] = i, seed
            if not together:
                finish()
    finish()
    assert engine.statistics().pages_used == 0
    return made


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict[tuple[int, int, int], list[int]]:
    return answers(llm, Engine(llm._runner, pages=64), together=False)


def test_each_answer_has_its_form(llm: LLM, alone: dict[tuple[int, int, int], list[int]]) -> None:
    whole = 0
    for (i, _, _), tokens in alone.items():
        if ASKED[i][1] is not None and len(tokens) < LONGEST:
            assert valid(text_of(llm, i, tokens), ASKED[i][1])
            whole += 1
    assert whole >= 12
    assert len({tuple(tokens) for tokens in alone.values()}) > 12  # seeds differ


def text_of(llm: LLM, i: int, tokens: list[int]) -> str:
    """What the answer adds to its prompt."""
    ids = llm.encode(ASKED[i][0])
    return llm.tokenizer.decode([*ids, *tokens]).removeprefix(llm.tokenizer.decode(ids))


@pytest.mark.parametrize("propose", [None, PromptLookup, Wild])
@pytest.mark.parametrize("options", [{"pages": 200}, {"pages": 7, "max_running": 5, "step_tokens": 24}])
def test_batch_and_guesses_change_no_answer(
    llm: LLM,
    alone: dict[tuple[int, int, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    propose: Callable[[], Proposer] | None,
    options: dict[str, int],
) -> None:
    """In a large pool, and in one where sequences are preempted in the middle of their grammars."""
    monkeypatch.setattr(StepCost, "share", lambda self, rows: 0.01)  # guesses pay
    engine = Engine(llm._runner, speculate=propose, **options)
    assert answers(llm, engine, together=True) == alone
    statistics = engine.statistics()
    if propose is not None:
        assert statistics.guessed_tokens > statistics.right_guesses > 0
    if options["pages"] == 7:
        assert statistics.preemptions > 0


def test_choices_of_a_grammar_guessed_together(
    llm: LLM, alone: dict[tuple[int, int, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCost, "share", lambda self, rows: 0.01)
    plain = answers(llm, Engine(llm._runner, pages=200), together=False, seeds=2, n=3)
    guessed = answers(llm, Engine(llm._runner, pages=200, speculate=PromptLookup), together=True, seeds=2, n=3)
    assert guessed == plain
    assert {key: tokens for key, tokens in plain.items() if key[2] == 0}.items() <= alone.items()
    assert len({tuple(plain[0, 1, choice]) for choice in range(3)}) == 3
