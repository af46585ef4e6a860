"""Who hosts which model, who rents which accelerator, and for how much.

What it is: `hosted.toml` and `hardware.toml` read into records, and a person's own `catalog.toml` in PUNA_HOME laid
over them: an item there replaces the one of the same key (a model's id; a price's model and host; a rent's accelerator
and host), and what is new is added.
What it is not: today's prices. Each is what its source said on its day; nothing is fetched.
What is surprising: a price may have ended, and a model may be retired. They stay, and say so, because people look them
up; what is computed leaves them out unless it is asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import TypeVar

from puna.catalog import models
from puna.catalog.tables import Table, read_file, read_resource
from puna.errors import CatalogError
from puna.settings import puna_home

T = TypeVar("T")

OVERRIDES = "catalog.toml"
"""The name of a person's own file in PUNA_HOME."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a fact was read, and on which day."""

    name: str
    url: str
    date: date


@dataclass(frozen=True, slots=True)
class Host:
    """Somebody who serves models or rents machines. `ended` is the day from which there is no such offer."""

    id: str
    name: str
    url: str
    ended: date | None
    note: str
    source: Source


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model that is not Llama. Tokens in and out are the most there may be; None and "" are not known."""

    id: str
    name: str
    maker: str
    released: date | None
    context_in: int | None
    context_out: int | None
    sees: bool | None
    cutoff: str
    weights: str
    licence: str
    access: str
    retires: date | None
    note: str
    source: Source

    def retired(self, today: date) -> bool:
        """Whether it is gone on that day."""
        return self.retires is not None and self.retires <= today


@dataclass(frozen=True, slots=True)
class Tier:
    """What a request costs whose prompt has more than `above` tokens; all of its tokens, not those beyond."""

    above: int
    input: float
    output: float
    cached: float | None


@dataclass(frozen=True, slots=True)
class Price:
    """What a host charges for a model: dollars a million tokens in, out, and in from its cache.

    `model` is a HostedModel's id or a Llama's short name. `batch` is the share of the price that batches cost and
    `batch_cached` the same for cached input; None where the host has no such offer. `context` is the most tokens in at
    this host, where it is less than the model's own.
    """

    model: str
    host: str
    input: float
    output: float
    cached: float | None
    cache_write: float | None
    batch: float | None
    batch_cached: float | None
    tiers: tuple[Tier, ...]
    context: int | None
    ended: date | None
    genai: str
    note: str
    source: Source

    def over(self, today: date) -> bool:
        """Whether the offer has ended on that day."""
        return self.ended is not None and self.ended <= today

    def at(self, prompt_tokens: float) -> Tier:
        """The rates for a request with that many tokens in."""
        fitting = [tier for tier in self.tiers if prompt_tokens > tier.above]
        return fitting[-1] if fitting else Tier(0, self.input, self.output, self.cached)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An accelerator: memory in GB, bandwidth in GB/s, peak in TFLOP/s of dense BF16, power in watts, price to buy."""

    id: str
    name: str
    memory: float
    bandwidth: float
    peak: float
    power: float
    usd: float | None
    note: str
    source: Source


@dataclass(frozen=True, slots=True)
class Rent:
    """What one card costs an hour at a host; `count` is how many must be taken together."""

    gpu: str
    host: str
    usd_per_hour: float
    count: int
    ended: date | None
    note: str
    source: Source


@dataclass(frozen=True, slots=True)
class Electricity:
    """Dollars a kilowatt hour."""

    usd_per_kwh: float
    note: str
    source: Source


@dataclass(frozen=True)
class Market:
    """All of it. Hosts of models and hosts of machines are two lists, since AWS is in both."""

    hosts: Mapping[str, Host]
    models: Mapping[str, HostedModel]
    prices: Mapping[tuple[str, str], Price]
    renters: Mapping[str, Host]
    gpus: Mapping[str, Gpu]
    rents: Mapping[tuple[str, str], Rent]
    electricity: Electricity

    def prices_of(self, model: str) -> list[Price]:
        """The prices of a model, cheapest (input and output together) first."""
        return sorted(
            (price for price in self.prices.values() if price.model == model),
            key=lambda price: (price.input + price.output, price.host),
        )

    def rents_of(self, gpu: str) -> list[Rent]:
        """The rents of an accelerator, cheapest first."""
        found = (rent for rent in self.rents.values() if rent.gpu == gpu)
        return sorted(found, key=lambda rent: (rent.usd_per_hour, rent.host))


