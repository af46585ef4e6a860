"""Choosing the next token of many sequences at once, each by its own rules and its own random numbers.

What it is: the fast way to what `samplers.definitions.distribution` defines. Bias, penalties and bars change some
logits of a row in place; one pass over all rows (`ops.shortlist`) finds the FEW largest of each and the sums of its
exponentials; filters then go over these lists of all rows together. Where top_p or min_p leave more than its list, a
token is drawn from the whole row until one is inside (rejection sampling: the same distribution, without finding its
border); other rows that go beyond their list are looked at alone.
What it is not: a keeper of books: `sample` accepts nothing. Whoever keeps a token says so to its sampler.
What is surprising: a row's token depends on nothing but its logits, its mask and its sampler: not on the batch, nor on
how often it is asked. Rows are as they were when `sample` returns. Sums over a vocabulary are float32 (a relative error
of about 1e-6, which can move a filter's border by a token of that size); all else is float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from puna.engine.samplers import definitions, edits
from puna.engine.samplers.uniform import uniform
from puna.errors import NothingLeftError, UsageError
from puna.kernels import ops
from puna.kernels.reference import SUM_PART
from puna.types import Sampling, TokenLogprob

FEW = 65
"""How many of the likeliest tokens are looked at first: what top_k 64 needs, and the one that shows where it ends."""

TRIES = 8
"""How often a token is drawn from the whole row, in the hope that it lies inside a nucleus of more than FEW."""

Row = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint32]
Reals = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

_TOKEN, _COIN, _TRY = 0, 1, 2
"""Which of a token's own random numbers it is: where in what is left it stands, whether XTC applies, and, one each,
where in the whole row it stands."""


class LogitsError(FloatingPointError):
    """Logits that are no numbers: the weights are damaged. `row` is the row of the batch."""

    def __init__(self, row: int) -> None:
        super().__init__("the model's logits are not numbers")
        self.row = row


class Draw(NamedTuple):
    """A token that was drawn; its logarithm of probability and those of the likeliest, as `types.TokenLogprob` says,
    where the request asks for them (`logprobs`, or `best_of` above n), else None and nothing."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """How one sequence's next token is drawn: a request's `sampling`, and what there was so far.

    `stop_ids` are the tokens that `min_tokens` and `ignore_eos` keep away; `choice` tells the answers of one request
    apart. Token ids are checked by `check_tokens`, not here.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int] = (),
        stop_ids: frozenset[int] = frozenset(),
        choice: int = 0,
    ) -> None:
        s = sampling
        self.sampling = s
        self.made = 0
        """How many tokens of the answer were accepted."""
        self._seed = int.from_bytes(os.urandom(8), "big") if s.seed is None else int(s.seed)
        self.choice = choice
        self._bias = (np.array([t for t, _ in s.logit_bias], np.intp), np.array([a for _, a in s.logit_bias]))
        self._banned = np.array(s.banned_tokens, np.intp)
        self._stops = np.array(sorted(stop_ids), np.intp)
        self._breakers = frozenset(s.dry_sequence_breakers)
        self._history: edits.History | None = None
        self._counts: edits.Counts | None = None
        if s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty or s.dry_multiplier > 0:
            self._history = edits.History(prompt)
        if self._history and (s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty):
            self._counts = edits.Counts(self._history, s.penalty_range)
        self.most_surprise = 2 * s.mirostat_tau if s.mirostat_tau > 0 else np.inf
        """Mirostat's state, in bits."""
        self._drawn: tuple[int, float] | None = None  # the token drawn last, and its surprise among those kept
        self.filters = (s.temperature, s.top_n_sigma, s.top_k, s.top_p, s.min_p, s.typical_p)
        """The numbers of the filters that many rows go through together."""

    def accept(self, token: int) -> None:
        """The token is the answer's next. One that was not drawn (a grammar forced it) leaves mirostat as it was."""
        self.made += 1
        if self._history is not None:
            self._history.append(token)
        if self._counts is not None:
            self._counts.accept(token)
        if self._drawn is not None and self._drawn[0] == token:
            self.most_surprise -= self.sampling.mirostat_eta * (self._drawn[1] - self.sampling.mirostat_tau)
        self._drawn = None

    def copy(self) -> Sampler:
        """One that goes its own way from here, and would draw the same."""
        new = object.__new__(Sampler)
        new.__dict__.update(self.__dict__)  # what is not copied below never changes
        if self._history is not None:
            new._history = self._history.copy()
            if self._counts is not None:
                new._counts = self._counts.copy(new._history)
        return new

    def uniform(self, draw: int) -> float:
        """The `draw`-th random number of the token that comes next."""
        return uniform(self._seed, self.choice, self.made, draw)

    def coin(self) -> bool:
        """Whether XTC applies to the token that comes next."""
        chance = self.sampling.xtc_probability
        return chance > 0 and self.uniform(_COIN) < chance

    def note(self, token: int, probability: float) -> None:
        """What was drawn, and how likely it was among those kept: mirostat goes by it, should it be accepted."""
        if self.sampling.mirostat_tau > 0:
            self._drawn = token, -float(np.log2(probability))

    def edit(self, row: Row) -> list[edits.Edit]:
        """Change a row as the request asks before anything is drawn; what stood there, for `edits.undo`."""
        s, done = self.sampling, []
        if self._bias[0].size:
            done.append(edits.add(row, *self._bias))
        if self._counts is not None:
            done.append(self._counts.penalize(row, s))
        if s.dry_multiplier > 0 and self._history is not None:
            ids, lost = edits.repeats(self._history.last(s.dry_range), s, self._breakers)
            if ids.size:
                done.append(edits.add(row, ids, -lost))
        if self._banned.size:
            done.append(edits.bar(row, self._banned))
        if self._stops.size and (s.ignore_eos or self.made < s.min_tokens):
            done.append(edits.bar(row, self._stops))
        return done


