"""Reads the catalog's TOML files, Puna's own and a person's, equally strictly.

What it is: `Table`, one TOML table with typed getters that take each key once, and `finish`, which refuses what is
left by name. `read_file` and `read_resource` give the top one.
What it is not: any fact, or any knowledge of which keys there are.
What is surprising: a number must be finite and not negative, because everything that is counted here is.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator
from datetime import date, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from puna.errors import CatalogError

LARGEST = 1 << 20
"""Bytes of a file at most: nobody writes more prices by hand."""

_FORMAT = "docs/guides/choosing.md has the format."


class Table:
    """One table of a file. Each getter takes a key away; `finish` refuses what nobody took."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self._values = dict(values)
        self._known: list[str] = []

    def _take(self, key: str, kinds: tuple[type, ...], what: str, needed: bool) -> Any:
        self._known.append(key)
        if key not in self._values:
            if needed:
                raise CatalogError(f"{self.where}: {key} is missing.", remedy=f"It must be {what}.")
            return None
        value = self._values.pop(key)
        # datetime is a date and bool an int to Python, and neither is one here.
        if type(value) not in kinds:
            raise self.wrong(key, what, value)
        return value

    def wrong(self, key: str, what: str, value: object) -> CatalogError:
        """The error for a key whose value is not `what`."""
        return CatalogError(f"{self.where}: {key} must be {what}, not {value!r:.80}.", remedy=_FORMAT)

    def text(self, key: str, *, one_of: tuple[str, ...] = ()) -> str:
        """A text that must be there and not be empty."""
        value = self._take(key, (str,), "a text", True)
        if not value.strip() or (one_of and value not in one_of):
            raise self.wrong(key, f"one of {', '.join(one_of)}" if one_of else "a text that is not empty", value)
        return str(value)

    def text_or(self, key: str, default: str = "") -> str:
        """A text, or the default."""
        return str(self._take(key, (str,), "a text", False) or default)

    def number(self, key: str) -> float:
        """A finite number of at least 0 that must be there."""
        return self._finite(key, self._take(key, (int, float), "a number", True))

    def number_or_none(self, key: str) -> float | None:
        """A finite number of at least 0, or None."""
        value = self._take(key, (int, float), "a number", False)
        return None if value is None else self._finite(key, value)

    def count_or_none(self, key: str) -> int | None:
        """A whole number of at least 1, or None."""
        value = self._take(key, (int,), "a whole number", False)
        if value is not None and not 1 <= value < 1 << 62:
            raise self.wrong(key, "a whole number of at least 1", value)
        return None if value is None else int(value)

    def truth_or_none(self, key: str) -> bool | None:
        """true, false, or None."""
        value = self._take(key, (bool,), "true or false", False)
        return None if value is None else bool(value)

    def day_or_none(self, key: str) -> date | None:
        """A TOML date (2026-11-24), or None."""
        value = self._take(key, (date,), "a date such as 2026-11-24", False)
        return None if value is None or isinstance(value, datetime) else value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, empty where the key is not there."""
        value = self._take(key, (list,), "a list of texts", False) or []
        if not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of texts", value)
        return tuple(value)

    def tables(self, key: str) -> Iterator[Table]:
        """A list of tables (`[[key]]`), each with its place in the error's words."""
        value = self._take(key, (list,), "a list of tables", False) or []
        for number, item in enumerate(value, 1):
            if not isinstance(item, dict):
                raise self.wrong(key, "a list of tables", value)
            yield Table(f"{self.where}: {key} {number}", item)

    def named(self, key: str) -> Iterator[tuple[str, Table]]:
        """A table of tables (`[key.NAME]`), by name."""
        value = self._take(key, (dict,), "a table of tables", False) or {}
        for name, item in value.items():
            if not isinstance(item, dict):
                raise self.wrong(key, "a table of tables", value)
            yield name, Table(f"{self.where}: {key}.{name}"[:200], item)

    def table_or_none(self, key: str) -> Table | None:
        """One table, or None."""
        value = self._take(key, (dict,), "a table", False)
        return None if value is None else Table(f"{self.where}: {key}", value)

    def numbers(self, key: str) -> dict[str, float]:
        """A table of numbers, by name."""
        value = self._take(key, (dict,), "a table of numbers", False) or {}
        for name, item in value.items():
            if type(item) not in (int, float):
                raise self.wrong(f"{key}.{name}", "a number", item)
        return {name: self._finite(f"{key}.{name}", item) for name, item in value.items()}

    def finish(self) -> None:
        """Raises CatalogError for a key that no getter took, with the nearest one that exists."""
        for key in self._values:
            near = difflib.get_close_matches(key, self._known, n=1, cutoff=0.6)
            remedy = f"Did you mean {near[0]}?" if near else f"The keys here are {', '.join(self._known)}."
            raise CatalogError(f"{self.where}: there is no key {key!r:.80}.", remedy=remedy)

    def _finite(self, key: str, value: float) -> float:
        if not math.isfinite(value) or not 0 <= value < 1e15:
            raise self.wrong(key, "a finite number of at least 0", value)
        return float(value)


def read_resource(name: str) -> Table:
    """A file of Puna's own, beside this one."""
    return _parsed(name, resources.files(__package__).joinpath(name).read_bytes())


def read_file(path: Path) -> Table:
    """A person's file. Raises CatalogError for one that cannot be read, is too large, or is not TOML."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror or error}.", remedy="Check the file.") from error
    if len(data) > LARGEST:
        raise CatalogError(f"{path} is larger than {LARGEST} bytes.", remedy="It is no catalog.")
    return _parsed(str(path), data)


def _parsed(where: str, data: bytes) -> Table:
    try:
        return Table(where, tomllib.loads(data.decode()))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise CatalogError(f"{where} is not TOML: {error}.", remedy="https://toml.io has the format.") from error
