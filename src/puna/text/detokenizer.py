"""The incremental detokenizer: ids one at a time in, text out, never half a character; and stop strings on top of it.

What it is: `Detokenizer` (ids to text) and `StopStrings` (text to text, holding back what may become a stop string).
What it is not: the judge of stop tokens; whoever drives the model looks at `Tokenizer.stop_ids` and does not push them.
What is surprising: an answer is decoded as the continuation of its prompt. The space that sentencepiece puts before a
text is taken away only where the prompt holds nothing but special tokens, so an answer keeps its own spacing.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from puna.errors import UsageError
from puna.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes an answer as it is generated.

    All texts that `push` and `flush` return, joined, are what `Tokenizer.decode(prompt + answer)` has after the
    prompt's part; a character whose bytes the prompt began and the answer finished belongs to the answer. Bytes that
    are no UTF-8 become U+FFFD exactly as `bytes.decode(errors="replace")` of the whole would have it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special: bool = False) -> None:
        """prompt_ids: what the answer follows. skip_special: special tokens in the answer give no text."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        special = set(tokenizer.special.values())
        self._started = any(i not in special for i in prompt_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Only a character that is still open matters; UTF-8 has at most 4 bytes, and a token at least one.
        tail, _ = tokenizer.text_bytes(prompt_ids[-4:], started=True, skip_special=skip_special)
        self._decoder.decode(tail)

    def push(self, token_id: int) -> str:
        """The text that this id completes, often empty. Raises TokenizerError for an id outside the vocabulary."""
        data, self._started = self._tokenizer.text_bytes(
            (token_id,), started=self._started, skip_special=self._skip_special
        )
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Passes text through until one of the stop strings appears in it, wherever the borders of the pieces lie.

    Text that may be the beginning of a stop string is held back until that is decided. The stop string that is
    complete first wins; of several complete at the same character, the one that began first. Neither the stop string
    nor anything after it is passed on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises UsageError for an empty stop string, which would end every answer before it began."""
        if any(not stop for stop in stops):
            raise UsageError("A stop string is empty.", remedy="Leave it out, or give it at least one character.")
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found, or None."""

    def push(self, text: str) -> str:
        """The text that can be passed on; after a hit, nothing."""
        if self.hit is not None:
            return ""
        if not self._stops:
            return text
        self._held += text
        # Where each stop string ends for the first time; the earliest end wins, then the longest (it began first).
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            end, _, self.hit = min(ends)
            passed, self._held = self._held[: end - len(self.hit)], ""
            return passed
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        passed, self._held = self._held[:cut], self._held[cut:]
        return passed

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a proper beginning of stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
