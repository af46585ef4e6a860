"""JSON schemas made fit for llguidance: what it would ignore is refused, what it would read otherwise is rewritten.

What it is: `normalise`, from the text of a schema to one of a single draft that holds nothing but keywords which
llguidance honours. Every refusal names the keyword by its JSON pointer, and the reason.
What it is not: the compiler, which may still refuse what is left (a `oneOf` whose branches overlap); nor a validator.
What is surprising:
- Drafts are told apart by what a schema says, not by `$schema`: an `items` list is `prefixItems` everywhere, a boolean
  `exclusiveMinimum` means draft 4's. A keyword that a draft does not know yet is honoured all the same, so that an
  instance may be narrower than its draft asks and never wider.
- A keyword that nobody knows is refused. JSON Schema would have it ignored, and a misspelt `maxlength` with it.
- References are followed here, so what a schema does not reach is not looked at.
- A schema that no finite text can satisfy (an object that must hold itself) is refused: a model would write for ever.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from puna.engine.ecma_regex import PatternError, to_rust
from puna.errors import GrammarError

MAX_CHARACTERS = 256 << 10
"""How long a schema's text may be: a hundred times that of a large tool's, and parsed in milliseconds."""

MAX_DEPTH = 64
"""How deep a schema may be nested."""

MAX_REFERENCES = 256
"""How many different places of a schema `$ref` may name."""

MAX_SCHEMAS = 20_000
"""How many schemas, one inside the other or beside it, are read, those again that several references reach: a second's
work, during which every other thread waits for Python's lock half of the time."""

MAX_PROPERTIES = 1000
"""How many keys of an object may be named: each one is left out of what the others' names may be."""

MAX_PATTERNS_AT_ONCE = 8
"""How many expressions one string may have to match, through allOf and $ref. From about 15 on llguidance may take
minutes, and 80 MB a second, to find out whether any string does, and none of its limits ends that."""

EXACT = 1 << 53
"""Numbers are 64-bit floats inside llguidance: whole numbers above this are rounded there in silence."""

ANNOTATIONS = frozenset(
    (
        *("$schema", "$comment", "$defs", "definitions", "$anchor", "$dynamicAnchor", "$recursiveAnchor"),
        *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly"),
    )
)
"""Keywords that say nothing about the text of an instance, and are left out."""

REFUSED: Mapping[str, str] = {
    "not": "a grammar cannot say what a text is not",
    "if": "a grammar cannot look back at what an earlier part was",
    "then": "see if",
    "else": "see if",
    "contains": "which item will be the one is not known while the others are written",
    "minContains": "see contains",
    "maxContains": "see contains",
    "uniqueItems": "a grammar does not remember the items it has seen (false is accepted)",
    "dependencies": "a grammar does not remember the keys it has seen",
    "dependentRequired": "see dependencies",
    "dependentSchemas": "see dependencies",
    "propertyNames": "use patternProperties with additionalProperties false",
    "unevaluatedItems": "use items (true is accepted)",
    "unevaluatedProperties": "use additionalProperties (true is accepted)",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
    "$vocabulary": "a schema of schemas is not a form of data",
    "contentEncoding": "it is not enforced; use pattern",
    "contentMediaType": "it is not enforced",
    "contentSchema": "it is not enforced",
    "nullable": 'it belongs to OpenAPI; use "type": [..., "null"] (false is accepted)',
    "discriminator": "it belongs to OpenAPI; use const in each branch of anyOf",
    "x-guidance": "it would change how llguidance reads the schema",
    "$id": "below the root it would change what a $ref means",
    "id": "below the root it would change what a $ref means",
}
"""Keywords that are refused, and why."""

_ACCEPTED_AS: Mapping[str, bool] = {
    "uniqueItems": False,
    "nullable": False,
    "unevaluatedItems": True,
    "unevaluatedProperties": True,
}
"""Values of refused keywords that ask for nothing."""

IMPLEMENTED = frozenset(
    (
        *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"),
        *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "pattern", "format"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    )
)
"""Keywords that are honoured."""

_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    "(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    f"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"

FORMATS: Mapping[str, str | None] = {
    # llguidance would take a 29 February in any year, and a leap second at any hour (RFC 3339, 5.6 and 5.7).
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    # Labels of at most 63 characters (RFC 1123); that a name has at most 253 is said by maxLength.
    "hostname": None,
    "duration": None,
    "email": None,
    "ipv4": None,
    "ipv6": None,
    "uuid": None,
    "uri": None,
}
"""The formats that are enforced: by our own expression, or by llguidance's."""

