"""`puna models`: the family as a table, one model whole, several side by side, and a picture of cost.

What it is not: what is on this machine; that is `puna list`.
What is surprising: the table has one row a size, since its forms (instruct, base) differ in nothing that it shows; with
`--json` each checkpoint is an item of its own.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

from puna.catalog import facts as family
from puna.catalog import models as catalog
from puna.catalog.facts import Facts
from puna.catalog.licence import licence_of
from puna.catalog.market import HostedModel, Market, Price, Source, market
from puna.catalog.models import CatalogEntry
from puna.cli import terminal
from puna.errors import CatalogError, UsageError
from puna.settings import ModelsSettings

USUAL_CONTEXT = 8192
"""Tokens that the memory column counts with where --context does not say."""

QUANT = "Q4_K_M"


def main(settings: ModelsSettings) -> int:
    """Run the command."""
    prices = market()
    today = date.today()
    if settings.models:
        chosen = [find(name, prices) for name in settings.models]
        items = [described(each, prices, today) for each in chosen]
        if settings.json:
            terminal.document({"models": items})
        elif len(chosen) == 1:
            _show(chosen[0], items[0])
        else:
            _compare(items)
        return 0
    if settings.hosted and settings.hosts:
        raise UsageError("--hosted does not go with --hosts.", remedy="Ask for one of the two.")
    if settings.hosted:
        return _hosted(settings, prices, today)
    if settings.hosts:
        return _hosts(settings, prices, today)
    shown = _filtered(settings)
    if settings.picture is not None:
        from puna.cli import chart

        drawn, left_out = chart.write(settings.picture, settings.against, settings.benchmark, shown, prices, today)
        terminal.note(f"{settings.picture}: {drawn} models, cost against {settings.against}; {left_out} without both")
    shown = sorted(shown, key=_key(settings, prices, today))
    if settings.json:
        names = {entry.name for entry in shown}
        forms = [entry for size in shown for entry in catalog.entries() if entry.name == size.name]
        assert {entry.name for entry in forms} == names
        terminal.document({"models": [described(entry, prices, today) for entry in forms]})
    elif settings.picture is None:
        _table(settings, shown, prices, today)
    return 0


def find(name: str, prices: Market) -> CatalogEntry | HostedModel:
    """The Llama or hosted model called `name`. Raises CatalogError or HubError, which offer the nearest."""
    if (entry := catalog.find(name)) is not None:
        return entry
    asked = name.strip().lower().replace(" ", "-")
    for model in prices.models.values():
        if asked in (model.id, model.name.lower().replace(" ", "-")):
            return model
    if family.correction(name) is None and (near := difflib.get_close_matches(asked, prices.models, n=1, cutoff=0.75)):
        raise CatalogError(f"There is no model called {name!r:.80} in the catalog.", remedy=f"Did you mean {near[0]}?")
    return catalog.lookup(name)


def cheapest(name: str, prices: Market, today: date) -> Price | None:
    """The cheapest price of a model that still holds."""
    return next((price for price in prices.prices_of(name) if not price.over(today)), None)


def described(model: CatalogEntry | HostedModel, prices: Market, today: date) -> dict[str, Any]:
    """What `--json` gives for a model: plain data, memory in bytes, prices in dollars a million tokens."""
    if isinstance(model, HostedModel):
        return {
            "short_name": model.id,
            "name": model.name,
            "maker": model.maker,
            "released": _day(model.released),
            "context_length": model.context_in,
            "output_length": model.context_out,
            "sees": model.sees,
            "knowledge_cutoff": model.cutoff or None,
            "weights": model.weights or None,
            "licence": model.licence or None,
            "access": model.access or None,
            "retires": _day(model.retires),
            "retired": model.retired(today),
            "notes": [model.note] if model.note else [],
            "source": _source(model.source),
            "prices": [_price(price, prices, today) for price in prices.prices_of(model.id)],
        }
    known = family.facts(model)
    return {
        "short_name": model.short_name,
        "name": model.name,
        "hub_id": model.hub_id,
        "generation": model.generation,
        "variant": model.variant,
        "released": model.released,
        "parameters": model.params,
        "parameters_stated": model.params_stated,
        "vision_parameters": model.vision_params,
        "active_parameters": known.active,
        "experts": known.experts,
        "context_length": model.context_length,
        "sees": known.sees,
        "languages": list(known.languages),
        "knowledge_cutoff": known.cutoff or None,
        "training_tokens": known.training_tokens or None,
        "formats": list(known.formats),
        "quantized": list(known.quantized),
        "memory_bytes": {quant: round(family.memory_bytes(model, USUAL_CONTEXT, quant)) for quant in family.BITS},
        "licence": model.licence_name,
        "gated": model.gated,
        "scores": [
            {"benchmark": s.benchmark, "setup": s.setup, "of": s.of, "value": s.value, "source": _source(s.source)}
            for s in known.scores
        ],
        "notes": _notes(model, known),
        "source": _source(known.source),
        "prices": [_price(price, prices, today) for price in prices.prices_of(family.size_of(model))],
    }


def _notes(entry: CatalogEntry, known: Facts) -> list[str]:
    return [note for note in (entry.note, *known.notes) if note]


def _day(day: date | None) -> str | None:
    return None if day is None else day.isoformat()


def _source(source: Source) -> dict[str, str]:
    return {"name": source.name, "url": source.url, "date": source.date.isoformat()}


def _price(price: Price, prices: Market, today: date) -> dict[str, Any]:
    host = prices.hosts[price.host]
    return {
        "host": host.name,
        "input": price.input,
        "output": price.output,
        "cached": price.cached,
        "cache_write": price.cache_write,
        "batch": price.batch,
        "batch_cached": price.batch_cached,
        "tiers": [{"above": t.above, "input": t.input, "output": t.output, "cached": t.cached} for t in price.tiers],
        "context": price.context,
        "ended": _day(price.ended or host.ended),
        "offered": not (price.over(today) or (host.ended is not None and host.ended <= today)),
        "note": price.note,
        "source": _source(price.source),
    }


def _sizes() -> list[CatalogEntry]:
    """The default form of each size."""
    return [entry for entry in catalog.entries() if entry.short_name == family.size_of(entry)]


def _filtered(settings: ModelsSettings) -> list[CatalogEntry]:
    generations = sorted({entry.generation for entry in catalog.entries()})
    licences = sorted({entry.licence for entry in catalog.entries()})
    for flag, value, known in (
        ("--generation", settings.generation, generations),
        ("--licence", settings.licence, licences),
    ):
        if value is not None and value not in known:
            raise UsageError(f"{flag} {value!r:.40}: there is none.", remedy=f"One of {', '.join(known)}.")
    shown = []
    for entry in _sizes():
        known_facts = family.facts(entry)
        memory = family.memory_bytes(entry, settings.context or USUAL_CONTEXT, QUANT) / 1e9
        if (
            (settings.generation in (None, entry.generation))
            and (settings.licence in (None, entry.licence))
            and (settings.modality is None or known_facts.sees == (settings.modality == "image"))
            and (settings.context is None or entry.context_length >= settings.context)
            and (settings.max_memory is None or memory <= settings.max_memory)
            and (settings.language is None or settings.language in known_facts.languages)
        ):
            shown.append(entry)
    return shown


def _key(settings: ModelsSettings, prices: Market, today: date) -> Any:
    """What to sort by; the catalog's own order among equals, and what is not known last."""
    order = {entry.name: place for place, entry in enumerate(catalog.entries())}
    context = settings.context or USUAL_CONTEXT
    which = family.widest(settings.benchmark)

    def value(entry: CatalogEntry) -> float:
        if settings.sort == "size":
            return family.facts(entry).parameters
        if settings.sort == "context":
            return -entry.context_length
        if settings.sort == "memory":
            return family.memory_bytes(entry, context, QUANT)
        if settings.sort == "released":
            return -date.fromisoformat(entry.released).toordinal()
        if settings.sort == "price":
            price = cheapest(family.size_of(entry), prices, today)
            return float("inf") if price is None else price.input + price.output
        if settings.sort == "score":
            score = family.facts(entry).at(which)
            return float("inf") if score is None else -score.value
        return 0

    return lambda entry: (value(entry), order[entry.name])


