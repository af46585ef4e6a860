"""Sampling against transformers' filters, published formulas, and the definitions that stand beside the fast way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from puna.engine.sampler import FEW, LogitsError, Sampler, check_tokens, distribution, logprobs, sample
from puna.engine.samplers import definitions
from puna.engine.samplers.uniform import mix, uniform
from puna.errors import NothingLeftError, UsageError
from puna.types import LONGEST_STOP, MOST_IDS, MOST_STOPS, Sampling, SamplingOptions

PLAIN = Sampling(temperature=1.0, top_p=1.0, seed=1)


def logits_of(seed: int, size: int = 50, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def bits(allowed: np.ndarray) -> np.ndarray:
    words = np.zeros(-(-allowed.size // 32), np.uint32)
    for token in np.flatnonzero(allowed):
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words


def told(prompt: Sequence[int], made: Sequence[int], sampling: Sampling, **options: object) -> Sampler:
    sampler = Sampler(sampling, prompt, **options)
    for token in made:
        sampler.accept(token)
    return sampler


def theirs(logits: np.ndarray, s: Sampling, seen: Sequence[int] = ()) -> np.ndarray:
    """By transformers' processors, in its own order."""
    scores, ids = torch.from_numpy(logits)[None].double(), torch.tensor([list(seen)])
    if seen:
        scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(s.temperature)(None, scores)
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(None, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(s.top_p)(None, scores)
    if s.min_p:
        scores = MinPLogitsWarper(s.min_p)(None, scores)
    if s.typical_p < 1:
        scores = TypicalLogitsWarper(s.typical_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


FILTERS = {
    "plain": PLAIN,
    "top-p": Sampling(temperature=0.6, top_p=0.9),
    "top-k": Sampling(temperature=1.3, top_p=1.0, top_k=7),
    "min-p": Sampling(temperature=1.0, top_p=1.0, min_p=0.1),
    "typical": Sampling(temperature=1.0, top_p=1.0, typical_p=0.6),
    "several": Sampling(temperature=0.8, top_p=0.8, top_k=20, min_p=0.05),
    "all": Sampling(temperature=1.1, top_p=0.95, top_k=30, min_p=0.01, typical_p=0.8),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sampling", FILTERS.values(), ids=FILTERS.keys())
def test_distribution_equals_transformers(seed: int, sampling: Sampling) -> None:
    logits = logits_of(seed)
    np.testing.assert_allclose(distribution(logits, Sampler(sampling)), theirs(logits, sampling), atol=1e-12)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = logits_of(3)
    sampling = replace(PLAIN, repetition_penalty=penalty, top_k=20)
    ours = distribution(logits, told([4, 9, 9], [1, 30], sampling))
    np.testing.assert_allclose(ours, theirs(logits, sampling, [4, 9, 9, 1, 30]), atol=1e-7)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_nucleus_of_any_size_equals_transformers(top_p: float, spread: float) -> None:
    """Flat logits need more tokens than are looked at first, up to nearly all of them."""
    logits = np.random.default_rng(2).normal(0, spread, 9000).astype(np.float32)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    ours, wanted = distribution(logits, Sampler(sampling)), theirs(logits, sampling)
    assert abs(np.count_nonzero(ours) - np.count_nonzero(wanted)) <= 1  # sums in another order, at the border
    np.testing.assert_allclose(ours, wanted, atol=1e-4 if spread < 1 else 1e-7)


# ---- every sampler: the fast way against its definition, by value and by draws ----

PROMPT, MADE = [3, 7, 11, 3, 7], [5, 3, 7]
KINDS: dict[str, Sampling] = {
    **FILTERS,
    "top-n-sigma": replace(PLAIN, top_n_sigma=1.2),
    "top-n-sigma, top-p": replace(PLAIN, top_n_sigma=2.5, top_p=0.5),
    "top-k, top-p": replace(PLAIN, top_k=100, top_p=0.5),
    "xtc": replace(PLAIN, xtc_probability=1.0, xtc_threshold=0.05),
    "xtc, sometimes": replace(PLAIN, xtc_probability=0.5, xtc_threshold=0.03, top_p=0.9),
    "mirostat": replace(PLAIN, mirostat_tau=1.5),
    "repetition": replace(PLAIN, repetition_penalty=1.4),
    "presence": replace(PLAIN, presence_penalty=1.5),
    "frequency": replace(PLAIN, frequency_penalty=0.8, penalty_range=2),
    "dry": replace(PLAIN, dry_multiplier=0.9, dry_sequence_breakers=(11,)),
    "bias": replace(PLAIN, logit_bias=((2, 4.0), (9, -2.5))),
    "banned": replace(PLAIN, banned_tokens=(0, 1, 17)),
    "min-tokens": replace(PLAIN, min_tokens=9),
    "ignore-eos": replace(PLAIN, ignore_eos=True),
    "everything": Sampling(
        temperature=1.2, top_p=0.95, top_k=25, min_p=0.01, typical_p=0.95, top_n_sigma=2.0, repetition_penalty=1.1,
        presence_penalty=0.2, frequency_penalty=0.1, penalty_range=4, dry_multiplier=0.5, logit_bias=((2, 1.0),),
        banned_tokens=(4,), min_tokens=20, xtc_probability=0.5,
    ),
}  # fmt: skip
STOPS = frozenset({6, 8})


def defined(logits: np.ndarray, sampler: Sampler, allowed: np.ndarray | None = None) -> np.ndarray:
    """By the plain definitions, with the sampler's own coin and mirostat's state after PROMPT and MADE."""
    s = sampler.sampling
    coin = 0.0 if sampler.coin() else 1.0
    return definitions.distribution(
        logits, s, PROMPT, MADE, STOPS, allowed, coin=coin, most_surprise=sampler.most_surprise
    )


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("size", [40, 700])
@pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS.keys())
def test_the_fast_way_gives_what_is_defined(sampling: Sampling, size: int, spread: float) -> None:
    for seed in range(6):
        logits = logits_of(seed, size, spread)
        before = logits.copy()
        sampler = told(PROMPT, MADE, replace(sampling, seed=seed), stop_ids=STOPS)
        allowed = np.random.default_rng(seed).random(size) < 0.6
        for mask in (None, allowed):
            ours = distribution(logits, sampler, None if mask is None else bits(mask))
            wanted = defined(logits, sampler, mask)
            assert np.array_equal(ours > 0, wanted > 0)
            np.testing.assert_allclose(ours, wanted, atol=2e-6)
        assert np.array_equal(logits, before)


def surprising(counts: np.ndarray, p: np.ndarray) -> float:
    """How many standard deviations Pearson's chi-squared lies above its mean, tokens of under 5 draws together."""
    expected = p * counts.sum()
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    assert counts[p == 0].sum() == 0
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    chi2 = float(np.sum((seen - wanted) ** 2 / wanted))
    degrees = len(seen) - 1
    return (chi2 - degrees) / math.sqrt(2 * degrees) if degrees else 0.0


@pytest.mark.parametrize("size", [30, 200])
@pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS.keys())
def test_draws_follow_the_definition(sampling: Sampling, size: int) -> None:
    """Pearson's test over 4,000 seeds; the seeds are fixed, so it passes always or never."""
    logits = logits_of(5, size, 1.0 if size > FEW else 2.0)
    counts, p = np.zeros(size), np.zeros(size)
    for start in range(0, 4000, 250):
        samplers = [told(PROMPT, MADE, replace(sampling, seed=start + i), stop_ids=STOPS) for i in range(250)]
        for draw in sample(np.tile(logits, (250, 1)), samplers):
            counts[draw.token] += 1
        heads = sum(sampler.coin() for sampler in samplers)
        for share, side in ((heads, 1.0), (250 - heads, 0.0)):
            if share:
                s = replace(sampling, xtc_probability=side)
                p += share * definitions.distribution(
                    logits, s, PROMPT, MADE, STOPS, coin=0.5, most_surprise=samplers[0].most_surprise
                )
    assert surprising(counts, p / 4000) < 4


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(top_p=0.6, temperature=1.0), replace(PLAIN, min_p=0.3)])
def test_draws_from_a_flat_row_follow_the_definition(sampling: Sampling) -> None:
    """What is kept are hundreds of tokens in several parts, so they are drawn from the whole row, and tried again."""
    logits = np.round(logits_of(5, 1500, 0.4), 1)  # many equals, also where the nucleus ends
    counts = np.zeros(1500)
    for start in range(0, 10000, 500):
        samplers = [Sampler(replace(sampling, seed=start + i)) for i in range(500)]
        for draw in sample(np.tile(logits, (500, 1)), samplers):
            counts[draw.token] += 1
    assert surprising(counts, definitions.distribution(logits, sampling)) < 4


