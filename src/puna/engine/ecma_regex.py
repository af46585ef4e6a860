"""Patterns of a JSON schema, in the words of the regular expressions that llguidance reads.

What it is: a translator of ECMA-262 regular expressions, which JSON Schema's `pattern` is written in, to the syntax of
Rust's regex crate. Both mean the same strings afterwards.
What it is not: a matcher, or a judge of everything Rust refuses: what passes here may still be too large there.
What is surprising: the two differ without a word of warning. `.` matches a carriage return in one only, `\\d` is any
script's digit in one only, and `[[a]b]` is a class of two characters in one and a class with a text after it in the
other. So every atom is written out: nothing is passed through whose meaning differs.
"""

from __future__ import annotations

import re

MAX_GROUPS = 50
"""How deep groups may be nested: Rust's parser goes down a level a group."""

MAX_UNROLLED = 10_000
"""How many atoms a pattern may have with its counted repetitions written out: `(a{100}){100}`. Ten times that keep
llguidance busy for a second before it gives up, and not while it compiles but while an answer is made."""

_SPACE = r"\t\n\x0B\x0C\r \x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
"""What `\\s` is (ECMA-262, WhiteSpace and LineTerminator)."""

_CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": _SPACE}
_CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
_COUNT = re.compile(r"\{[0-9]+(,[0-9]*)?\}")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_ATOM = re.compile(r"\\[pPxu]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_PROPERTY = re.compile(r"[pP]\{[A-Za-z_]+(=[A-Za-z_]+)?\}")


class PatternError(ValueError):
    """What a pattern holds that cannot be translated."""


def to_rust(pattern: str) -> str:
    """The pattern for the regex crate. Raises PatternError, saying what it is, for what that crate cannot express."""
    if unrolled(pattern) > MAX_UNROLLED + len(pattern):
        raise PatternError(f"repetitions that come to more than {MAX_UNROLLED:,} characters")
    out: list[str] = []
    at = depth = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            written, at = _escape(pattern, at, inside=False)
            out.append(written)
        elif character == "[":
            written, at = _class(pattern, at)
            out.append(written)
        elif character == "(":
            depth += 1
            if depth > MAX_GROUPS:
                raise PatternError(f"groups nested more than {MAX_GROUPS} deep")
            written, at = _group(pattern, at)
            out.append(written)
        elif character == "{":
            count = _COUNT.match(pattern, at)
            out.append(count.group() if count else r"\{")
            at = count.end() if count else at + 1
        else:
            depth -= character == ")"
            out.append({".": r"[^\n\r\x{2028}\x{2029}]", "}": r"\}", "]": r"\]"}.get(character, character))
            at += 1
    return "".join(out)


def unrolled(pattern: str) -> int:
    """How many atoms a pattern has with its counted repetitions written out, `(ab{3}){2}` eight.

    Reads both dialects, and a pattern that is none without complaint: the compiler will have that.
    """
    stack: list[int] = []
    total = last = at = 0
    while at < len(pattern):
        character = pattern[at]
        count = _COUNT.match(pattern, at)
        if character == "(":
            stack.append(total)
            total = last = 0
            at += 1
        elif character == ")" and stack:
            last = total
            total += stack.pop()
            at += 1
        elif count:
            most = max(int(number[:9]) for number in re.findall("[0-9]+", count.group()))
            total += last * max(most - 1, 0)
            last *= max(most, 1)
            at = count.end()
        elif character in "*+?|^$":
            at += 1
        else:
            found = _ATOM.match(pattern, at)
            at = found.end() if found else at + 1
            last = 1
            total += 1
    return total


def literal(text: str) -> str:
    """A pattern that matches a text and nothing else."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):X}}}" for c in text)


def _group(pattern: str, at: int) -> tuple[str, int]:
    if not pattern.startswith("(?", at):
        return "(?:", at + 1  # what a group captured is not asked for
    if pattern.startswith("(?:", at):
        return "(?:", at + 3
    name = re.compile(r"\(\?P?<[A-Za-z_$][A-Za-z0-9_$]*>").match(pattern, at)
    if name:
        return "(?:", name.end()
    around = re.compile(r"\(\?<?[=!]").match(pattern, at)
    raise PatternError(f"{'a lookaround' if around else 'a group'} {pattern[at : at + 4]!r}")


def _escape(pattern: str, at: int, *, inside: bool) -> tuple[str, int]:
    """What the escape at a place is, in a class or outside of one, and where it ends."""
    if at + 1 == len(pattern):
        raise PatternError("a backslash at its end")
    letter = pattern[at + 1]
    if letter.lower() in _CLASSES:
        members = _CLASSES[letter.lower()]
        negated = letter.isupper()
        return (members if inside and not negated else f"[{'^' * negated}{members}]"), at + 2
    if letter in _CONTROLS:
        return literal(_CONTROLS[letter]), at + 2
    if letter == "0" and not pattern[at + 2 : at + 3].isdecimal():
        return r"\x{0}", at + 2
    if letter == "b" and inside:
        return r"\x{8}", at + 2
    hexadecimal = _HEX.match(pattern, at + 1)
    if hexadecimal:
        code = int(next(filter(None, hexadecimal.groups())), 16)
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise PatternError(f"half of a character, {hexadecimal.group()!r}")
        return f"\\x{{{code:X}}}", hexadecimal.end()
    property_ = _PROPERTY.match(pattern, at + 1)
    if property_:
        return "\\" + property_.group(), property_.end()
    if letter.isalnum() or letter == "_":
        what = {"b": "a word border", "B": "a word border", "k": "a reference back"}
        raise PatternError(f"{'a reference back' if letter.isdecimal() else what.get(letter, 'the escape')} \\{letter}")
    return literal(letter), at + 2


def _member(pattern: str, at: int) -> tuple[str, int, bool]:
    """A member of a class, where it ends, and whether it is one character."""
    if pattern[at] != "\\":
        return literal(pattern[at]), at + 1, True
    written, end = _escape(pattern, at, inside=True)
    return written, end, pattern[at + 1] not in "dDwWsSpP"


def _class(pattern: str, at: int) -> tuple[str, int]:
    start = at
    at += 1
    negated = pattern.startswith("^", at)
    at += negated
    members: list[str] = []
    begins = False  # whether the last member is one character, which a range may begin with
    while at < len(pattern) and pattern[at] != "]":
        here = at
        written, at, one = _member(pattern, at)
        if written == literal("-") and pattern[here] == "-" and begins and pattern[at : at + 1] not in ("]", ""):
            written, at, one = _member(pattern, at)
            if not one:
                raise PatternError("a range with a class at its border")
            written, one = f"-{written}", False
        members.append(written)
        begins = one
    if at == len(pattern):
        raise PatternError(f"a class that is not closed, {pattern[start : start + 10]!r}")
    if not members:
        if negated:
            return r"[\x{0}-\x{10FFFF}]", at + 1
        raise PatternError("an empty class, which matches nothing")
    return f"[{'^' * negated}{''.join(members)}]", at + 1