def check_tokens(sampling: Sampling, vocab_size: int) -> None:
    """Raises UsageError where `sampling` names a token that the vocabulary does not have."""
    named = {
        "logit_bias": [token for token, _ in sampling.logit_bias],
        "banned_tokens": sampling.banned_tokens,
        "dry_sequence_breakers": sampling.dry_sequence_breakers,
    }
    for name, tokens in named.items():
        if (most := max(tokens, default=0)) >= vocab_size:
            raise UsageError(
                f"{name}: token {most} is outside the model's vocabulary of {vocab_size}.",
                remedy="Name tokens of this model.",
            )


def sample(
    logits: npt.NDArray[np.float32], samplers: Sequence[Sampler], masks: Sequence[Mask | None] | None = None
) -> list[Draw]:
    """The next token of each row of logits [M, V], drawn as the row's sampler says; `masks` are grammars' of [V] bits.

    Nothing is accepted, and the rows are as they were. Raises LogitsError for a row of NaN or infinity, and
    NothingLeftError where nothing may come; both name the row.
    """
    logits = np.require(logits, np.float32, ["C", "W"])
    told = _told(logits, samplers)
    done: list[edits.Edit] = []
    try:
        rows = _edited(logits, samplers, masks, done)
        try:
            tokens = _choose(rows, samplers)
        except _NoNumberError as error:
            edits.undo(done)
            done.clear()
            raise _fault(logits, error.row) from None
    finally:
        edits.undo(done)
    return [
        Draw(token) if known is None else Draw(token, float(row[token]) - known[0], known[1])
        for token, row, known in zip(tokens, logits, told, strict=True)
    ]


def distribution(logits: Row, sampler: Sampler, mask: Mask | None = None) -> Reals:
    """The probabilities [V] from which `sample` draws this row's token; errors as there, the row being 0."""
    logits = np.require(logits, np.float32, ["C", "W"])[None]
    done: list[edits.Edit] = []
    try:
        rows = _edited(logits, [sampler], [mask], done)
        whole = np.zeros(logits.shape[1])
        if sampler.sampling.temperature == 0:
            whole[_largest(rows)] = 1
            return whole
        [found] = _shortlists(rows, [sampler])
        ids, weights = (found.ids, found.weights) if found.ids is not None else _alone(rows[0], sampler)
        whole[slice(None) if ids is None else ids] = weights / weights.sum()
        return whole
    except _NoNumberError as error:
        edits.undo(done)
        done.clear()
        raise _fault(logits, error.row) from None
    finally:
        edits.undo(done)


