"""Calls of tools in Python's notation as a Lark grammar: `[f(a=1, b="x"), g()]`, as Llama 3.2 to 4 write them.

What it is: `calls_lark`, from the text of a `Grammar` of the kind "pythonic".
What it is not: calls written as JSON; a JSON schema says those.
What is surprising: arguments come in the order in which the schema names them, each once, and a value inside a list or
an object is written as JSON does (true, not True): what reads calls takes both.
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Mapping
from typing import Any

from puna.engine.json_schema import ANNOTATIONS, MAX_CHARACTERS, normalise
from puna.errors import GrammarError

MAX_ARGUMENTS = 100
"""How many arguments a tool may have: each one's schema is read with all that it may refer to."""

_HONOURED = frozenset(("type", "properties", "required", "additionalProperties", *ANNOTATIONS))
_WORDS = {"boolean": '("True" | "False")', "null": '"None"'}


def calls_lark(text: str, style: Mapping[str, Any]) -> str:
    """The Lark grammar of the calls that a text allows: `{"tools": {name: schema}, "many": whether several may be}`.

    style: how llguidance is to write JSON. Raises GrammarError for a schema that cannot be honoured.
    """
    if len(text) > MAX_CHARACTERS:
        raise _no_calls(f"it has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that are read")
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _no_calls(f"it is no JSON ({error!s:.100})") from error
    tools = spec.get("tools") if isinstance(spec, dict) else None
    if not isinstance(tools, dict) or not tools or not isinstance(spec.get("many"), bool) or len(spec) != 2:
        raise _no_calls("it holds something else than tools and many")
    rules = ['start: "[" call (", " call)* "]"' if spec["many"] else 'start: "[" call "]"']
    rules.append("call: " + " | ".join(f"t{n}" for n in range(len(tools))))
    for n, (name, schema) in enumerate(tools.items()):
        rules += _tool(f"t{n}", name, schema, style)
    return "\n".join(rules) + "\n"


def _tool(rule: str, name: str, schema: Any, style: Mapping[str, Any]) -> list[str]:
    """The rules of a call: `rule_n` are its arguments from the n-th on, the first of them without a comma before it,
    `rule_n_c` the same behind another argument."""
    if not isinstance(schema, dict) or schema.get("type", "object") not in ("object", ["object"]):
        raise _refuse(name, "it is no schema of an object")
    for key in schema:
        if key not in _HONOURED and not key.startswith("x-"):
            raise _refuse(name, f"{key} cannot stand beside properties where a call is written as Python writes it")
    named, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(named, dict) or not isinstance(required, list):
        raise _refuse(name, "properties is no object, or required no list")
    if len(named) > MAX_ARGUMENTS:
        raise _refuse(name, f"it has {len(named):,} arguments, and {MAX_ARGUMENTS} may be named")
    if unknown := [key for key in required if key not in named]:
        raise _refuse(name, f"{unknown[0]!r:.60} is required, and not among its properties")
    rules = [f'{rule}: {_quoted(f"{name}(")} {rule}_0 ")"']
    for n, key in enumerate(named):
        if not (isinstance(key, str) and key.isidentifier()) or keyword.iskeyword(key):
            raise _refuse(name, f"{key!r:.60} is no name that an argument may have in Python")
        place = key.replace("~", "~0").replace("/", "~1")
        value = normalise(json.dumps({"$defs": {name: schema}, "$ref": f"#/$defs/{_pointer(name)}/properties/{place}"}))
        plain = (
            named[key].get("type") if isinstance(named[key], dict) and not {"enum", "const"} & set(named[key]) else ""
        )
        written = _WORDS.get(plain if isinstance(plain, str) else "")
        if written is None:
            written = f"%json {json.dumps((value if isinstance(value, dict) else {}) | {'x-guidance': dict(style)})}"
        rules.append(f"{rule}_v{n}: {written}")
        for suffix, comma in (("", ""), ("_c", ", ")):
            here = f"{_quoted(f'{comma}{key}=')} {rule}_v{n} {rule}_{n + 1}_c"
            rules.append(f"{rule}_{n}{suffix}: {here}" + ("" if key in required else f" | {rule}_{n + 1}{suffix}"))
    return [*rules, f'{rule}_{len(named)}: ""', f'{rule}_{len(named)}_c: ""']


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Lark's strings have JSON's escapes


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1").replace("%", "%25")


def _no_calls(why: str) -> GrammarError:
    return GrammarError(
        f"The calls cannot be honoured: {why}.", remedy='Give {"tools": {name: schema, ...}, "many": true}.'
    )


def _refuse(name: str, why: str) -> GrammarError:
    return GrammarError(
        f"Calls of the tool {name!r} cannot be held to its schema: {why}.",
        remedy="Give its arguments as properties of an object, or do not require a call.",
    )
