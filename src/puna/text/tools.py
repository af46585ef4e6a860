"""Tools: the forms in which Meta's models call them, and an answer told apart into its text and its calls.

What it is: `CallForm`, how a model writes a call; `CallParser`, which reads answers as they come; `call_grammar`, the
grammar that holds an answer to a call. Sources: the prompt-format pages of Llama 3.1, 3.2, 3.3 and 4, and the chat
templates that their instruct models came with.
What it is not: rendering (`puna.text.chat`), nor a judge of arguments: what no grammar was asked for is handed on as
the model wrote it.
What is surprising:
- Nothing is evaluated. Values in Python's notation are read by the parser below, which knows literals only.
- A call is known by its tool's name. A JSON object that was asked for, or an example in an explanation, stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from puna.errors import ChatFormatError, GrammarError
from puna.types import Grammar, Tool, ToolCallPiece

MAX_DEPTH = 64
"""How deep arguments and schemas may be nested."""

MAX_NAME = 128
_NAME = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}")


CallKind = Literal["json", "pythonic"]


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call.

    kind "json": `{"name": "f", "parameters": {...}}`, with `key` in place of "parameters", and `"type": "function"`
    before it where `typed`; "pythonic": `[f(a=1), g(b="x")]`. `tag` is the special token that goes before it, `many`
    whether a message may hold several calls, `beside` whether it may hold text too.
    """

    kind: CallKind
    key: str = "parameters"
    typed: bool = False
    tag: str = ""
    many: bool = False
    beside: bool = False

    TAGS: ClassVar[tuple[str, ...]] = ("<|python_tag|>", "<|python_start|>")


def check_name(name: str) -> None:
    """Raises ChatFormatError for a name that no tool may have: it would not come out as it went in."""
    if not _NAME.fullmatch(name):
        raise ChatFormatError(
            f"{name!r:.80} cannot be the name of a tool.",
            remedy=f"Names have letters, digits and any of _ . : / -, and {MAX_NAME} characters at most.",
        )