def _table(settings: ModelsSettings, shown: Sequence[CatalogEntry], prices: Market, today: date) -> None:
    if not shown:
        terminal.note("No model of the catalog is like that. `puna models` lists them all.")
        return
    context = settings.context or USUAL_CONTEXT
    which = family.widest(settings.benchmark)
    rows = []
    for entry in shown:
        known = family.facts(entry)
        price = cheapest(family.size_of(entry), prices, today)
        score = known.at(which)
        forms = [each.variant for each in catalog.entries() if each.name == entry.name]
        rows.append(
            (
                entry.short_name,
                entry.params_stated + (f" ({terminal.quantity(known.active)} active)" if known.experts else ""),
                _tokens(entry.context_length),
                "text, image" if known.sees else "text",
                terminal.size(family.memory_bytes(entry, min(context, entry.context_length), QUANT)),
                f"{score.value:g}" if score else "",
                f"{price.input:g} / {price.output:g}" if price else "",
                entry.released,
                " ".join(forms),
                entry.licence_name.removesuffix(" License Agreement").removesuffix(" (non-commercial)"),
            )
        )
    headers = (
        "SHORT NAME", "PARAMETERS", "CONTEXT", "TAKES", f"MEMORY {QUANT}", settings.benchmark.upper(), "$/M IN / OUT",
        "RELEASED", "FORMS", "LICENCE",
    )  # fmt: skip
    terminal.report(headers, rows, (1, 2, 4, 5, 6), spare=(9, 8, 7, 3))
    if terminal.is_terminal(sys.stdout):
        terminal.note(
            f"Memory: weights as {QUANT} and a cache of {context:,} tokens. {which[0]}: "
            f"{', '.join(filter(None, which[:0:-1]))}, where Meta published that. Price: the cheapest host here; "
            "`puna models NAME` has all of them, and sources."
        )


