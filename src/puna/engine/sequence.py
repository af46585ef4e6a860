"""A request and its sequences: what was asked for, and how far each choice of an answer is.

What it is: plain records. The scheduler moves sequences; the engine adds tokens to them.
What it is not: a place for decisions.
What is surprising: one number says what a sequence needs next. `computed` of its `tokens` have keys and values in its
pages; a step computes some or all of the others, and the logits after the last of all give the next token. So a prompt,
a decoded token, forced tokens and a preempted sequence that starts over are one case.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from puna.engine.pictures import Shown, keys
from puna.engine.prefix import Node
from puna.engine.sampler import Draw, Sampler
from puna.engine.speculation import Drafts
from puna.types import Pooling, Sampling

NEVER = 1 << 62
"""`Sequence.wanted` of one that is asked for its next token only."""


class Constraint(Protocol):
    """What a structured answer may say next (see `engine.grammar`)."""

    @property
    def finished(self) -> bool:
        """Nothing may follow but the end."""

    def mask(self) -> npt.NDArray[np.uint32]:
        """A bit for each token that may come next, [ceil(V / 32)]."""

    def accept(self, token: int) -> None:
        """The token became part of the answer."""

    def forced(self) -> list[int]:
        """The tokens that must come next, where there is but one way to go on."""

    def copy(self) -> Constraint:
        """One for another choice that has said the same so far."""


@dataclass(eq=False)
class Request:
    """What was submitted, and the sequences of it that are not finished."""

    number: int
    prompt: int
    """Tokens of the prompt."""
    sampling: Sampling
    stop_ids: frozenset[int]
    namespace: Hashable
    priority: int
    limit: int
    """Tokens of a sequence at most, prompt included."""
    adapter: int = -1
    """Its number at the runner, -1 for none. `namespace` has it too: keys and values differ with it."""
    continuations: tuple[tuple[int, ...], ...] = ()
    """Where answers are given and only their probabilities asked for: choice c is continuation c."""
    pooling: Pooling | None = None
    """How the prompt's hidden states become one vector, where that is all that is asked for."""
    pictures: tuple[Shown, ...] = ()
    """Those that stand in the prompt."""
    live: list[Sequence] = field(default_factory=list)
    forked: bool = False
    """Whether each choice has a sequence of its own; before, the first stands for all."""
    unwanted: set[int] = field(default_factory=set)
    """Choices that were cancelled before that."""

    @property
    def choices(self) -> int:
        """How many answers are made."""
        return self.sampling.best_of or self.sampling.n

    @property
    def logprobs(self) -> bool:
        """Whether its tokens' probabilities are told: asked for, or needed to pick the best answers."""
        return self.sampling.logprobs is not None or self.choices > self.sampling.n


class Sequence:
    """One choice of an answer, its prompt included. Until the prompt is computed there is but choice 0."""

    __slots__ = (
        "_keys", "choice", "computed", "constraint", "depth", "drafts", "goal", "local", "node", "pages", "passed",
        "pooled", "rank", "read", "request", "restarted", "reused", "sampler", "slot", "tokens", "turn", "wanted",
    )  # fmt: skip

    def __init__(
        self, request: Request, choice: int, tokens: list[int], sampler: Sampler, constraint: Constraint | None,
        drafts: Drafts | None,
    ) -> None:  # fmt: skip
        self.request, self.choice, self.tokens = request, choice, tokens
        self.sampler, self.constraint, self.drafts = sampler, constraint, drafts
        self.rank = (-request.priority, request.number, choice)
        """Who goes first: the higher priority, then who came earlier."""
        self.computed = 0
        self.wanted = NEVER
        """From this token on, every token's logits (or hidden state) are wanted, and have not been seen yet."""
        self.read: tuple[Draw, ...] = ()
        """The prompt's tokens whose probabilities are known and not told yet."""
        self.pooled: npt.NDArray[np.float64] | None = None
        """The sum of the hidden states seen so far, or the last one, as the pooling asks."""
        self.goal = 0
        """Until so many tokens are computed it takes turns, as a prompt; from then on each step has it."""
        self.reused = 0
        """Tokens of the prompt that were not computed, for the cache had them."""
        self.restarted = False
        """Whether it was preempted, or forked where nothing could run."""
        self.turn = 0
        """The step that last computed some of its prompt."""
        self.slot = -1
        """Its row in the scheduler's table of pages while it runs, else -1."""
        self.pages: list[int] = []
        self.local: list[int] = []
        """Its pages of layers that see one chunk only: the first `passed` are given back, and stand as NO_PAGE."""
        self.passed = 0
        self.depth = 0
        """How many of its pages, from the first, are in the prefix cache."""
        self.node: Node | None = None
        """The last of those."""
        self._keys: list[int] = keys(tokens, request.pictures) if request.pictures else tokens

    @property
    def keys(self) -> list[int]:
        """What the prefix cache knows its tokens by, of which there are as many (see `engine.pictures`)."""
        if self._keys is not self.tokens:  # beside pictures: what follows them are plain tokens
            self._keys += self.tokens[len(self._keys) :]
        return self._keys

    def shown(self, start: int, end: int) -> list[Shown]:
        """The pictures that its tokens from `start` to `end` are computed with."""
        return [each for each in self.request.pictures if each.needed(start, end)]

    @property
    def shown_still(self) -> list[Shown]:
        """The pictures that its next tokens are computed with, or may be."""
        return self.shown(self.computed, max(self.goal, len(self.tokens)))

    @property
    def running(self) -> bool:
        """Whether it has pages; a sequence that waits has none."""
        return self.slot >= 0

    @property
    def first(self) -> int:
        """Its first token whose logits (or hidden state) are wanted: a cache may not spare its computation."""
        return min(self.wanted, len(self.tokens) - 1)

    def guess(self, most: int, price: float) -> list[int]:
        """Up to `most` tokens that may follow (see `Drafts.propose`); none where nobody guesses."""
        return [] if self.drafts is None else self.drafts.propose(self.tokens, most, price)[:most]

    def judge(self, guesses: int, right: int) -> None:
        """How the guesses did, for those to come."""
        if self.drafts is not None:
            self.drafts.judge(guesses, right)

    def fork(self, choice: int, sampler: Sampler, drafts: Drafts | None) -> Sequence:
        """Another choice with the same tokens; where the scheduler places it, it shares the pages."""
        constraint = None if self.constraint is None else self.constraint.copy()
        twin = Sequence(self.request, choice, list(self.tokens), sampler, constraint, drafts)
        twin.reused, twin.restarted = self.reused, True
        self.request.live.append(twin)
        return twin