def json_object(text: str) -> dict[str, Any]:
    """The object that a JSON text holds. Raises ValueError for a text that holds none, or one nested too deeply."""
    try:
        found = json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return found
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def json_text(text: str, what: str) -> str:
    """A JSON text that holds an object, written in the one way in which this package writes it.

    Raises ChatFormatError, naming `what`, for a text that holds none.
    """
    try:
        return json.dumps(json_object(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ChatFormatError(f"{what} is no JSON object: {error!s:.100}.", remedy='Give one, such as "{}".') from error


def python_call(name: str, arguments: dict[str, Any]) -> str:
    """A call in Python's notation: `f(a=1, b="x", c=[True, None])`."""
    return f"{name}({', '.join(f'{key}={python_value(value)}' for key, value in arguments.items())})"


def python_value(value: Any) -> str:
    """A value of JSON's in Python's notation, strings in double quotes as Meta's pages have them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{python_value(key)}: {python_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(python_value, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


# --- grammars --------------------------------------------------------------------------------------------------------

_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_DATA = frozenset(("const", "enum", "default", "example", "examples"))


def call_grammar(form: CallForm, tools: Sequence[Tool], *, many: bool) -> Grammar:
    """The grammar of a call of one of these tools (or, where the form has room and `many` may be, of several), each
    with arguments by its schema. An object whose schema does not speak of other properties has none.

    Raises GrammarError, naming the tool, for a schema that is none of an object.
    """
    schemas = {tool.name: _arguments_schema(tool) for tool in tools}
    if form.kind == "pythonic":
        return Grammar("pythonic", json.dumps({"tools": schemas, "many": many and form.many}, ensure_ascii=False))
    choices = []
    for name in schemas:
        typed = {"type": {"const": "function"}} if form.typed else {}
        properties = {**typed, "name": {"const": name}, form.key: {"$ref": _place(name)}}
        choices.append(
            {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
        )
    schema = choices[0] if len(choices) == 1 else {"anyOf": choices}
    return Grammar("json_schema", json.dumps({**schema, "$defs": schemas}, ensure_ascii=False))


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """A tool's schema, of an object, to stand among the $defs of another under its name."""
    try:
        schema = _rebased(json_object(tool.parameters), _place(tool.name))
    except (ValueError, RecursionError) as error:
        raise _no_schema(tool, f"it is no JSON object ({error!s:.100})") from error
    assert isinstance(schema, dict)
    if schema.setdefault("type", "object") not in ("object", ["object"]):
        raise _no_schema(tool, f"its type is {json.dumps(schema['type']):.40}, and arguments are an object")
    if not set(schema) & {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "enum", "const", "minProperties"}:
        schema.setdefault("additionalProperties", False)
    return schema


def _no_schema(tool: Tool, why: str) -> GrammarError:
    return GrammarError(
        f"Calls of the tool {tool.name!r} cannot be held to its schema: {why}.",
        remedy='Give a JSON schema of an object: {"type": "object", "properties": {...}}.',
    )


def _place(name: str) -> str:
    """Where a tool's schema stands among the $defs, as a $ref says it (RFC 6901, in a fragment)."""
    return "#/$defs/" + name.replace("~", "~0").replace("/", "~1")


def _rebased(schema: Any, place: str) -> Any:
    """A schema whose references into itself still hold where it stands at `place` of another."""
    if isinstance(schema, list):
        return [_rebased(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            found[key] = place + value[1:]
        elif key in _BY_NAME and isinstance(value, dict):
            found[key] = {name: _rebased(item, place) for name, item in value.items()}
        else:
            found[key] = value if key in _DATA else _rebased(value, place)
    return found


# --- answers ---------------------------------------------------------------------------------------------------------

MAX_HEAD = 1024
"""Characters of what may be the beginning of a call; after so many without a decision it is text."""

MAX_VALUE = 1 << 20
"""Characters of an argument in Python's notation, which is read as a whole."""

_SPACE = " \t\r\n"
_BETWEEN = _SPACE + ";,"
_END_TAG = "<|python_end|>"
_CODE = "code_interpreter"

_Reading = Generator[None, str, Any]
_Parts = tuple[tuple[str, ...] | None, ...]


class _Form(NamedTuple):
    """How a call begins: literal parts, each one of several, or None for any space; which of them tells the name."""

    kind: Literal["json", "function", "list", "item", "call"]
    parts: _Parts
    named: int


def new_call_id() -> str:
    """What tells one call from all others."""
    return f"call_{secrets.token_hex(12)}"


class CallParser:
    """Tells an answer apart, as it comes, into its text and its calls of tools.

    What `push` and `finish` give, put together, does not depend on where the answer was cut into pieces. A call stands
    at the beginning of an answer, behind another call, or behind <|python_tag|> or <|python_start|>, in one of Meta's
    forms: `{"name": "f", "parameters": {...}}` (also with "arguments", and with `"type": "function"` first; several
    with `;` or `,` or only space between them), `<function=f>{...}</function>`, `[f(a=1), g(b="x")]`, and behind the
    tag `f.call(a="x")`, or code for a tool of the name code_interpreter. What only looks like one (an unknown name, a
    value that is none) is text, all of it.
    A call is told from when it can be nothing else: where its JSON object begins, or where its first argument in
    Python's notation is whole. What is wrong behind that is part of its arguments, as the model wrote it.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        many: bool = True,
        tagged: bool = False,
        calls: int = 0,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """names: the tools that may be called. many: whether several may; without, `ended` is set behind the first.
        tagged: the prompt ended with the tag that stands before a call. calls: how many there were before."""
        self._names = tuple(sorted(names, key=len, reverse=True))
        self._many = many
        self._new_id = new_id
        self._forms = _forms(self._names)
        self._out: list[str | ToolCallPiece] = []
        self._back: deque[str] = deque()  # characters that are read once more
        self._over = False
        self.calls = calls
        """How many calls there were so far."""
        self._free = False  # whether the next character is text, unless a tag begins with it
        self._doubtful = ""  # what may be the beginning of a call
        self.ended = False
        """Whether there was a call, and no further one may follow: nothing is read any more."""
        self._reading = self._answer(tagged)
        next(self._reading)

    @property
    def undecided(self) -> bool:
        """Whether the last of what was read may be the beginning of a call."""
        return bool(self._doubtful.strip(_BETWEEN))

    def push(self, text: str) -> list[str | ToolCallPiece]:
        """What becomes certain by a piece of the answer: texts, and pieces of calls."""
        at = 0
        while at < len(text) and not self.ended:
            if self._free:  # most of most answers: as it is, as far as a tag may begin
                begin = at
                at = text.find("<", begin)
                at = len(text) if at < 0 else at
                self._out.append(text[begin:at])
            if at < len(text):
                self._free = False
                self._reading.send(text[at])
                at += 1
        return self._taken()

    def finish(self) -> list[str | ToolCallPiece]:
        """What is left at the end of the answer."""
        if not self.ended:
            self._over = True
            self._reading.send("")
        self.ended = True
        return self._taken()

    def _taken(self) -> list[str | ToolCallPiece]:
        """What was told since the last time, in as few pieces as it can be."""
        out: list[str | ToolCallPiece] = []
        parts: list[str] = []

        def close() -> None:
            last = out[-1]
            out[-1] = "".join(parts) if isinstance(last, str) else replace(last, arguments="".join(parts))

        for item in self._out:
            if item == "":
                continue
            last = out[-1] if out else None
            if last is None or type(last) is not type(item) or (isinstance(item, ToolCallPiece) and item.name):
                if out:
                    close()
                out.append(item)
                parts = []
            parts.append(item if isinstance(item, str) else item.arguments)
        if out:
            close()
        self._out = []
        return out

    # What follows reads the answer a character at a time. Each reader is given characters by `_character`, and puts
    # back what others are to read.

    def _character(self) -> _Reading:
        """The next character of the answer; "" for its end."""
        if self._back:
            return self._back.popleft()
        if self._over:
            return ""
        return (yield)

    def _again(self, text: str) -> None:
        self._back.extendleft(reversed(text))

    def _begin(self, name: str) -> None:
        self._doubtful = ""
        self._out.append(ToolCallPiece(self.calls, id=self._new_id(), name=name))
        self.calls += 1

    def _argue(self, text: str) -> None:
        self._out.append(ToolCallPiece(self.calls - 1, arguments=text))

    def _answer(self, tagged: bool) -> _Reading:
        behind = "" if tagged else None  # the tag that was read; None for none, "" for the prompt's
        forms = self._forms["tag" if tagged else "begin"]
        while True:
            if (yield from self._call(forms, behind)):
                if not self._many:
                    self.ended = True
                    yield
                behind, forms = None, self._forms["next"]
                continue
            behind = yield from self._text()
            if not behind:
                yield  # the end
            forms = self._forms["tag"]

    def _text(self) -> _Reading:
        """Text, as far as a tag, which is returned; "" at the end."""
        held = ""
        while True:
            self._free = not held and not self._back
            character = yield from self._character()
            if not character:
                self._out.append(held)
                return ""
            held += character
            if held in CallForm.TAGS:
                return held
            while held and not any(tag.startswith(held) for tag in CallForm.TAGS):
                self._out.append(held[0])
                held = held[1:]

    def _call(self, forms: Sequence[_Form], tag: str | None) -> _Reading:
        """A call, or several of one list; whether there was one, and what follows is behind it."""
        form, name, head = yield from self._head(forms)
        if form is None:
            if forms is self._forms["next"] and not head.strip(_BETWEEN):
                return False  # what separates calls, and none follows
            return (yield from self._no_call(tag, head))
        if form.kind in ("json", "function"):
            yield from self._json(name)
            yield from self._closing("}" if form.kind == "json" else "</function>")
            return True
        while True:
            wrong = yield from self._arguments(name)
            if wrong is not None:
                return (yield from self._no_call(tag, head + wrong))
            if form.kind == "call":
                return True
            if (yield from self._closing("]")):
                yield from self._closing(_END_TAG)
                return True
            if not self._many:
                return True
            tag = None
            form, name, head = yield from self._head(self._forms["item"])
            if form is None:
                return (yield from self._no_call(tag, head))

    def _no_call(self, tag: str | None, text: str) -> _Reading:
        """What was read is no call: code for the interpreter behind its tag, else text. Whether it is a call."""
        if tag is not None and tag != CallForm.TAGS[1] and _CODE in self._names and text.strip():
            self._begin(_CODE)
            self._argue('{"code": "')
            self._again(text)
            while character := (yield from self._character()):
                self._argue(json.dumps(character, ensure_ascii=False)[1:-1])
            self._argue('"}')
            return True
        self._doubtful = ""
        self._out.append(tag or "")
        # A tag may begin in it.
        self._again(text)
        return False

    def _head(self, forms: Sequence[_Form]) -> _Reading:
        """The form, the name and the text of the beginning of a call; None, "" and what was read where it is none."""
        text = ""
        while character := (yield from self._character()):
            text += character
            self._doubtful = text
            undecided = False
            for form in forms:
                name = _match(form, text)
                if name:
                    return form, name, text
                undecided = undecided or name is not None
            if not undecided or len(text) > MAX_HEAD:
                break
        return None, "", text

    def _closing(self, literal: str) -> _Reading:
        """Whether this comes next, perhaps behind space; if not, nothing has been read."""
        text = ""
        while character := (yield from self._character()):
            text += character
            inner = text.lstrip(_SPACE)
            if inner == literal:
                return True
            if not literal.startswith(inner) or len(text) > MAX_HEAD:
                break
        self._again(text)
        return False

    def _json(self, name: str) -> _Reading:
        """A JSON object whose first brace was read, passed on as it is."""
        self._begin(name)
        self._argue("{")
        depth, quoted, escaped = 1, False, False
        while depth and (character := (yield from self._character())):
            self._argue(character)
            if quoted:
                quoted = escaped or character != '"'
                escaped = not escaped and character == "\\"
            elif character == '"':
                quoted = True
            else:
                depth += (character in "{[") - (character in "}]")

    def _arguments(self, name: str) -> _Reading:
        """Arguments in Python's notation behind `name(`, told as JSON; or what was read, where nothing was told."""
        keys: set[str] = set()
        before = ""  # since the last argument that was told

        def wrong(text: str) -> _Reading:
            if not keys:
                return before + text
            self._argue(before + text)
            while character := (yield from self._character()):
                self._argue(character)
            return None

        while True:
            key, character = yield from self._key()
            if character == ")" and not key.strip():
                if not keys:
                    self._begin(name)
                self._argue("}" if keys else "{}")
                return None
            named = key.strip()
            if character != "=" or not named.isidentifier() or named in keys:
                return (yield from wrong(key + character))
            value, character = yield from self._value()
            told = json_value(value) if character in (",", ")") else None
            if told is None:
                return (yield from wrong(f"{key}={value}{character}"))
            if not keys:
                self._begin(name)
            keys.add(named)
            self._argue(f"{'{' if len(keys) == 1 else ', '}{json.dumps(named, ensure_ascii=False)}: {told}")
            if character == ")":
                self._argue("}")
                return None
            before = ","

    def _key(self) -> _Reading:
        """What stands before `=` or `)`, and that; or before what cannot stand in a name, and that."""
        text = ""
        while True:
            character = yield from self._character()
            inner = (text + character).strip()
            if not character or not (inner.isidentifier() or not inner) or len(text) > MAX_HEAD:
                return text, character
            text += character

    def _value(self) -> _Reading:
        """What stands before the `,` or `)` behind a value, and that; "" at the end, and what cannot stand there."""
        text: list[str] = []
        depth, quote, escaped = 0, "", False
        while character := (yield from self._character()):
            if quote:
                if not escaped and character == quote:
                    quote = ""
                escaped = not escaped and character == "\\"
            elif character in "\"'":
                quote = character
            elif character in "([{":
                depth += 1
            elif character in ")]}" and depth:
                depth -= 1
            elif character in ",)]}" and not depth:
                return "".join(text), character
            text.append(character)
            if len(text) > MAX_VALUE:
                break
        return "".join(text), ""


def _forms(names: tuple[str, ...]) -> dict[str, tuple[_Form, ...]]:
    """How calls of these tools begin: at the beginning of an answer, behind a tag, behind a call, and in a list."""
    space, key = None, (('"parameters"', '"arguments"'), None, (":",), None, ("{",))
    named = (('"name"',), space, (":",), space, tuple(f'"{name}"' for name in names), space, (",",), space, *key)
    function = (('"type"',), space, (":",), space, ('"function"',), space, (",",), space)
    begin = (
        _Form("json", (space, ("{",), space, *named), 7),
        _Form("json", (space, ("{",), space, *function, *named), 15),
        _Form("function", (space, ("<function=",), names, (">",), space, ("{",)), 2),
        _Form("list", (space, ("[",), space, names, space, ("(",)), 3),
    )
    between = (space, (";", ",", ""))
    return {
        "begin": begin,
        "tag": (*begin, _Form("call", (space, names, (".call(",)), 1)),
        "next": tuple(_Form(form.kind, (*between, *form.parts), form.named + 2) for form in begin),
        "item": (_Form("item", (space, (",",), space, names, space, ("(",)), 3),),
    }


def _match(form: _Form, text: str) -> str | None:
    """The name where a text is the whole beginning of a call of this form; "" where it may become one; else None."""
    at, name = 0, ""
    for n, part in enumerate(form.parts):
        rest = text[at:]
        if part is None:
            at = len(text) - len(rest.lstrip(_SPACE))
            continue
        for choice in part:  # the longest first
            if rest.startswith(choice):
                at += len(choice)
                name = choice.strip('"') if n == form.named else name
                break
            if choice.startswith(rest):
                return ""
        else:
            return None
    return name


# --- values in Python's notation -------------------------------------------------------------------------------------

_NUMBER = re.compile(r"([+-]?)(?:(\d+(?:_\d+)*)?(?:(\.)(\d+(?:_\d+)*)?)?)(?:[eE]([+-]?\d+))?", re.ASCII)
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_WORD_END = re.compile(r"[A-Za-z]+")
_ESCAPES = {
    "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\n": "", "/": "/",
}  # fmt: skip
_CODES = {"x": 2, "u": 4, "U": 8}
_OCTAL = re.compile(r"[0-7]{1,3}")


def json_value(text: str) -> str | None:
    """A literal in Python's notation, or JSON's, as JSON; None for what is none.

    Strings, numbers, True, False, None, lists, tuples, and dicts whose keys are strings.
    """
    try:
        value, at = _literal(text, _skip(text, 0), 0)
        return value if _skip(text, at) == len(text) else None
    except (_NoValueError, IndexError):
        return None


class _NoValueError(ValueError):
    """A text that is no literal."""


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _literal(text: str, at: int, depth: int) -> tuple[str, int]:
    """A literal that begins here as JSON, and where it ends. Raises _NoValueError, and IndexError at the text's end."""
    first = text[at]
    if first in "\"'":
        value, at = _string(text, at)
        return json.dumps(value, ensure_ascii=False), at
    if first in "[({":
        if depth >= MAX_DEPTH:
            raise _NoValueError
        return _group(text, at, depth)
    word = _WORD_END.match(text, at)
    if word is not None:
        if word[0] not in _WORDS:
            raise _NoValueError
        return _WORDS[word[0]], word.end()
    return _number(text, at)


def _group(text: str, at: int, depth: int) -> tuple[str, int]:
    """A list, a tuple or a dict."""
    end = {"[": "]", "(": ")", "{": "}"}[text[at]]
    items: list[str] = []
    keyed: dict[str, str] = {}
    commas = 0
    at = _skip(text, at + 1)
    while text[at] != end:
        if commas < len(items) + len(keyed) and (items or keyed):
            raise _NoValueError
        if end == "}":
            if text[at] not in "\"'":
                raise _NoValueError
            key, at = _string(text, at)
            at = _skip(text, at)
            if text[at] != ":":
                raise _NoValueError
            value, at = _literal(text, _skip(text, at + 1), depth + 1)
            if key in keyed:
                raise _NoValueError
            keyed[key] = value
        else:
            value, at = _literal(text, at, depth + 1)
            items.append(value)
        at = _skip(text, at)
        if text[at] == ",":
            commas += 1
            at = _skip(text, at + 1)
    at += 1
    if end == "}":
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)}: {v}" for k, v in keyed.items()) + "}", at
    if end == ")" and len(items) == 1 and not commas:
        return items[0], at
    return "[" + ", ".join(items) + "]", at


def _string(text: str, at: int) -> tuple[str, int]:
    """A string in quotes of either kind, and where it ends."""
    quote = text[at]
    at += 1
    parts: list[str] = []
    while text[at] != quote:
        end = at
        while text[end] not in (quote, "\\"):
            end += 1
        parts.append(text[at:end])
        at = end
        if text[at] == "\\":
            kind = text[at + 1]
            octal = _OCTAL.match(text, at + 1)
            if kind in _CODES:
                digits = text[at + 2 : at + 2 + _CODES[kind]]
                if len(digits) < _CODES[kind] or not re.fullmatch("[0-9a-fA-F]+", digits) or int(digits, 16) > 0x10FFFF:
                    raise _NoValueError
                parts.append(chr(int(digits, 16)))
                at += 2 + _CODES[kind]
            elif octal is not None:
                parts.append(chr(int(octal[0], 8)))
                at = octal.end()
            else:
                parts.append(_ESCAPES.get(kind, "\\" + kind))  # as Python has it
                at += 2
    value = "".join(parts)
    if any("\ud800" <= character <= "\udfff" for character in value):  # two halves of a character, as JSON writes it
        try:
            value = value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise _NoValueError from error
    return value, at + 1


def _number(text: str, at: int) -> tuple[str, int]:
    found = _NUMBER.match(text, at)
    assert found is not None  # it matches nothing at all too
    sign, whole, point, part, power = found.groups()
    if whole is None and part is None:
        raise _NoValueError
    digits = (whole or "0").replace("_", "")
    if point is None and power is None and len(digits) > 1 and digits[0] == "0":
        raise _NoValueError
    digits = digits.lstrip("0") or "0"
    value = ("-" if sign == "-" else "") + digits
    if point is not None:
        value += "." + (part or "0").replace("_", "")
    return value + (f"e{power}" if power is not None else ""), found.end()
