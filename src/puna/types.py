"""Plain data that crosses rooms: what a request asks of a model, and what comes back.

What it is: frozen records of Python numbers and strings.
What it is not: a place for arrays or behaviour; rows below this one import it, it imports nothing but the errors.
What is surprising: `Sampling` refuses values when it is made, so no later room checks them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, TypedDict

from puna.errors import UsageError

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""Why an answer ended: the model said stop (or a stop string came), max_tokens were made, the model's context is full,
or the caller asked for an end."""

DTYPES = ("auto", "fp32", "bf16", "fp16")
"""What `--dtype` takes: the weights as stored, or converted on load."""

TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip
"""The types that a model can be written in, as GGUF's users call them, largest first."""

QUANTS = TYPES[3:]
"""The packed ones, which `--quant` takes."""

KERNELS = ("auto", "reference", "scalar", "avx2", "avx512", "neon")
"""What `--kernels` takes: the fastest available, the NumPy reference, or one instruction set of the C++."""


KV_TYPES = ("auto", "fp32", "bf16", "fp16", "q8_0")
"""What `--kv-type` takes: how the cache keeps keys and values. auto is fp32 where all matrices are, else fp16."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to end.

    temperature 0 takes the largest logit; top_k 0, top_p 1 and min_p 0 switch those filters off; seed None draws one;
    max_tokens None goes on until the model stops or its context is full; `stop` strings are not part of the answer.
    Raises UsageError for a value out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def need(fits: bool, name: str, what: str) -> None:
            if not fits:
                raise UsageError(
                    f"{name} must be {what}, not {getattr(self, name)!r:.80}.",
                    remedy=f"Leave it out for the default, {type(self).__dataclass_fields__[name].default!r}.",
                )

        def number(value: object) -> bool:  # NumPy's count, True does not
            return isinstance(value, Real) and not isinstance(value, bool)

        def whole(value: object) -> bool:
            return isinstance(value, Integral) and not isinstance(value, bool)

        need(number(self.temperature) and 0 <= self.temperature < math.inf, "temperature", "a number, 0 or larger")
        need(number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1")
        need(whole(self.top_k) and self.top_k >= 0, "top_k", "a whole number, 0 (off) or larger")
        need(number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "a number between 0 and 1")
        seed, most = self.seed, self.max_tokens
        need(seed is None or (whole(seed) and 0 <= seed < 1 << 64), "seed", "a whole number from 0 to 2^64 - 1")
        need(most is None or (whole(most) and most >= 1), "max_tokens", "a whole number, 1 or larger")
        # A string is a sequence of strings too: each of its characters would end the answer.
        texts = isinstance(self.stop, tuple | list) and all(isinstance(text, str) and text for text in self.stop)
        need(texts, "stop", "a tuple of strings of at least one character")


@dataclass(frozen=True)
class Timings:
    """Seconds: from the request to its first token, and from there to the last; rates in tokens a second."""

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Answer:
    """A finished answer. `token_ids` are the answer's own, the stop token left out."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    timings: Timings
    model: str
    kernels: str
    kv_type: str
    notes: tuple[str, ...] = field(default=())


class SamplingOptions(TypedDict, total=False):
    """`Sampling`'s fields as keywords, for `LLM.stream(prompt, temperature=0)`; a test holds the two together."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
