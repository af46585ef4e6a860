"""Speculation: tokens guessed before the model says them, so that one step can confirm several.

What it is: who guesses (`Proposer`; prompt lookup is one, `engine.draft` another), and how many guesses pay (`Drafts`,
`StepCost`).
What it is not: a change of the answer. The engine draws every token as it would without a guess, and a guess that is
not what was drawn ends the walk.
What is surprising: the width is arithmetic, not a setting. The j-th guess is right with the chance a^j and gives one
more token; it costs a row. It is worth that as long as it brings more tokens a second than the step does anyway.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

WIDEST = 7
"""Guesses at a time at most. With the token before them they are as many as attention computes the way it computes one
(FEW_TOKENS of kernels/cpu/attention.inl); a ninth would change the logits' last bits, and now and then a greedy answer.
"""
REST = 32
"""Tokens without a guess, after guesses stopped paying, until one more is tried."""


class Proposer(Protocol):
    """Guesses for one sequence."""

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow; from call to call `tokens` only grows."""


class Wanted(NamedTuple):
    """The guesses that one sequence would have in the next step."""

    proposer: Proposer
    tokens: list[int]
    most: int
    namespace: Hashable


@runtime_checkable
class Together(Protocol):
    """Makes proposers whose guesses cost time, and are made for all sequences of a step at once."""

    seconds: float
    """What one more guess for each sequence takes, by those so far."""

    def __call__(self) -> Proposer:
        """The proposer of a new sequence."""

    def prepare(self, wanted: list[Wanted]) -> None:
        """Make the guesses that the proposers are going to be asked for."""


class PromptLookup:
    """Guesses that what followed the last few tokens before follows them again (Saxena 2023, "prompt lookup").

    The longest run of tokens that was seen before counts, and of its places the newest. Nothing is indexed: comparing
    100,000 tokens with one takes NumPy 0.05 ms, and the first look at so many 2 ms, where making an index took 70.
    """

    RUNS = (4, 2)
    """Lengths of the runs it looks for, longest first."""

    def __init__(self) -> None:
        self._ids = np.empty(0, np.int32)
        self._seen = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """See Proposer."""
        count = len(tokens)
        if count > len(self._ids):
            self._ids = np.resize(self._ids, max(2 * count, 1024))
        self._ids[self._seen : count] = tokens[self._seen :]
        self._seen = count
        ids = self._ids[:count]
        # Places behind a run; the run that ends the text has nothing behind it, and must not find itself.
        places = np.flatnonzero(ids[:-1] == ids[-1]) + 1
        best = 0
        for length in range(2, min(max(self.RUNS), count) + 1):
            places = places[places >= length]
            places = places[ids[places - length] == ids[count - length]]
            if not len(places):
                break
            if length in self.RUNS:
                best = int(places[-1])
        return tokens[best : best + most] if best else []


class StepCost:
    """What a row adds to a step, from the steps so far: a line through (rows, seconds), recent ones weighing more."""

    FORGET = 0.98

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        keep = self.FORGET
        self._weight = keep * self._weight + 1
        self._rows = keep * self._rows + rows
        self._seconds = keep * self._seconds + seconds
        self._rows_rows = keep * self._rows_rows + rows * rows
        self._rows_seconds = keep * self._rows_seconds + rows * seconds

    def share(self, rows: int) -> float:
        """The cost of one more row, as a share of a step of `rows`; 1 / WIDEST of it where nothing tells yet."""
        row, step = self._line(rows)
        if row is None:
            return 1 / WIDEST
        return min(max(row / step, 0.0), 1.0) if step > 0 else 1.0

    def seconds(self, rows: int) -> float:
        """What a step of `rows` takes; 0 where nothing tells yet."""
        return max(self._line(rows)[1], 0.0)

    def _line(self, rows: int) -> tuple[float | None, float]:
        """Seconds of a row more (None: all steps had as many), and of a step of `rows`."""
        spread = self._weight * self._rows_rows - self._rows * self._rows
        if spread <= 1e-9 * self._rows_rows:
            return None, self._seconds / self._weight if self._weight else 0.0
        row = (self._weight * self._rows_seconds - self._rows * self._seconds) / spread
        return row, self._seconds / self._weight + row * (rows - self._rows / self._weight)


class Drafts:
    """The guesses for one sequence: as many as pay, by how its earlier ones did."""

    FORGET = 0.8

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self._right, self._wrong = 1.0, 1.0  # one of each to begin with: an even chance
        self._asked_at = 0

    def propose(self, tokens: list[int], most: int, price: float) -> list[int]:
        """Up to `most` guesses; `price` is what a row costs, in tokens that the step makes in the same time."""
        width = min(self.wanted(tokens, price), most)
        if not width:
            return []
        self._asked_at = len(tokens)
        return self.proposer.propose(tokens, width)

    def wanted(self, tokens: list[int], price: float) -> int:
        """How many guesses it is going to make: as many as pay; one, where none has for a while."""
        return self.width(price) or int(len(tokens) - self._asked_at >= REST)

    def width(self, price: float) -> int:
        """How many guesses pay: a^j > price."""
        chance = self._right / (self._right + self._wrong)
        width, worth = 0, chance
        while worth > price and width < WIDEST:
            width, worth = width + 1, worth * chance
        return width

    def judge(self, guesses: int, right: int) -> None:
        """So many of the guesses were right, from the first on."""
        self._right = self.FORGET * self._right + right
        self._wrong = self.FORGET * self._wrong + (right < guesses)
