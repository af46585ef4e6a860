"""Costs, each worked out by hand here."""

from __future__ import annotations

from datetime import date

import pytest

from puna.catalog import models
from puna.catalog.cost import (
    BANDWIDTH_EFFICIENCY,
    HOURS,
    PEAK_EFFICIENCY,
    Machine,
    Speed,
    Work,
    copies_of,
    hosted,
    self_hosted,
    speed,
)
from puna.catalog.facts import kv_bytes
from puna.catalog.market import Gpu, Price, Source, Tier
from puna.errors import CatalogError, UsageError

SOURCE = Source("a test", "", date(2026, 1, 1))
CARD = Gpu("card", "Card", 24.0, 1000.0, 100.0, 300.0, 2000.0, "", SOURCE)
EIGHT = models.lookup("llama3.1:8b")


def price(**changes: object) -> Price:
    values: dict[str, object] = {
        "model": "m", "host": "h", "input": 2.0, "output": 10.0, "cached": None, "cache_write": None, "batch": None,
        "batch_cached": None, "tiers": (), "context": None, "ended": None, "genai": "", "note": "", "source": SOURCE,
    }  # fmt: skip
    return Price(**(values | changes))  # type: ignore[arg-type]


def test_a_host_by_hand() -> None:
    cost = hosted(price(), Work(1000, 2000, 500))
    # 2M in at 2, 0.5M out at 10
    assert cost.usd == pytest.approx(2 * 2 + 0.5 * 10)
    assert cost.steps == ("input: 2M tokens × $2 = $4.00", "output: 0.5M tokens × $10 = $5.00")
    assert cost.notes == ()


def test_a_cache_and_batches_by_hand() -> None:
    offer = price(cached=0.5, cache_write=2.5, batch=0.5, batch_cached=1.0)
    cost = hosted(offer, Work(1000, 2000, 500, cached=0.75, batch=0.4))
    # 0.5M fresh, 1.5M cached, 0.5M out; 40 % at half price, but for what is cached
    share = 1 - 0.4 * 0.5
    assert cost.usd == pytest.approx(0.5 * 2 * share + 1.5 * 0.5 + 0.5 * 10 * share)
    assert cost.without_cache == pytest.approx((2 * 2 + 0.5 * 10) * share)
    assert cost.without_batch == pytest.approx(0.5 * 2 + 1.5 * 0.5 + 0.5 * 10)
    assert any("2.5 a million" in note for note in cost.notes)


def test_what_a_host_has_no_price_for_is_charged_in_full_and_said() -> None:
    cost = hosted(price(), Work(1000, 2000, 500, cached=0.5, batch=1.0))
    assert cost.usd == hosted(price(), Work(1000, 2000, 500)).usd == cost.without_cache == cost.without_batch
    assert len(cost.notes) == 2


def test_a_long_prompt_has_the_higher_price() -> None:
    offer = price(tiers=(Tier(1000, 4.0, 20.0, None),))
    assert hosted(offer, Work(1000, 1000, 0)).usd == pytest.approx(2.0)
    assert hosted(offer, Work(1000, 1001, 0)).usd == pytest.approx(4.004)


