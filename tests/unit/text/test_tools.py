"""Calls in answers: read the same however the answer comes in pieces, and nothing of it lost; grammars of calls."""

from __future__ import annotations

import ast
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import GrammarError
from puna.text.tools import MAX_DEPTH, MAX_HEAD, CallForm, CallParser, call_grammar, json_value, new_call_id
from puna.types import Tool, ToolCallPiece

NAMES = ("f", "foo", "get_weather", "brave_search")

Told = tuple[str, list[tuple[str, str]]]


def told(items: list[str | ToolCallPiece]) -> Told:
    """The text, and the calls."""
    calls: dict[int, list[str]] = {}
    for item in items:
        if isinstance(item, ToolCallPiece):
            assert bool(item.name) == bool(item.id) == (item.index not in calls)
            call = calls.setdefault(item.index, [item.name, ""])
            call[1] += item.arguments
    assert list(calls) == list(range(len(calls)))
    text = "".join(item for item in items if isinstance(item, str))
    return text, [(name, arguments) for name, arguments in calls.values()]


def read(text: str, *cuts: int, names: tuple[str, ...] = NAMES, **options: Any) -> Told:
    parser = CallParser(names, **options)
    items: list[str | ToolCallPiece] = []
    ends = [*cuts, len(text)]
    for begin, end in zip([0, *ends], ends, strict=False):
        items += parser.push(text[begin:end])
    return told(items + parser.finish())


WHOLE: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("", "", []),
    ("Hello.", "Hello.", []),
    # JSON, as Llama 3.1 to 3.3 write it
    ('{"name": "f", "parameters": {"a": [1, "}"], "b": "\\"{"}}', "", [("f", '{"a": [1, "}"], "b": "\\"{"}')]),
    (
        '<|python_tag|>{\n    "type": "function",\n    "name": "get_weather",\n    "parameters": {\n        "n": "10"\n'
        "    }\n}",
        "",
        [("get_weather", '{\n        "n": "10"\n    }')],
    ),
    ('\n {"name":"foo","arguments":{}} \n', "", [("foo", "{}")]),
    (
        '{"name": "f", "parameters": {"a": 1}}; {"name": "foo", "parameters": {}}\n{"name":"f","parameters":{"b":2}}',
        "",
        [("f", '{"a": 1}'), ("foo", "{}"), ("f", '{"b":2}')],
    ),
    ('{"name": "f", "parameters": {}}\nThat was it.', "\nThat was it.", [("f", "{}")]),
    ('{"name": "f", "parameters": {"a": 1}, "x": 2} y', ', "x": 2} y', [("f", '{"a": 1}')]),
    ('{"name": "f", "parameters": {"a": tru', "", [("f", '{"a": tru')]),
    # <function=...>
    ('<function=f>{"n": 10}</function>', "", [("f", '{"n": 10}')]),
    ('<function=f>{"n": 10}</function>\n<function=foo>{}</function>', "", [("f", '{"n": 10}'), ("foo", "{}")]),
    ('<function=f>{"n": 10}', "", [("f", '{"n": 10}')]),
    # Python's notation, as Llama 3.2 and 4 write it
    (
        "[get_weather(city='San Francisco', metric=\"celsius\"), foo()]",
        "",
        [("get_weather", '{"city": "San Francisco", "metric": "celsius"}'), ("foo", "{}")],
    ),
    (
        "[f(a=True, b=None, c=-1.50, d=[1, (2, 3), {'k': \"v\"}], e='it\\'s, (ok)')]",
        "",
        [("f", '{"a": true, "b": null, "c": -1.50, "d": [1, [2, 3], {"k": "v"}], "e": "it\'s, (ok)"}')],
    ),
    (" [ f ( a = 1 , ) ] ", "", [("f", '{"a": 1}')]),
    ("Sure: <|python_start|>[f(a=1)]<|python_end|>", "Sure: ", [("f", '{"a": 1}')]),
    ("<|python_tag|>[f(a=1)]", "", [("f", '{"a": 1}')]),
    ("[f(a=1)]\n[foo(b=2)]", "", [("f", '{"a": 1}'), ("foo", '{"b": 2}')]),
    ("[f(a=1), unknown(b=2)] x", ", unknown(b=2)] x", [("f", '{"a": 1}')]),
    ("[f(a=1, b=oops), foo()]", "", [("f", '{"a": 1, b=oops), foo()]')]),
    # built-in tools
    ('<|python_tag|>brave_search.call(query="gold, (1oz)")', "", [("brave_search", '{"query": "gold, (1oz)"}')]),
    # what only looks like a call
    *(
        (text, text, [])
        for text in (
            '{"name": "Bob", "parameters": {"a": 1}}',
            '{"name": "f"}',
            '{"name": "f", "age": 3}',
            '{"name": "f", "parameters": null}',
            '{"parameters": {}, "name": "f"}',
            '{"name": "fo", "parameters": {}}',
            '{"name": "f',
            'I would say {"name": "f", "parameters": {}}',
            '```json\n{"name": "f", "parameters": {}}\n```',
            "<function=bar>{}</function>",
            "<function=f>[1]</function>",
            "[f](https://x)",
            "[f(1)]",
            "[f(a=b)]",
            "[f(a=1",
            "[f(a='1)]",
            "[f(a=1]",
            "[f(a=open('x'))]",
            "[f(a=1+1)]",
            "[f(a=f'x')]",
            "[f(a.b=1)]",
            "[f(**{})]",
            "[bar(a=1)]",
            "[]",
            "f(a=1)",
            "brave_search.call(query='x')",
            "<|python_tag|>import os",
            "<|python_tag|>",
            "<|python_tag|><|python_ta",
            "a <| b <|python <|python_tag| >",
        )
    ),
]


