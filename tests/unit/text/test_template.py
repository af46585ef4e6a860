"""Chat templates of strangers: the helpers they expect, and the bombs and escapes that must end in an error."""

# ruff: noqa: E501 (templates stand on one line, because their whitespace counts)
from __future__ import annotations

import time
import tracemalloc
from datetime import datetime
from typing import Any

import pytest

from puna.errors import ChatFormatError
from puna.text.template import MAX_TEMPLATE_CHARS, ChatTemplate

NOW = datetime(2024, 7, 26, 12, 30)


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, origin="test").render(variables, input_chars=100, now=NOW)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ {'a': '<é>', 'b': [1, true, none]} | tojson }}", '{"a": "<é>", "b": [1, true, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{% set ns = namespace(x=0) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}", "3"),
        ("{% macro m(a, b='z') %}{{ a }}{{ b }}{% endmacro %}{{ m('y') }}{{ m(1, 2) }}", "yz12"),
        (
            "{% for i in 'abc' %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ loop.cycle('o', 'e') }} {% endfor %}",
            "1False3o 2False3e 3True3o ",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{{ ['a', 'b'] | join('-') }}{{ 'a-b'.split('-')[::-1] | join }}{{ 'x' * 3 ~ 7 % 4 }}", "a-bbaxxx3"),
        ("{% set x %}a{{ 'b' }}{% endset %}{{ x | upper }}{% generation %}!{% endgeneration %}", "AB!"),
        (
            "{{ 'a b'.replace(' ', '_') }}{{ 'aXa' | replace('a', 'bb') }}{{ '%s=%d' | format('k', 3) }}{{ '%s' % 'v' }}",
            "a_bbbXbbk=3v",
        ),
        ("{{ missing is defined }}{{ missing }}{{ x | default('d') }}{{ 3 is in [3] }}", "FalsedTrue"),
        (
            "{{ [{'r': 1}, {'r': 2}] | selectattr('r', 'equalto', 2) | list | length }}{{ ['b', 'a'] | map('upper') | sort | join }}",
            "1AB",
        ),
        ("{{ dict(a=1) | items | list }}{{ 'x\ny' | indent(2) }}", "[('a', 1)]x\n  y"),
    ],
)
def test_what_templates_use(source: str, text: str) -> None:
    assert render(source) == text


