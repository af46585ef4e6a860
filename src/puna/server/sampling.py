"""The sampling fields that every protocol's bodies have in common, and the way from them to `types.Sampling`.

What it is: `SamplingFields`, Puna's own names, which OpenAI's routes take beside their own (vLLM's clients send most of
them in `extra_body`); and `to_sampling`, by which every protocol makes its `Sampling`, so that limits and the words for
a value that does not fit are the same everywhere.
What it is not: a protocol's defaults: OpenAI's and Anthropic's routes say temperature 1 and top_p 1, Ollama's its own.
What is surprising: a seed may be negative, as OpenAI's is a signed integer: those of 64 bits are told apart as they
are (-1 is 2^64 - 1), and what does not fit 64 bits is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic import BaseModel

from puna.errors import UsageError
from puna.server.limits import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP_CHARS, MAX_STOPS
from puna.server.problems import RequestError
from puna.types import Sampling

_NAMES = frozenset(field.name for field in fields(Sampling))


class SamplingFields(BaseModel):
    """Puna's own names, each as `types.Sampling` has it; None is that field's default."""

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    repetition_penalty: float | None = None
    penalty_range: int | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = None
    dry_sequence_breakers: list[int] | None = None
    banned_tokens: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None

    def own(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name in SamplingFields.model_fields if (value := getattr(self, name)) is not None}


def to_sampling(**values: Any) -> Sampling:
    """`Sampling` of these fields; None is a field's default. `stop` is a string or a list of them, `logit_bias` is
    OpenAI's object from ids, as text, to numbers.

    Raises RequestError with the field as `param` for a value out of range, and for more than `limits` allow.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if "stop" in given:
        given["stop"] = _stops(given["stop"])
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"])
    for name in ("dry_sequence_breakers", "banned_tokens"):
        if name in given:
            given[name] = tuple(given[name])
            _most(name, len(given[name]), MAX_LOGIT_BIAS, "ids")
    if "seed" in given:
        given["seed"] = _seed(given["seed"])
    for name in ("n", "best_of"):
        _most(name, given.get(name, 1), MAX_N, "answers")
    for name in ("logprobs", "prompt_logprobs"):
        _most(name, given.get(name, 0), MAX_LOGPROBS, "tokens")
    try:
        return Sampling(**given)
    except UsageError as error:
        name = error.message.split(" ", 1)[0]
        param = name if name in _NAMES else None
        raise RequestError(error.message, remedy=error.remedy, code="invalid_value", param=param) from error


def _most(name: str, count: object, most: int, what: str) -> None:
    if isinstance(count, int) and count > most:
        raise RequestError(
            f"{name} asks for more than the {most} {what} that are given at most.",
            remedy="Ask for fewer.",
            code="invalid_value",
            param=name,
        )


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    _most("stop", len(stops), MAX_STOPS, "strings")
    for text in stops:
        if len(text) > MAX_STOP_CHARS:
            raise RequestError(
                f"A stop string has {len(text)} characters; at most {MAX_STOP_CHARS} are looked for.",
                remedy="Stop at its beginning.",
                code="invalid_value",
                param="stop",
            )
    return stops


def _biases(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    _most("logit_bias", len(biases), MAX_LOGIT_BIAS, "entries")
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise RequestError(
                f"logit_bias has {name[:40]!r}, which is no token id.",
                remedy='Keys are ids, as text: {"42": -100}.',
                code="invalid_value",
                param="logit_bias",
            )
    return tuple((int(name), value) for name, value in biases.items())


def _seed(seed: int) -> int:
    if not -(1 << 63) <= seed < 1 << 64:
        raise RequestError(
            "seed does not fit 64 bits.", remedy="Use a smaller one.", code="invalid_value", param="seed"
        )
    return seed % (1 << 64)