def test_tries_that_fail_leave_the_distribution_as_it_is() -> None:
    """A nucleus of a hundredth of a flat row: eight tries mostly miss it."""
    logits = logits_of(5, 9000, 0.05)
    sampling = Sampling(temperature=1.0, top_p=0.01)
    p = definitions.distribution(logits, sampling)
    assert np.count_nonzero(p) > FEW
    counts = np.zeros(9000)
    for start in range(0, 1500, 300):
        samplers = [Sampler(replace(sampling, seed=start + i)) for i in range(300)]
        for draw in sample(np.tile(logits, (300, 1)), samplers):
            counts[draw.token] += 1
    assert surprising(counts, p) < 4


# ---- nothing depends on the batch ----


def test_draws_are_the_same_alone_in_a_batch_in_any_order_and_after_copy() -> None:
    rng = np.random.default_rng(0)
    kinds = [*KINDS.values(), Sampling(temperature=0), Sampling(logprobs=3)]
    samplers = [
        told(PROMPT, MADE, replace(kinds[i % len(kinds)], seed=i), stop_ids=STOPS, choice=i % 3) for i in range(64)
    ]
    masks = [bits(rng.random(1000) < 0.5) if i % 4 == 1 else None for i in range(64)]
    for step in range(5):
        logits = np.stack([logits_of(100 * step + i, 1000, (0.3, 3.0)[i % 2]) for i in range(64)])
        together = sample(logits, samplers, masks)
        for i in range(64):
            assert sample(logits[i : i + 1], [samplers[i]], masks[i : i + 1]) == [together[i]]
            assert sample(logits[i : i + 1], [samplers[i].copy()], masks[i : i + 1]) == [together[i]]
        order = rng.permutation(64)
        shuffled = sample(logits[order], [samplers[i] for i in order], [masks[i] for i in order])
        assert shuffled == [together[i] for i in order]
        copies = [sampler.copy() for sampler in samplers]
        for sampler, copy, draw in zip(samplers, copies, together, strict=True):
            sampler.accept(draw.token)
            copy.accept(0)
        samplers = [sampler.copy() for sampler in samplers]  # the copies that went another way change nothing