def market() -> Market:
    """Puna's own records with the person's `catalog.toml` over them. Raises CatalogError for a file that is wrong."""
    path = puna_home() / OVERRIDES
    try:
        known = path.stat()
    except OSError:
        return _own()
    return _with(path, known.st_mtime_ns, known.st_size)


@cache
def _own() -> Market:
    hosted, hardware = _Reader(read_resource("hosted.toml")), _Reader(read_resource("hardware.toml"))
    prices, rents = hosted.prices(), hardware.rents()
    electricity = hardware.electricity()
    assert electricity is not None
    made = Market(
        hosted.hosts(), hosted.models(), prices, hardware.hosts("renters"), hardware.gpus(), rents, electricity
    )
    hosted.table.finish()
    hardware.table.finish()
    _check("hosted.toml", made)
    return made


@cache
def _with(path: Path, _mtime: int, _size: int) -> Market:
    """The person's file over Puna's own; read again when it has changed."""
    own, reader = _own(), _Reader(read_file(path))
    made = replace(
        own,
        models={**own.models, **reader.models()},
        hosts={**own.hosts, **reader.hosts()},
        renters={**own.renters, **reader.hosts("renters")},
        prices={**own.prices, **reader.prices()},
        gpus={**own.gpus, **reader.gpus()},
        rents={**own.rents, **reader.rents()},
        electricity=reader.electricity() or own.electricity,
    )
    reader.table.finish()
    _check(str(path), made)
    return made


def _check(where: str, made: Market) -> None:
    """Every price and rent names things that are there."""
    for price in made.prices.values():
        known = price.model in made.models or models.find(price.model) is not None
        if not known or price.host not in made.hosts:
            what = f"host {price.host!r}" if known else f"model {price.model!r}"
            raise CatalogError(f"{where}: a price names the {what:.90}, which is not known.", remedy=_remedy(known))
    for rent in made.rents.values():
        known = rent.gpu in made.gpus
        if not known or rent.host not in made.renters:
            what = f"host {rent.host!r}" if known else f"accelerator {rent.gpu!r}"
            remedy = (
                "Describe it in [renters.NAME]." if known else f"Known: {', '.join(made.gpus)}; or add [gpus.NAME]."
            )
            raise CatalogError(f"{where}: a rent names the {what:.90}, which is not known.", remedy=remedy)


def _remedy(model_known: bool) -> str:
    if model_known:
        return "Describe it in [hosts.NAME]."
    return "Write a short name of `puna models`, or describe it in [models.NAME]."


def read_sources(table: Table) -> dict[str, Source]:
    """The `[sources.NAME]` of a file."""
    found = {}
    for name, each in table.named("sources"):
        day = each.day_or_none("date")
        if day is None:
            raise CatalogError(f"{each.where}: date is missing.", remedy="It is the day the source was read.")
        found[name] = Source(each.text("name"), each.text_or("url"), day)
        each.finish()
    return found


