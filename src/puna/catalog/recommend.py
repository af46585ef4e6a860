"""Which Llama for a task, within a budget, a privacy and a context: a ranking in which every point is explained.

What it is: gates (what a case rules out, each with its reason) and then four sums of points, from the catalog's facts
alone; the same question gives the same answer.
What it is not: a judgement of models that nobody published scores for with a source: those get no quality points, and
say so. Hosted models that are not Llama are named beside the ranking with their cost, not ranked.
What is surprising: quality is an order, not an average of percentages. A model beats another if it wins more of the
benchmarks that both have in the same setup; what the beaten one beats counts as beaten too. So a model is never ranked
by having been measured on easier tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache

from puna.catalog import licence as licences
from puna.catalog import models
from puna.catalog.cost import HOURS, USABLE, Work, copies_of, hosted
from puna.catalog.facts import Facts, Score, facts, memory_bytes, size_of
from puna.catalog.market import HostedModel, Market
from puna.catalog.models import CatalogEntry
from puna.errors import UsageError

TASKS = {
    "chat": ("IFEval", "MMLU-Pro", "MMLU"),
    "code": ("HumanEval", "LiveCodeBench"),
    "infill": ("HumanEval", "LiveCodeBench"),
    "reason": ("GPQA Diamond", "MATH", "MMLU-Pro", "MMLU"),
    "summarise": ("TLDR9+", "IFEval", "MMLU-Pro", "MMLU"),
    "tools": ("BFCL v2", "IFEval", "MMLU-Pro"),
    "translate": ("MGSM", "MMLU-Pro", "MMLU"),
    "vision": ("MMMU", "DocVQA", "ChartQA"),
    "moderation": (),
}
"""The tasks, and the benchmarks that speak of each."""

PRIVACY = ("local", "rented", "any")
"""Where text may go: nowhere; to machines that are rented but one's own to run; to anybody's service."""

QUALITY, COST, PRIVATE, KNOWLEDGE = 60, 25, 10, 5
"""Points at most for each."""

_QUANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
"""What is tried in turn, best first."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked. `budget` is dollars a month, `memory` GB of one's own machine, both None where not said."""

    task: str
    privacy: str
    context: int
    work: Work
    budget: float | None = None
    memory: float | None = None
    language: str | None = None
    region: str | None = None
    users: int | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """How a model would be run: `where` is local, rented or hosted; dollars a month, and what that is made of."""

    where: str
    usd: float
    says: str
    quant: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A model in the ranking: its points by kind, the way it would be run, what speaks for it and against it."""

    entry: CatalogEntry
    way: Way
    points: dict[str, float]
    reasons: tuple[str, ...]
    against: tuple[str, ...]

    @property
    def total(self) -> float:
        """All points."""
        return sum(self.points.values())


@dataclass(frozen=True, slots=True)
class Advice:
    """The ranking, what was ruled out and why, and the hosted models beside it with what they would cost a month."""

    choices: tuple[Choice, ...]
    excluded: tuple[tuple[str, str], ...]
    beside: tuple[tuple[HostedModel, float], ...]


def recommend(case: Case, market: Market, today: date) -> Advice:
    """Rank the family for a case. Raises UsageError for a task, privacy, language or region that there is not."""
    _check(case)
    ways: list[tuple[CatalogEntry, Way]] = []
    excluded: list[tuple[str, str]] = []
    for entry in _candidates(case.task):
        why = _ruled_out(entry, case)
        if why:
            excluded.append((entry.short_name, why))
            continue
        found = _ways(entry, case, market, today)
        affordable = [way for way in found if case.budget is None or way.usd <= case.budget]
        if affordable:
            ways.append((entry, min(affordable, key=lambda way: (way.usd, way.where))))
        elif found:
            best = min(found, key=lambda way: way.usd)
            excluded.append((entry.short_name, f"costs ${best.usd:,.2f} a month at least ({best.says})"))
        else:
            excluded.append((entry.short_name, _nowhere(entry, case)))
    cheapest = min((way.usd for _, way in ways if way.usd), default=1.0)
    choices = [_choice(entry, way, case, market, cheapest) for entry, way in ways]
    choices.sort(key=lambda each: (-round(each.total, 6), facts(each.entry).parameters, each.entry.short_name))
    return Advice(tuple(choices), tuple(excluded), _beside(case, market, today))


def _check(case: Case) -> None:
    if case.task not in TASKS:
        raise UsageError(f"--task {case.task!r:.40}: there is no such task.", remedy=f"One of {', '.join(TASKS)}.")
    if case.privacy not in PRIVACY:
        raise UsageError(f"--privacy {case.privacy!r:.40}: must be one of {', '.join(PRIVACY)}.")
    if case.context < 1:
        raise UsageError(f"--context {case.context}: must be at least 1.")
    for flag, value in (("budget", case.budget), ("memory", case.memory)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{flag} {value}: must be a number of at least 0.")
    spoken = sorted({each for entry in models.entries() for each in facts(entry).languages})
    if case.language is not None and case.language not in spoken:
        raise UsageError(
            f"--language {case.language!r:.40}: no Llama supports it officially.",
            remedy=f"Two letters, one of {', '.join(spoken)}. Others may work and are not promised.",
        )


def _candidates(task: str) -> list[CatalogEntry]:
    """The forms that answer: guards for moderation, Code Llama's base that fills in, else chat and instruct."""
    entries = models.entries()
    if task == "moderation":
        return [entry for entry in entries if entry.variant == "guard"]
    if task == "infill":
        return [e for e in entries if e.generation == "codellama" and e.variant == "base" and e.vocab_size == 32016]
    return [entry for entry in entries if entry.variant in ("chat", "instruct") or entry.generation == "llama1"]


