"""The other end of the pipe: what an engine under measurement is, and the loop in which it answers.

What it is: one JSON object a line on stdin, one a line on stdout, until stdin ends. Requests: `load`, `first`
and `prefill` (a number of tokens; `first` once, `prefill` for a while), `decode` (streams, context, steps), `limits`,
and `clients` (see load.py) of an engine that serves many at once, `counts` of Puna's.
Times are taken here, beside the engine, so that the pipe does not count; only a cold start is timed by the parent.
What it is not: dependent on anything but the standard library: peers run it in interpreters without Puna.
What is surprising: what libraries print on stdout goes to stderr, which keeps stdout for the answers. A prompt is
random and new each time where it is measured (an engine that remembers prompts must compute it), and always the same
where only the decoding after it is measured (an engine that can rewind need not compute it).
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from puna.bench.load import Load, Serving, put

LEAST_SECONDS = 0.3
"""Shorter work is repeated until this time was measured, and the mean is answered: clocks and threads wake up late."""

FIRST_IDS = 300
"""Ids below this are left out of prompts: special tokens and bytes of most vocabularies."""


class Engine(Protocol):
    """One engine with one model. `version` is that of its package; `vocabulary` is known once `load` was called."""

    version: str
    vocabulary: int

    def load(self) -> None:
        """Make the model ready to compute."""

    def prefill(self, prompt: list[int]) -> int:
        """Read a prompt from an empty cache; the likeliest next token."""

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds a step of greedy decoding takes, all prompts in one batch; reading the prompts does not count."""


def serve(engine: Engine | Serving) -> None:
    """Answer requests until stdin ends. What an engine raises is an answer too: `{"error": …}`."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    fresh = random.Random()
    for line in sys.stdin:
        try:
            answer = _answer(engine, json.loads(line), fresh)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(engine: Any, request: dict[str, Any], fresh: random.Random) -> dict[str, Any]:
    def prefill() -> float:
        prompt = _prompt(engine, fresh, request["tokens"])
        began = time.perf_counter()
        engine.prefill(prompt)
        return time.perf_counter() - began

    match request["do"]:
        case "load":
            began = time.perf_counter()
            engine.load()
            return {"seconds": time.perf_counter() - began, "version": engine.version}
        case "first":
            return {"seconds": prefill()}
        case "prefill":
            return {"seconds": _for_a_while(prefill, 1)}
        case "decode":
            streams, steps = request["streams"], request["steps"]
            prompts = [_prompt(engine, random.Random(stream), request["context"]) for stream in range(streams)]
            return {"seconds": _for_a_while(lambda: engine.decode(prompts, steps), steps)}
        case "limits":
            # Only Puna's own engine has this: the machine's limits are measured by its kernels.
            return engine.limits()  # type: ignore[no-any-return]
        case "counts":
            return engine.counts()  # type: ignore[no-any-return]
        case "clients":
            return {"figures": put(engine, Load(**request["load"]), range(_first_id(engine), engine.vocabulary))}
        case other:
            raise ValueError(f"no such request: {other}")


def _for_a_while(measure: Callable[[], float], steps: int) -> float:
    """The mean of what `measure` gives, seconds a step, until it adds up to LEAST_SECONDS."""
    total, times = 0.0, 0
    while total * steps < LEAST_SECONDS:
        total += measure()
        times += 1
    return total / times


def _prompt(engine: Engine, draw: random.Random, tokens: int) -> list[int]:
    return draw.choices(range(_first_id(engine), engine.vocabulary), k=tokens)


def _first_id(engine: Engine) -> int:
    return min(FIRST_IDS, engine.vocabulary // 2)
