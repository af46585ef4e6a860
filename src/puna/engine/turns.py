"""Drawing tokens: the logits of a step become what each of its sequences says next.

What it is: a `Turn` for each sequence, and `draw`, which adds tokens to them for as long as guesses turn out right.
What it is not: an end of anything. It notes why a sequence ends, or what went wrong with it; the engine ends it.
What is surprising: one grammar or row of logits that is at fault costs its own sequence alone. It is taken out, and the
others are drawn again, which gives what it would have given: a token is a function of its own logits and numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from puna.engine.progress import explained
from puna.engine.runner import Logits
from puna.engine.sampler import Draw, sample
from puna.engine.sequence import Sequence
from puna.errors import NothingLeftError, PunaError
from puna.types import FinishReason

Mask = npt.NDArray[np.uint32]


class Turn:
    """One sequence while tokens are drawn for it: `row` has its next logits, `right` counts its right guesses."""

    __slots__ = ("draws", "error", "finish", "guesses", "right", "row", "sequence", "tokens")

    def __init__(self, sequence: Sequence, row: int, guesses: list[int]) -> None:
        self.sequence, self.row, self.guesses = sequence, row, guesses
        self.right = 0
        self.tokens: list[int] = []
        self.draws: list[Draw] = []
        self.finish: FinishReason | None = None
        self.error: PunaError | None = None


def draw(turns: list[Turn], logits: Logits) -> None:
    """Draw what comes next for each of the turns, of a step's logits [M, V]."""
    while turns:  # the second round draws after the first guess of those whose first guess was right, and so on
        turns = _round(turns, logits)


def _round(turns: list[Turn], logits: Logits) -> list[Turn]:
    """Draw a token for each and add it to its sequence; returns those that go on, for their guess was right."""
    if not turns:
        return []
    masks: list[Mask | None] = []
    for turn in turns:
        constraint = turn.sequence.constraint
        try:
            masks.append(None if constraint is None else constraint.mask())
        except Exception as error:  # the others do not pay for one grammar
            turn.error = explained(error)
            return _round([turn for turn in turns if turn.error is None], logits)
    rows = [turn.row for turn in turns]
    everything = rows == list(range(len(logits)))
    try:
        draws = sample(logits if everything else logits[rows], [turn.sequence.sampler for turn in turns], masks)
    except Exception as error:  # one that names its row ends that sequence alone
        row: int | None = getattr(error, "row", None)
        for turn in turns if row is None else [turns[row]]:
            turn.error = explained(error, f"After {turn.sequence.computed} tokens {error}.")
        return _round([turn for turn in turns if turn.error is None], logits)
    going = []
    for turn, drawn in zip(turns, draws, strict=True):
        try:
            if _add(turn, drawn):
                going.append(turn)
        except Exception as error:
            turn.error = explained(error)
    return going


def _add(turn: Turn, draw: Draw) -> bool:
    """Add a drawn token, and what a grammar forces after it; whether all were guessed, so that the walk goes on."""
    sequence, constraint = turn.sequence, turn.sequence.constraint
    request = sequence.request
    telling = request.logprobs
    guessed = True
    new = [draw.token]
    for token in new:
        if token in request.stop_ids:
            turn.finish = "stop"
            return False
        sequence.tokens.append(token)
        sequence.sampler.accept(token)
        turn.tokens.append(token)
        if telling:
            turn.draws.append(draw)
        if len(sequence.tokens) == request.limit:
            turn.finish = "context" if request.sampling.max_tokens is None else "length"
            return False
        if constraint is not None:
            constraint.accept(token)
            if constraint.finished:
                if sequence.sampler.made < request.sampling.min_tokens:
                    raise NothingLeftError(
                        f"The answer fulfils its grammar after {sequence.sampler.made} tokens, nothing may follow, and "
                        f"min_tokens asks for {request.sampling.min_tokens}.",
                        remedy="Lower min_tokens, or allow more in the grammar.",
                    )
                turn.finish = "stop"
                return False
            if len(new) == 1 and not telling:  # a token that is not drawn has no probability to tell
                new += constraint.forced()
        guessed = guessed and turn.right < len(turn.guesses) and turn.guesses[turn.right] == token
        if guessed:  # its keys and values are in place, and the next row's logits are those after it
            turn.right += 1
            turn.row += 1
            sequence.computed += 1
    return guessed