def _ruled_out(entry: CatalogEntry, case: Case) -> str:
    """Why a model cannot be the answer whatever it costs; "" where it can."""
    known = facts(entry)
    if case.task == "vision" and not known.sees:
        return "takes no pictures"
    if case.task == "moderation" and entry.generation == "llama-guard3-vision":
        return "judges a picture with its text; its card says that it is no classifier of text alone"
    if entry.variant == "base" and entry.generation == "llama1":
        return "has no form that was tuned to answer, and a licence for research only"
    if entry.context_length < case.context:
        return f"its context is {entry.context_length:,} tokens"
    if case.language is not None and case.language not in known.languages:
        return f"does not support {case.language} officially"
    reading = licences.read(licences.licence_of(entry), sees=known.sees, users=case.users, region=case.region)
    for finding in reading.findings:
        if finding.verdict in ("not granted", "ask Meta"):
            place = finding.clauses[0].place if finding.clauses else "no public text"
            return f"its licence ({place}): {finding.says}"
    return ""


def _ways(entry: CatalogEntry, case: Case, market: Market, today: date) -> list[Way]:
    """How it could be run where the case allows it."""
    found = []
    need = {quant: memory_bytes(entry, case.context, quant) / 1e9 for quant in _QUANTS}
    if case.memory is not None:
        fits = next((quant for quant in _QUANTS if need[quant] <= USABLE * case.memory), None)
        if fits:
            says = f"your {case.memory:g} GB hold it as {fits} with {case.context:,} tokens ({need[fits]:.1f} GB)"
            found.append(Way("local", 0.0, f"{says}; power not counted", fits))
    elif case.privacy == "local":
        says = f"needs about {need['Q4_K_M']:.1f} GB as Q4_K_M with {case.context:,} tokens; its cost is not counted"
        found.append(Way("local", 0.0, says, "Q4_K_M"))
    if case.privacy != "local":
        offers = []
        for rent in market.rents.values():
            if rent.ended is not None and rent.ended <= today:
                continue
            gpu = market.gpus[rent.gpu]
            count = max(rent.count, copies_of(entry, gpu, case.context, "Q4_K_M"))
            count = math.ceil(count / rent.count) * rent.count
            host = market.renters[rent.host].name
            says = f"{count} × {gpu.name} at {host}, ${rent.usd_per_hour:g} an hour each, all month, as Q4_K_M"
            offers.append(Way("rented", count * rent.usd_per_hour * HOURS, says, "Q4_K_M"))
        if offers:
            found.append(min(offers, key=lambda way: (way.usd, way.says)))
    if case.privacy == "any":
        charges = []
        for price in market.prices_of(size_of(entry)):
            server = market.hosts[price.host]
            gone = price.over(today) or (server.ended is not None and server.ended <= today)
            if gone or (price.context is not None and price.context < case.context):
                continue
            charge = hosted(price, case.work)
            says = f"at {server.name}, ${price.input:g} in and ${price.output:g} out a million on {price.source.date}"
            charges.append(Way("hosted", charge.usd, says))
        if charges:
            found.append(min(charges, key=lambda way: (way.usd, way.says)))
    return found


def _nowhere(entry: CatalogEntry, case: Case) -> str:
    need = memory_bytes(entry, case.context) / 1e9
    if case.memory is not None:
        return f"needs about {need:.1f} GB as Q4_K_M with {case.context:,} tokens, and {case.memory:g} GB are here"
    return "no offer of it is in the catalog"