def test_a_copy_goes_its_own_way() -> None:
    logits = logits_of(3, 100)
    s = replace(PLAIN, repetition_penalty=1.3, frequency_penalty=0.2, dry_multiplier=0.8)
    sampler = told(PROMPT, MADE, s)
    copy = sampler.copy()
    for token in range(90):
        copy.accept(token)
    np.testing.assert_allclose(distribution(logits, sampler), defined(logits, sampler), atol=2e-6)
    wanted = definitions.distribution(logits, s, PROMPT, [*MADE, *range(90)])
    np.testing.assert_allclose(distribution(logits, copy), wanted, atol=2e-6)


def test_seed_choice_and_place_each_make_another_draw() -> None:
    logits = logits_of(0, 5000, 0.01)

    def draw(seed: int, choice: int, made: int) -> int:
        sampler = Sampler(replace(PLAIN, seed=seed), choice=choice)
        for _ in range(made):
            sampler.accept(0)
        return sample(logits[None], [sampler])[0].token

    assert draw(1, 0, 0) == draw(1, 0, 0)
    assert len({draw(seed, choice, made) for seed in (0, 1) for choice in (0, 1) for made in (0, 1)}) == 8
    assert Sampler(Sampling()).uniform(0) != Sampler(Sampling()).uniform(0)  # no seed: one is drawn


