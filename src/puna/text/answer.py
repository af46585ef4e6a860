"""An answer's text as its ids arrive: the incremental detokenizer and the stop strings, in one hand.

What it is: ids in, certain text out, and where a stop string ended it.
What it is not: a judge of stop tokens (the engine does not hand those out), or of lengths.
What is surprising: several ids may come at once (speculation, forced tokens), and a stop string may end in the middle
of them; those after it are not part of the answer, and `push` says how many were.
"""

from __future__ import annotations

from collections.abc import Sequence

from puna.text.detokenizer import Detokenizer, StopStrings
from puna.text.tokenizer import Tokenizer


class AnswerText:
    """The text of one answer under way."""

    def __init__(self, tokenizer: Tokenizer, follows: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        """`follows`: the ids that the text continues; none where it is a text of its own."""
        self._detokenizer = Detokenizer(tokenizer, follows)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come; nothing follows it."""
        return self._stops.hit is not None

    @property
    def stopped_by(self) -> str:
        """The stop string that has come; "" where none has."""
        return self._stops.hit or ""

    def push(self, ids: Sequence[int]) -> tuple[str, int]:
        """The text that these ids make certain, often none, and how many of them are part of the answer."""
        text = ""
        for used, token in enumerate(ids):
            if self.stopped:
                return text, used
            text += self._stops.push(self._detokenizer.push(token))
        return text, len(ids)

    def finish(self) -> str:
        """What was held back (half a character, the start of a stop string) and, at the end, belongs to the answer."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