def logprobs(logits: npt.NDArray[np.float32], tokens: Sequence[int], top: int = 0) -> list[TokenLogprob]:
    """What the model itself gave `tokens` [T], each after the text that its row of logits [T, V] stands for; with the
    `top` likeliest (all for more than there are). Raises LogitsError."""
    if not tokens:
        return []
    rows = list(np.require(logits, np.float32, ["C"]))
    return [
        TokenLogprob(token, float(row[token]) - total, likeliest)
        for token, row, (total, likeliest) in zip(tokens, rows, _totals(rows, [top] * len(rows)), strict=True)
    ]


class _NoNumberError(Exception):
    """The largest logit of a row is NaN or infinite, one way or the other."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row


def _fault(logits: npt.NDArray[np.float32], row: int) -> Exception:
    """What is wrong with a row, given the logits as the model gave them."""
    if np.isfinite(logits[row].max()):
        return NothingLeftError(
            "No token may come next: all are banned, barred until later, or not allowed by the grammar.",
            remedy="Lift banned_tokens, min_tokens or ignore_eos, or allow more in the grammar.",
            row=row,
        )
    return LogitsError(row)


def _told(
    logits: npt.NDArray[np.float32], samplers: Sequence[Sampler]
) -> list[tuple[float, tuple[tuple[int, float], ...]] | None]:
    """For each row that wants logprobs what `_totals` gives."""
    out: list[tuple[float, tuple[tuple[int, float], ...]] | None] = [None] * len(samplers)
    wanted = [
        i
        for i, each in enumerate(samplers)
        if each.sampling.logprobs is not None or (each.sampling.best_of or 0) > each.sampling.n
    ]
    if wanted:
        tops = [samplers[i].sampling.logprobs or 0 for i in wanted]
        try:
            found = _totals([logits[i] for i in wanted], tops)
        except LogitsError as error:
            raise LogitsError(wanted[error.row]) from None
        for i, known in zip(wanted, found, strict=True):
            out[i] = known
    return out


def _totals(rows: list[Row], tops: list[int]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Of each row the logarithm of the sum of its exponentials, and so many of the likeliest tokens' logprobs."""
    most = min(max(1, *tops), rows[0].size)
    ids, values, sums = ops.shortlist(rows, np.ones(len(rows), np.float32), most)
    _finite(values[:, 0], LogitsError)
    totals = values[:, 0].astype(np.float64) + np.log(_sum(sums))
    shown = values - totals[:, None]
    return [
        (total, tuple(zip(ids[i, :top].tolist(), shown[i, :top].tolist(), strict=True)))
        for i, (total, top) in enumerate(zip(totals.tolist(), tops, strict=True))
    ]


def _sum(sums: Row) -> Reals:
    """The sums of all parts of each row. NumPy would add while it converts, and split a row by where it stands."""
    return np.asarray(sums.astype(np.float64).sum(axis=1))


def _finite(largest: Row, error: Callable[[int], Exception]) -> None:
    """Raise an error with the number of the first row whose largest logit is no number."""
    wrong = np.flatnonzero(~np.isfinite(largest))
    if wrong.size:
        raise error(int(wrong[0]))


def _edited(
    logits: npt.NDArray[np.float32],
    samplers: Sequence[Sampler],
    masks: Sequence[Mask | None] | None,
    done: list[edits.Edit],
) -> list[Row]:
    """The rows, changed in place (what stood there goes to `done`), or copied where a mask changes most of them."""
    rows = list(logits)
    for row, sampler in zip(rows, samplers, strict=True):
        done += sampler.edit(row)
    masked = [] if masks is None else [(i, mask) for i, mask in enumerate(masks) if mask is not None]
    if masked:
        copies = ops.allowed([rows[i] for i, _ in masked], [mask for _, mask in masked])
        for (i, _), copy in zip(masked, copies, strict=True):
            rows[i] = copy
    return rows