def test_random_numbers_are_splitmix64s_and_uniform() -> None:
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published generator's first number from seed 0
    asked = itertools.product(range(20), range(4), range(50), range(4))  # seed, choice, index, draw
    grid = list(itertools.starmap(uniform, asked))
    counts = np.bincount((np.array(grid) * 100).astype(int), minlength=100)
    assert len(set(grid)) == len(grid)
    assert surprising(counts, np.full(100, 0.01)) < 4
    pairs = np.array(grid).reshape(-1, 2)
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.04
    assert 0 <= min(grid) < max(grid) < 1


# ---- single samplers ----


def test_greedy_takes_the_first_of_the_largest() -> None:
    row = np.array([[1.0, 3.0, 3.0]], np.float32)
    assert sample(row, [Sampler(Sampling(temperature=0))])[0].token == 1
    assert sample(row, [Sampler(Sampling(temperature=0, banned_tokens=(1,)))])[0].token == 2
    assert sample(row, [Sampler(Sampling(temperature=0))], [np.array([0b101], np.uint32)])[0].token == 2


def test_ties_at_the_border_of_top_k_are_all_kept() -> None:
    logits = np.array([1, 5, 3, 3, 0, 3], np.float32)
    assert np.flatnonzero(distribution(logits, Sampler(replace(PLAIN, top_k=2)))).tolist() == [1, 2, 3, 5]
    many = np.zeros(500, np.float32)
    for k in (1, FEW - 1, FEW, FEW + 1, 499, 500, 9999):
        assert np.count_nonzero(distribution(many, Sampler(replace(PLAIN, top_k=k)))) == 500


def test_penalties_by_openais_formula() -> None:
    sampler = told([1, 1, 2], [3, 3, 4], replace(PLAIN, presence_penalty=0.5, frequency_penalty=0.25))
    p = distribution(np.zeros(6, np.float32), sampler)
    np.testing.assert_allclose(np.log(p / p[0]), [0, 0, 0, -1.0, -0.75, 0], atol=1e-6)


def test_penalties_reach_back_as_far_as_they_should() -> None:
    """Tokens leave the range one by one, the prompt's first; counted as they come it must be as counted anew."""
    rng = np.random.default_rng(0)
    logits = logits_of(0, 12)
    for reach in (0, 1, 3, 10):
        s = replace(
            PLAIN, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, penalty_range=reach, seed=2
        )
        prompt, made = rng.integers(0, 12, 6).tolist(), []
        sampler = Sampler(s, prompt)
        for _ in range(200):
            np.testing.assert_allclose(
                distribution(logits, sampler), definitions.distribution(logits, s, prompt, made), atol=1e-6
            )
            made.append(int(rng.integers(0, 12)))
            sampler.accept(made[-1])


def test_dry_by_hand() -> None:
    # "1 2 3" stood before and was followed by 4; "3" alone also stood before a 9, and 2 3 before a 7.
    tokens = [1, 2, 3, 4, 3, 9, 2, 3, 7, 1, 2, 3]
    assert definitions.dry(tokens, 0.8, 1.75, 2, ()) == pytest.approx({4: 0.8 * 1.75, 7: 0.8})
    assert definitions.dry(tokens, 0.8, 1.75, 1, ()) == pytest.approx({4: 0.8 * 1.75**2, 9: 0.8, 7: 0.8 * 1.75})
    assert definitions.dry(tokens, 0.8, 1.75, 1, (2,)) == pytest.approx({4: 0.8, 9: 0.8, 7: 0.8})
    assert definitions.dry(tokens, 0.8, 1.75, 1, (3,)) == {}
    assert definitions.dry([5], 0.8, 1.75, 1, ()) == definitions.dry([], 0.8, 1.75, 1, ()) == {}
    assert definitions.dry([1, 1, 1], 1.0, 2.0, 1, ()) == {1: 2.0}


@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    allowed=st.integers(1, 4),
    breakers=st.sets(st.integers(0, 3), max_size=2),
    reach=st.integers(0, 12),
)
@settings(max_examples=200, deadline=None)
def test_dry_finds_the_repeats_that_are_defined(
    tokens: list[int], allowed: int, breakers: set[int], reach: int
) -> None:
    s = replace(
        PLAIN, dry_multiplier=0.8, dry_allowed_length=allowed, dry_sequence_breakers=tuple(breakers), dry_range=reach
    )
    cut = len(tokens) // 2
    sampler = told(tokens[:cut], tokens[cut:], s)
    wanted = definitions.distribution(np.zeros(5, np.float32), s, tokens[:cut], tokens[cut:])
    np.testing.assert_allclose(distribution(np.zeros(5, np.float32), sampler), wanted, atol=1e-6)