@pytest.mark.parametrize(("answer", "text", "calls"), WHOLE, ids=[answer[:40] for answer, _, _ in WHOLE])
def test_every_way_of_cutting_is_read_alike(answer: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(answer) == (text, calls)
    assert read(answer, *range(1, len(answer))) == (text, calls)
    for cut in range(len(answer)):
        assert read(answer, cut) == (text, calls)


@pytest.mark.parametrize("answer", [answer for answer, _, _ in WHOLE])
def test_what_was_told_is_never_taken_back(answer: str) -> None:
    """What is told of any beginning is what the whole begins with."""
    text, calls = read(answer)
    for end in range(len(answer)):
        parser = CallParser(NAMES)
        before, begun = told(parser.push(answer[:end]))
        assert text.startswith(before)
        assert len(begun) <= len(calls)
        for (name, arguments), (whole_name, whole) in zip(begun, calls, strict=False):
            assert name == whole_name
            assert whole.startswith(arguments)


def test_arguments_come_as_early_as_they_are_certain() -> None:
    parser = CallParser(NAMES, new_id=lambda: "call_1")
    assert parser.push('{"name": "f", "parameters": ') == []
    assert parser.push('{"te') == [ToolCallPiece(0, "call_1", "f", '{"te')]
    assert parser.push('xt": "a') == [ToolCallPiece(0, arguments='xt": "a')]
    assert parser.push('b"}') == [ToolCallPiece(0, arguments='b"}')]
    assert parser.push("}") == []
    parser = CallParser(NAMES, new_id=lambda: "call_1")
    assert parser.push("[f(a=1") == []
    assert parser.push(", b") == [ToolCallPiece(0, "call_1", "f", '{"a": 1')]
    assert parser.push("='x')") == [ToolCallPiece(0, arguments=', "b": "x"}')]
    assert parser.push("]") == parser.finish() == []
    assert CallParser(NAMES).push("He said <|py") == ["He said "]


def test_one_call_ends_the_answer_where_no_more_may_follow() -> None:
    for answer, calls in (
        ('{"name": "f", "parameters": {"a": 1}} {"name": "f", "parameters": {}}', [("f", '{"a": 1}')]),
        ("[f(a=1), foo()]", [("f", '{"a": 1}')]),
        ("[f(a=1)] and more", [("f", '{"a": 1}')]),
        ("<function=f>{}</function> x", [("f", "{}")]),
    ):
        parser = CallParser(NAMES, many=False)
        items = parser.push(answer)
        assert parser.ended
        assert told(items + parser.finish()) == ("", calls)
    parser = CallParser(NAMES, many=False)
    assert told(parser.push("[1, 2] and more") + parser.finish()) == ("[1, 2] and more", [])


def test_a_tag_in_the_prompt_stands_before_the_call() -> None:
    assert read('brave_search.call(query="x")', tagged=True) == ("", [("brave_search", '{"query": "x"}')])
    assert read('{"name": "f", "parameters": {}}', tagged=True) == ("", [("f", "{}")])
    assert read("text", tagged=True) == ("text", [])


def test_code_is_a_call_of_the_interpreter_behind_its_tag_only() -> None:
    code = 'def f(n):\n    return "\\n" * n  # é\n\nprint(f(7))'
    names = ("code_interpreter", "f")
    text, [(name, arguments)] = read(f"Let me see.\n<|python_tag|>{code}", names=names)
    assert (text, name, json.loads(arguments)) == ("Let me see.\n", "code_interpreter", {"code": code})
    assert read(code, names=names) == (code, [])
    text, [(name, arguments)] = read("<|python_tag|>[f(a=x)]", names=names)
    assert (name, json.loads(arguments)) == ("code_interpreter", {"code": "[f(a=x)]"})
    assert read("<|python_tag|>[f(a=1)]", names=names) == ("", [("f", '{"a": 1}')])


def test_ids_tell_calls_apart() -> None:
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", each) for each in ids)


# --- whatever a model may write --------------------------------------------------------------------------------------

FRAGMENTS = (
    *("{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", "=", " ", "\n", ".call(", "<", ">", "|", "1", "-"),
    *(
        '{"name": "f", "parameters": {',
        '{"type": "function", "name": "foo", "parameters": {',
        '"a": ',
        "[f(",
        "a=",
        "b=",
    ),
    *("foo(", "<function=f>{", "</function>", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "True", "None"),
    *("brave_search.call(", '"x"', "'y'", "}}", "é🦙", "\\u00e9", "\\ud83d\\ude00", "\\ud800", "1.5", "words"),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.data(), st.booleans())
def test_no_cut_and_no_answer_does_harm(fragments: list[str], data: st.DataObject, code: bool) -> None:
    # Words mark every place: each must come out, in a text or in arguments, in order within each.
    marked = "".join(f"{fragment}w{n}" if n % 3 == 0 else fragment for n, fragment in enumerate(fragments))
    names = (*NAMES, "code_interpreter") if code else NAMES
    whole = read(marked, names=names)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(marked)), max_size=6)))
    assert read(marked, *cuts, names=names) == whole
    assert read(marked, *range(len(marked)), names=names) == whole
    text, calls = whole
    if not calls:
        assert text == marked
    everything = text + "".join(f" {name} {arguments}" for name, arguments in calls)
    for n in range(0, len(fragments), 3):
        assert f"w{n}" in everything
    everything.encode()


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_pythons_own_notation_is_read(value: Any) -> None:
    """`repr` writes it, and JSON too."""
    for written in (repr(value), json.dumps(value), json.dumps(value, ensure_ascii=False)):
        found = json_value(written)
        assert found is not None
        assert json.loads(found) == value
    [(name, arguments)] = read(f"[f(a={value!r})]")[1]
    assert (name, json.loads(arguments)) == ("f", {"a": value})


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="[](){}'\"\\,:1_.e+-aTrueNonxuU0 \n", max_size=12))
def test_what_is_read_is_what_python_reads(text: str) -> None:
    """Whatever is taken for a literal is one for Python too, of the same value (but for JSON's words, and `\\/`)."""
    found = json_value(text)
    if found is None or re.search(r"true|false|null|\\/|\n", text):
        return
    value = ast.literal_eval(text.strip())
    assert json.loads(found) == json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "1 2", "007", "1__0", "0x10", "1j", "{1: 2}", "{1}", "[1,,2]", "[,]", "b'x'", "'a' 'b'", "-"),
        *("'\\ud800'", "'\\x4'", "'\\U00110000'", "'a", "[1", "{'a': 1, 'a': 2}", "...", "nan", "__import__('os')"),
    ],
)
def test_what_is_no_literal(text: str) -> None:
    assert json_value(text) is None


