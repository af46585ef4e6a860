"""A pattern means the same after its translation: an engine of ECMA-262 and llguidance take the same strings."""

from __future__ import annotations

import json
import random

import pytest
import regress
from schema_walks import takes

from puna.engine.ecma_regex import PatternError, literal, to_rust, unrolled
from puna.engine.grammar import Grammars
from puna.types import Grammar

VOCABULARY = [b"", *(bytes([i]) for i in range(256))]
BYTES = {token: i for i, token in enumerate(VOCABULARY) if token}

PATTERNS = [
    *(
        "^.$",
        "^a.b$",
        r"^\d$",
        r"^\D$",
        r"^\w+$",
        r"^\W$",
        r"^\s$",
        r"^\S$",
        r"^[\s]$",
        r"^[^\s]$",
        r"^[\S]$",
        r"^[\D1]$",
    ),
    *(
        r"^[^\W]$",
        "^[[a]b]$",
        r"^[\d-z]$",
        "^[a&&b]$",
        "^[a-c~]$",
        "^[-a]$",
        "^[a-]$",
        r"^[\]a]$",
        r"^[^]$",
        "^[a-c-e]$",
        "^a{2}$",
    ),
    *(
        "^a{,2}b$",
        "^a{x$",
        "^a}$",
        "^a]$",
        "a|b$",
        "^(?:a|b)c",
        "(a)(b)?",
        "^(?<n>a)$",
        r"^\/$",
        r"^\x41\u00e9$",
        r"^\t$",
    ),
    *(
        r"^\.\*$",
        r"^[.]$",
        r"^[\b]$",
        r"^\0$",
        r"^a\-b$",
        "^$",
        "^a*?$",
        "^a+b?$",
        "^é$",
        r"^[à-ü]$",
        "#x",
        "^a #b$",
        "^a~$",
    ),
    *(r"^[\x41-\x43]$", r"^[\u00e0-\u00fc]$", r"^[$^.|]$", "^\\u{61}$", "^[#&~-]$", "^(a|)b$", "^\ufeff$", "^[^a]b$"),
]
STRINGS = [
    *(
        "",
        "a",
        "b",
        "ab",
        "ac",
        "abc",
        "aa",
        "aaa",
        "aab",
        "A",
        "C",
        "1",
        "٣",
        "_",
        "é",
        "à",
        "ü",
        "ß",
        " ",
        "\t",
        "\n",
        "\r",
    ),
    *(
        "\u00a0",
        "\u2028",
        "\u2029",
        "\u0085",
        "\ufeff",
        "\u3000",
        "\u180e",
        "\v",
        "-",
        "~",
        "&",
        "[",
        "]",
        "[b]",
        "a]",
        "}",
    ),
    *(
        "a}",
        "a{x",
        "a{,2}b",
        "a&b",
        "a-b",
        ".*",
        "$",
        "^",
        ".",
        "|",
        "/",
        "Aé",
        "#x",
        "a #b",
        "a~",
        "👩",
        "a\nb",
        "axb",
        "e",
        "d",
    ),
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(VOCABULARY, {0}, len(VOCABULARY))


def _agree(grammars: Grammars, pattern: str, strings: list[str]) -> int:
    flags = "u" if r"\u{" in pattern else ""
    other = regress.Regex(pattern, flags)
    constraint = grammars.compile(Grammar("json_schema", json.dumps({"type": "string", "pattern": pattern}))).result(30)
    taken = 0
    for text in strings:
        if any(character < " " and character not in "\b\f\n\r\t" for character in text):
            continue  # such strings are never written
        if ord(max(text, default="a")) > 0xFFFF and flags == "":
            continue  # without the flag u a pattern sees two halves there
        expected = other.find(text) is not None
        taken += expected
        assert takes(constraint, BYTES, json.dumps(text, ensure_ascii=False)) == expected, (
            pattern,
            to_rust(pattern),
            text,
        )
    return taken


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_takes_what_another_engine_takes(grammars: Grammars, pattern: str) -> None:
    if pattern in (r"^[\b]$", r"^\0$"):
        with_control = "\b" if "b" in pattern else "\0"
        assert regress.Regex(pattern).find(with_control) is not None
        assert to_rust(pattern) == ("^[\\x{8}]$" if "b" in pattern else "^\\x{0}$")
        return
    _agree(grammars, pattern, STRINGS)


def test_random_patterns(grammars: Grammars) -> None:
    draw = random.Random(5)
    atoms = [
        "a",
        "b",
        ".",
        r"\d",
        r"\w",
        r"\s",
        r"\S",
        "[ab]",
        "[^a]",
        r"[\s-]",
        "(?:ab)",
        "(a|b)",
        "é",
        r"\-",
        "[a-c]",
    ]
    taken = 0
    for _ in range(150):
        pattern = "".join(draw.choice(atoms) + draw.choice(["", "", "*", "?", "+", "{2}", "{1,3}"]) for _ in range(3))
        pattern = draw.choice(["", "^"]) + pattern + draw.choice(["", "$"])
        strings = ["".join(draw.choices("ab1é \n-c_", k=draw.randrange(6))) for _ in range(12)]
        taken += _agree(grammars, pattern, strings)
    assert taken > 100


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(?=a)",
            "(?!a)b",
            "(?<=a)b",
            "(?<!a)b",
            r"(a)\1",
            r"a\b",
            r"\Ba",
            r"\k<n>",
            "[a",
            "[]",
            "a\\",
            r"\cA",
        ),
        *(r"\ud800", r"\z", r"\A", "(?i)a", "(" * 60 + ")" * 60, "(a{1000}){1000}", r"[a-\d]", r"\q"),
    ],
)
def test_what_cannot_be_said_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        to_rust(pattern)


@pytest.mark.parametrize(
    ("pattern", "atoms"),
    [
        *(("", 0), ("abc", 3), ("(ab{3}){2}", 8), ("a{2,5}", 5), (r"(\d|[^]a]){10}", 20), (r"\x{41}{4}", 4)),
        *(("a*b+", 2), ("(a{10}){10}x", 101), (r"\{5}", 2 + 1), ("(a){3}{3}", 9)),
    ],
)  # fmt: skip
def test_unrolled_counts_atoms(pattern: str, atoms: int) -> None:
    assert unrolled(pattern) == atoms


def test_a_literal_is_itself(grammars: Grammars) -> None:
    text = 'a.b*[c]\\ "é"\n👩#&~-'
    constraint = grammars.compile(Grammar("regex", literal(text))).result(30)
    ids = [BYTES[bytes([byte])] for byte in text.encode()]
    assert constraint.valid(ids) == len(ids)