def _alone(flag: str, others: Sequence[tuple[str, object]]) -> None:
    """Refuses the flags that are about the family beside one that lists something else."""
    for other, value in others:
        if value is not None:
            raise UsageError(f"{other} does not go with {flag}.", remedy="It is about the Llama family.")


def _hosts(settings: ModelsSettings, prices: Market, today: date) -> int:
    """`--hosts`: who serves models, and who rents which accelerator."""
    names = ("generation", "modality", "context", "max_memory", "licence", "language", "picture")
    _alone("--hosts", [(f"--{name.replace('_', '-')}", getattr(settings, name)) for name in names])
    if settings.sort != "family":
        raise UsageError("--sort does not go with --hosts.")
    offered: dict[str, int] = {}
    for price in prices.prices.values():
        if not price.over(today):
            offered[price.host] = offered.get(price.host, 0) + 1
    rents = [(rent, prices.gpus[rent.gpu], prices.renters[rent.host]) for rent in prices.rents.values()]
    rents.sort(key=lambda each: (each[1].id, each[0].usd_per_hour))
    if settings.json:
        terminal.document(
            {
                "hosts": [
                    {
                        "id": host.id,
                        "name": host.name,
                        "url": host.url,
                        "offers": offered.get(host.id, 0),
                        "ended": _day(host.ended),
                        "note": host.note,
                        "source": _source(host.source),
                    }
                    for host in prices.hosts.values()
                ],
                "rents": [
                    {
                        "accelerator": gpu.id,
                        "name": gpu.name,
                        "memory_gb": gpu.memory,
                        "host": host.name,
                        "usd_an_hour": rent.usd_per_hour,
                        "at_least": rent.count,
                        "ended": _day(rent.ended),
                        "note": rent.note,
                        "source": _source(rent.source),
                    }
                    for rent, gpu, host in rents
                ],
            }
        )
        return 0
    terminal.report(
        ("HOST", "MODELS", "PAGE", "NOTE"),
        [(host.name, str(offered.get(host.id, "")), host.url, host.note) for host in prices.hosts.values()],
        (1,),
    )
    terminal.say("\n")
    terminal.report(
        ("ACCELERATOR", "NAME", "MEMORY", "$ AN HOUR", "HOST", "PRICE OF", "NOTE"),
        [
            (
                gpu.id,
                gpu.name,
                f"{gpu.memory:g} GB",
                f"{rent.usd_per_hour:.2f}",
                host.name,
                rent.source.date.isoformat(),
                "; ".join(filter(None, (f"{rent.count} together" * (rent.count > 1), rent.note))),
            )
            for rent, gpu, host in rents
        ],
        (2, 3),
    )
    return 0