def _choose(rows: list[Row], samplers: Sequence[Sampler]) -> list[int]:
    """A token for each row. Raises _NoNumberError."""
    greedy = [i for i, each in enumerate(samplers) if each.sampling.temperature == 0]
    drawn = [i for i, each in enumerate(samplers) if each.sampling.temperature > 0]
    tokens = [0] * len(rows)
    try:
        places = greedy
        for i, token in zip(greedy, _largest([rows[i] for i in greedy]), strict=True):
            tokens[i] = token
            samplers[i].note(token, 1.0)
        places = drawn
        some, theirs = [rows[i] for i in drawn], [samplers[i] for i in drawn]
        found = _shortlists(some, theirs)
        tried = _tried(some, theirs, found)
        for at, i in enumerate(drawn):
            tokens[i] = tried[at] if at in tried else _draw(some[at], theirs[at], found[at])
    except _NoNumberError as error:
        raise _NoNumberError(places[error.row]) from None
    return tokens


def _largest(rows: list[Row]) -> list[int]:
    """The first of the largest of each row."""
    if not rows:
        return []
    found = [int(ops.argmax(row)) for row in rows]
    _finite(np.array([row[token] for row, token in zip(rows, found, strict=True)]), _NoNumberError)
    return found


class _Shortlist(NamedTuple):
    """What is left of a row after its filters: `ids` and `weights`, likeliest first, or more than were looked at (None)
    and then the `sums` of all exponentials, by parts. `likeliest` is the first of all."""

    likeliest: int
    ids: npt.NDArray[np.int32] | None
    weights: Reals
    sums: Row


def _shortlists(rows: list[Row], samplers: Sequence[Sampler]) -> list[_Shortlist]:
    """Filter the FEW likeliest of all rows together; every filter but `typical` keeps the first so many of them."""
    if not rows:
        return []
    filters = np.array([each.filters for each in samplers])
    temperature, sigmas, top_k, top_p, min_p, typical = filters.T
    vocabulary, few = rows[0].size, min(FEW, rows[0].size)
    with np.errstate(over="ignore"):
        ids, values, sums = ops.shortlist(rows, _scales(temperature), few)
        _finite(values[:, 0], _NoNumberError)
        weights = np.exp((values.astype(np.float64) - values[:, :1]) / temperature[:, None])
    running = np.cumsum(weights, axis=1)
    mass = _sum(sums) if few < vocabulary else running[:, -1]
    index = np.arange(len(rows))
    kept = np.full(len(rows), few)  # so many at the head of each list
    more = np.full(len(rows), few < vocabulary)  # and those beyond the list

    def cut(which: npt.NDArray[np.bool_], fits: npt.NDArray[np.bool_]) -> None:
        """Keep only the head of each list that fits, in the rows concerned."""
        nonlocal kept, more, mass
        kept = np.where(which, np.minimum(kept, fits.sum(axis=1)), kept)
        more = more & (~which | (kept == few))
        mass = np.where(more, mass, running[index, kept - 1])

    for i in np.flatnonzero(sigmas).tolist():
        fits = np.zeros(values.shape, bool)
        fits[i] = values[i] >= _sigma_bound(rows[i], sigmas[i])
        cut(index == i, fits)
    if (which := (top_k > 0) & (top_k < vocabulary)).any():
        last = np.minimum(top_k, few).astype(np.intp) - 1
        # Beyond the list the k-th is not known yet; and where all equal it, others may.
        cut(which, (values >= values[index, last][:, None]) | (top_k > few)[:, None])
    # What top_p takes a share of must be known: everything, or a list that ends.
    unknown = more & ((sigmas > 0) | ((top_k > 0) & (top_k < vocabulary)))
    if (which := top_p < 1).any():
        cut(which, running - weights < (top_p * mass)[:, None])
    if (which := min_p > 0).any():
        cut(which, weights >= min_p[:, None])  # the likeliest weighs 1
    more |= unknown | (typical < 1)
    surprise = np.array([each.most_surprise for each in samplers])
    if (which := surprise < np.inf).any():
        least = np.minimum(definitions.least_likely(surprise) * mass, 1)
        cut(which, weights >= least[:, None])
    out = []
    for i, sampler in enumerate(samplers):
        start, end = 0, int(kept[i])
        if sampler.coin():
            some = weights[i, :end]
            start = max(0, int(np.sum((some >= sampler.sampling.xtc_threshold * mass[i]) & (some > 0))) - 1)
        out.append(_Shortlist(int(ids[i, 0]), None if more[i] else ids[i, start:end], weights[i, start:end], sums[i]))
    return out