def test_hostile_answers_cost_little() -> None:
    deep = "[f(a=" + "[" * 100_000
    began = time.perf_counter()
    assert read(deep) == (deep, [])
    assert json_value("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert json_value("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)) is None
    closed = "[f(a=" + "[" * 5000 + "]" * 5000 + ")]"
    assert read(closed) == (closed, [])
    for text in (" " * 20_000, "{" + " " * 20_000, "<|python_tag|>" * 500, '{"name": "f", "parameters": {' * 50):
        read(text)
    parser = CallParser(NAMES)
    assert "".join(map(str, parser.push("[" + " " * (MAX_HEAD + 5)))).startswith("[")  # held no longer
    assert time.perf_counter() - began < 20  # seconds where every character costs a look at all before it


# --- grammars --------------------------------------------------------------------------------------------------------

CITY = Tool(
    "w", "", '{"type": "object", "properties": {"city": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"type": "string"}}}'
)


def test_the_schema_of_a_call_in_json() -> None:
    grammar = call_grammar(CallForm("json", key="arguments", typed=True), [CITY], many=True)
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.text) == {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "name": {"const": "w"},
            "arguments": {"$ref": "#/$defs/w"},
        },
        "required": ["type", "name", "arguments"],
        "additionalProperties": False,
        "$defs": {
            "w": {
                "type": "object",
                "properties": {"city": {"$ref": "#/$defs/w/$defs/c"}},
                "$defs": {"c": {"type": "string"}},
                "additionalProperties": False,
            }
        },
    }