def test_raise_exception_reaches_the_user() -> None:
    with pytest.raises(ChatFormatError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert "of test" in caught.value.message
    assert caught.value.remedy


BOMBS = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "long range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "output of the message": "{% for a in range(99999) %}{{ text }}{% endfor %}",
    "repetition": "{{ 'x' * 10 ** 10 }}",
    "repetition of a list": "{{ [1] * 10 ** 10 }}",
    "repetition, other way round": "{{ 10 ** 10 * 'x' }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested tuples": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x }}",
    "nested dicts": "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x }}",
    "comparing nested lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "power": "{{ 9 ** 99999999 }}",
    "squaring": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "replace": "{% set x = 'x' * 4000 %}{{ x.replace('x', x).replace('x', x) }}",
    "replace filter": "{% set x = 'x' * 4000 %}{{ x | replace('x', x) | replace('', x) }}",
    "join": "{% set x = 'x' * 100000 %}{{ range(99999) | join(x) }}",
    "join method": "{% set x = 'x' * 100000 %}{{ x.join('y' * 100000) }}",
    "join of a generator": "{% set x = 'x' * 100000 %}{{ range(99999) | map('string') | join(x) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width after a name": "{{ '%(a)900000000d' % {'a': 1} }}",
    "width after a name, filter": "{{ '%(a)900000000d' | format(a=1) }}",
    "width of the filter": "{{ '%*d' | format(1000000000, 1) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'x' | center(1000000000) }}",
    "zfill": "{{ 'x'.zfill(1000000000) }}",
    "indent": "{{ 'x\nx' | indent(1000000000, true) }}",
    "indent of JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro that doubles": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}x{% endmacro %}{{ m(60) }}",
    "block of text": "{% set x = 'x' * 1000000 %}{% set y %}{% for i in range(90000) %}{{ x }}{% endfor %}{% endset %}",
    "map of lists": "{{ range(99999) | map('string') | map('replace', '', 'x' * 100000) | list }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "cycling slices": "{% set x = 'x' * 1000000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "formatting": "{% set x = 'x' * 1000000 %}{{ '%(a)s' * 100000 % {'a': x} }}",
    "formatting by the filter": "{% set x = 'x' * 1000000 %}{{ ('%(a)s' * 100000) | format(a=x) }}",
    "splitting": "{{ ('x ' * 2000000).split() | length }}",
    "splitting lines": "{{ ('\n' * 4000000).splitlines() | length }}",
    "characters": "{{ ('é' * 4000000) | list | length }}",
    "characters of a generator": "{{ ('é' * 4000000) | select | list | length }}",
    "characters joined": "{{ ('é' * 4000000) | join('') }}",
    "comparisons": "{% set x = 'x' * 1000000 %}{% set y = 'x' * 1000000 %}"
    + "{% if x == y %}{% endif %}" * 200
    + "{{ [0] * 10 ** 9 }}",
    "searches": "{% set x = 'x' * 100000 ~ 'y' %}{% for i in range(99999) %}{% for j in range(99999) %}{% if 'xxxxxxxxy' in text ~ x %}{% endif %}{% endfor %}{% endfor %}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ "
    + "[" * 300
    + "]" * 300
    + " }}{% for a in x recursive %}{{ loop(a) }}{% endfor %}"
    + "{% if 1 %}" * 300,
    "size": "x" * (MAX_TEMPLATE_CHARS + 1),
}

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ (''|attr('__class__')) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__self__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__}'.format_map({}) }}",
    "{{ [1].append(2) }}",
    "{{ {}.update({1: 2}) }}",
    "{{ [1] | map('attr', '__class__') | list }}",
    "{{ ['x'] | map(attribute='__class__') | list }}",
    "{{ self.__init__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ dict.fromkeys(range(9)) }}",
    "{{ (1).bit_length() }}",
    "{{ 'x'.encode() }}",
    "{{ x.y.z }}",
    "{% if %}",
    "{{ 1 / 0 }}",
    "{{ unknown() }}",
    "{{ 'x' | unknown }}",
]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_quickly(name: str) -> None:
    began = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ChatFormatError, match="chat template of test cannot be used"):
            render(BOMBS[name], text="x" * 100)
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_are_refused(source: str) -> None:
    try:
        text = render(source, messages=[])
    except ChatFormatError:
        return
    # An unsafe attribute that is only printed is an undefined value: no text.
    assert text in ("", "[Undefined]"), text


def test_namespaces_do_not_print_what_they_hold() -> None:
    source = "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = [namespace(a=n.x, b=n.x)] %}{% endfor %}"
    assert render(source + "{{ n.x }}") == "[<Namespace>]"


def test_a_template_can_be_used_again_after_a_failure() -> None:
    template = ChatTemplate("{% if bad %}{{ 'x' * 10 ** 10 }}{% endif %}ok", origin="test")
    with pytest.raises(ChatFormatError):
        template.render({"bad": True}, input_chars=0, now=NOW)
    assert template.render({"bad": False}, input_chars=0, now=NOW) == "ok"


def test_long_conversations_are_within_the_limits() -> None:
    """Two thousand messages, and one of four million characters, through a template that slices and copies."""
    source = "{% set messages = messages[1:] %}{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim + '\n' }}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 300} for _ in range(2_000)]
    assert (
        len(ChatTemplate(source, origin="t").render({"messages": messages}, input_chars=600_000, now=NOW))
        == 1_999 * 307
    )
    messages = [{"role": "user", "content": "x" * 4_000_000}] * 2
    assert (
        len(ChatTemplate(source, origin="t").render({"messages": messages}, input_chars=8_000_000, now=NOW))
        == 4_000_007
    )
