"""A draft model: a small model of the same vocabulary guesses what a large one is going to say.

What it is: `DraftModel`, the proposers of an engine, over an engine of its own in which the small model runs.
What it is not: a second way to keep pages. Each guess is a greedy request to the small engine, whose prefix cache has
all that it computed before: what was guessed wrong is left behind there as any other end of a text is.
What is surprising: guesses are greedy whatever the sampling. The large model draws from its own logits and numbers
anyway, so a guess is right when it is what was drawn.
"""

from __future__ import annotations

import time

from puna.engine.engine import Engine
from puna.engine.speculation import Wanted
from puna.types import Sampling


class DraftModel:
    """See speculation.Together. `engine` runs the small model and belongs to this object from now on."""

    FORGET = 0.9

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds = 0.0
        """See speculation.Together."""

    def __call__(self) -> Guessed:
        """See speculation.Together."""
        return Guessed()

    def prepare(self, wanted: list[Wanted]) -> None:
        """See speculation.Together.

        It takes one step of the small engine for each guess, and one more; who is behind by more than that (a long
        prompt that it has not read) has no guesses this time, and what was read of it is kept. Raises what ended a
        request of the small engine.
        """
        engine = self._engine
        before = engine.statistics().computed_tokens
        began = time.perf_counter()
        asked: dict[int, Guessed] = {}
        for proposer, tokens, most, namespace in wanted:
            assert isinstance(proposer, Guessed)
            proposer.after, proposer.tokens = len(tokens), []
            room = engine.capacity - len(tokens)
            if room > 0:
                sampling = Sampling(temperature=0, max_tokens=min(most, room))
                asked[engine.submit(tokens, sampling, namespace=str(namespace))] = proposer
        steps = 0
        longest = max((each.most for each in wanted), default=0)
        while steps <= longest and not engine.idle:
            for report in engine.step():
                if report.error is not None:
                    engine.cancel_all()
                    raise report.error
                asked[report.request].tokens += report.tokens
            steps += 1
        engine.cancel_all()
        made = max((len(each.tokens) for each in asked.values()), default=0)
        read = engine.statistics().computed_tokens - before
        if made and read <= 4 * made * len(asked):  # a prompt that was read here is not what a guess costs
            took = (time.perf_counter() - began) / made
            self.seconds = self.FORGET * self.seconds + (1 - self.FORGET) * took if self.seconds else took

    def check(self) -> None:
        """The books of the small engine; raises AssertionError where they are wrong."""
        assert self._engine.idle, "a guess is still being made"
        self._engine.check()


class Guessed:
    """See speculation.Proposer. The guesses that were made for one sequence."""

    def __init__(self) -> None:
        self.after = 0
        self.tokens: list[int] = []

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """See Proposer."""
        return self.tokens[:most] if len(tokens) == self.after else []
