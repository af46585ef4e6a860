"""What is done to a row of logits before anything is drawn from it: bias, penalties, DRY, bars.

What it is: the first two steps of `definitions.distribution`, in place, at a cost that goes by the tokens seen and not
by the vocabulary. Every edit gives back what stood there before, so that the row can be put right again.
What it is not: a copy of a row; a row of 128,256 logits takes longer to copy than to sample from.
What is surprising: how often a token was seen is counted as it comes (`Counts`), but DRY looks for its repeats anew for
each token: the places of one token among all are found at 10 GB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.engine.samplers.definitions import LONGEST_REPEAT, dry_penalty
from puna.types import Sampling

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
Edit = tuple[Row, Ids, npt.NDArray[np.float32]]
"""A row, and what stood at some of its places."""


class History:
    """A sequence's tokens, prompt and answer, one more at a time."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = np.array(prompt, np.int32)
        self.size = self.prompt = len(prompt)

    def append(self, token: int) -> None:
        """One more token."""
        if self.size == self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.zeros(max(64, self.size // 2), np.int32)])
        self._tokens[self.size] = token
        self.size += 1

    def last(self, count: int) -> npt.NDArray[np.int32]:
        """The last `count` tokens, all for 0."""
        return self._tokens[max(0, self.size - count) if count else 0 : self.size]

    def at(self, place: int) -> int:
        """The token at a place."""
        return int(self._tokens[place])

    def copy(self) -> History:
        """One that goes its own way."""
        new = object.__new__(History)
        new._tokens, new.size, new.prompt = self._tokens.copy(), self.size, self.prompt
        return new


class Counts:
    """How often each token stands in the last `reach` ones (0: in all), and how often in the answer's part of them."""

    def __init__(self, history: History, reach: int) -> None:
        self._history, self._reach = history, reach
        ids, counts = np.unique(history.last(reach), return_counts=True)
        self._slots = dict(zip(ids.tolist(), range(ids.size), strict=True))
        self._ids = ids.astype(np.intp)
        self._counts = np.stack([counts, np.zeros_like(counts)])  # in all, in the answer

    def accept(self, token: int) -> None:
        """Count the token that the history got last, and no longer the one that went out of reach."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._ids.size:
            more = max(64, slot // 2)
            self._ids = np.concatenate([self._ids, np.zeros(more, np.intp)])
            self._counts = np.concatenate([self._counts, np.zeros((2, more), self._counts.dtype)], axis=1)
        self._ids[slot] = token
        self._counts[:, slot] += 1
        gone = self._history.size - 1 - self._reach
        if self._reach and gone >= 0:
            slot = self._slots[self._history.at(gone)]
            self._counts[0, slot] -= 1
            if gone >= self._history.prompt:
                self._counts[1, slot] -= 1

    def penalize(self, row: Row, sampling: Sampling) -> Edit:
        """Apply the repetition, presence and frequency penalties to a row."""
        used = len(self._slots)
        ids, (seen, made) = self._ids[:used], self._counts[:, :used]
        before = row[ids]
        after = before.astype(np.float64)
        penalty = sampling.repetition_penalty
        if penalty != 1:
            after = np.where(seen > 0, np.where(after > 0, after / penalty, after * penalty), after)
        after -= sampling.frequency_penalty * made + sampling.presence_penalty * (made > 0)
        row[ids] = after
        return row, ids, before

    def copy(self, history: History) -> Counts:
        """One that goes its own way, over `history`."""
        new = object.__new__(Counts)
        new._history, new._reach = history, self._reach
        new._slots, new._ids, new._counts = self._slots.copy(), self._ids.copy(), self._counts.copy()
        return new


def add(row: Row, ids: Ids, amounts: npt.NDArray[Any]) -> Edit:
    """Add an amount to each of some logits."""
    before = row[ids]
    row[ids] = before + amounts
    return row, ids, before


def bar(row: Row, ids: Ids) -> Edit:
    """Have some tokens never drawn."""
    before = row[ids]
    row[ids] = -np.inf
    return row, ids, before


def undo(edits: list[Edit]) -> None:
    """Put back what stood there before the first of the edits."""
    for row, ids, before in reversed(edits):
        row[ids] = before


def repeats(
    tokens: npt.NDArray[np.int32], sampling: Sampling, breakers: frozenset[int]
) -> tuple[Ids, npt.NDArray[np.float64]]:
    """The tokens that would go on a repeat, each once, and what DRY takes off their logits: `definitions.dry`."""
    nothing = np.zeros(0, np.intp), np.zeros(0)
    if tokens.size < 2:
        return nothing
    last = tokens.size - 1
    places = np.flatnonzero(tokens[:last] == tokens[last])
    lengths = np.zeros(places.size, np.int64)
    for length in range(LONGEST_REPEAT):
        if int(tokens[last - length]) in breakers:
            break
        # Of places that fit so far, those one token further back; all fit at length 0.
        alive = np.flatnonzero(lengths == length)
        alive = alive[places[alive] >= length]
        alive = alive[tokens[places[alive] - length] == tokens[last - length]]
        if not alive.size:
            break
        lengths[alive] += 1
    long = lengths >= sampling.dry_allowed_length
    if not long.any():
        return nothing
    order = np.argsort(lengths[long], kind="stable")[::-1]
    ids, first = np.unique(tokens[places[long][order] + 1], return_index=True)  # the longest of each comes first
    over = lengths[long][order][first] - sampling.dry_allowed_length
    return ids.astype(np.intp), dry_penalty(sampling.dry_multiplier, sampling.dry_base, over)
