"""What is asked of given texts: how likely their tokens are, and the vector that stands for them.

What it is: the sequences that ask for it (`scored`, `embedded`), and what the rows of a step tell them. A request that
is answered may ask for its prompt's tokens too (`read_prompt`).
What it is not: a way of its own. They wait, run, share pages and start over as answers do; only nothing is drawn.
What is surprising: given answers of one request share the prompt's pages and its last row, whose logits are for the
first token of each.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Ids
from typing import NamedTuple, get_args

import numpy as np

from puna.engine.runner import Hidden, Logits
from puna.engine.sampler import Draw, Sampler, logprobs
from puna.engine.sequence import NEVER, Request, Sequence
from puna.errors import UsageError
from puna.types import Pooling, Sampling


class Whose(NamedTuple):
    """What of a request says whose it is (see `sequence.Request`)."""

    number: int
    namespace: Hashable
    priority: int
    adapter: int


def check_continuations(continuations: Ids[Ids[int]]) -> None:
    """Raises UsageError for a continuation without tokens, and for none."""
    if not continuations or not all(map(len, continuations)):
        raise UsageError("A continuation has no tokens.", remedy="Give at least one, of one token or more each.")


def check_pooling(pooling: str) -> None:
    """Raises UsageError for an unknown one."""
    if pooling not in get_args(Pooling):
        raise UsageError(f"There is no pooling {pooling!r:.80}.", remedy=f"There are {', '.join(get_args(Pooling))}.")


def scored(prompt: Ids[int], continuations: Ids[Ids[int]], whose: Whose) -> Sequence:
    """The sequence that asks how likely each continuation is; it stands for all until the prompt is computed."""
    sampling = Sampling(temperature=0, n=len(continuations), logprobs=1)
    limit, answers = len(prompt) + max(map(len, continuations)), tuple(map(tuple, continuations))
    request = Request(
        whose.number, len(prompt), sampling, frozenset(), whose.namespace, whose.priority, limit, whose.adapter,
        continuations=answers,
    )  # fmt: skip
    return Sequence(request, 0, list(prompt), Sampler(sampling), None, None)


def embedded(prompt: Ids[int], pooling: Pooling, whose: Whose) -> Sequence:
    """The sequence that asks for a prompt's vector."""
    tokens = list(prompt[:1] if pooling == "cls" else prompt)
    sampling = Sampling(temperature=0)
    request = Request(
        whose.number, len(tokens), sampling, frozenset(), whose.namespace, whose.priority, len(tokens), whose.adapter,
        pooling=pooling,
    )  # fmt: skip
    sequence = Sequence(request, 0, tokens, Sampler(sampling), None, None)
    if pooling == "mean":
        sequence.wanted = 0
    return sequence


def read_prompt(sequence: Sequence, first: int, logits: Logits) -> None:
    """Note how likely a prompt's tokens were, given the logits after those from `first` on. Raises LogitsError."""
    request, end = sequence.request, first + len(logits)
    following = sequence.tokens[first + 1 : min(end + 1, request.prompt)]  # after the last, one is drawn
    sequence.read = _draws(logits[: len(following)], following, request.sampling.prompt_logprobs or 0)
    sequence.wanted = end if end < request.prompt else NEVER


def score(sequence: Sequence, choice: int, first: int, logits: Logits) -> tuple[tuple[Draw, ...], bool]:
    """How likely continuation `choice`'s tokens are, given the logits after the sequence's from `first` on, and whether
    these were its last. Raises LogitsError."""
    request = sequence.request
    given, at = request.continuations[choice], first + 1 - request.prompt
    end = at + len(logits)
    return _draws(logits, given[at:end], 1), end >= len(given)


def pool(sequence: Sequence, end: int, states: Hidden) -> Hidden | None:
    """Add the hidden states of a sequence's tokens up to `end` to what was seen; its vector, once that is all.

    Raises FloatingPointError for a vector that is not numbers.
    """
    mean = sequence.request.pooling == "mean"
    for state in states.astype(np.float64):  # one after another: the sum is then the same however the prompt was cut
        sequence.pooled = sequence.pooled + state if mean and sequence.pooled is not None else state
    if mean and len(states):  # else it starts over, and is not as far as it was
        sequence.wanted = end
    if end < len(sequence.tokens) or sequence.pooled is None:
        return None
    vector: Hidden = (sequence.pooled / (end if mean else 1)).astype(np.float32)
    if not np.isfinite(vector).all():
        raise FloatingPointError("the model's hidden states are not numbers")
    return vector


def _draws(logits: Logits, tokens: Ids[int], top: int) -> tuple[Draw, ...]:
    """What the model gave each of `tokens`, and the `top` likeliest in its place. Raises LogitsError."""
    return tuple(Draw(known.token, known.logprob, known.top) for known in logprobs(logits, tokens, top))
