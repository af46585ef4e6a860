"""The sampler against distributions worked out by hand and by transformers' own filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from puna.engine.sampler import Sampler, distribution
from puna.errors import UsageError
from puna.types import Sampling, SamplingOptions


def logits_of(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def theirs(logits: np.ndarray, s: Sampling) -> np.ndarray:
    scores = TemperatureLogitsWarper(s.temperature)(None, torch.from_numpy(logits)[None].double())
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(None, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(s.top_p)(None, scores)
    if s.min_p:
        scores = MinPLogitsWarper(s.min_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_p=1.0),
        Sampling(temperature=0.6, top_p=0.9),
        Sampling(temperature=1.3, top_p=1.0, top_k=7),
        Sampling(temperature=1.0, top_p=1.0, min_p=0.1),
        Sampling(temperature=0.8, top_p=0.8, top_k=20, min_p=0.05),
    ],
    ids=["plain", "top-p", "top-k", "min-p", "all"],
)
def test_distribution_equals_transformers(seed: int, sampling: Sampling) -> None:
    logits = logits_of(seed)
    np.testing.assert_allclose(distribution(logits, sampling), theirs(logits, sampling), atol=1e-12)


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling(temperature=0)).pick(np.array([1.0, 3.0, 3.0], np.float32)) == 1


def test_same_seed_same_draws_and_they_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampling = Sampling(temperature=1.0, top_p=1.0, seed=11)
    one, two = Sampler(sampling), Sampler(sampling)
    draws = [one.pick(logits) for _ in range(4000)]
    assert draws == [two.pick(logits) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.2], atol=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_what_is_no_number_is_never_sampled(temperature: float, fault: float) -> None:
    with pytest.raises(FloatingPointError):
        Sampler(Sampling(temperature=temperature)).pick(np.array([0.0, fault, 1.0], np.float32))


@pytest.mark.filterwarnings("error")
def test_a_temperature_next_to_nothing_takes_the_largest() -> None:
    logits = np.array([1.0, -7.0, 3.0], np.float32)
    assert distribution(logits, Sampling(temperature=5e-324)).tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("seed", -1),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", "END"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        Sampling(**{field: value})


def test_the_keywords_are_the_fields() -> None:
    assert SamplingOptions.__annotations__.keys() == Sampling.__dataclass_fields__.keys()


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_nucleus_of_any_size_equals_transformers(top_p: float, spread: float) -> None:
    """Flat logits need more tokens than are looked at first, up to nearly all of them."""
    logits = np.random.default_rng(2).normal(0, spread, 9000).astype(np.float32)
    sampling = Sampling(temperature=1.0, top_p=top_p)
    ours, wanted = distribution(logits, sampling), theirs(logits, sampling)
    assert abs(np.count_nonzero(ours) - np.count_nonzero(wanted)) <= 1  # sums in another order, at the border
    np.testing.assert_allclose(ours, wanted, atol=1e-4 if spread < 1 else 1e-7)


def test_ties_at_the_border_of_top_k_are_all_kept() -> None:
    logits = np.array([1, 5, 3, 3, 0, 3], np.float32)
    assert np.flatnonzero(distribution(logits, Sampling(temperature=1.0, top_p=1.0, top_k=2))).tolist() == [1, 2, 3, 5]
