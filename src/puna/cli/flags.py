"""From a settings record to a command-line parser, and from what was typed back to a record.

What it is: the one place that turns `puna.settings` into argparse. Every command is parsed by the same few lines.
What it is not: a list of flags; those are the fields of the settings.
What is surprising: options and positionals may be mixed in any order (`puna run M --raw ""`), which argparse alone gets
wrong for optional positionals. So argparse reads the options, and the words it leaves are dealt out here. After `--`
every word is a positional.
"""

from __future__ import annotations

import argparse
import difflib
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from puna.errors import UsageError
from puna.settings import Flag, Settings, typed_path

S = TypeVar("S", bound=Settings)


class HelpWanted(Exception):  # noqa: N818 - a request that was heard, not an error
    """`--help` was among the arguments; the text is the message."""


class _Parser(argparse.ArgumentParser):
    def _parse_optional(self, arg_string: str) -> Any:
        """A text with spaces that begins with a dash is a text, also where argparse sees a short flag (`-h`) in it."""
        text = " " in arg_string and not arg_string.startswith("--")
        return None if text else super()._parse_optional(arg_string)

    def error(self, message: str) -> NoReturn:
        """A UsageError in place of argparse's exit."""
        raise UsageError(_sentence(message.removeprefix("argument ")), remedy=f"`{self.prog} --help` shows the flags.")


def read(settings: type[S], arguments: Sequence[str]) -> S:
    """The record that the arguments after the command's name stand for.

    Raises UsageError for what is unknown, missing, too many or of the wrong type; HelpWanted for `--help`.
    """
    head, tail = _split(list(arguments))
    parser = _parser(settings, positionals=False)
    found, rest = parser.parse_known_args(head)
    if found.help:
        raise HelpWanted(help_text(settings))
    words = []
    for word in rest:
        if _looks_like_a_flag(word):
            raise _unknown(settings, word)
        words.append(word)
    words += tail
    values = {name: value for name, value in vars(found).items() if name != "help"}
    places = [each for each in fields(settings) if flag(each).positional]
    rest_to = places[-1].name if places and places[-1].default == () else None  # the last takes all that are left
    if len(words) > len(places) and rest_to is None:
        extra = words[len(places)]
        raise UsageError(
            f"puna {settings.command}: {_shown(extra)} is one argument too many.",
            remedy="Put a text of several words between quotes." if places else usage(settings),
        )
    values |= {each.name: word for each, word in zip(places, words, strict=False)}
    if rest_to in values:
        values[rest_to] = tuple(words[len(places) - 1 :])
    if values.get("config") is not None:
        from puna.cli import config_file

        typed = {name: value for name, value in values.items() if value is not None}
        values = config_file.read(settings, values["config"]) | typed
    missing = [spelling(each) for each in fields(settings) if flag(each).required and values.get(each.name) is None]
    if missing:
        raise UsageError(f"puna {settings.command} needs {' and '.join(missing)}.", remedy=usage(settings))
    for each in places:
        if (choices := flag(each).choices) and values[each.name] not in choices:
            said = f"{spelling(each)} must be one of {', '.join(choices)}, not {_shown(values[each.name])}."
            raise UsageError(said, remedy=usage(settings))
        # An empty name would be taken for the current folder, as an empty path is.
        if flag(each).required and values[each.name] == "":
            raise UsageError(f'{spelling(each)} is empty: ""', remedy=usage(settings))
    return settings(**{name: value for name, value in values.items() if value is not None})


def ordered(settings: type[Settings]) -> list[Field[Any]]:
    """A command's fields as people read them: positionals, its own options, then those every command has."""
    shared = {each.name for each in fields(Settings)}
    return sorted(fields(settings), key=lambda each: (not flag(each).positional, each.name in shared))


def flag(each: Field[Any]) -> Flag:
    """The command-line side of a settings field."""
    found: Flag = each.metadata["flag"]
    return found


def spelling(each: Field[Any]) -> str:
    """What a person types for a field: `--max-tokens`, or a positional's metavar."""
    return flag(each).metavar if flag(each).positional else "--" + (flag(each).typed or each.name.replace("_", "-"))


def value_name(each: Field[Any]) -> str:
    """What stands for a field's value in help: `N`, `auto|fp32`, or nothing for a switch."""
    return "|".join(flag(each).choices) or flag(each).metavar


def usage(settings: type[Settings]) -> str:
    """The line `Usage: puna run [MODEL] [PROMPT] [options]`; what must be given stands without brackets."""
    parts = [f"Usage: puna {settings.command}"]
    for each in ordered(settings):
        if flag(each).positional:
            more = " ..." if each.default == () else ""
            parts.append(spelling(each) if flag(each).required else f"[{spelling(each)}{more}]")
        elif flag(each).required:
            parts.append(f"{spelling(each)} {value_name(each)}")
    return " ".join([*parts, "[options]"])


