"""`puna cost`: a month of work at each host, on rented machines and on one's own, with the arithmetic.

What it is not: a quotation. Prices carry the day they were read, and assumed speeds are bounds that say so.
"""

from __future__ import annotations

import math
from datetime import date
from typing import Any

from puna.catalog import facts as family
from puna.catalog.cost import HOURS, MOST, Hosted, Machine, SelfHosted, Speed, Work, copies_of, hosted, self_hosted
from puna.catalog.market import Gpu, HostedModel, Market, Price, market
from puna.catalog.models import CatalogEntry
from puna.cli import terminal
from puna.cli.models import find
from puna.errors import CatalogError, UsageError
from puna.settings import CostSettings


def main(settings: CostSettings) -> int:
    """Run the command."""
    today = date.today()
    prices = market()
    work = Work(settings.requests, settings.tokens_in, settings.tokens_out, settings.cached, settings.batch)
    model = find(settings.model, prices)
    others = [find(name, prices) for name in settings.against]
    offers = []
    for each in (model, *others):
        found = _offers(each, prices, work, today)
        if not found and (isinstance(each, HostedModel) or each is not model):
            raise CatalogError(_no_offer(each, work, today), remedy=_add_a_price())
        offers += [(_name(each), hosted(price, work)) for price in found]
    own = None
    if isinstance(model, CatalogEntry):
        own = _own(model, settings, work, prices, today)
    else:
        _refuse_machine(settings, model)
    offers.sort(key=lambda each: (each[1].usd, each[1].price.host))
    if settings.json:
        terminal.document(_document(settings, work, offers, own, prices))
    else:
        _tell(settings, work, offers, own, prices, today)
    return 0


def _add_a_price() -> str:
    return "Add a [[prices]] table to catalog.toml in PUNA_HOME; docs/guides/choosing.md shows one."


def _name(model: CatalogEntry | HostedModel) -> str:
    return model.id if isinstance(model, HostedModel) else family.size_of(model)


def _offers(model: CatalogEntry | HostedModel, prices: Market, work: Work, today: date) -> list[Price]:
    """The offers of a model that still hold and take such a request."""
    if isinstance(model, HostedModel):
        if model.retired(today) or work.tokens_out > (model.context_out or math.inf):
            return []
        longest = model.context_in or math.inf
    else:
        # A Llama's context holds both.
        longest = model.context_length - work.tokens_out
    found = []
    for price in prices.prices_of(_name(model)):
        host = prices.hosts[price.host]
        gone = price.over(today) or (host.ended is not None and host.ended <= today)
        if not gone and work.tokens_in <= min(longest, price.context or math.inf):
            found.append(price)
    return found


def _no_offer(model: CatalogEntry | HostedModel, work: Work, today: date) -> str:
    """Why there is none."""
    if isinstance(model, HostedModel):
        if model.retired(today):
            return f"{model.name} retired on {model.retires}: it is not offered any more."
        for most, tokens, way in (
            (model.context_in, work.tokens_in, "in"),
            (model.context_out, work.tokens_out, "out"),
        ):
            if most is not None and tokens > most:
                return f"{model.name} takes {most:,} tokens {way} at most, and a request has {tokens:,.0f}."
    return f"No offer of {_name(model)} that still holds and takes such a request is in the catalog."


def _refuse_machine(settings: CostSettings, model: HostedModel) -> None:
    """A hosted model has no machine of one's own: a flag about one is refused."""
    for flag in ("gpu", "gpus", "rent", "price", "power", "electricity", "streams", "speed_in", "speed_out"):
        if getattr(settings, flag) is not None:
            raise UsageError(
                f"--{flag.replace('_', '-')} does not go with {model.name}.", remedy="It is not run by you."
            )
    if settings.buy:
        raise UsageError(f"--buy does not go with {model.name}.", remedy="It is not run by you.")