def test_dry_of_one_token_for_ever_stays_a_number() -> None:
    for base in (1.75, 1e300):
        sampler = told([2] * 3000, [2] * 100, replace(PLAIN, dry_multiplier=0.8, dry_base=base))
        p = distribution(np.zeros(4, np.float32), sampler)
        np.testing.assert_allclose(p, [1 / 3, 1 / 3, 0, 1 / 3], atol=1e-9)


def test_xtc_leaves_the_least_of_the_top_choices() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))
    s = replace(PLAIN, xtc_probability=1.0, xtc_threshold=0.12)
    np.testing.assert_allclose(distribution(logits, Sampler(s)), np.array([0.1, 0, 0.05, 0, 0.15]) / 0.3, atol=1e-6)
    for threshold in (0.35, 0.45):  # one top choice, or none: nothing is taken
        kept = distribution(logits, Sampler(replace(s, xtc_threshold=threshold)))
        np.testing.assert_allclose(kept, [0.1, 0.4, 0.05, 0.3, 0.15], atol=1e-6)
    heads = [Sampler(replace(s, xtc_probability=0.3, seed=i)).coin() for i in range(4000)]
    assert abs(sum(heads) / 4000 - 0.3) < 0.03


def test_mirostat_by_hand() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125], np.float32)
    sampler = Sampler(replace(PLAIN, mirostat_tau=1.2, mirostat_eta=0.5))
    assert sampler.most_surprise == 2.4  # bits: the last two tokens have 3
    np.testing.assert_allclose(distribution(np.log(p), sampler), [2 / 3, 1 / 3, 0, 0], atol=1e-7)
    drawn = sample(np.log(p)[None], [sampler])[0].token
    surprise = -math.log2([2 / 3, 1 / 3][drawn])
    other = sampler.copy()
    sampler.accept(drawn)
    assert sampler.most_surprise == pytest.approx(2.4 - 0.5 * (surprise - 1.2))
    other.accept(3)  # not what was drawn
    assert other.most_surprise == 2.4


def test_mirostat_keeps_the_surprise_near_tau() -> None:
    logits = np.log(1 / np.arange(1, 3001)).astype(np.float32)[None]  # Zipf's law
    for tau in (2.0, 4.0):
        sampler = Sampler(replace(PLAIN, mirostat_tau=tau))
        surprises = []
        for _ in range(600):
            p = distribution(logits[0], sampler)
            token = sample(logits, [sampler])[0].token
            surprises.append(-math.log2(p[token]))
            sampler.accept(token)
        assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.15)


def test_stop_tokens_wait_for_min_tokens() -> None:
    row = np.array([[0.0, 9.0, 1.0]], np.float32)
    sampler = Sampler(Sampling(temperature=0, min_tokens=2), [0], frozenset({1}))
    made = []
    for _ in range(3):
        made.append(sample(row, [sampler])[0].token)
        sampler.accept(made[-1])
    assert made == [2, 2, 1]
    assert (
        sample(row, [told([], [0] * 9, Sampling(temperature=0, ignore_eos=True), stop_ids=frozenset({1}))])[0][0] == 2
    )


# ---- logprobs ----


def test_logprobs_equal_torch_whatever_is_sampled() -> None:
    logits = np.stack([logits_of(i, 2000) for i in range(3)])
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    hard = Sampling(temperature=0.1, top_k=3, banned_tokens=(5,), repetition_penalty=2.0, logprobs=4, seed=3)
    samplers = [Sampler(hard, [1, 2]), Sampler(Sampling(temperature=0, logprobs=0)), Sampler(Sampling())]
    draws = sample(logits, samplers, [bits(np.arange(2000) % 2 == 0), None, None])
    for i, count in ((0, 4), (1, 0)):
        assert draws[i].logprob == pytest.approx(wanted[i, draws[i].token], abs=2e-6)
        best = np.argsort(-logits[i], kind="stable")[:count]
        assert [token for token, _ in draws[i].top] == best.tolist()
        np.testing.assert_allclose([value for _, value in draws[i].top], wanted[i, best], atol=2e-6)
    assert (draws[2].logprob, draws[2].top) == (None, ())
    ranked = sample(logits[:1], [Sampler(Sampling(temperature=0, best_of=3))])[0]
    assert ranked.logprob is not None  # best-of goes by them
    assert ranked.top == ()