def _scales(temperature: Reals) -> Row:
    """What logits are multiplied with, in float32 and within what `ops.shortlist` takes."""
    with np.errstate(over="ignore"):
        return np.clip(1 / temperature, 1e-37, 1e30).astype(np.float32)


def _sigma_bound(row: Row, sigmas: float) -> float:
    """The least logit that `definitions.top_n_sigma` keeps."""
    numbers = row if row.min() > -np.inf else row[row > -np.inf]
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = float(np.std(numbers))
    if not np.isfinite(deviation):  # squares beyond float32
        deviation = float(np.std(numbers, dtype=np.float64))
    return max(float(row.max()) - sigmas * deviation, float(np.finfo(np.float32).min))


def _tried(rows: list[Row], samplers: Sequence[Sampler], found: list[_Shortlist]) -> dict[int, int]:
    """Tokens for the rows, by their place, of which top_p and min_p leave more than FEW, or nothing is cut; those for
    which no try lay inside are left out."""
    tokens: dict[int, int] = {}
    left = [i for i, each in enumerate(found) if each.ids is None and _only_shares(samplers[i])]
    for attempt in range(TRIES):
        if not left:
            break
        drawn = []
        for i in left:
            s = samplers[i].sampling
            token = _anywhere(rows[i], s.temperature, found[i].sums, samplers[i].uniform(_TRY + attempt))
            likelihood = float(_weights(rows[i][[token, found[i].likeliest]], s.temperature)[0])
            drawn.append((i, token, likelihood))
        fits = [likelihood >= samplers[i].sampling.min_p for i, _, likelihood in drawn]
        asked = [at for at, (i, _, _) in enumerate(drawn) if fits[at] and samplers[i].sampling.top_p < 1]
        if asked:
            some = [drawn[at] for at in asked]
            before = _sum(
                ops.above(
                    [rows[i] for i, _, _ in some],
                    _scales(np.array([samplers[i].sampling.temperature for i, _, _ in some])),
                    np.array([rows[i][found[i].likeliest] for i, _, _ in some]),
                    np.array([rows[i][token] for i, token, _ in some]),
                )
            )
            for at, (i, token, likelihood), above in zip(asked, some, before.tolist(), strict=True):
                equals = int(np.count_nonzero(rows[i][:token] == rows[i][token]))
                whole = float(_sum(found[i].sums[None])[0])
                fits[at] = above + equals * likelihood < samplers[i].sampling.top_p * whole
        tokens.update((i, token) for (i, token, _), inside in zip(drawn, fits, strict=True) if inside)
        left = [i for i in left if i not in tokens]
    return tokens


def _only_shares(sampler: Sampler) -> bool:
    """Whether nothing but top_p and min_p cuts off what comes next."""
    s = sampler.sampling
    return not (s.top_k or s.typical_p < 1 or s.top_n_sigma or s.mirostat_tau or sampler.coin())


def _draw(row: Row, sampler: Sampler, found: _Shortlist) -> int:
    """The token that the sampler's random number stands for."""
    u = sampler.uniform(_TOKEN)
    if found.ids is not None:
        place = _place(found.weights, u)
        sampler.note(int(found.ids[place]), float(found.weights[place] / found.weights.sum()))
        return int(found.ids[place])
    ids, weights = _alone(row, sampler)
    place = _place(weights, u)
    token = place if ids is None else int(ids[place])
    sampler.note(token, float(weights[place] / weights.sum()))
    return token


def _place(weights: Reals, u: float) -> int:
    """The index that a number from [0, 1) stands for: inverse transform sampling over the running sum."""
    running = np.cumsum(weights)
    place = int(np.searchsorted(running, u * running[-1], side="right"))
    last = int(np.searchsorted(running, running[-1]))  # that adds anything; rounding may pass it
    return min(place, last)


