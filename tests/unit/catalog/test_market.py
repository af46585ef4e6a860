"""Prices: each has a source and a day, those from genai-prices are its, and a person's file is read strictly."""

from __future__ import annotations

import contextlib
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.catalog import market as module
from puna.catalog import models
from puna.catalog.market import OVERRIDES, Price, market
from puna.errors import CatalogError

TODAY = date(2026, 11, 24)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUNA_HOME", str(tmp_path))
    return tmp_path


def test_every_price_and_every_rent_has_a_source_and_a_day() -> None:
    known = market()
    priced = [*known.prices.values(), *known.rents.values(), known.electricity]
    priced += [gpu for gpu in known.gpus.values() if gpu.usd is not None]
    assert len(known.prices) > 60
    assert len(known.rents) > 10
    for each in [*priced, *known.hosts.values(), *known.renters.values(), *known.models.values(), *known.gpus.values()]:
        assert each.source.name
        assert each.source.url.startswith(("https://", "http://"))
        assert date(2025, 1, 1) <= each.source.date <= TODAY


def test_prices_are_whole() -> None:
    known = market()
    for price in known.prices.values():
        assert price.model in known.models or models.lookup(price.model).short_name == price.model
        assert 0 < price.input <= price.output * 20
        assert price.output > 0
        assert price.cached is None or price.cached < price.input
        assert price.batch in (None, 0.5)
        assert price.batch is not None or price.batch_cached is None
        assert [tier.above for tier in price.tiers] == sorted({tier.above for tier in price.tiers})


@pytest.mark.parametrize("price", [p for p in market().prices.values() if p.genai], ids=lambda p: p.genai)
def test_prices_from_genai_prices_are_its(price: Price) -> None:
    data = pytest.importorskip("genai_prices.data", reason="needs genai-prices, of the dev group")
    provider, _, name = price.genai.partition("/")
    [found] = [m for p in data.providers if p.id == provider for m in p.models if m.id == name]
    when = datetime(2026, 11, 24, 12, tzinfo=UTC)
    theirs = found.get_prices(when)

    def base(value: object) -> float | None:
        return None if value is None else float(getattr(value, "base", value))  # type: ignore[arg-type]

    assert (price.input, price.output) == (base(theirs.input_mtok), base(theirs.output_mtok))
    assert price.cached == base(theirs.cache_read_mtok)
    assert price.cache_write == base(theirs.cache_write_mtok)
    for number, tier in enumerate(price.tiers):
        for mine, other in ((tier.input, theirs.input_mtok), (tier.output, theirs.output_mtok)):
            assert (tier.above, mine) == (other.tiers[number].start, float(other.tiers[number].price))
    batch = found.get_prices(when, {"processing": "batch"})
    assert base(batch.input_mtok) == pytest.approx(price.input * (1.0 if price.batch is None else price.batch))
    assert base(batch.output_mtok) == pytest.approx(price.output * (1.0 if price.batch is None else price.batch))
    if price.cached is not None and price.batch_cached is not None:
        assert base(batch.cache_read_mtok) == pytest.approx(price.cached * price.batch_cached)


def test_what_articles_get_wrong_is_right() -> None:
    known = market()
    gpt = known.models["gpt-5"]
    assert (gpt.context_in, gpt.context_out) == (272_000, 128_000)
    deepseek = known.prices["deepseek-v3", "deepseek"]
    assert (deepseek.input, deepseek.output) == (0.27, 1.10)
    assert known.hosts["anyscale"].ended == date(2024, 8, 1)


def test_retired_models_say_so() -> None:
    known = market().models
    assert [name for name, model in known.items() if model.retired(TODAY)] == ["mistral-large-2", "deepseek-v3"]
    assert not known["gpt-5"].retired(date(2026, 12, 10))
    assert known["gpt-5"].retired(date(2026, 12, 11))
    prices = market().prices
    assert prices["llama3.3:70b", "groq"].over(TODAY)
    assert not prices["llama3.3:70b", "together"].over(TODAY)


def test_a_tier_counts_for_the_whole_request() -> None:
    price = market().prices["gemini-2.5-pro", "google"]
    assert price.at(200_000).input == 1.25
    assert (price.at(200_001).input, price.at(200_001).output, price.at(200_001).cached) == (2.5, 15.0, 0.25)


OWN = """
[models.ours]
name = "Ours"
maker = "We"
source = "our contract"
date = 2026-01-02

[[prices]]
model = "ours"
host = "openai"
input = 1
output = 2.5
source = "our contract"
date = 2026-01-02

[[prices]]
model = "meta-llama/Llama-3.3-70B-Instruct"
host = "together"
input = 0.5
output = 0.5
source = "our contract"
date = 2026-01-02

[[rents]]
gpu = "h100"
host = "cellar"
usd_per_hour = 0.9
source = "our own meter"
date = 2026-01-02

[renters.cellar]
name = "The cellar"
source = "our own meter"
date = 2026-01-02
"""


