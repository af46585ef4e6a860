"""A command's configuration file: TOML whose keys are the command's flags.

What it is: `read`, from a file to the values of a settings record, and `written`, back to a file.
What it is not: a second list of flags, or defaults: the settings are both.
What is surprising: a value is read strictly: a number is no text, and a text no number. What is unknown is refused by
its name, with the nearest known one.
"""

from __future__ import annotations

import json
import re
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from puna.cli.flags import flag, spelling, suggestion
from puna.errors import UsageError
from puna.settings import Settings, typed_path

LARGEST = 1 << 20
"""Bytes of a file at most: nobody writes more by hand."""

_NOT_IN_FILES = ("config", "print_config", "json", "debug")


def read(settings: type[Settings], path: Path) -> dict[str, Any]:
    """The values that a file gives to fields of a settings record.

    Raises UsageError for a file that cannot be read or is no TOML, for an unknown key, and for a value of another type.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UsageError(f"{path} is larger than {LARGEST} bytes.", remedy="It is no configuration file.")
        found = tomllib.loads(data.decode())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.", remedy="Check --config.") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise UsageError(f"{path} is not TOML: {error}.", remedy="https://toml.io has the format.") from error
    known = {_key(each): each for each in fields(settings) if each.name not in _NOT_IN_FILES}
    types = typing.get_type_hints(settings)
    values: dict[str, Any] = {}
    for key, value in found.items():
        each = known.get(key)
        if each is None:
            raise UsageError(
                f"{path}: there is no setting {key!r:.80}.",
                remedy=suggestion(key.replace("_", "-"), list(known)) or f"The settings are {', '.join(known)}.",
            )
        values[each.name] = _value(f"{path}: {key}", each, types[each.name], value)
    return values


def written(settings: Settings) -> str:
    """The file that says what a record says; `read` gives the same back."""
    lines: list[str] = []
    tables: list[str] = []
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in _NOT_IN_FILES or value is None or value == ():
            continue
        if flag(each).table:
            tables += _table(_key(each), value)
        else:
            lines.append(f"{_key(each)} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _key(each: Field[Any]) -> str:
    return each.name if flag(each).positional else spelling(each).removeprefix("--")


def _value(where: str, each: Field[Any], kind: Any, value: Any) -> Any:
    def wrong(what: str) -> UsageError:
        return UsageError(f"{where} must be {what}, not {value!r:.80}.", remedy="`puna serve --help` says what it is.")

    if flag(each).table:
        if not isinstance(value, dict):
            raise wrong("a table")
        return tuple(_words(where, value))
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise wrong("a list of texts")
        return tuple(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if kind in (int, int | None):
        if type(value) is not int:
            raise wrong("a whole number")
        return value
    if kind in (float, float | None):
        if type(value) not in (int, float):
            raise wrong("a number")
        return float(value)
    if not isinstance(value, str):
        raise wrong("a text")
    if flag(each).choices and value not in flag(each).choices:
        raise wrong(f"one of {', '.join(flag(each).choices)}")
    return typed_path(value) if kind in (Path, Path | None) else value


def _words(where: str, table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The NAME=VALUE words of a table, and the NAME.KEY=VALUE words of tables in it."""
    for name, value in table.items():
        if "=" in name or not name:
            raise UsageError(f"{where}: {name!r:.80} is no name.", remedy="A name is not empty and has no =.")
        if isinstance(value, dict) and not prefix:
            yield from _words(where, value, f"{name}.")
        elif isinstance(value, bool | str | int | float):
            yield f"{prefix}{name}={json.dumps(value) if isinstance(value, bool) else value}"
        else:
            raise UsageError(f"{where}.{prefix}{name} is no text or number.", remedy="Write it as a flag takes it.")


def _table(key: str, words: tuple[str, ...]) -> Iterator[str]:
    """The lines of a table. Of MODEL.KEY=VALUE words each model is a table of its own, since its name has dots."""
    nested: dict[str, list[tuple[str, str]]] = {}
    for word in words:
        left, _, value = word.partition("=")
        of, _, name = left.rpartition(".") if key == "option" else ("", "", left)
        nested.setdefault(of, []).append((name, value))
    for of, pairs in nested.items():
        yield ""
        yield f"[{key}.{_name(of)}]" if of else f"[{key}]"
        yield from (f"{_name(name)} = {_toml(value)}" for name, value in pairs)


def _name(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _toml(text)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # A JSON text is a TOML text, but for DEL, which TOML wants escaped.
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
