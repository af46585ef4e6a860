"""Many clients at once: requests arrive, wait, stream their answers; how much is done, and how long each one waits.

What it is: the load that `protocol.serve` puts on an engine in its own process, and the arithmetic of what came of it.
What it is not: HTTP, or dependent on anything but the standard library: peers run it in interpreters without Puna.
What is surprising: waiting is counted from when a request was due, not from when the engine took it: an engine that is
busy when somebody comes lets them wait, and a load that waits politely with it would hide that (Tene's "coordinated
omission"). With a `rate` requests come as a Poisson process, whatever the engine does; without one `clients` ask again
as soon as they are answered.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Serving(Protocol):
    """An engine that answers several requests at once, greedily, without stopping before `new` tokens."""

    def submit(self, prompt: list[int], new: int) -> int:
        """Begin a request; its number."""

    def advance(self) -> dict[int, int]:
        """Compute, or wait for what is computed elsewhere, at most a moment: request → tokens that came."""


@dataclass(frozen=True)
class Load:
    """`requests` prompts of `prompt` tokens, the first `shared` of which are the same in all, answered by `new` tokens.

    `rate` is in requests a second; 0 means `clients` that ask one after another.
    """

    requests: int
    clients: int
    prompt: int
    new: int
    rate: float = 0.0
    shared: int = 0
    seed: int = 0


@dataclass
class _Asked:
    due: float
    times: list[float]
    left: int


def put(
    engine: Serving, load: Load, vocabulary: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Put the load on the engine; its figures (see `figures`). Ids are drawn from `vocabulary`."""
    draw = random.Random(load.seed)
    shared = draw.choices(vocabulary, k=load.shared)
    prompts = [[*shared, *draw.choices(vocabulary, k=load.prompt - load.shared)] for _ in range(load.requests)]
    arrivals = arrivals_of(load.requests, load.rate, draw)
    asked: dict[int, _Asked] = {}
    done: list[_Asked] = []
    sent = 0
    began = clock()
    while len(done) < load.requests:
        now = clock() - began
        while sent < load.requests and (now >= arrivals[sent] if load.rate else len(asked) < load.clients):
            due = arrivals[sent] if load.rate else now
            asked[engine.submit(prompts[sent], load.new)] = _Asked(due, [], load.new)
            sent += 1
        if not asked:
            time.sleep(max(0.0, arrivals[sent] - (clock() - began)))
            continue
        came = engine.advance()
        now = clock() - began
        for request, tokens in came.items():
            one = asked[request]
            one.times += [now] * tokens
            one.left -= tokens
            if one.left <= 0:
                done.append(asked.pop(request))
    return figures(done, load)


def arrivals_of(requests: int, rate: float, draw: random.Random) -> list[float]:
    """When each request is due, in seconds from the first: a Poisson process of `rate` a second; 0: all at once."""
    arrivals = [0.0] * requests
    for i in range(1, requests):
        arrivals[i] = arrivals[i - 1] + (draw.expovariate(rate) if rate else 0.0)
    return arrivals


def spread(values: Sequence[float]) -> dict[str, float]:
    """What a distribution of times looks like: its mean, percentiles and largest; 0 for none."""
    found = {f"p{share}": percentile(values, share) for share in (50, 90, 95, 99)}
    return {"mean": sum(values) / len(values) if values else 0.0, **found, "max": max(values, default=0.0)}


def figures(done: Sequence[_Asked], load: Load) -> dict[str, float]:
    """tokens_per_second: prompts' and answers' over the makespan; first_p50, first_p90: seconds to a first token;
    between_p50, between_p90: seconds between two tokens of one answer (0 for those that come together)."""
    first = [one.times[0] - one.due for one in done]
    between = [b - a for one in done for a, b in zip(one.times, one.times[1:], strict=False)]
    makespan = max(one.times[-1] for one in done) - min(one.due for one in done)
    return {
        "tokens_per_second": load.requests * (load.prompt + load.new) / makespan,
        "requests_per_second": load.requests / makespan,
        "makespan": makespan,
        "first_p50": percentile(first, 50),
        "first_p90": percentile(first, 90),
        "between_p50": percentile(between, 50),
        "between_p90": percentile(between, 90),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` per cent lie, between neighbours by their distance; 0 for none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * share / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
