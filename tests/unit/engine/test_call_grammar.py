"""Calls in Python's notation: which texts the grammar takes, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from puna import LLM
from puna.engine.grammar import Constraint, Grammars
from puna.errors import GrammarError
from puna.text.token_table import encode_after
from puna.types import Grammar

TOOLS: dict[str, Any] = {
    "go": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "fast": {"type": "boolean"},
            "stops": {"type": "array", "items": {"$ref": "#/$defs/go/$defs/stop"}, "maxItems": 2},
            "until": {"type": "null"},
        },
        "required": ["city", "stops"],
        "$defs": {"stop": {"enum": [1, "b", True]}},
    },
    "a/b": {"properties": {"ñ": {"$ref": "#/$defs/a~1b/properties/n"}, "n": {"type": "integer"}}},
    "none": {},
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("cria")


@pytest.fixture(scope="module")
def grammars(llm: LLM) -> Grammars:
    return llm.grammars


def constraint(grammars: Grammars, tools: dict[str, Any], many: bool = True) -> Constraint:
    return grammars.compile(Grammar("pythonic", json.dumps({"tools": tools, "many": many}))).result(30)


def takes(llm: LLM, found: Constraint, text: str) -> bool:
    """Whether a whole answer may be this text."""
    ids = encode_after(llm.tokenizer, text)
    found = found.copy()
    if found.valid(ids) < len(ids):
        return False
    for token in ids:
        found.accept(token)
    return found.may_end


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('[go(city="x", stops=[])]', True),
        ('[go(city="x\\n\\"", fast=True, stops=[1, "b"], until=None)]', True),
        ('[go(city="x", stops=[true]), none(), a/b(ñ=-1, n=2)]', True),
        ("[none()]", True),
        ("[a/b(n=2)]", True),
        ("[a/b()]", True),
        ("[]", False),
        ("[none(), ]", False),
        ("none()", False),
        ('[go(stops=[], city="x")]', False),
        ('[go(city="x")]', False),
        ('[go(city="x", stops=[2])]', False),
        ('[go(city="x", stops=[1, 1, 1])]', False),
        ('[go(city="x", city="x", stops=[])]', False),
        ('[go(city="x", fast=true, stops=[])]', False),
        ('[go(, city="x", stops=[])]', False),
        ("[go(city='x', stops=[])]", False),
        ("[none(a=1)]", False),
        ("[other()]", False),
        ("[a/b(ñ=1.5)]", False),
    ],
)
def test_what_is_taken(llm: LLM, grammars: Grammars, text: str, taken: bool) -> None:
    assert takes(llm, constraint(grammars, TOOLS), text) is taken


def test_one_call_at_most(llm: LLM, grammars: Grammars) -> None:
    found = constraint(grammars, TOOLS, many=False)
    assert takes(llm, found, "[none()]")
    assert not takes(llm, found, "[none(), none()]")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "something else than tools and many"),
        ('{"tools": {}, "many": true}', "something else"),
        ('{"tools": {"f": {}}, "many": 1}', "something else"),
        ('{"tools": {"f": {}}, "many": true, "x": 1}', "something else"),
        (" " * 300_000, "more than the"),
        ('{"tools": {"f": []}, "many": true}', "'f' .* no schema of an object"),
        ('{"tools": {"f": {"type": "array"}}, "many": true}', "'f' .* no schema of an object"),
        ('{"tools": {"f": {"properties": []}}, "many": true}', "'f' .* no object"),
        ('{"tools": {"f": {"minProperties": 1}}, "many": true}', "'f' .* minProperties cannot stand"),
        ('{"tools": {"f": {"properties": {"a b": {}}}}, "many": true}', "'f' .* 'a b' is no name"),
        ('{"tools": {"f": {"properties": {"a": {"format": "odd"}}}}, "many": true}', "f/properties/a/format"),
        (
            json.dumps({"tools": {"f": {"properties": {f"a{n}": {} for n in range(101)}}}, "many": True}),
            "101 arguments",
        ),
    ],
    ids=lambda text: text[:30],
)
def test_what_cannot_be_honoured(grammars: Grammars, text: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        grammars.compile(Grammar("pythonic", text)).result(30)


def test_a_name_cannot_leave_its_quotes(llm: LLM, grammars: Grammars) -> None:
    name = 'f" | /.*/ | "'
    found = constraint(grammars, {name: {}})
    assert takes(llm, found, f"[{name}()]")
    assert not takes(llm, found, "[f()]")
