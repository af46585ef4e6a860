"""Every sampler, defined in plain NumPy, and the one order in which they apply.

What it is: a function of a few lines each, over one row, in float64: what `puna.engine.sampler` computes faster, and is
compared with.
What it is not: fast. It sorts whole vocabularies; but `typical`, `xtc` and `mirostat` serve the fast way as they are,
over what the other filters left.
What is surprising: the order differs between programs, and with it the meaning of the numbers. Ours is `distribution`,
read from top to bottom:

1. What is added to logits: logit_bias, then repetition, presence and frequency penalties, then DRY. Bias comes first
   because the repetition penalty goes by a logit's sign, and is to see the one the request asked for (vLLM and
   llama.cpp do the same).
2. What is barred, whatever was added: banned tokens, stop tokens that may not come yet, what a grammar does not allow.
3. top_n_sigma, which is about logits.
4. temperature. It stands before the filters, as in transformers, vLLM and OpenAI's API: top_p 0.9 is nine tenths of
   what would be drawn, not of another distribution. (llama.cpp applies it last.)
5. top_k, top_p, min_p, typical_p: each to what the one before it left, as transformers orders them.
6. XTC, which takes the likeliest away from what is left, so that nothing unfit takes their place; or mirostat, alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.types import Sampling

Reals = npt.NDArray[np.float64]
Kept = npt.NDArray[np.bool_]

LONGEST_REPEAT = 64
"""As how many tokens DRY counts a longer repeat: at its default base that is a penalty of 1e15 already."""

LARGEST_PENALTY = 1e30
"""What DRY's penalty grows to at most: a logit less that is still a number, and below all others."""


def biased(logits: Reals, bias: Mapping[int, float]) -> Reals:
    """The logits with what a request adds to single tokens."""
    out = logits.copy()
    for token, amount in bias.items():
        out[token] += amount
    return out


def repetition(logits: Reals, tokens: Sequence[int], penalty: float) -> Reals:
    """Logits of `tokens` (prompt and answer) divided by the penalty where positive, else multiplied (Keskar et al.
    2019, CTRL)."""
    out = logits.copy()
    for token in set(tokens):
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    return out


def presence_and_frequency(logits: Reals, made: Sequence[int], presence: float, frequency: float) -> Reals:
    """Logits less `frequency` for each time a token is in the answer, and less `presence` if it is (OpenAI's API)."""
    counts = np.bincount(np.array(made, np.int64), minlength=logits.size)
    penalized: Reals = logits - frequency * counts - presence * (counts > 0)
    return penalized


def dry(
    tokens: Sequence[int], multiplier: float, base: float, allowed_length: int, breakers: Collection[int]
) -> dict[int, float]:
    """By token, what is taken off its logit because it would go on a repeat ("Don't repeat yourself", p-e-w 2024).

    Where the last tokens stood before, `length` of them, the token that followed there loses
    multiplier · base^(length − allowed_length), from `allowed_length` on; the longest repeat counts, and a breaker is
    never part of one.
    """
    lost: dict[int, float] = {}
    last = len(tokens) - 1
    for place in range(last):
        length = 0
        while (
            length <= place
            and length < LONGEST_REPEAT
            and tokens[place - length] == tokens[last - length]
            and tokens[last - length] not in breakers
        ):
            length += 1
        if length >= allowed_length:
            following = tokens[place + 1]
            lost[following] = max(lost.get(following, 0.0), dry_penalty(multiplier, base, length - allowed_length))
    return lost


def dry_penalty(multiplier: float, base: float, over: Any) -> Any:
    """multiplier · base^over, where it is a number of a usual size."""
    with np.errstate(over="ignore"):
        return np.minimum(multiplier * np.float64(base) ** over, LARGEST_PENALTY)


def top_n_sigma(logits: Reals, sigmas: float) -> Kept:
    """Logits within so many standard deviations of the largest (Tang et al. 2024), those of minus infinity not counted.

    The deviation is that of the whole population, as in llama.cpp.
    """
    near: Kept = logits >= logits.max() - sigmas * np.std(logits[logits > -np.inf])
    return near


def top_k(logits: Reals, k: int) -> Kept:
    """The k largest, and what equals the last of them."""
    kept: Kept = logits >= np.sort(logits)[-min(k, logits.size)]
    return kept


def top_p(p: Reals, share: float) -> Kept:
    """The fewest of the likeliest that make up `share` (Holtzman et al. 2020), of equals the lower ids."""
    order = np.argsort(-p, kind="stable")
    kept = np.zeros(p.size, bool)
    kept[order] = np.cumsum(p[order]) - p[order] < share
    return kept