def _anywhere(row: Row, temperature: float, sums: Row, u: float) -> int:
    """A token of the whole row: first the part, by the sums of all, then within it."""
    running = np.cumsum(sums, dtype=np.float64)
    at = u * running[-1]
    part = min(int(np.searchsorted(running, at, side="right")), int(np.searchsorted(running, running[-1])))
    some = row[part * SUM_PART : (part + 1) * SUM_PART].astype(np.float64)
    with np.errstate(over="ignore"):
        weights = np.exp((some - some.max()) / temperature)
    within = (at - (running[part - 1] if part else 0.0)) / float(sums[part])
    return part * SUM_PART + _place(weights, min(max(within, 0.0), 1.0))


def _filtered(sampler: Sampler) -> bool:
    """Whether anything is cut off the distribution of the token that comes next."""
    s = sampler.sampling
    return bool(
        s.top_k or s.top_p < 1 or s.min_p or s.typical_p < 1 or s.top_n_sigma or s.mirostat_tau or sampler.coin()
    )


def _alone(row: Row, sampler: Sampler) -> tuple[Ids | None, Reals]:
    """What the filters leave of a row, where that is more than FEW or hangs on all: ids, ascending (None: all), and
    weights."""
    s = sampler.sampling
    ids: Ids | None = None
    if s.top_n_sigma > 0:
        ids = np.flatnonzero(row >= _sigma_bound(row, s.top_n_sigma))
    if 0 < s.top_k < row.size:
        bound = ops.top_k(row, s.top_k)[1][-1]
        ids = np.flatnonzero(row >= bound) if ids is None else ids[row[ids] >= bound]
    if ids is None and s.top_p == 1 and s.min_p > 0:  # the bulk goes before the exponentials; what is near stays
        with np.errstate(over="ignore"):
            near = s.temperature * (np.log(s.min_p) * 1.001 - 1e-12)  # beyond 1e15 all are equal to the last bit
            ids = np.flatnonzero(row >= float(row.max()) + near - 0.01)
    scores = row if ids is None else row[ids]
    if s.top_p < 1:
        inside = _nucleus(scores, s.top_p, s.temperature)
        ids = inside if ids is None else ids[inside]
        scores = scores[inside]
    weights = _weights(scores, s.temperature)
    filters: tuple[tuple[bool, Callable[[Reals], definitions.Kept]], ...] = (
        (s.min_p > 0, lambda p: definitions.min_p(p, s.min_p)),
        (s.typical_p < 1, lambda p: definitions.typical(p, s.typical_p)),
        (sampler.coin(), lambda p: definitions.xtc(p, s.xtc_threshold)),
        (s.mirostat_tau > 0, lambda p: definitions.mirostat(p, sampler.most_surprise)),
    )
    for wanted, keep in filters:
        if wanted:
            inside = np.flatnonzero(keep(weights / weights.sum()))
            ids = inside if ids is None else ids[inside]
            weights = weights[inside]
    return ids, weights


def _weights(scores: Row, temperature: float) -> Reals:
    """exp((score − max) / temperature). A temperature near 0 leaves nothing but the largest, as it should."""
    with np.errstate(over="ignore"):
        out = scores.astype(np.float64)
        out -= out.max()
        out /= temperature
        return np.asarray(np.exp(out, out=out))


def _nucleus(scores: Row, share: float, temperature: float) -> Ids:
    """`definitions.top_p` of scores, ascending, without sorting them all: those about the border are told by their
    distance from the largest, in steps of 1/64 of a temperature, and only they are sorted."""
    weights = _weights(scores, temperature)
    weights /= weights.sum()
    with np.errstate(over="ignore"):
        below = (scores - scores.max()) * _scales(np.array([temperature]))
        depth = np.minimum(below * np.float32(-64), 8191).astype(np.int32)
    reached = np.cumsum(np.bincount(depth, weights))
    border = min(int(np.searchsorted(reached, share)), len(reached) - 1)
    before = float(reached[border - 1]) if border else 0.0
    about = np.flatnonzero(depth == border)
    about = about[np.argsort(-scores[about], kind="stable")]
    some = weights[about]
    about = about[np.cumsum(some) - some < share - before]
    return np.sort(np.concatenate([np.flatnonzero(depth < border), about]))