def _own(entry: CatalogEntry, settings: CostSettings, work: Work, prices: Market, today: date) -> SelfHosted:
    """The work on machines of one's own, as the flags describe them."""
    for flag, value in (
        ("--rent", settings.rent),
        ("--price", settings.price),
        ("--power", settings.power),
        ("--electricity", settings.electricity),
    ):
        if value is not None and not 0 <= value <= MOST:
            raise UsageError(f"{flag} {value}: must be a number from 0 to {MOST:.0e}.")
    for flag, number in (
        ("--gpus", settings.gpus), ("--streams", settings.streams), ("--months", settings.months),
        ("--speed-in", settings.speed_in), ("--speed-out", settings.speed_out),
    ):  # fmt: skip
        if number is not None and not 1 / MOST <= number <= MOST:
            raise UsageError(f"{flag} {str(number)[:40]}: must be above 0, and below {MOST:.0e}.")
    if settings.rent is not None and (settings.price is not None or settings.buy):
        raise UsageError("--rent does not go with --price or --buy.", remedy="Rent it or buy it.")
    if (settings.speed_in is None) != (settings.speed_out is None):
        raise UsageError("--speed-in and --speed-out go together.", remedy="`puna bench` measures both.")
    if settings.streams is not None and settings.speed_in is not None:
        raise UsageError("--streams does not go with --speed-in.", remedy="A measured speed has its streams in it.")
    tokens = max(1, math.ceil(work.tokens_in + work.tokens_out))
    if tokens > entry.context_length:
        raise CatalogError(
            f"A request of {tokens:,} tokens is longer than {entry.short_name}'s context of {entry.context_length:,}.",
            remedy="`puna models --context N` lists models that hold it.",
        )
    gpu = _gpu(entry, settings, prices, tokens, today)
    count = settings.gpus or copies_of(entry, gpu, tokens, settings.quant)
    if settings.price is not None or settings.buy:
        buy = settings.price if settings.price is not None else gpu.usd
        if buy is None:
            raise CatalogError(f"The catalog has no price to buy a {gpu.name}.", remedy="Say it with --price.")
        origin = "as given" if settings.price is not None else f"{gpu.source.name}, {gpu.source.date}"
        rent = None
    else:
        buy, rent = None, settings.rent
        origin = "as given"
        if rent is None:
            offer = next((o for o in prices.rents_of(gpu.id) if o.ended is None or o.ended > today), None)
            if offer is None:
                raise CatalogError(
                    f"The catalog has no rent for a {gpu.name}.", remedy="Say it with --rent, or --price."
                )
            # What must be taken together is paid together.
            count = math.ceil(count / offer.count) * offer.count
            rent, origin = (
                offer.usd_per_hour,
                f"{prices.renters[offer.host].name}, {offer.source.date}, {offer.source.name}",
            )
    machine = Machine(
        gpu,
        count,
        rent,
        buy,
        settings.months,
        settings.power if settings.power is not None else count * gpu.power,
        settings.electricity if settings.electricity is not None else prices.electricity.usd_per_kwh,
        origin,
    )
    measured = None
    if settings.speed_in is not None and settings.speed_out is not None:
        measured = Speed(settings.speed_in, settings.speed_out, 0, True)
    return self_hosted(entry, machine, work, settings.quant, settings.utilisation, measured, settings.streams)


def _gpu(entry: CatalogEntry, settings: CostSettings, prices: Market, tokens: int, today: date) -> Gpu:
    """The accelerator that was named, or the one on which one copy is cheapest to rent."""
    if settings.gpu is not None:
        found = prices.gpus.get(settings.gpu.lower())
        if found is None:
            raise CatalogError(
                f"--gpu {settings.gpu!r:.40}: the catalog does not know it.",
                remedy=f"One of {', '.join(prices.gpus)}; or describe it in catalog.toml, [gpus.NAME].",
            )
        return found
    offers = []
    for rent in prices.rents.values():
        if rent.ended is None or rent.ended > today:
            gpu = prices.gpus[rent.gpu]
            count = settings.gpus or copies_of(entry, gpu, tokens, settings.quant)
            fits = count >= copies_of(entry, gpu, tokens, settings.quant)
            if fits:
                offers.append((math.ceil(count / rent.count) * rent.count * rent.usd_per_hour, gpu.id, gpu))
    if not offers:
        raise CatalogError(
            f"{entry.short_name} as {settings.quant} does not fit {settings.gpus} of any accelerator in the catalog.",
            remedy="Give more with --gpus, or name one with --gpu.",
        )
    return min(offers)[2]