def min_p(p: Reals, share: float) -> Kept:
    """Those at least `share` as likely as the likeliest (Nguyen et al. 2024)."""
    kept: Kept = p >= share * p.max()
    return kept


def typical(p: Reals, share: float) -> Kept:
    """Those whose surprise is nearest to the expected one, up to the one at which they make up `share`, and what
    equals it (Meister et al. 2023)."""
    some = np.flatnonzero(p)
    surprise = -np.log(p[some])
    off = np.abs(surprise - np.sum(p[some] * surprise))
    order = np.argsort(off)
    border = min(int(np.sum(np.cumsum(p[some][order]) < share)), some.size - 1)
    kept = np.zeros(p.size, bool)
    kept[some] = off <= off[order[border]]
    return kept


def xtc(p: Reals, threshold: float) -> Kept:
    """All but those of at least `threshold`, of which the least likely stays ("Exclude top choices", p-e-w 2024), of
    equals the one with the highest id. Where the coin of xtc_probability falls otherwise, all stay."""
    kept = np.ones(p.size, bool)
    top = int(np.sum((p >= threshold) & (p > 0)))
    kept[np.argsort(-p, kind="stable")[: max(0, top - 1)]] = False
    return kept


def mirostat(p: Reals, most: float) -> Kept:
    """Those whose surprise, −log2 p, is `most` at most, and the likeliest in any case (Basu et al. 2021, version 2).

    `most` begins at 2 · tau and, after a token with surprise s among those kept, loses eta · (s − tau).
    """
    kept: Kept = p >= min(least_likely(most), p.max())
    return kept


def least_likely(most: Any) -> Any:
    """The probability whose surprise is `most` bits; a surprise is never negative."""
    return np.exp2(np.minimum(-most, 0.0))


def distribution(
    logits: npt.NDArray[np.float32],
    sampling: Sampling,
    prompt: Sequence[int] = (),
    made: Sequence[int] = (),
    stop_ids: Collection[int] = (),
    allowed: Kept | None = None,
    *,
    coin: float = 1.0,
    most_surprise: float = np.inf,
) -> Reals:
    """The probabilities [V] from which the token after `prompt` and `made` is drawn: the chain of all samplers.

    `allowed` [V] is the grammar's; `coin` from [0, 1) decides about XTC; `most_surprise` is mirostat's. At least one
    logit of what is not barred must be a number.
    """
    s = sampling
    tokens = [*prompt, *made]
    scores = biased(logits.astype(np.float64), dict(s.logit_bias))
    scores = repetition(scores, tokens[-s.penalty_range :], s.repetition_penalty)
    recent = made[-s.penalty_range :] if s.penalty_range else made
    scores = presence_and_frequency(scores, recent, s.presence_penalty, s.frequency_penalty)
    if s.dry_multiplier > 0:
        repeats = dry(
            tokens[-s.dry_range :], s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_sequence_breakers
        )
        scores = biased(scores, {token: -amount for token, amount in repeats.items()})

    barred = np.zeros(scores.size, bool) if allowed is None else ~allowed
    barred[list(s.banned_tokens)] = True
    if s.ignore_eos or len(made) < s.min_tokens:
        barred[list(stop_ids)] = True
    scores[barred] = -np.inf

    if s.temperature == 0:
        return np.asarray(np.arange(scores.size) == np.argmax(scores), np.float64)
    kept = top_n_sigma(scores, s.top_n_sigma) if s.top_n_sigma > 0 else np.ones(scores.size, bool)
    with np.errstate(over="ignore"):
        p = np.where(kept, np.exp((scores - scores.max()) / s.temperature), 0)
    p /= p.sum()
    filters: tuple[tuple[bool, Callable[[Reals], Kept]], ...] = (
        # By logits: a temperature near infinity makes equals of what is none.
        (s.top_k > 0, lambda _: top_k(np.where(kept, scores, -np.inf), s.top_k)),
        (s.top_p < 1, lambda p: top_p(p, s.top_p)),
        (s.min_p > 0, lambda p: min_p(p, s.min_p)),
        (s.typical_p < 1, lambda p: typical(p, s.typical_p)),
        (coin < s.xtc_probability, lambda p: xtc(p, s.xtc_threshold)),
        (s.mirostat_tau > 0, lambda p: mirostat(p, most_surprise)),
    )
    for wanted, keep in filters:
        if wanted:
            p = np.where(keep(p), p, 0)
            p /= p.sum()
    return p