@pytest.mark.parametrize(
    "work",
    [(0, 1, 1), (1, 0, 0), (1, -1, 5), (float("nan"), 1, 1), (1, 1, 1, 1.5), (1, 1, 1, 0, -0.1), (float("inf"), 1, 1)],
)
def test_work_that_is_none(work: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        Work(*work)


def rented(usd: float = 1.0, count: int = 1) -> Machine:
    return Machine(CARD, count, usd, None, 36, 300, 0.2, "a test")


def test_a_machine_by_hand() -> None:
    assert rented(1.5, 2).monthly == 2 * 1.5 * 730
    bought = Machine(CARD, 2, None, 3600.0, 36, 1000, 0.2, "a test")
    # 2 × 3600 / 36 = 200; 1 kW × 730 h × 0.2 = 146
    assert bought.monthly == pytest.approx(346)
    assert bought.steps() == [
        "2 × $3,600 over 36 months = $200.00 a month",
        "1000 W × 730 hours = 730.0 kWh × $0.2 = $146.00 a month",
    ]


def test_self_hosted_by_hand_with_a_measured_speed() -> None:
    work = Work(1_000_000, 1000, 300, cached=0.5)
    own = self_hosted(EIGHT, rented(2.0), work, "Q4_K_M", 0.5, Speed(5000.0, 1000.0, 0, True), None)
    # 500 / 5000 + 300 / 1000 = 0.4 s a request; 730 × 3600 / 0.4 = 6.57M requests a month at 100 %
    assert own.capacity == pytest.approx(6_570_000)
    assert own.copies == 1
    assert own.utilisation == pytest.approx(1 / 6.57)
    assert own.usd == pytest.approx(1460)
    # At $0.001 a request: 1,460,000 requests, 22.2 % of the copy's time.
    share, requests = own.break_even(1000.0, work)
    assert requests == pytest.approx(1_460_000)
    assert share == pytest.approx(1_460_000 / 6_570_000)
    assert share == pytest.approx(own.utilisation * own.usd / 1000.0)


def test_copies_are_added_above_the_utilisation() -> None:
    how = Speed(1000.0, 1000.0, 0, True)

    # 1 s a request: 2,628,000 a month
    def copies(requests: float, target: float) -> int:
        return self_hosted(EIGHT, rented(), Work(requests, 500, 500), "Q4_K_M", target, how, None).copies

    assert copies(2_628_000, 1.0) == 1
    assert copies(2_628_001, 1.0) == 2
    assert copies(2_628_000, 0.5) == 2
    own = self_hosted(EIGHT, rented(), Work(3_000_000, 500, 500, cached=0.9), "Q4_K_M", 0.5, how, None)
    # 0.55 s against 1 s: 2 copies against 3
    assert own.copies == 2
    assert own.without_cache == pytest.approx(3 * 730)
    for target in (0.0, 1.01, -1.0):
        with pytest.raises(UsageError):
            copies(1, target)


def test_the_assumed_speed_by_hand() -> None:
    work = Work(1, 1000, 200)
    how = speed(EIGHT, CARD, 1, work, "Q8_0", 4)
    params = 8_030_261_248
    read = params * 34 / 32 + 4 * kv_bytes(EIGHT, 1100)
    step = read / (BANDWIDTH_EFFICIENCY * 1000e9)
    assert how.decode == pytest.approx(4 / step)
    assert how.prefill == pytest.approx(PEAK_EFFICIENCY * 100e12 / (2 * params))
    assert (how.streams, how.measured) == (4, False)


def test_of_a_mixture_only_the_experts_that_are_met_are_read() -> None:
    scout = models.lookup("llama4:scout")
    big = Gpu("big", "Big", 200.0, 1000.0, 1e9, 1.0, None, "", SOURCE)
    work = Work(1, 10, 10)
    one = 16 * (107_769_861_120 - 17_172_894_720) / 15 / 16
    for batch in (1, 8):
        met = 16 * (1 - (15 / 16) ** batch)
        read = (17_172_894_720 - one + met * one) * 2 + batch * kv_bytes(scout, 15)
        how = speed(scout, Gpu("b", "B", 300.0, 1000.0, 1e9, 1.0, None, "", SOURCE), 1, work, "BF16", batch)
        assert how.decode == pytest.approx(batch * BANDWIDTH_EFFICIENCY * 1000e9 / read)
    assert copies_of(scout, big, 8192, "BF16") == 2


def test_what_does_not_fit_is_refused() -> None:
    assert copies_of(EIGHT, CARD, 8192, "Q4_K_M") == 1
    assert copies_of(models.lookup("llama3.3:70b"), CARD, 8192, "Q4_K_M") == 3
    with pytest.raises(CatalogError, match="does not fit 1 × Card"):
        speed(models.lookup("llama3.3:70b"), CARD, 1, Work(1, 1000, 100), "Q4_K_M")
    with pytest.raises(CatalogError, match="999 conversations"):
        speed(EIGHT, CARD, 1, Work(1, 1000, 100), "Q4_K_M", 999)
    assert HOURS * 12 == 8760