def _hosted(settings: ModelsSettings, prices: Market, today: date) -> int:
    """`--hosted`: the models that are not Llama."""
    names = ("generation", "max_memory", "licence", "language", "picture")
    _alone("--hosted", [(f"--{name.replace('_', '-')}", getattr(settings, name)) for name in names])
    if settings.sort not in ("family", "context", "price", "released"):
        raise UsageError(
            f"--sort {settings.sort} does not go with --hosted.", remedy="family, context, price, released."
        )
    found = [
        model
        for model in prices.models.values()
        if (settings.context is None or (model.context_in or 0) >= settings.context)
        and (settings.modality is None or model.sees == (settings.modality == "image"))
    ]

    def key(model: HostedModel) -> float:
        price = cheapest(model.id, prices, today)
        if settings.sort == "context":
            return -(model.context_in or 0)
        if settings.sort == "price":
            return price.input + price.output if price else float("inf")
        if settings.sort == "released":
            return -model.released.toordinal() if model.released else float("inf")
        return 0

    found.sort(key=key)
    if settings.json:
        terminal.document({"models": [described(model, prices, today) for model in found]})
        return 0
    rows = []
    for model in found:
        price = next(iter(prices.prices_of(model.id)), None)
        rows.append(
            (
                model.id,
                model.maker,
                _tokens(model.context_in),
                _tokens(model.context_out),
                f"{price.input:g} / {price.output:g}" if price else "",
                f"{price.cached:g}" if price and price.cached is not None else "",
                f"× {price.batch:g}" if price and price.batch is not None else "",
                model.weights,
                _state(model, today),
                price.source.date.isoformat() if price else "",
            )
        )
    headers = (
        "NAME", "MAKER", "TOKENS IN", "TOKENS OUT", "$/M IN / OUT", "CACHED", "BATCH", "WEIGHTS", "STATE", "PRICE OF",
    )  # fmt: skip
    terminal.report(headers, rows, (2, 3, 4, 5, 6), spare=(7, 1, 6, 5))
    return 0


def _state(model: HostedModel, today: date) -> str:
    if model.retires is None:
        return "offered"
    return f"retired on {model.retires}" if model.retired(today) else f"retires on {model.retires}"


def _tokens(count: int | None) -> str:
    """Tokens as their makers say them: 131,072 are 128K, and so are 128,000."""
    if count is None:
        return ""
    if count % 1000:
        for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
            if count % size == 0:
                return f"{count // size}{unit}"
    return terminal.quantity(count)


def _price_line(price: dict[str, Any]) -> str:
    parts = [f"${price['input']:g} in, ${price['output']:g} out"]
    if price["cached"] is not None:
        parts.append(f"${price['cached']:g} cached")
    if price["batch"] is not None:
        parts.append(f"× {price['batch']:g} in batches")
    for tier in price["tiers"]:
        parts.append(f"${tier['input']:g} in and ${tier['output']:g} out above {tier['above']:,} tokens")
    if price["context"]:
        parts.append(f"up to {price['context']:,} tokens")
    if not price["offered"]:
        parts.append(f"ended on {price['ended']}")
    if price["note"]:
        parts.append(price["note"])
    return f"{price['host']}: {', '.join(parts)} [{price['source']['date']}, {price['source']['name']}]"