class _Reader:
    """Reads the tables of one file. `source` is an id of its `[sources]`, or a text with a `date` beside it."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.sources = read_sources(table)

    def source(self, table: Table) -> Source:
        """The source of an item, and its day: the item's own `date` goes before its source's."""
        said, day = table.text("source"), table.day_or_none("date")
        known = self.sources.get(said)
        if known is not None:
            return known if day is None else replace(known, date=day)
        if day is None:
            raise CatalogError(
                f"{table.where}: the source {said!r:.80} has no date.",
                remedy="Add date = 2026-11-24 (the day it was read), or describe it in [sources.NAME].",
            )
        return Source(said, "", day)

    def hosts(self, key: str = "hosts") -> dict[str, Host]:
        """The hosts of `[hosts.NAME]`, or `[renters.NAME]`."""
        found = {}
        for name, each in self.table.named(key):
            found[name] = Host(
                name,
                each.text("name"),
                each.text_or("url"),
                each.day_or_none("ended"),
                each.text_or("note"),
                self.source(each),
            )
            each.finish()
        return found

    def models(self) -> dict[str, HostedModel]:
        """The models of `[models.NAME]`."""
        found = {}
        for name, each in self.table.named("models"):
            if models.find(name) is not None:
                raise CatalogError(
                    f"{each.where}: {name} is a Llama, whose facts do not change.",
                    remedy="Choose another id; prices of a Llama are given in [[prices]].",
                )
            found[name] = HostedModel(
                id=name,
                name=each.text("name"),
                maker=each.text("maker"),
                released=each.day_or_none("released"),
                context_in=each.count_or_none("context_in"),
                context_out=each.count_or_none("context_out"),
                sees=each.truth_or_none("sees"),
                cutoff=each.text_or("cutoff"),
                weights=each.text_or("weights"),
                licence=each.text_or("licence"),
                access=each.text_or("access"),
                retires=each.day_or_none("retires"),
                note=each.text_or("note"),
                source=self.source(each),
            )
            each.finish()
        return found

    def prices(self) -> dict[tuple[str, str], Price]:
        """The prices of `[[prices]]`."""
        found = []
        for each in self.table.tables("prices"):
            tiers = []
            for tier in each.tables("tiers"):
                above = tier.count_or_none("above")
                if above is None:
                    raise CatalogError(f"{tier.where}: above is missing.", remedy="It is a number of tokens.")
                tiers.append(Tier(above, tier.number("input"), tier.number("output"), tier.number_or_none("cached")))
                tier.finish()
            price = Price(
                model=each.text("model"),
                host=each.text("host"),
                input=each.number("input"),
                output=each.number("output"),
                cached=each.number_or_none("cached"),
                cache_write=each.number_or_none("cache_write"),
                batch=each.number_or_none("batch"),
                batch_cached=each.number_or_none("batch_cached"),
                tiers=tuple(sorted(tiers, key=lambda tier: tier.above)),
                context=each.count_or_none("context"),
                ended=each.day_or_none("ended"),
                genai=each.text_or("genai"),
                note=each.text_or("note"),
                source=self.source(each),
            )
            each.finish()
            # One spelling of a Llama, so that a price finds it: meta-llama/Llama-3.1-8B-Instruct is llama3.1:8b.
            if (entry := models.find(price.model)) is not None:
                price = replace(price, model=entry.short_name)
            found.append(price)
        return _by_key(self.table.where, found, lambda price: (price.model, price.host))

    def gpus(self) -> dict[str, Gpu]:
        """The accelerators of `[gpus.NAME]`."""
        found = {}
        for name, each in self.table.named("gpus"):
            gpu = Gpu(
                id=name,
                name=each.text("name"),
                memory=each.number("memory"),
                bandwidth=each.number("bandwidth"),
                peak=each.number("peak"),
                power=each.number("power"),
                usd=each.number_or_none("usd"),
                note=each.text_or("note"),
                source=self.source(each),
            )
            each.finish()
            if not (gpu.memory and gpu.bandwidth and gpu.peak):
                raise CatalogError(
                    f"{each.where}: memory, bandwidth and peak must be above 0.",
                    remedy="They are GB, GB/s and TFLOP/s.",
                )
            found[name] = gpu
        return found

    def rents(self) -> dict[tuple[str, str], Rent]:
        """The rents of `[[rents]]`."""
        found = []
        for each in self.table.tables("rents"):
            found.append(
                Rent(
                    gpu=each.text("gpu"),
                    host=each.text("host"),
                    usd_per_hour=each.number("usd_per_hour"),
                    count=each.count_or_none("count") or 1,
                    ended=each.day_or_none("ended"),
                    note=each.text_or("note"),
                    source=self.source(each),
                )
            )
            each.finish()
        return _by_key(self.table.where, found, lambda rent: (rent.gpu, rent.host))

    def electricity(self) -> Electricity | None:
        """`[electricity]`, if it is there."""
        each = self.table.table_or_none("electricity")
        if each is None:
            return None
        found = Electricity(each.number("usd_per_kwh"), each.text_or("note"), self.source(each))
        each.finish()
        return found


def _by_key(where: str, items: Iterable[T], key: Callable[[T], tuple[str, str]]) -> dict[tuple[str, str], T]:
    found: dict[tuple[str, str], T] = {}
    for item in items:
        name = key(item)
        if name in found:
            raise CatalogError(f"{where}: {' at '.join(name)} is given twice.", remedy="Leave one.")
        found[name] = item
    return found