def test_prompt_logprobs_equal_torch() -> None:
    logits = np.stack([logits_of(i, 300) for i in range(4)])
    wanted = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    found = logprobs(logits, [5, 0, 299, 7], top=2)
    assert [each.token for each in found] == [5, 0, 299, 7]
    for row, each in zip(wanted, found, strict=True):
        assert each.logprob == pytest.approx(row[each.token], abs=2e-6)
        assert [token for token, _ in each.top] == np.argsort(-row, kind="stable")[:2].tolist()
    assert len(logprobs(logits[:1], [0], top=9999)[0].top) == 300
    assert logprobs(logits[:0], []) == []


# ---- what goes wrong, and the ends ----


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), PLAIN, Sampling(logprobs=1), Sampling(top_n_sigma=1.0)])
@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_what_is_no_number_is_never_sampled(sampling: Sampling, fault: float) -> None:
    logits = np.zeros((4, 200), np.float32)
    logits[2, 150] = fault
    with pytest.raises(LogitsError, match="not numbers") as caught:
        sample(logits, [Sampler(sampling) for _ in range(4)])
    assert caught.value.row == 2
    with pytest.raises(LogitsError) as caught:  # not the row's place among those of its kind
        sample(logits, [Sampler(Sampling(temperature=0)), Sampler(PLAIN), Sampler(sampling), Sampler(PLAIN)])
    assert caught.value.row == 2
    with pytest.raises(FloatingPointError):
        sample(np.full((1, 5), -np.inf, np.float32), [Sampler(sampling)])
    with pytest.raises(FloatingPointError):
        distribution(logits[2], Sampler(replace(sampling, logprobs=None)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_may_come_a_typed_error_names_the_row(temperature: float) -> None:
    logits = np.stack([logits_of(i, 70) for i in range(3)])
    before = logits.copy()
    s = Sampling(temperature=temperature, top_p=1.0, logit_bias=((3, 1.0),), banned_tokens=(5,))
    samplers = [Sampler(s, [], frozenset({6})) for _ in range(3)]
    nothing, five = np.zeros(3, np.uint32), bits(np.arange(70) == 5)
    for mask in (nothing, five):
        with pytest.raises(NothingLeftError, match="No token may come next") as caught:
            sample(logits, samplers, [None, None, mask])
        assert caught.value.row == 2
        assert caught.value.remedy
        assert np.array_equal(logits, before)
    with pytest.raises(NothingLeftError):
        distribution(logits[0], samplers[0], nothing)
    only = sample(logits, samplers, [bits(np.arange(70) == 69)] * 3)
    assert [draw.token for draw in only] == [69] * 3
    assert np.array_equal(logits, before)


@given(
    size=st.integers(1, 200),
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.0, 5e-324, 1e-30, 1e-3, 1.0, 100.0, 1e30, 1e300]),
    top_k=st.sampled_from([0, 1, 2, 64, 65, 66, 10**9]),
    top_p=st.sampled_from([1e-300, 0.3, 0.95, 1 - 2**-53, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 0.1, 1.0]),
    others=st.sampled_from(
        [{}, {"typical_p": 1e-9}, {"typical_p": 0.5}, {"top_n_sigma": 1e-9}, {"top_n_sigma": 1e9},
         {"xtc_probability": 1.0, "xtc_threshold": 0.0}, {"xtc_probability": 1.0, "xtc_threshold": 1.0}]
    ),
    logits=st.sampled_from(["random", "equal", "two", "one", "huge"]),
)  # fmt: skip
@settings(max_examples=250, deadline=None)
@example(size=66, seed=0, temperature=1e30, top_k=66, top_p=1.0, min_p=1.0, others={}, logits="random")
@example(size=66, seed=0, temperature=1e30, top_k=0, top_p=1.0, min_p=1.0, others={}, logits="random")
@example(
    size=2,
    seed=1,
    temperature=1e30,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    others={"xtc_probability": 1.0, "xtc_threshold": 0.0},
    logits="random",
)
@pytest.mark.filterwarnings("error")
def test_every_end_gives_a_token_that_is_defined(
    size: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    others: dict[str, float],
    logits: str,
) -> None:
    row = logits_of(seed, size)
    if logits == "equal":
        row[:] = 2
    elif logits == "two":
        row[row < np.median(row)] = -np.inf
        row[row > -np.inf] = np.round(row[row > -np.inf])
    elif logits == "one":
        row[np.arange(size) != seed % size] = -np.inf
    elif logits == "huge":
        row *= np.float32(1e37)
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, **others)
    sampler = Sampler(s)
    wanted = definitions.distribution(row, s, coin=0.0 if sampler.coin() else 1.0)
    [draw] = sample(row[None], [sampler])
    assert row[draw.token] > -np.inf
    # top_p's border may move by rounding; and where all are equal to the last bit, which one XTC leaves is rounding's.
    assert wanted[draw.token] > 0 or top_p < 1 or (temperature > 1e15 and sampler.coin())
    ours = distribution(row, sampler)
    assert ours[draw.token] > 0
    assert ours.sum() == pytest.approx(1)
    if top_p == 1 and not others:
        np.testing.assert_allclose(ours, wanted, atol=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300])