def _show(model: CatalogEntry | HostedModel, item: dict[str, Any]) -> None:
    """One model, whole."""
    lines = _lines(item)
    if isinstance(model, CatalogEntry):
        lines.append(("its page", model.licence_page))
        lines.append(("agreement", licence_of(model).text))
    lines += [("price", _price_line(price)) for price in item["prices"]]
    lines += [("note", note) for note in item["notes"]]
    lines.append(("source", f"{item['source']['name']}, {item['source']['date']}: {item['source']['url']}"))
    terminal.facts(lines)


def _lines(item: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known of a model, in words; what is not known is left out."""
    lines = [("model", f"{item['name']} ({item['short_name']})")]
    if "maker" in item:
        lines += [
            ("maker", item["maker"]),
            ("released", item["released"] or ""),
            (
                "state",
                ("retired on " if item["retired"] else "retires on ") + item["retires"]
                if item["retires"]
                else "offered",
            ),
            ("tokens in", f"{item['context_length']:,}" if item["context_length"] else ""),
            ("tokens out", f"{item['output_length']:,}" if item["output_length"] else ""),
            ("takes", "" if item["sees"] is None else "text, image" if item["sees"] else "text"),
            ("knows until", item["knowledge_cutoff"] or ""),
            ("weights", item["weights"] or ""),
            ("licence", item["licence"] or ""),
            ("access", item["access"] or ""),
        ]
        return [line for line in lines if line[1]]
    memory = item["memory_bytes"]
    lines += [
        ("hub id", item["hub_id"]),
        ("released", item["released"]),
        (
            "parameters",
            f"{item['parameters']:,}"
            + f", {item['vision_parameters']:,} of them for pictures" * bool(item["vision_parameters"])
            + f"; {item['active_parameters']:,} serve a token ({item['experts']} experts)" * bool(item["experts"]),
        ),
        ("tokens in", f"{item['context_length']:,}"),
        ("takes", "text, image" if item["sees"] else "text"),
        ("languages", ", ".join(item["languages"])),
        ("knows until", item["knowledge_cutoff"] or ""),
        ("trained on", f"{item['training_tokens']} tokens" if item["training_tokens"] else ""),
        ("published as", ", ".join([*item["formats"], *item["quantized"]])),
        *(
            (f"as {quant}", f"{terminal.size(nbytes)} with {USUAL_CONTEXT:,} tokens")
            for quant, nbytes in memory.items()
        ),
        ("licence", item["licence"]),
    ]
    for score in item["scores"]:
        setup = f", {score['setup']}" if score["setup"] else ""
        lines.append(
            ("score", f"{score['benchmark']} {score['value']:g} ({score['of']}{setup}) [{score['source']['name']}]")
        )
    return [line for line in lines if line[1]]


def _compare(items: Sequence[dict[str, Any]]) -> None:
    """Several models side by side: a row a fact, and a row a score that more than one of them has."""
    labels: dict[str, list[str]] = {}
    for at, item in enumerate(items):
        for label, value in _lines(item):
            if label in ("score", "model"):
                continue
            labels.setdefault(label, [""] * len(items))[at] = value
    rows = [(label, *values) for label, values in labels.items()]
    scores: dict[tuple[str, str, str], list[str]] = {}
    for at, item in enumerate(items):
        for score in item.get("scores", ()):
            key = score["benchmark"], score["of"], score["setup"]
            scores.setdefault(key, [""] * len(items))[at] = f"{score['value']:g}"
    for (benchmark, of, setup), values in scores.items():
        if sum(map(bool, values)) > 1:
            rows.append((f"{benchmark} ({', '.join(filter(None, (of, setup)))})", *values))
    offers = []
    for item in items:
        best = next((price for price in item["prices"] if price["offered"]), None)
        offers.append(f"${best['input']:g} in, ${best['output']:g} out at {best['host']}" if best else "no offer known")
    rows.append(("cheapest host", *offers))
    terminal.report(("", *(item["short_name"] for item in items)), rows)