_MAX_HOSTNAME = 253

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)  # RFC 6901, 4

_TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_APPLICATORS = ("allOf", "anyOf", "oneOf", "$ref", "enum", "const")
_REMEDY = "Take the keyword out and check the answer yourself, or say it another way; docs/guides/structured-output.md "
_REMEDY += "lists what is honoured."


def normalise(text: str) -> dict[str, Any] | bool:
    """The schema that a text holds, in the words of JSON Schema 2020-12 that llguidance honours.

    Raises GrammarError for what is no schema, what cannot be honoured, and what exceeds the limits above.
    """
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(
            f"The schema has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that are read.",
            remedy="Name what it repeats once in $defs, and leave long descriptions to the prompt.",
        )
    schema = _parse(text)
    return _Rewriter(schema).run()


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError too
        what = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise GrammarError(f"The schema is not JSON: {what:.200}.", remedy="Check it with a JSON validator.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r:.80} stands twice in an object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _refuse(pointer: str, why: str, remedy: str = _REMEDY) -> GrammarError:
    where = pointer if len(pointer) <= 200 else f"{pointer[:100]} … {pointer[-90:]}"
    return GrammarError(f"The schema cannot be honoured at {where or 'its root'}: {why}.", remedy=remedy)


def _step(pointer: str, key: str | int) -> str:
    return f"{pointer}/{str(key).replace('~', '~0').replace('/', '~1')}"


class _Rewriter:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._names: dict[str, str] = {}  # the pointer a $ref names -> its name in the new $defs
        self._waiting: list[str] = []
        self._definitions: dict[str, Any] = {}
        self._read = 0

    def run(self) -> dict[str, Any] | bool:
        schema = self._schema(self._root, "", 0)
        while self._waiting:
            pointer = self._waiting.pop()
            self._definitions[self._names[pointer]] = self._schema(self._resolve(pointer), pointer, 0)
        self._check_ends(schema)
        if self._patterns(schema, {}) > MAX_PATTERNS_AT_ONCE:
            raise _refuse("", f"a string would have to match more than {MAX_PATTERNS_AT_ONCE} patterns at once")
        if isinstance(schema, bool) or not self._definitions:
            return schema
        return schema | {"$defs": self._definitions}

    def _schema(self, schema: Any, pointer: str, depth: int) -> dict[str, Any] | bool:
        self._read += 1
        if self._read > MAX_SCHEMAS:
            raise _refuse(pointer, f"it has more than {MAX_SCHEMAS:,} parts, counted as often as they are referred to")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise _refuse(pointer, f"{json.dumps(schema):.40} is no schema", "A schema is an object, true or false.")
        if depth > MAX_DEPTH:
            raise _refuse(pointer, f"it is nested more than {MAX_DEPTH} deep")
        plain: dict[str, Any] = {}
        applicators: dict[str, Any] = {}
        first = True  # whether plain keywords come first: keys are written in the order in which they are named
        for key, value in schema.items():
            at = _step(pointer, key)
            if key in _APPLICATORS:
                first = first and ("properties" in plain or "properties" not in schema)
                applicators[key] = self._applicator(key, value, at, depth)
            elif key in IMPLEMENTED:
                self._plain(schema, key, value, at, depth, plain)
            elif key == "$schema" and not isinstance(value, str):
                raise _refuse(at, "it is no string")
            elif key in ANNOTATIONS or _ACCEPTED_AS.get(key) is value or (key in ("$id", "id") and not pointer):
                continue
            elif key in REFUSED:
                raise _refuse(at, f"{key} is not supported: {REFUSED[key]}")
            elif not key.startswith("x-"):
                raise _refuse(at, f"{key!r:.60} is no keyword that is known here")
        ours = FORMATS.get(plain.get("format", ""))
        if ours:
            del plain["format"]
            whole = {"pattern": f"^(?:{ours})$"}
            if "pattern" in plain:
                applicators["allOf"] = [*applicators.get("allOf", ()), whole]
            else:
                plain |= whole
        if plain.get("minProperties", 0) > 1:
            if plain["minProperties"] > len(set(plain.get("required", ()))):
                raise _refuse(
                    _step(pointer, "minProperties"),
                    "a grammar does not notice a key that is written twice, so it can ask for one key at most beside "
                    "the required ones",
                )
            del plain["minProperties"]  # the required ones are that many
        return plain | applicators if first else applicators | plain

    def _applicator(self, key: str, value: Any, at: str, depth: int) -> Any:
        if key == "$ref":
            return self._reference(value, at)
        if key == "const":
            _check_constant(value, at)
            return value
        if not isinstance(value, list) or not value:
            raise _refuse(at, "it is no list with something in it")
        if key == "enum":
            for n, item in enumerate(value):
                _check_constant(item, _step(at, n))
            return value
        return [self._schema(item, _step(at, n), depth + 1) for n, item in enumerate(value)]

    def _plain(self, schema: dict[str, Any], key: str, value: Any, at: str, depth: int, new: dict[str, Any]) -> None:
        """Put what a keyword says into the new schema."""
        if key == "type":
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
                raise _refuse(at, f"{json.dumps(value):.60} is none of the types {', '.join(sorted(_TYPES))}")
            new[key] = value
        elif key in ("properties", "patternProperties"):
            if not isinstance(value, dict):
                raise _refuse(at, "it is no object")
            if len(value) > MAX_PROPERTIES:
                raise _refuse(at, f"it names {len(value):,} keys, and {MAX_PROPERTIES:,} may be named")
            named = {name: self._schema(item, _step(at, name), depth + 1) for name, item in value.items()}
            if key == "properties":
                for name in named:
                    _check_text(name, at)
            else:
                named = {_pattern(name, at): item for name, item in named.items()}
                if len(named) < len(value):
                    raise _refuse(at, "two of its patterns mean the same")
            new[key] = named
        elif key == "additionalProperties":
            new[key] = self._schema(value, at, depth + 1)
        elif key in ("prefixItems", "items", "additionalItems"):
            self._items(schema, key, value, at, depth, new)
        elif key == "required":
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise _refuse(at, "it is no list of names")
            for name in value:
                _check_text(name, at)
            new[key] = value
        elif key in _COUNTS:
            count = _number(value, at)
            if count != int(count) or count < 0:
                raise _refuse(at, "it is no whole number of 0 or more")
            new[key] = min(int(count), new.get(key, math.inf)) if key == "maxLength" else int(count)
        elif key == "pattern":
            new[key] = _pattern(value, at)
        elif key == "format":
            _format(value, at, new)
        elif key in ("minimum", "maximum"):
            if schema.get(f"exclusive{key.capitalize()}") is not True:
                new[key] = _number(value, at)
        elif key in ("exclusiveMinimum", "exclusiveMaximum"):
            if value is True:  # draft 4
                beside = key.removeprefix("exclusive").lower()
                if beside not in schema:
                    raise _refuse(at, f"it is true, and there is no {beside}")
                new[key] = _number(schema[beside], _step(at.rpartition("/")[0], beside))
            elif value is not False:
                new[key] = _number(value, at)
        else:
            assert key == "multipleOf"
            new[key] = _number(value, at)
            _check_multiple(new[key], at)

    def _items(self, schema: dict[str, Any], key: str, value: Any, at: str, depth: int, new: dict[str, Any]) -> None:
        lists = isinstance(schema.get("items"), list)
        if key == "prefixItems" or (key == "items" and lists):
            if not isinstance(value, list) or (lists and "prefixItems" in schema):
                raise _refuse(at, "it is no list of schemas, or there are two of them")
            new["prefixItems"] = [self._schema(item, _step(at, n), depth + 1) for n, item in enumerate(value)]
        elif key == "items" or lists:
            new["items"] = self._schema(value, at, depth + 1)

    def _reference(self, value: Any, at: str) -> str:
        root = self._root.get("$id", self._root.get("id")) if isinstance(self._root, dict) else None
        if not isinstance(value, str):
            raise _refuse(at, "it is no string")
        local = value.removeprefix(root.rstrip("#")) if isinstance(root, str) else value
        if local not in ("", "#") and not local.startswith("#/"):
            raise _refuse(
                at, f"{value!r:.80} is no pointer into this schema", 'Copy what it names into $defs: "#/$defs/NAME".'
            )
        pointer = unquote(local.removeprefix("#"))
        if pointer not in self._names:
            if len(self._names) == MAX_REFERENCES:
                raise _refuse(at, f"more than {MAX_REFERENCES} places are named by $ref")
            self._names[pointer] = f"r{len(self._names)}"
            self._resolve(pointer, at)
            self._waiting.append(pointer)
        return f"#/$defs/{self._names[pointer]}"

    def _resolve(self, pointer: str, at: str = "") -> Any:
        found = self._root
        for key in pointer.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and _INDEX.fullmatch(key) and int(key) < len(found):
                found = found[int(key)]
            else:
                raise _refuse(at, f"there is nothing at {pointer!r:.80}")
            if isinstance(found, dict) and isinstance(found.get("$id", found.get("id")), str):
                raise _refuse(at, f"{pointer!r:.80} lies in a schema with an $id, which would change what it means")
        return found

    def _patterns(self, schema: dict[str, Any] | bool, known: dict[str, int]) -> int:
        """How many expressions may meet in one string of an instance, at most."""
        if isinstance(schema, bool):
            return 0
        met = ("pattern" in schema) + ("format" in schema)
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name not in known:
                known[name] = 0  # while it is looked at: what meets itself is refused by llguidance
                known[name] = self._patterns(self._definitions[name], known)
            met += known[name]
        met += sum(self._patterns(item, known) for item in schema.get("allOf", ()))
        parts = [schema[key] for key in ("items", "additionalProperties") if key in schema]
        parts += [item for key in ("properties", "patternProperties") for item in schema.get(key, {}).values()]
        choices = [schema[key] for key in ("anyOf", "oneOf", "prefixItems") if key in schema]
        for group in (parts, *choices):
            met += max((self._patterns(item, known) for item in group), default=0)
        return met

    def _check_ends(self, schema: dict[str, Any] | bool) -> None:
        """Whether some finite instance can be written: a definition ends when it does not need itself in order to."""
        ending: set[str] = set()
        while True:
            new = {name for name, item in self._definitions.items() if name not in ending and _ends(item, ending)}
            if not new:
                break
            ending |= new
        if not _ends(schema, ending):
            raise _refuse("", "no finite text satisfies it: it is false, or needs itself inside of itself")


def _ends(schema: dict[str, Any] | bool, ending: set[str]) -> bool:
    """Whether a schema can be satisfied, as far as references go, by what the definitions in `ending` allow."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].rpartition("/")[2] not in ending:
        return False
    if not all(_ends(item, ending) for item in schema.get("allOf", ())):
        return False
    if not all(any(_ends(item, ending) for item in schema[key]) for key in ("anyOf", "oneOf") if key in schema):
        return False
    if "enum" in schema or "const" in schema:
        return True
    types = schema.get("type", "null")
    names = [types] if isinstance(types, str) else types
    return any(_ENDS[name](schema, ending) if name in _ENDS else True for name in names)


def _object_ends(schema: dict[str, Any], ending: set[str]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    # A name that a pattern may match is taken for one that ends: that is the compiler's to find out.
    rest = True if "patternProperties" in schema else others
    return all(_ends(known.get(name, rest), ending) for name in schema.get("required", ()))


def _array_ends(schema: dict[str, Any], ending: set[str]) -> bool:
    least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    return all(_ends(item, ending) for item in first[:least]) and (
        least <= len(first) or _ends(schema.get("items", True), ending)
    )


_ENDS: dict[str, Callable[[dict[str, Any], set[str]], bool]] = {"object": _object_ends, "array": _array_ends}


def _number(value: Any, at: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _refuse(at, f"{json.dumps(value):.40} is no number")
    if abs(value) > EXACT:
        raise _refuse(at, f"numbers beyond 2^53 are not compared exactly, and {value!r:.40} is one")
    return value


def _check_multiple(value: int | float, at: str) -> None:
    digits = repr(value)
    if value <= 0 or "e" in digits or len(digits.replace(".", "").strip("0")) > 9:
        raise _refuse(at, f"{digits:.40} is not above 0 with at most nine digits and no exponent")


def _check_text(value: str, at: str) -> None:
    """Whether a string can be written in the one way that strings are written in: control characters cannot."""
    for character in value:
        if (
            (character < " " and character not in "\b\f\n\r\t")
            or character == "\x7f"
            or "\ud800" <= character < "\ue000"
        ):
            raise _refuse(at, f"the character U+{ord(character):04X} is never written")


def _check_constant(value: Any, at: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise _refuse(at, f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        _check_text(value, at)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, at)
            _check_constant(item, _step(at, key), depth + 1)
    elif isinstance(value, list):
        for n, item in enumerate(value):
            _check_constant(item, _step(at, n), depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _number(value, at)


def _pattern(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise _refuse(at, f"{json.dumps(value):.40} is no regular expression")
    try:
        return to_rust(value)
    except PatternError as error:
        raise _refuse(at, f"the pattern {value!r:.80} holds {error}") from error


def _format(value: Any, at: str, new: dict[str, Any]) -> None:
    if not isinstance(value, str) or value not in FORMATS:
        raise _refuse(at, f"the format {json.dumps(value):.60} is not enforced (those that are: {', '.join(FORMATS)})")
    if value == "hostname":
        new["maxLength"] = min(new.get("maxLength", _MAX_HOSTNAME), _MAX_HOSTNAME)
    new["format"] = value
