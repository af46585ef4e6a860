"""How deep a JSON text nests and how many values it has, found out piece by piece before a parser sees it.

What it is: a count over the brackets and commas that stand outside of strings.
What it is not: a parser; a text that is no JSON passes here and is refused there.
What is surprising: it takes pieces as the network cuts them, and lets the event loop go on between them: a body of the
largest size takes a fraction of a second, which no other stream may wait for.
"""

from __future__ import annotations

import asyncio
import re

import numpy as np

from puna.server.problems import RequestError

MAX_VALUES = 2_000_000
"""Values of a body, as its commas count them: a context of a million tokens as ids is half of that, and a parser takes
a tenth of a second for it."""

MAX_THINGS = 100_000
"""Texts, keys, objects and arrays of a body: each may be a fault of its own to who checks the fields, and costs it
microseconds; a conversation has six for each message."""

_PIECE = 64 << 10
# Possessive repeats, and an end that may be missing: one pass over any input, whatever its quotes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)
_END = b'"\0'  # closes a string that goes on, and leaves the zero outside; or else is one itself
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = np.zeros(256, np.int32)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


class Nesting:
    """Refuses a text that nests deeper than `most`, or has more than `MAX_VALUES` values or `MAX_THINGS` that are no
    numbers."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._depth = self._values = self._things = 0
        self._before = b""  # what must stand before the next piece: the begin of a string that goes on

    async def feed(self, data: bytes) -> None:
        """The next piece. Raises RequestError."""
        for at in range(0, len(data), _PIECE):
            self.take(data[at : at + _PIECE])
            if at + _PIECE < len(data):
                await asyncio.sleep(0)

    def take(self, piece: bytes) -> None:
        """The next piece, at once. Raises RequestError."""
        if b"\0" in piece:  # UTF-16 has them, which a JSON parser would take, and this count would misread
            raise RequestError("The body must be JSON in UTF-8.", status=400, code="invalid_json")
        if b'"' in piece or self._before:
            piece = self._before + piece
            escape = b"\\" if (len(piece) - len(piece.rstrip(b"\\"))) % 2 else b""  # it belongs to what comes next
            piece, strings = _STRING.subn(b"", piece.removesuffix(escape) + _END)
            self._things += strings
            self._before = (b'"' if piece.endswith(b"\0") else b"") + escape
        self._values += piece.count(b",")
        if self._values > MAX_VALUES:
            raise RequestError(f"A body has at most {MAX_VALUES} values.", status=413, code="body_too_large")
        brackets = piece.translate(None, _NOT_BRACKETS)
        self._things += len(brackets) // 2
        if self._things > MAX_THINGS:
            raise RequestError(
                f"A body has at most {MAX_THINGS} texts, keys, objects and arrays.", status=413, code="body_too_large"
            )
        if brackets:
            depths = np.cumsum(_STEPS[np.frombuffer(brackets, np.uint8)])
            if self._depth + int(depths.max()) > self._most:
                raise RequestError(
                    f"Objects and arrays of a body are at most {self._most} deep.", status=400, code="body_too_deep"
                )
            self._depth += int(depths[-1])
