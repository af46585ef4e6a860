"""What comes of a request to `puna.LLM`: a `Stream` of text, or a `Job` that gives none.

What it is: the two listeners to whom an LLM hands what its engine's steps made.
What it is not: a thread. A stream that needs more steps its model's engine, and others' requests with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypedDict

from puna.engine.engine import Progress
from puna.errors import PunaError, UsageError
from puna.types import Answer, FinishReason, Timings

if TYPE_CHECKING:
    from puna.text.answer import AnswerText


class About(TypedDict):
    """What an answer says of the model that gave it (see `types.Answer`)."""

    model: str
    kernels: str
    kv_type: str
    notes: tuple[str, ...]


class Job:
    """A request that gives no text: all that was said of it."""

    def __init__(self, request: int, choices: int) -> None:
        self.request = request
        self.seen: list[Progress] = []
        self.error: PunaError | None = None
        self._left = choices

    @property
    def over(self) -> bool:
        """Whether every choice has come to its end."""
        return not self._left

    def arrive(self, progress: Progress) -> None:
        """A step said this of it."""
        self.seen.append(progress)
        self.error = self.error or progress.error
        self._left -= progress.finish is not None or progress.error is not None


class Stream:
    """One answer under way. Iterating gives text as soon as it is certain; closing it early cancels the request."""

    def __init__(
        self,
        pieces: AnswerText,
        prompt: list[int],
        *,
        step: Callable[[], None],
        cancel: Callable[[], None],
        about: Callable[[], About],
    ) -> None:
        """`pieces` makes text of the ids; `step` has the engine compute more, `cancel` ends the request."""
        self._pieces, self._step, self._cancel, self._about = pieces, step, cancel, about
        self.prompt_ids = prompt
        """What the answer follows."""
        self._arrived: deque[Progress] = deque()
        self._ids: list[int] = []
        self._text: list[str] = []
        self._began = time.perf_counter()
        self._first: float | None = None
        self._reused = 0
        self._answer: Answer | None = None
        self.prefilled = 0
        """How many of the prompt's tokens are in the cache so far."""

    def arrive(self, progress: Progress) -> None:
        """A step said this of it; it is looked at when somebody iterates."""
        self._arrived.append(progress)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._answer is None:
            while not self._arrived:
                self._step()
            if piece := self._take(self._arrived.popleft()):
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop here: the answer is what was made so far, finish reason "cancelled". After the end it does nothing."""
        if self._answer is None:
            # What was held back (half a character, the start of a stop string) belongs to what was made.
            self._text.append(self._pieces.finish())
            self._end("cancelled")

    @property
    def open(self) -> bool:
        """Whether more may come."""
        return self._answer is None

    @property
    def answer(self) -> Answer:
        """The finished answer. Raises UsageError before the stream has ended."""
        if self._answer is None:
            raise UsageError("The answer is not finished.", remedy="Iterate over the stream to its end, or close() it.")
        return self._answer

    def _take(self, progress: Progress) -> str:
        """What a step made; the text that becomes certain by it, often none. Raises what ended the request."""
        self.prefilled, self._reused = progress.prefilled, progress.reused
        if progress.error is not None:
            self.close()
            raise progress.error
        if not progress.tokens and progress.finish is None:
            return ""
        self._first = self._first or time.perf_counter()
        piece, used = self._pieces.push(progress.tokens)
        self._ids += progress.tokens[:used]
        finish = "stop" if self._pieces.stopped else progress.finish
        if finish is not None:
            piece += self._pieces.finish()
        self._text.append(piece)
        if finish is not None:
            self._end(finish)
        return piece

    def _end(self, reason: FinishReason) -> None:
        self._cancel()
        now = time.perf_counter()
        prefill, decode = (self._first or now) - self._began, now - (self._first or now)
        made = len(self._ids)
        self._answer = Answer(
            text="".join(self._text),
            token_ids=tuple(self._ids),
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=made,
            finish_reason=reason,
            timings=Timings(
                prefill,
                decode,
                (len(self.prompt_ids) - self._reused) / prefill if prefill > 0 else 0.0,
                (made - 1) / decode if decode > 0 and made > 1 else 0.0,
            ),
            **self._about(),
        )
