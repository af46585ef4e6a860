"""Structured output: what is honoured yields only what it should, the rest is refused, nothing stalls others."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schema_walks import allowed, judge, style, takes, walk
from tool_schemas import generated, handwritten

from puna.engine import grammar
from puna.engine.grammar import Constraint, Grammars
from puna.engine.json_schema import ANNOTATIONS, FORMATS, IMPLEMENTED, REFUSED, normalise
from puna.errors import GrammarError, UsageError
from puna.text.token_table import encode_after, token_table
from puna.text.tokenizer import Tokenizer, load_tokenizer
from puna.types import Grammar

SUITE = Path(__file__).parent / "json_schema_suite" / "suite.jsonl"
GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "structured-output.md"

STOP, SPECIAL = 0, 1
WORDS = (b'{"', b'": ', b', "', b'"}', b"foo", b"foobar", b"bar", "é".encode(), b"tr", b"ue", b"12", b"], [")
VOCABULARY = [b"", b"", *(bytes([i]) for i in range(256)), *WORDS]
BYTES = {token: i for i, token in enumerate(VOCABULARY) if len(token) == 1}
PADDED = len(VOCABULARY) + 45

WEATHER = Grammar(
    "json_schema",
    '{"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},'
    ' "required": ["city", "days"], "additionalProperties": false}',
)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(VOCABULARY, {STOP}, PADDED)


@pytest.fixture(scope="module")
def constrain(grammars: Grammars) -> Callable[[str, Any], Constraint]:
    def build(kind: Any, text: Any) -> Constraint:
        return grammars.compile(Grammar(kind, text if isinstance(text, str) else json.dumps(text))).result(30)

    return build


def spell(text: str) -> list[int]:
    return [BYTES[bytes([byte])] for byte in text.encode()]


# What the suite of other people says


def _suite() -> list[list[Any]]:
    return [json.loads(line) for line in SUITE.read_text().splitlines()]


def _try(constrain: Callable[[str, Any], Constraint], schema: Any) -> Constraint | str:
    try:
        return constrain("json_schema", schema)
    except GrammarError as error:
        return error.message if error.remedy else pytest.fail(f"a refusal without a remedy: {error.message}")


def _follow(
    schema: Any, draft: str | None, constraint: Constraint, vocabulary: list[bytes], stops: frozenset[int], walks: int
) -> int:
    """Walk a grammar a few times and have what comes out judged; how often an end was reached."""
    ended = 0
    for seed in range(walks):
        answer = walk(constraint.copy(), vocabulary, stops, random.Random(seed))
        if answer is None:
            continue
        ended += 1
        try:
            wrong = judge(schema, draft, answer)
        except re.error:  # Python reads no \p{...}; the pattern's translation has a test of its own
            continue
        if wrong and re.search(r"\\\\[WDSs]", json.dumps(schema)) and not answer.isascii():
            continue  # Python's \W, \D, \S and \s go by Unicode in another way than ECMA-262's
        assert wrong is None, (schema, wrong)
    return ended


def _check_group(constrain: Callable[[str, Any], Constraint], group: list[Any], walks: int) -> bool:
    draft, file, description, schema, instances = group
    constraint = _try(constrain, schema)
    if isinstance(constraint, str):
        return False
    for instance, valid in instances:
        if not valid:
            assert not takes(constraint, BYTES, style(instance)), (draft, file, description, instance)
    padded = [*VOCABULARY, *(b"" for _ in range(PADDED - len(VOCABULARY)))]
    _follow(schema, draft, constraint, padded, frozenset({STOP}), walks)
    return True


def test_a_sample_of_the_suite(constrain: Callable[[str, Any], Constraint]) -> None:
    compiled = [_check_group(constrain, group, walks=1) for group in _suite()[::12]]
    assert 40 <= sum(compiled) < len(compiled)


@pytest.mark.slow
def test_the_whole_suite(constrain: Callable[[str, Any], Constraint]) -> None:
    compiled = [_check_group(constrain, group, walks=5) for group in _suite()]
    assert len(compiled) == 1266
    assert sum(compiled) >= 600  # the rest is refused, with a reason each


def test_most_valid_instances_can_be_written(constrain: Callable[[str, Any], Constraint]) -> None:
    """Not all: keys have one order, and 1.0 is written as 1."""
    taken = total = 0
    for *_, schema, instances in _suite()[5::12]:
        constraint = _try(constrain, schema)
        if not isinstance(constraint, str):
            valid = [instance for instance, is_valid in instances if is_valid]
            taken += sum(takes(constraint, BYTES, style(instance)) for instance in valid)
            total += len(valid)
    assert total > 80
    assert taken / total > 0.85


# Our own, in the style of tool definitions


def _check_tools(
    make: Callable[[str, Any], Constraint],
    schemas: list[Any],
    vocabulary: list[bytes],
    stops: frozenset[int],
    walks: int,
) -> tuple[int, int]:
    compiled = ended = 0
    for schema in schemas:
        constraint = _try(make, schema)
        if not isinstance(constraint, str):
            compiled += 1
            ended += _follow(schema, None, constraint, vocabulary, stops, walks)
    return compiled, ended


def test_tool_schemas(constrain: Callable[[str, Any], Constraint]) -> None:
    padded = [*VOCABULARY, *(b"" for _ in range(PADDED - len(VOCABULARY)))]
    compiled, ended = _check_tools(constrain, handwritten() + generated(30), padded, frozenset({STOP}), walks=2)
    assert compiled > 45
    assert ended > 1.7 * compiled


@pytest.fixture(scope="module")
def llama3(reference: Path) -> Tokenizer:
    return load_tokenizer(reference / "tokenizers" / "llama3" / "tokenizer.model")


@pytest.fixture(scope="module")
def llama3_grammars(llama3: Tokenizer) -> Grammars:
    return Grammars(
        token_table(llama3), llama3.stop_ids, llama3.vocab_size, encode=lambda text: encode_after(llama3, text)
    )


@pytest.mark.slow
def test_200_tool_schemas_with_the_tokenizer_of_llama3(llama3: Tokenizer, llama3_grammars: Grammars) -> None:
    def make(kind: Any, schema: Any) -> Constraint:
        return llama3_grammars.compile(Grammar(kind, json.dumps(schema))).result(30)

    schemas = handwritten() + generated(200, seed=1)
    compiled, ended = _check_tools(make, schemas, token_table(llama3), llama3.stop_ids, walks=3)
    assert compiled > 150  # the rest asks for unique items, an unknown format, what no object satisfies, ... on purpose
    assert ended > 2.7 * compiled


@pytest.mark.slow
def test_the_suite_with_the_tokenizer_of_llama3(llama3: Tokenizer, llama3_grammars: Grammars) -> None:
    table = token_table(llama3)
    for draft, _, _, schema, _ in _suite():
        try:
            constraint = llama3_grammars.compile(Grammar("json_schema", json.dumps(schema))).result(30)
        except GrammarError:
            continue
        _follow(schema, draft, constraint, table, llama3.stop_ids, walks=1)


# What is refused


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"properties": {"a/b": {"not": {}}}}, "/properties/a~1b/not"),
        ({"items": [{"type": "string", "maxlength": 3}]}, "/items/0/maxlength"),
        ({"type": "string", "format": "regex"}, "/format"),
        ({"type": "string", "pattern": "(?!a)b"}, "/pattern"),
        ({"type": "string", "pattern": "(a{1000}){1000}"}, "/pattern"),
        ({"$ref": "http://example.com/other.json"}, "/$ref"),
        ({"$ref": "#/$defs/none"}, "/$ref"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"uniqueItems": True}}}, "/$defs/a/uniqueItems"),
        ({"x-guidance": {"lenient": True}, "type": "string"}, "/x-guidance"),
        ({"type": "object", "minProperties": 2}, "/minProperties"),
        ({"const": (1 << 53) + 1}, "/const"),
        ({"enum": ["\u0001"]}, "/enum/0"),
        ({"type": "text"}, "/type"),
        ({"multipleOf": 0}, "/multipleOf"),
        ({"minLength": -1}, "/minLength"),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(1001)}}, "/properties"),
        ({"properties": {"a": {"$id": "x"}}}, "/properties/a/$id"),
    ],
)
def test_a_refusal_names_the_place(grammars: Grammars, schema: Any, pointer: str) -> None:
    with pytest.raises(GrammarError) as caught:
        grammars.check(Grammar("json_schema", json.dumps(schema)))
    assert f" at {pointer}: " in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("keyword", REFUSED)
def test_every_refused_keyword_is_refused(grammars: Grammars, keyword: str) -> None:
    schema = {"properties": {"a": {keyword: [{"type": "string"}], "type": "string"}}}
    with pytest.raises(GrammarError, match=re.escape(f"/properties/a/{keyword}: ")):
        grammars.check(Grammar("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    "text",
    [
        *("{", "", "[]", "1", "NaN", '{"minimum": Infinity}', '{"type": "string", "type": "null"}', "[" * 100_000),
        *('{"minimum": ' + "9" * 5000 + "}", '{"items": ' * 500 + "{}" + "}" * 500, " " * 300_000 + "{}", "false"),
        '{"const": ' + "[" * 200 + "]" * 200 + "}",
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_schema_is_refused(grammars: Grammars, text: str) -> None:
    with pytest.raises((GrammarError, UsageError)):
        grammars.check(Grammar("json_schema", text))


def test_a_schema_that_never_ends_is_refused(grammars: Grammars) -> None:
    loops = [
        {"$ref": "#"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "array", "minItems": 1, "items": {"anyOf": [{"$ref": "#"}, False]}},
    ]
    for schema in loops:
        with pytest.raises(GrammarError, match="no finite text"):
            grammars.check(Grammar("json_schema", json.dumps(schema)))
    grammars.check(Grammar("json_schema", '{"type": "array", "items": {"$ref": "#"}}'))


def test_too_many_patterns_at_once_are_refused(grammars: Grammars) -> None:
    """They would keep llguidance busy for minutes, and take memory without end."""
    parts = {f"a{i}": {"properties": {"x": {"pattern": f".*a.{{{i}}}b"}}} for i in range(30)}
    schema = {"allOf": [{"$ref": f"#/$defs/{name}"} for name in parts], "$defs": parts}
    with pytest.raises(GrammarError, match="more than 8 patterns at once"):
        grammars.check(Grammar("json_schema", json.dumps(schema)))


def test_overlapping_branches_of_one_of_are_refused(constrain: Callable[[str, Any], Constraint]) -> None:
    with pytest.raises(GrammarError, match="oneOf"):
        constrain("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("regex", "(a"), ("regex", "(?=a)b"), ("regex", "(" * 99 + "a" + ")" * 99), ("regex", "((a{99}){99}){99}")),
        *(("lark", 'start: "a'), ("lark", "start: nothing"), ("lark", 'start: <|eot_id|>'), ("lark", "start: <[1]>")),
        *(("lark", 'start: %json {"not": {}}'), ("lark", 'start[max_tokens=3]: "a"'), ("lark", "start: " + "(" * 5000)),
        *(("lark", "start: /(a{999}){999}/"), ("lark", "start: A\nA: " + " & ".join("B" * 12)), ("regex", "\ud800")),
        *(("choice", "[]"), ("choice", '["a", 1]'), ("choice", '[""]'), ("choice", "yes"), ("regex", "a" * 70_000)),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_with_a_reason(
    constrain: Callable[[str, Any], Constraint], kind: str, text: str
) -> None:
    with pytest.raises(GrammarError) as caught:
        constrain(kind, text)
    assert caught.value.remedy


def test_a_spec_refuses_what_it_is_not() -> None:
    for kind, text in [("xml", "a"), ("json_object", "{}"), ("regex", "")]:
        with pytest.raises(UsageError):
            Grammar(kind, text)  # type: ignore[arg-type]


def test_the_guide_lists_what_is_honoured_and_what_is_refused() -> None:
    page = GUIDE.read_text()
    rows = {key: " ".join(why.split()) for key, why in re.findall(r"^\| `([^`]+)` \| (.+) \|$", page, re.MULTILINE)}
    assert rows == dict(REFUSED)
    for listed in (IMPLEMENTED, ANNOTATIONS, FORMATS):
        assert not [word for word in listed if f"`{word}`" not in page]


# How JSON is written


def test_json_is_written_in_one_way(constrain: Callable[[str, Any], Constraint]) -> None:
    one = constrain("json_schema", {"properties": {"a": {"type": "integer"}, "b": {"type": "array"}}, "type": "object"})
    for text, fits in [
        ('{"a": 1, "b": [1, {}]}', True),
        ('{"a":1}', False),
        ('{"a": 1,"b": []}', False),
        ('{ "a": 1}', False),
        ('{"b": [], "a": 1}', False),
        ('{"\\u0061": 1}', False),
        ('{"c": "\\n\\"é"}', True),
        ('{"c": "\\u00e9"}', False),
        ('{"c": "\\/"}', False),
    ]:
        assert takes(one, BYTES, text) == fits, text


def test_a_key_cannot_be_smuggled_in_by_another_spelling(constrain: Callable[[str, Any], Constraint]) -> None:
    one = constrain("json_schema", {"type": "object", "properties": {"a\n": {"type": "integer"}}})
    assert takes(one, BYTES, '{"a\\n": 1}')
    assert not takes(one, BYTES, '{"a\\u000a": "x"}')
    assert not takes(one, BYTES, '{"a\\n": "x"}')


def test_dates_are_those_of_the_calendar(constrain: Callable[[str, Any], Constraint]) -> None:
    import datetime

    date = constrain("json_schema", {"type": "string", "format": "date"})
    for year in (1900, 1996, 2000, 2023, 2024, 9999):
        for month in range(1, 13):
            for day in range(1, 33):
                try:
                    datetime.date(year, month, day)
                    exists = True
                except ValueError:
                    exists = False
                assert takes(date, BYTES, f'"{year}-{month:02}-{day:02}"') == exists


def test_an_object_of_any_form(constrain: Callable[[str, Any], Constraint]) -> None:
    any_object = constrain("json_object", "")
    assert takes(any_object, BYTES, '{"a": [1, null], "b": {}}')
    assert not takes(any_object, BYTES, "[1]")


# Regular expressions, Lark, choices


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("regex", "[a-c]{2,3}x?", ["ab", "abcx"], ["a", "abcd", "abx "]),
        ("regex", "a|b", ["a", "b"], ["ab", "xa"]),
        ("lark", 'start: "a" (b | "c")+\nb: /[0-9]+/\n', ["ac", "a12c3"], ["a", "12", "ab"]),
        ("lark", 'start: stop?\nstop: "." [stop]\n', ["", ".", ".."], ["x"]),
        ("lark", 'start: pair\npair: "(" pair? ")"\n', ["()", "((()))"], ["(", "(()", "())"]),
        (
            "choice",
            '["yes", "no", "y", "\\u00e9\\n\\"(.*)\\\\"]',
            ["yes", "no", "y", 'é\n"(.*)\\'],
            ["ye", "yesno", "n"],
        ),
    ],
)
def test_the_whole_answer_matches(
    constrain: Callable[[str, Any], Constraint], kind: str, text: str, good: list[str], bad: list[str]
) -> None:
    constraint = constrain(kind, text)
    assert [takes(constraint, BYTES, answer) for answer in good] == [True] * len(good)
    assert [takes(constraint, BYTES, answer) for answer in bad] == [False] * len(bad)


# Masks, forced tokens, going back, copies


def test_special_and_padded_ids_are_never_allowed(constrain: Callable[[str, Any], Constraint]) -> None:
    anything = constrain("regex", r"(?s:.)*")
    ids = allowed(anything, PADDED)
    assert SPECIAL not in ids
    assert ids.max() < len(VOCABULARY)
    assert anything.mask().shape == (-(-PADDED // 32),)
    assert STOP in ids


def test_without_stop_ids_an_answer_is_finished(grammars: Grammars) -> None:
    """The mask is empty then, and has the width of the vocabulary, though llguidance needs an id more."""
    own = Grammars(VOCABULARY[:256], (), 256)
    constraint = own.compile(Grammar("choice", '["a"]')).result(30)
    assert constraint.mask().shape == (8,)
    constraint.accept(BYTES[b"a"])
    assert constraint.finished
    assert not constraint.mask().any()


def test_a_stop_id_is_part_of_no_grammar() -> None:
    stop = VOCABULARY.index(b"foo")
    own = Grammars(VOCABULARY, {stop}, len(VOCABULARY))
    constraint = own.compile(Grammar("regex", "(foo|b)+")).result(30)
    assert set(allowed(constraint, len(VOCABULARY)).tolist()) == {BYTES[b"f"], BYTES[b"b"]}
    constraint.accept(BYTES[b"b"])
    assert stop in allowed(constraint, len(VOCABULARY))  # as the end


def test_what_the_mask_leaves_out_is_refused(constrain: Callable[[str, Any], Constraint]) -> None:
    constraint = constrain("choice", ["ab"])
    with pytest.raises(GrammarError, match="cannot go on"):
        constraint.accept(BYTES[b"x"])


def _forced_by_hand(constraint: Constraint) -> list[int]:
    """What sampling token by token would have to give: as long as the mask leaves one id."""
    own, out = constraint.copy(), []
    while True:
        ids = allowed(own, PADDED)
        if len(ids) != 1 or ids[0] == STOP:
            return out
        own.accept(int(ids[0]))
        out.append(int(ids[0]))


@pytest.mark.parametrize("seed", range(6))
def test_forced_tokens_are_those_that_sampling_would_have_to_give(
    constrain: Callable[[str, Any], Constraint], seed: int
) -> None:
    draw = random.Random(seed)
    seen = 0
    for schema in (json.loads(WEATHER.text), *handwritten()[:12]):
        constraint = constrain("json_schema", schema)
        for _ in range(30):
            forced = constraint.forced()
            assert forced == _forced_by_hand(constraint)[: len(forced)]
            seen += len(forced)
            ids = [i for i in allowed(constraint, PADDED).tolist() if i != STOP]
            if not ids:
                break
            constraint.accept(forced[0] if forced else draw.choice(ids))
    assert seen > 100


def test_forced_tokens_are_the_tokenizers_own(llama3: Tokenizer, llama3_grammars: Grammars) -> None:
    constraint = llama3_grammars.compile(WEATHER).result(30)
    assert constraint.forced() == llama3.encode('{"city":')
    for token in llama3.encode('{"city": "Oslo"'):
        constraint.accept(token)
    forced = constraint.forced()
    assert len(forced) >= 4
    assert forced == llama3.encode(', "days": 12')[: len(forced)]


def test_rollback_and_copy(constrain: Callable[[str, Any], Constraint]) -> None:
    constraint = constrain("json_schema", json.loads(WEATHER.text))
    whole = spell('{"city": "x", "days": 1}')
    masks = []
    for token in whole:
        masks.append(constraint.mask())
        constraint.accept(token)
    assert constraint.finished
    for back in (1, 3, len(whole)):
        own = constraint.copy()
        own.rollback(back)
        assert not own.finished
        for token, mask in zip(whole[-back:], masks[-back:], strict=True):
            np.testing.assert_array_equal(own.mask(), mask)
            own.accept(token)
        assert own.finished
    assert constraint.finished  # the copies went their own way
    constraint.rollback(0)
    with pytest.raises(GrammarError):
        constraint.rollback(len(whole) + 1)


def test_valid_counts_without_accepting(constrain: Callable[[str, Any], Constraint]) -> None:
    constraint = constrain("choice", ["abc", "abd"])
    before = constraint.mask()
    assert [constraint.valid(spell(text)) for text in ("abc", "abx", "x", "")] == [3, 2, 0, 0]
    np.testing.assert_array_equal(constraint.mask(), before)


def test_a_tokenizer_that_cuts_otherwise_is_not_believed() -> None:
    """llguidance would leave out a forced text that the ids do not spell."""
    for nonsense in ([], [BYTES[b"x"]]):
        own = Grammars(VOCABULARY, {STOP}, PADDED, encode=lambda text, ids=nonsense: ids)
        assert own.compile(Grammar("choice", '["foobarb"]')).result(30).forced() == [
            VOCABULARY.index(b"foobar"),
            BYTES[b"b"],
        ]


def test_a_vocabulary_that_cannot_spell_every_text_is_refused() -> None:
    own = Grammars([token for token in VOCABULARY if token != b"{"], {STOP}, PADDED)
    with pytest.raises(GrammarError, match="no token for the byte 0x7b"):
        own.check(WEATHER)
    with pytest.raises(GrammarError, match="no token for the byte 0x7b"):
        own.compile(WEATHER).result(30)


# Compiling beside the step


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Grammars(VOCABULARY, {STOP}, PADDED, cached=2)
    built: list[str] = []
    build = own._build
    monkeypatch.setattr(own, "_build", lambda spec: (built.append(spec.text), build(spec))[1])
    specs = [Grammar("choice", json.dumps([word])) for word in "abc"]
    first, second = own.compile(specs[0]).result(30), own.compile(specs[0]).result(30)
    first.accept(BYTES[b"a"])
    assert not second.finished
    own.compile(specs[1]).result(30)
    own.compile(specs[0]).result(30)
    assert len(built) == 2
    own.compile(specs[2]).result(30)  # the least recently used goes: specs[1]
    own.compile(specs[0]).result(30)
    assert len(built) == 3
    own.compile(specs[1]).result(30)
    assert len(built) == 4


def test_a_stuck_compile_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Grammars(VOCABULARY, {STOP}, PADDED, seconds=0.2)
    build, release = own._build, threading.Event()

    def stuck(spec: Grammar) -> Any:
        if spec.kind == "regex":
            release.wait(30)
        return build(spec)

    monkeypatch.setattr(own, "_build", stuck)
    hostile = [own.compile(Grammar("regex", "a" * (n + 1))) for n in range(grammar.MAX_STUCK)]
    started = time.monotonic()
    good = own.compile(Grammar("choice", '["a"]'))  # waits for a worker, 0.2 s at most for each pair before it
    assert good.result(10).valid([BYTES[b"a"]]) == 1
    assert time.monotonic() - started < 5
    for future in hostile:
        with pytest.raises(GrammarError, match=r"more than 0\.2 s"):
            future.result(10)
    with pytest.raises(GrammarError, match="4 took too long"):
        own.compile(Grammar("regex", "b")).result(10)
    assert own.compile(Grammar("choice", '["a"]')).result(10)  # what is there already is handed out
    release.set()
    deadline = time.monotonic() + 10
    while own._stuck and time.monotonic() < deadline:
        time.sleep(0.01)
    assert own._stuck == own._running == 0
    own._seconds = 10
    assert own.compile(Grammar("regex", "a")).result(10)  # given up is not kept: now there is time


def test_a_fault_inside_the_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    own = Grammars(VOCABULARY, {STOP}, PADDED)

    def fails(spec: Grammar) -> Any:
        raise Panic("index out of bounds")

    monkeypatch.setattr(own, "_build", fails)
    with pytest.raises(GrammarError, match="index out of bounds"):
        own.compile(WEATHER).result(10)
    assert own._running == 0


def test_a_step_that_takes_too_much_ends_the_answer_soon(constrain: Callable[[str, Any], Constraint]) -> None:
    def go_on() -> None:
        constraint = constrain("lark", 'start: ("a" | b){1,100000}\nb: ("c" | start){1,100000}\n')
        for _ in range(200):
            constraint.accept(next(i for i in allowed(constraint, PADDED).tolist() if i != STOP))

    with pytest.raises(GrammarError, match="cannot go on"):
        go_on()


# Vocabularies


def test_every_tokenizer_of_the_family(reference: Path) -> None:
    folder = reference / "tokenizers"
    files = ["llama2/tokenizer.model", "llama2/tokenizer.json", "llama2/tokenizer.bin"]
    for tokenizer in map(load_tokenizer, (folder / file for file in files)):
        table = token_table(tokenizer)
        own = Grammars(table, tokenizer.stop_ids, len(table), encode=lambda text, of=tokenizer: encode_after(of, text))
        constraint = own.compile(WEATHER).result(30)
        text = b""
        forced = constraint.forced()
        assert [table[i] for i in forced] == [b'{"', b"city", b'":']
        for token in encode_after(tokenizer, '{"city": "Oslo", "days": 12}'):
            constraint.accept(token)
            text += table[token]
        assert text == b'{"city": "Oslo", "days": 12}'
        assert constraint.finished
        assert all(table[i] == b"" for i in tokenizer.special.values())


def test_references_are_not_a_way_to_be_read_many_times() -> None:
    part: dict[str, Any] = {
        "properties": {f"p{i}": {"properties": {f"q{j}": {} for j in range(20)}} for i in range(100)}
    }
    for _ in range(40):
        part = {"anyOf": [part]}
    schema = {"anyOf": [{"$ref": "#/$defs/a" + "/anyOf/0" * i} for i in range(40)], "$defs": {"a": part}}
    with pytest.raises(GrammarError, match="more than 20,000 parts"):
        normalise(json.dumps(schema))


def test_a_pointer_names_an_item_in_one_way() -> None:
    for index in ("00", "0000000001", "٠"):
        with pytest.raises(GrammarError, match="nothing at"):
            normalise(json.dumps({"$ref": f"#/$defs/a/{index}", "$defs": {"a": [{"type": "null"}]}}))