def _document(
    settings: CostSettings, work: Work, offers: list[tuple[str, Hosted]], own: SelfHosted | None, prices: Market
) -> dict[str, Any]:
    cheapest = offers[0][1].usd if offers else None
    document: dict[str, Any] = {
        "model": settings.model,
        "work": {
            "requests_a_month": work.requests,
            "tokens_in": work.tokens_in,
            "tokens_out": work.tokens_out,
            "cached": work.cached,
            "batch": work.batch,
        },
        "hosted": [
            {
                "model": name,
                "host": prices.hosts[cost.price.host].name,
                "usd_a_month": cost.usd,
                "without_cache": cost.without_cache,
                "without_batch": cost.without_batch,
                "steps": list(cost.steps),
                "notes": list(cost.notes),
                "source": {"name": cost.price.source.name, "date": cost.price.source.date.isoformat()},
            }
            for name, cost in offers
        ],
        "self_hosted": None,
    }
    if own is not None:
        even = own.break_even(cheapest, work) if cheapest else None
        document["self_hosted"] = {
            "accelerator": own.machine.gpu.name,
            "accelerators_a_copy": own.machine.count,
            "copies": own.copies,
            "rented": own.machine.rent is not None,
            "usd_a_month": own.usd,
            "without_cache": own.without_cache,
            "one_answer_at_a_time": own.one_stream,
            "utilisation": own.utilisation,
            "requests_a_copy": own.capacity,
            "tokens_a_second_in": own.speed.prefill,
            "tokens_a_second_out": own.speed.decode,
            "speed_is_measured": own.speed.measured,
            "break_even_utilisation": None if even is None or math.isinf(even[0]) else even[0],
            "break_even_requests": None if even is None or math.isinf(even[1]) else even[1],
            "steps": list(own.steps),
            "source": own.machine.origin,
        }
    return document


def _tell(
    settings: CostSettings,
    work: Work,
    offers: list[tuple[str, Hosted]],
    own: SelfHosted | None,
    prices: Market,
    today: date,
) -> None:
    terminal.say(
        f"{settings.requests:,} requests a month of {settings.tokens_in:,} tokens in and {settings.tokens_out:,} out"
        + f", {work.cached:.0%} of the input cached" * bool(work.cached)
        + f", {work.batch:.0%} in batches" * bool(work.batch)
        + "\n\n"
    )
    rows = []
    for name, cost in offers:
        price = cost.price
        rows.append(
            (
                f"{cost.usd:,.2f}",
                name,
                prices.hosts[price.host].name,
                f"${price.input:g} in, ${price.output:g} out a million",
                f"{price.source.date}",
                "; ".join(cost.notes),
            )
        )
    if own is not None:
        machine = own.machine
        kind = "rented" if machine.rent is not None else "bought"
        rows.append(
            (
                f"{own.usd:,.2f}",
                settings.model,
                f"yourself, {kind}",
                f"{own.copies * machine.count} × {machine.gpu.name}",
                machine.origin,
                f"busy {own.utilisation:.1%} of the time",
            )
        )
    rows.sort(key=lambda row: float(row[0].replace(",", "")))
    terminal.report(("$ A MONTH", "MODEL", "WHERE", "WHAT", "PRICE OF", "NOTES"), rows, (0,))
    if offers:
        name, best = offers[0]
        terminal.say(f"\n{name} at {prices.hosts[best.price.host].name}\n")
        for step in best.steps:
            terminal.say(f"  {step}\n")
        _savings(("the cache", best.without_cache - best.usd), ("batches", best.without_batch - best.usd))
    if own is None:
        return
    terminal.say("\nyourself\n")
    for step in own.steps:
        terminal.say(f"  {step}\n")
    _savings(
        ("the cache", own.without_cache - own.usd),
        ("answering many at a time", own.one_stream - own.usd if not own.speed.measured else 0.0),
    )
    if offers:
        best = offers[0][1]
        share, requests = own.break_even(best.usd, work)
        host = prices.hosts[best.price.host].name
        each = best.usd / work.requests
        terminal.say(
            f"  break-even with {host}: ${own.machine.monthly:,.2f} / ${each:.6g} a request = {requests:,.0f} requests "
            f"a month, {share:.1%} of one copy's time" + (", which it does not have\n" if share > 1 else "\n")
        )
    if own.machine.rent is not None:
        terminal.note(f"A rented machine is counted for all {HOURS:g} hours of a month, busy or not.")


def _savings(*saved: tuple[str, float]) -> None:
    for what, usd in saved:
        if usd > 0.005:
            terminal.say(f"  {what} saves ${usd:,.2f} a month\n")