def test_a_temperature_at_an_end_warns_of_nothing(temperature: float) -> None:
    logits = np.array([1.0, -7.0, 3.0, -np.inf], np.float32)
    wanted = [0, 0, 1, 0] if temperature < 1 else [1 / 3, 1 / 3, 1 / 3, 0]
    np.testing.assert_allclose(distribution(logits, Sampler(Sampling(temperature=temperature, top_p=1.0))), wanted)
    assert np.isfinite(logits[sample(logits[None], [Sampler(Sampling(temperature=temperature))])[0].token])


# ---- what a request may say ----

REFUSED: list[tuple[str, object]] = [
    ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("min_p", 2.0),
    ("seed", -1), ("max_tokens", 0), ("stop", ("",)), ("stop", "END"), ("typical_p", 0), ("typical_p", True),
    ("top_n_sigma", -1.0), ("top_n_sigma", math.inf), ("xtc_probability", 1.1), ("xtc_threshold", -0.1),
    ("mirostat_tau", -1.0), ("mirostat_eta", 0.0), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan),
    ("presence_penalty", 101), ("frequency_penalty", math.nan), ("penalty_range", -1), ("penalty_range", 1.5),
    ("dry_multiplier", -1), ("dry_base", 0.5), ("dry_allowed_length", 0), ("dry_range", -1),
    ("dry_sequence_breakers", (-1,)), ("dry_sequence_breakers", ("\n",)), ("dry_sequence_breakers", "\n"),
    ("logit_bias", ((1, math.nan),)), ("logit_bias", ((1, 101),)), ("logit_bias", ((-1, 1),)),
    ("logit_bias", ((1, 1), (1, 2))), ("logit_bias", (1,)), ("logit_bias", {1: 2.0}), ("logit_bias", ((1, 2, 3),)),
    ("banned_tokens", (1.5,)), ("banned_tokens", 4), ("min_tokens", -1), ("ignore_eos", 1), ("logprobs", -1),
    ("logprobs", True), ("prompt_logprobs", 1.5), ("n", 0), ("n", None), ("best_of", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{field} must be ") as caught:
        Sampling(**{field: value})
    assert caught.value.remedy


def test_how_much_may_be_named_is_bounded() -> None:
    many = tuple(range(MOST_IDS))
    Sampling(stop=("x" * LONGEST_STOP,) * MOST_STOPS, banned_tokens=many, logit_bias=tuple((i, 1.0) for i in many))
    for field, value, why in (
        ("stop", ("x",) * (MOST_STOPS + 1), "stop has 65 strings, and 64 at most"),
        ("stop", ("x" * (LONGEST_STOP + 1),), "A stop string has 4097 characters, and 4096 at most"),
        ("banned_tokens", (*many, 0), "banned_tokens has 16385 tokens"),
        ("dry_sequence_breakers", (*many, 0), "dry_sequence_breakers has 16385 tokens"),
        ("logit_bias", tuple((i, 1.0) for i in range(MOST_IDS + 1)), "logit_bias has 16385 tokens"),
    ):
        with pytest.raises(UsageError, match=why):
            Sampling(**{field: value})


def test_values_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UsageError, match="min_tokens must be at most max_tokens = 3"):
        Sampling(min_tokens=4, max_tokens=3)
    with pytest.raises(UsageError, match="best_of must be a whole number from n = 3 to 128"):
        Sampling(n=3, best_of=2)
    for other in ({"top_p": 0.95}, {"top_k": 5}, {"min_p": 0.1}, {"typical_p": 0.5}, {"top_n_sigma": 1.0}):
        with pytest.raises(UsageError, match=f"mirostat_tau takes the place of {next(iter(other))}"):
            Sampling(**{"top_p": 1.0, "mirostat_tau": 5.0, **other})
    with pytest.raises(UsageError, match="xtc_probability"):
        replace(PLAIN, mirostat_tau=5.0, xtc_probability=0.5)