def _choice(entry: CatalogEntry, way: Way, case: Case, market: Market, cheapest: float) -> Choice:
    known = facts(entry)
    reasons, against = [way.says if way.where != "hosted" else f"served {way.says}"], []
    points = {"quality": 0.0, "cost": 0.0, "privacy": 0.0, "knowledge": 0.0}

    order = _order(TASKS[case.task])
    name = size_of(entry)
    if case.task == "moderation":
        # Nobody's card compares all guards; the later generation was made to replace the earlier.
        rank = sorted({e.released for e in models.entries() if e.variant == "guard"}).index(entry.released) + 1
        most = len({e.released for e in models.entries() if e.variant == "guard"})
        points["quality"] = QUALITY * rank / most
        reasons.append(f"guard number {rank} of {most} by release ({entry.released}); no card compares them all")
    elif name in order:
        beaten, by = order[name]
        points["quality"] = QUALITY * len(beaten) / max(1, len(order) - 1)
        scores = _told(known, TASKS[case.task])
        reasons.append(f"beats {len(beaten)} of {len(order) - 1} others by published scores; {scores}")
        if by:
            against.append(f"behind {', '.join(by[:3])}{' and others' * (len(by) > 3)} in scores")
    else:
        against.append("no published score for this task was found with a source: no points for quality")

    points["cost"] = COST if not way.usd else COST * max(0.0, 1 - math.log10(max(1.0, way.usd / cheapest)) / 3)
    if way.usd:
        (reasons if way.usd <= cheapest else against).append(f"${way.usd:,.2f} a month")
    points["privacy"] = {"local": PRIVATE, "rented": PRIVATE / 2, "hosted": 0.0}[way.where]
    if way.where == "hosted":
        against.append("text goes to the host")
    newest = max(facts(e).cutoff for e in models.entries())
    if known.cutoff:
        months = _months(newest) - _months(known.cutoff)
        points["knowledge"] = KNOWLEDGE * max(0.0, 1 - months / 36)
        (reasons if months == 0 else against).append(f"knows the world until {known.cutoff}")
    else:
        against.append("when its knowledge ends was not published")
    if entry.note:
        against.append(entry.note)
    return Choice(entry, way, points, tuple(reasons), tuple(against))


def _months(when: str) -> int:
    year, month = when.split("-")
    return 12 * int(year) + int(month)


def _told(known: Facts, benchmarks: Sequence[str]) -> str:
    """Its scores on those benchmarks, one of each."""
    found = [score for name in benchmarks if (score := known.score(name, "instruct")) is not None]
    return ", ".join(f"{each.benchmark} {each.value:g}" + f" ({each.setup})" * bool(each.setup) for each in found)


@cache
def _order(benchmarks: tuple[str, ...]) -> dict[str, tuple[frozenset[str], tuple[str, ...]]]:
    """For each size with scores on these: the sizes it beats, directly or through others, and those that beat it."""
    scored: dict[str, dict[tuple[str, str, str], Score]] = {}
    for entry in models.entries():
        own = {s.key: s for s in facts(entry).scores if s.benchmark in benchmarks and s.of == "instruct"}
        if own:
            scored[size_of(entry)] = own
    beats: dict[str, set[str]] = {name: set() for name in scored}
    for one in scored:
        for other in scored:
            shared = scored[one].keys() & scored[other].keys()
            margin = sum(
                (scored[one][k].value > scored[other][k].value) - (scored[one][k].value < scored[other][k].value)
                for k in shared
            )
            if margin > 0:
                beats[one].add(other)
    reached = {}
    for name in scored:
        seen: set[str] = set()
        waiting = list(beats[name])
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                waiting += beats[at]
        reached[name] = frozenset(seen - {name})
    return {
        name: (reached[name], tuple(sorted(other for other in scored if name in reached[other]))) for name in scored
    }


def _beside(case: Case, market: Market, today: date) -> tuple[tuple[HostedModel, float], ...]:
    """Hosted models that are not Llama and would do, cheapest first; none where text must not leave."""
    if case.privacy != "any" or case.task == "moderation":
        return ()
    found = []
    for model in market.models.values():
        short = model.context_in is not None and model.context_in < case.context
        if model.retired(today) or short or (case.task == "vision" and not model.sees):
            continue
        offers = [hosted(p, case.work).usd for p in market.prices_of(model.id) if not p.over(today)]
        if offers and (case.budget is None or min(offers) <= case.budget):
            found.append((model, min(offers)))
    return tuple(sorted(found, key=lambda each: (each[1], each[0].id)))