def test_a_persons_file_goes_before_puna(home: Path) -> None:
    before = market()
    (home / OVERRIDES).write_text(OWN)
    after = market()
    assert before.prices["llama3.3:70b", "together"].input == 0.88
    assert after.prices["llama3.3:70b", "together"].input == 0.5
    assert after.prices["llama3.3:70b", "together"].source.name == "our contract"
    assert after.prices["ours", "openai"].source.date == date(2026, 1, 2)
    assert after.rents_of("h100")[0].host == "cellar"
    assert after.prices["gpt-5", "openai"] == before.prices["gpt-5", "openai"]
    # It is read again once it has changed.
    (home / OVERRIDES).write_text(OWN.replace("0.5", "0.25"))
    assert market().prices["llama3.3:70b", "together"].input == 0.25
    (home / OVERRIDES).unlink()
    assert market() is before


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (("input = 1\n", "imput = 1\n"), "input is missing", ""),
        (("output = 2.5", "output = 2.5\noutptu = 1"), "there is no key 'outptu'", "Did you mean output"),
        (("input = 1\n", 'input = "1"\n'), "input must be a number, not '1'", "docs/guides"),
        (("input = 1\n", "input = true\n"), "input must be a number, not True", ""),
        (("input = 1\n", "input = nan\n"), "a finite number of at least 0", ""),
        (("input = 1\n", "input = -1\n"), "a finite number of at least 0", ""),
        (("input = 1\n", "input = 1e300\n"), "a finite number of at least 0", ""),
        (('model = "ours"', 'model = "theirs"'), "the model 'theirs', which is not known", "puna models"),
        (('host = "openai"', 'host = "nobody"'), "the host 'nobody', which is not known", "hosts.NAME"),
        (('gpu = "h100"', 'gpu = "h1000"'), "the accelerator 'h1000', which is not known", "gpus.NAME"),
        (('host = "cellar"', 'host = "attic"'), "the host 'attic', which is not known", "renters.NAME"),
        (("date = 2026-01-02", 'date = "2026-01-02"'), "date must be a date such as", ""),
        (("date = 2026-01-02", ""), "the source 'our contract' has no date", "the day it was read"),
        (("[models.ours]", '[models."llama3.1:8b"]'), "llama3.1:8b is a Llama", "Choose another id"),
        (('model = "ours"', 'model = ""'), "model must be a text that is not empty", ""),
        (("[models.ours]", "[models.ours"), "is not TOML", "toml.io"),
        (("[models.ours]", "models = 3\n[x.ours]"), "models must be a table of tables", ""),
        (("[renters.cellar]", "[renterz.cellar]"), "there is no key 'renterz'", "Did you mean renters"),
    ],
)
def test_a_persons_file_is_read_strictly(home: Path, change: tuple[str, str], message: str, remedy: str) -> None:
    assert change[0] in OWN
    (home / OVERRIDES).write_text(OWN.replace(change[0], change[1], 1))
    with pytest.raises(CatalogError) as caught:
        market()
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.remedy


def test_a_price_is_given_once(home: Path) -> None:
    (home / OVERRIDES).write_text(OWN + OWN[OWN.index("[[prices]]") : OWN.index("[[rents]]")])
    with pytest.raises(CatalogError, match="ours at openai is given twice"):
        market()


def test_a_file_that_is_too_large_or_no_file(home: Path) -> None:
    (home / OVERRIDES).write_bytes(b"#" * (1 << 21))
    with pytest.raises(CatalogError, match="larger than"):
        market()
    (home / OVERRIDES).unlink()
    (home / OVERRIDES).mkdir()
    with pytest.raises(CatalogError, match="cannot be read"):
        market()


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, len(OWN) - 1), piece=st.text(max_size=4), drop=st.integers(0, 6))
def test_a_damaged_file_is_an_error_or_right(
    at: int, piece: str, drop: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("own") / OVERRIDES
    path.write_text(OWN[:at] + piece + OWN[at + drop :], "utf-8", errors="replace")
    with contextlib.suppress(CatalogError):
        module._with(path, 0, 0)


def test_the_guides_example_is_read(home: Path) -> None:
    guide = Path(__file__).resolve().parents[3] / "docs" / "guides" / "choosing.md"
    example = guide.read_text("utf-8").split("```toml\n")[1].split("```")[0]
    (home / OVERRIDES).write_text(example, "utf-8")
    known = market()
    assert known.prices["llama3.3:70b", "ours"].cached == 0.05
    assert known.models["other-7b"].context_in == 32_000
    assert known.rents["h100", "cellar"].usd_per_hour == 1.10
    assert known.gpus["rtx5090"].memory == 32
    assert known.electricity.usd_per_kwh == 0.28