@pytest.mark.parametrize(
    "named", [{"logit_bias": ((50, 1.0),)}, {"banned_tokens": (3, 50)}, {"dry_sequence_breakers": (50,)}]
)
def test_tokens_outside_the_vocabulary_are_refused(named: dict[str, tuple[int, ...]]) -> None:
    check_tokens(Sampling(**named), 51)
    with pytest.raises(UsageError, match=f"{next(iter(named))}: token 50 is outside the model's vocabulary of 50"):
        check_tokens(Sampling(**named), 50)


def test_the_keywords_are_the_fields() -> None:
    assert SamplingOptions.__annotations__.keys() == Sampling.__dataclass_fields__.keys()


def test_defaults_switch_everything_off_but_temperature_and_top_p() -> None:
    logits = logits_of(1, 300)
    wanted = theirs(logits, Sampling())
    np.testing.assert_allclose(distribution(logits, told([1, 1, 1], [1, 1, 1], Sampling())), wanted, atol=1e-12)


SINGLE: list[tuple[Callable[..., np.ndarray], tuple[float, ...], list[bool]]] = [
    (definitions.top_k, (2,), [True, True, False, False]),
    (definitions.top_k, (9,), [True, True, True, True]),
    (definitions.top_p, (0.7,), [True, True, False, False]),
    (definitions.top_p, (0.71,), [True, True, True, False]),
    (definitions.min_p, (0.51,), [True, True, False, False]),
    (definitions.xtc, (0.2,), [False, False, True, True]),
    (definitions.mirostat, (1.8,), [True, True, False, False]),
    (definitions.mirostat, (-3.0,), [True, False, False, False]),
]


@pytest.mark.parametrize(("sampler", "numbers", "kept"), SINGLE)
def test_definitions_by_hand(sampler: Callable[..., np.ndarray], numbers: tuple[float, ...], kept: list[bool]) -> None:
    p = np.array([0.4, 0.3, 0.2, 0.1])
    assert sampler(p, *numbers).tolist() == kept


def test_top_n_sigma_by_hand() -> None:
    logits = np.array([0.0, 2.0, 4.0, 6.0, -np.inf])  # mean 3, deviation √5 = 2.236 of the four numbers
    assert np.flatnonzero(definitions.top_n_sigma(logits, 0.9)).tolist() == [2, 3]
    p = distribution(logits.astype(np.float32), Sampler(replace(PLAIN, top_n_sigma=0.89)))
    assert np.flatnonzero(p).tolist() == [3]


def test_numbers_of_every_kind_are_doubles_or_refused() -> None:
    """One that NumPy keeps as an object would break the step of all requests beside it."""
    assert type(Sampling(temperature=Fraction(1, 2)).temperature) is float
    for name, value in (("temperature", 10**400), ("top_k", 10**30), ("n", 129), ("best_of", 10**9)):
        with pytest.raises(UsageError, match=f"{name} must be"):
            Sampling(**{name: value})