def help_text(settings: type[Settings]) -> str:
    """What `puna COMMAND --help` prints."""
    return _parser(settings, positionals=True).format_help().rstrip("\n")


def description(settings: type[Settings]) -> str:
    """A command's own words, from its settings' docstring."""
    first, _, rest = (settings.__doc__ or "").partition("\n")
    lines = [line.removeprefix("    ") for line in rest.splitlines()]
    return "\n".join([first, *lines]).strip()


def summary(settings: type[Settings]) -> str:
    """The first line of a command's own words, without its full stop."""
    return description(settings).partition("\n")[0].removesuffix(".")


def value(name: str, kind: Any, word: str, remedy: str) -> Any:
    """A word as a value of a field's type; `none` is what switches an optional one off.

    Raises UsageError, with the `remedy`, for a word that is none.
    """
    if kind == tuple[str, ...]:
        return () if word == "none" else (word,)
    if word == "none" and kind == int | None:
        return None
    try:
        return _reader(kind)(word)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name} {error}.", remedy=remedy) from error


def suggestion(word: str, known: Sequence[str]) -> str:
    """`Did you mean …?` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {near[0]}?" if near else ""


def _parser(settings: type[Settings], *, positionals: bool) -> _Parser:
    parser = _Parser(
        prog=f"puna {settings.command}",
        usage=usage(settings).removeprefix("Usage: "),
        description=description(settings),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        add_help=False,
        allow_abbrev=False,
    )
    types = typing.get_type_hints(settings)
    for each in ordered(settings):
        if flag(each).positional and positionals:
            parser.add_argument(each.name, metavar=flag(each).metavar, help=flag(each).help, nargs="?")
        elif not flag(each).positional:
            _add(parser, each, types[each.name])
    parser.add_argument("--help", "-h", action="store_true", help="show this text")
    return parser


def _add(parser: argparse.ArgumentParser, each: Field[Any], kind: Any) -> None:
    """One option; a flag that is not given leaves None, so that the record's own default holds."""
    names = [name for name in (spelling(each), flag(each).short) if name]
    if kind is bool:
        parser.add_argument(*names, dest=each.name, action="store_true", default=None, help=flag(each).help)
        return
    shown = "" if each.default in (None, (), MISSING) else f" (default: {each.default})"
    parser.add_argument(
        *names,
        dest=each.name,
        action=_Append if kind == tuple[str, ...] else _Once,
        type=_choice(flag(each).choices) if flag(each).choices else _reader(kind),
        metavar=value_name(each),
        help=(flag(each).help + shown).replace("%", "%%"),
    )


class _Once(argparse.Action):
    """Stores a value; a second one would silently win, so it is refused."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "is given twice")
        setattr(namespace, self.dest, values)


class _Append(argparse.Action):
    """Collects the values of a flag that may be repeated."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), values))


def _reader(kind: Any) -> Callable[[str], Any]:
    """What turns a word into a value of a field's type."""
    if kind in (int, int | None):
        return _number(int, "a whole number")
    if kind in (float, float | None):
        return _number(float, "a number")
    if kind in (Path, Path | None):
        return typed_path
    return str


def _number(kind: Callable[[str], Any], name: str) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {name}, not {_shown(word)}") from None

    return convert


def _choice(choices: tuple[str, ...]) -> Callable[[str], str]:
    def convert(word: str) -> str:
        if word not in choices:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(choices)}, not {_shown(word)}")
        return word

    return convert


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and after it."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _looks_like_a_flag(word: str) -> bool:
    """A dash alone is stdin, and a text with spaces that begins with a dash is a text."""
    return word.startswith("-") and word != "-" and " " not in word and not word[1:2].isdigit()


def _unknown(settings: type[Settings], word: str) -> UsageError:
    known = [name for each in fields(settings) if not flag(each).positional for name in (spelling(each),)]
    name = word.partition("=")[0]
    near = suggestion(name, [*known, "--help"])
    if name in known:
        return UsageError(f"puna {settings.command}: {name} takes no value.", remedy=usage(settings))
    return UsageError(
        f"puna {settings.command} has no flag {_shown(name)}.",
        remedy=near
        or f"`puna {settings.command} --help` shows the flags. A text that begins with a dash goes after --.",
    )


def _shown(word: str) -> str:
    return repr(word if len(word) <= 60 else word[:57] + "...")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