def test_what_is_no_reference_stays() -> None:
    schema = {
        "properties": {
            "$ref": {"type": "string"},
            "const": {"$ref": "#/properties/a~1b"},
            "a/b": {"const": {"$ref": "#"}},
        },
        "additionalProperties": True,
    }
    found = json.loads(call_grammar(CallForm("json"), [Tool("n/m", "", json.dumps(schema))], many=True).text)
    assert found["properties"]["parameters"] == {"$ref": "#/$defs/n~1m"}
    assert found["$defs"]["n/m"] == {
        "type": "object",
        "properties": {
            "$ref": {"type": "string"},
            "const": {"$ref": "#/$defs/n~1m/properties/a~1b"},
            "a/b": {"const": {"$ref": "#"}},
        },
        "additionalProperties": True,
    }


@pytest.mark.parametrize("schema", ['{"type": "array"}', "[]", "{", "true", '{"items":' * 100_000])
def test_a_schema_of_no_object_is_refused(schema: str) -> None:
    for form in (CallForm("json"), CallForm("pythonic")):
        with pytest.raises(GrammarError, match="the tool 'f' cannot be held to its schema"):
            call_grammar(form, [CITY, Tool("f", "", schema)], many=True)


def test_several_calls_where_the_form_has_room() -> None:
    for form, many, expected in (
        (CallForm("pythonic", many=True), True, True),
        (CallForm("pythonic", many=True), False, False),
        (CallForm("pythonic"), True, False),
    ):
        assert json.loads(call_grammar(form, [CITY], many=many).text)["many"] is expected
