"""The kinds of work that are measured, and the least time this machine could take for each.

What it is: a table, and what `forecast`'s arithmetic says of each: bytes and operations.
What it is not: a measurement.
What is surprising: the limit is that of the model as stored, whoever runs it. A peer that holds the weights in fewer
bytes could exceed it. Of a mixture it counts the experts that so many tokens choose at random, on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from puna import forecast
from puna.errors import UsageError
from puna.models.config import DecoderConfig
from puna.models.registry import definition


@dataclass(frozen=True)
class Work:
    """`tokens` new tokens for each of `streams` sequences that hold `context` already; `steps` times for a figure."""

    name: str
    unit: str
    kind: str
    """What is asked of an engine: `prefill`, `decode`, or `start` (a fresh process)."""
    tokens: int = 1
    streams: int = 1
    context: int = 0
    steps: int = 1

    @property
    def positions(self) -> int:
        """The longest sequence it takes."""
        return self.context + self.tokens * self.steps

    def shown(self, seconds: float) -> float:
        """A figure in `unit`: tokens a second over all streams, or what was measured as it is."""
        return self.tokens * self.streams / seconds if self.unit == "tokens/s" else seconds


START_PROMPT = 16
"""Tokens of the prompt of a cold start."""

DECODE_CONTEXT, DECODE_STEPS = 128, 32

QUICK = (
    Work("decode", "tokens/s", "decode", context=DECODE_CONTEXT, steps=DECODE_STEPS),
    Work("prefill_512", "tokens/s", "prefill", tokens=512),
    Work("decode_8_streams", "tokens/s", "decode", streams=8, context=DECODE_CONTEXT, steps=8),
)
FULL = (
    Work("prefill_2048", "tokens/s", "prefill", tokens=2048),
    Work("decode_at_8192", "tokens/s", "decode", context=8192, steps=8),
)
STARTS = (
    Work("load", "s", "start"),
    Work("first_token", "s", "start", tokens=START_PROMPT),
    Work("cold_start", "s", "start", tokens=START_PROMPT),
    Work("peak_memory", "MB", "start", tokens=START_PROMPT),
)
"""Measured together, each time in a fresh process: load the model, answer a prompt of 16 tokens (a cold start is both,
from the start of the process), then do the first two of QUICK, after which the peak of memory is taken."""

ALL = (*QUICK, *FULL, *STARTS)


def chosen(only: str | None, full: bool) -> list[Work]:
    """The works that `--only` names, else the quick ones, and the long ones where `full`. Raises UsageError."""
    if only is None:
        return [work for work in ALL if full or work not in FULL]
    names = [word.strip() for word in only.split(",")]
    known = [work.name for work in ALL]
    for name in names:
        if name not in known:
            raise UsageError(f"--only {name}: no such work.", remedy=f"Some of: {','.join(known)}.")
    return [work for work in ALL if work.name in names]


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs: the config, bytes of each parameter, how numbers are multiplied."""

    config: DecoderConfig
    sizes: Mapping[str, int]
    """Canonical name → bytes as stored."""
    products: str
    """`int8`, `bf16` or `fp32`: the kind of product that weights of this type take at best."""
    kv_type: str
    """How the cache keeps numbers, a key of `forecast.KV_KINDS`."""


def bytes_read(work: Work, model: Model) -> float:
    """Bytes that a step must read: each matrix once (of experts those chosen), and the cache of every stream."""
    cache = work.streams * forecast.cache_bytes(model.config, model.kv_type, work.context, 1)
    return forecast.bytes_read(model.config, model.sizes, work.tokens * work.streams, cache)


def operations(work: Work, model: Model) -> int:
    """Operations of a step; a prefill is one step."""
    shapes = definition(model.config).shapes(model.config)
    return forecast.operations(model.config, shapes, work.tokens, work.context, work.streams)


def least_seconds(work: Work, model: Model, limits: Mapping[str, float]) -> tuple[float, str] | None:
    """The least time a step could take here, and whether `memory` or `arithmetic` sets it; None where it is not known.

    `limits` are what was measured: `read` in bytes a second, and operations a second by kind of product; a kind that
    the machine has no instruction for is computed in fp32.
    """
    peak = limits.get(model.products, limits.get("fp32"))
    if work.kind == "start" or peak is None or "read" not in limits:
        return None
    memory, arithmetic = bytes_read(work, model) / limits["read"], operations(work, model) / peak
    return max((memory, "memory"), (arithmetic, "arithmetic"))
