"""What a month of work costs: hosted by the token, on a rented machine, on one's own; and where they break even.

What it is: plain arithmetic on a workload and on prices, each step kept as a line that can be shown.
What it is not: a measurement. Where no speed is given, it is bounded by bandwidth and peak (Williams et al.,
"Roofline", CACM 2009) times two efficiencies that are assumptions and say so; `puna bench` measures,
and the figures can be given.
What is surprising: utilisation does not change what a machine costs, only what a token on it costs. The break-even
utilisation is the share of a machine's time that must be work for it to cost what the host charges for the same work;
above 1 the machine never gets there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from puna.catalog.facts import BITS, facts, kv_bytes, weight_bytes
from puna.catalog.market import Gpu, Price
from puna.catalog.models import CatalogEntry
from puna.errors import CatalogError, UsageError

HOURS = 730.0
"""Hours of a month: 8,760 / 12."""

BANDWIDTH_EFFICIENCY = 0.6
PEAK_EFFICIENCY = 0.4
"""Assumed shares of bandwidth (decode) and peak (prefill) that a good engine reaches."""

USABLE = 0.9
"""Share of an accelerator's memory that weights and cache may take; the rest is activations and the runtime."""

MOST = 1e15
"""Above this, no number of requests, tokens, dollars or accelerators is meant."""

MOST_STREAMS = 64
_MOST_COPIES = 1_000_000


@dataclass(frozen=True, slots=True)
class Work:
    """A month's workload: so many requests of so many tokens in and out, a share of the input found in a cache, a share
    of the requests in batches (answered within hours, where a host has that)."""

    requests: float
    tokens_in: float
    tokens_out: float
    cached: float = 0.0
    batch: float = 0.0

    def __post_init__(self) -> None:
        for flag, value in (("requests", self.requests), ("in", self.tokens_in), ("out", self.tokens_out)):
            if not 0 <= value <= MOST:
                raise UsageError(f"--{flag} {str(value)[:40]}: must be a number from 0 to {MOST:.0e}.")
        for flag, value in (("cached", self.cached), ("batch", self.batch)):
            if not 0 <= value <= 1:
                raise UsageError(f"--{flag} {value}: is a share, from 0 to 1.")
        if not self.requests or not self.tokens_in + self.tokens_out:
            raise UsageError("There is no work to cost.", remedy="Give --requests (a month), --in and --out above 0.")


@dataclass(frozen=True, slots=True)
class Hosted:
    """What a host charges for the work in a month. `without_cache` and `without_batch` are the same with neither."""

    price: Price
    usd: float
    without_cache: float
    without_batch: float
    steps: tuple[str, ...]
    notes: tuple[str, ...]


def hosted(price: Price, work: Work) -> Hosted:
    """The cost at a host. What it has no price for (a cache, batches) is charged in full, and noted."""
    usd, steps, notes = _hosted(price, work)
    return Hosted(
        price,
        usd,
        _hosted(price, replace(work, cached=0.0))[0],
        _hosted(price, replace(work, batch=0.0))[0],
        tuple(steps),
        tuple(notes),
    )


def _hosted(price: Price, work: Work) -> tuple[float, list[str], list[str]]:
    rates, notes, steps = price.at(work.tokens_in), [], []
    if rates.above:
        notes.append(f"prompts above {rates.above:,} tokens have the higher price")
    cached = rates.cached
    if work.cached and cached is None:
        notes.append("no price for cached input: charged in full")
    if work.cached and price.cache_write is not None:
        notes.append(f"writing to the cache costs {price.cache_write:g} a million, and is not counted here")
    if work.batch and price.batch is None:
        notes.append("no price for batches: charged in full")
    million = work.requests / 1e6
    fresh, found = million * work.tokens_in * (1 - work.cached), million * work.tokens_in * work.cached
    out = million * work.tokens_out
    parts = [("input", fresh, rates.input, price.batch)]
    if found:
        parts.append(
            (
                "cached input",
                found,
                rates.input if cached is None else cached,
                price.batch if cached is None else price.batch_cached,
            )
        )
    parts.append(("output", out, rates.output, price.batch))
    total = 0.0
    for name, tokens, rate, batch in parts:
        share = 1 - work.batch * (1 - (1.0 if batch is None else batch))
        usd = tokens * rate * share
        total += usd
        factor = "" if share == 1 else f" × {share:g} (batches)"
        steps.append(f"{name}: {tokens:,.6g}M tokens × ${rate:g}{factor} = ${usd:,.2f}")
    return total, steps, notes


@dataclass(frozen=True, slots=True)
class Machine:
    """What serves one copy of the model: so many of one accelerator. Exactly one of `rent` (dollars an hour for one of
    them) and `buy` (dollars for one) is given; `power` is the whole machine's watts."""

    gpu: Gpu
    count: int
    rent: float | None
    buy: float | None
    months: float
    power: float
    electricity: float
    origin: str

    @property
    def monthly(self) -> float:
        """Dollars a month, whether it works or not. A rent includes the power; what is bought draws it all the time."""
        if self.rent is not None:
            return self.count * self.rent * HOURS
        assert self.buy is not None
        return self.count * self.buy / self.months + self.power * HOURS / 1000 * self.electricity

    def steps(self) -> list[str]:
        """The arithmetic of `monthly`, in words."""
        if self.rent is not None:
            return [f"{self.count} × ${self.rent:g} an hour × {HOURS:g} hours = ${self.monthly:,.2f} a month"]
        assert self.buy is not None
        kwh = self.power * HOURS / 1000
        bought, drawn = self.count * self.buy / self.months, kwh * self.electricity
        return [
            f"{self.count} × ${self.buy:,.0f} over {self.months:g} months = ${bought:,.2f} a month",
            f"{self.power:g} W × {HOURS:g} hours = {kwh:,.1f} kWh × ${self.electricity:g} = ${drawn:,.2f} a month",
        ]


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one copy: in (prefill) and out (decode, all streams together); `measured` or assumed."""

    prefill: float
    decode: float
    streams: int
    measured: bool


def copies_of(entry: CatalogEntry, gpu: Gpu, tokens: int, quant: str) -> int:
    """How many of an accelerator one copy of the model needs, with one conversation of so many tokens."""
    need = weight_bytes(entry, quant) + kv_bytes(entry, tokens)
    return max(1, math.ceil(need / (USABLE * gpu.memory * 1e9)))


def speed(entry: CatalogEntry, gpu: Gpu, count: int, work: Work, quant: str, streams: int | None = None) -> Speed:
    """The assumed speed of one copy: decode reads the weights once a step for all streams, and each stream its cache;
    prefill takes two operations an active parameter a token. Accelerators share both evenly.

    Raises CatalogError where the memory does not hold that many streams.
    """
    known = facts(entry)
    room = USABLE * count * gpu.memory * 1e9 - weight_bytes(entry, quant)
    context = max(1, math.ceil(work.tokens_in + work.tokens_out))
    most = int(room // kv_bytes(entry, context))
    if most < 1:
        raise CatalogError(
            f"{entry.short_name} as {quant} with {context:,} tokens does not fit {count} × {gpu.name}.",
            remedy="Take more of them (--gpus), a larger one (--gpu), or fewer bits (--quant).",
        )
    if streams is not None and streams > most:
        raise CatalogError(
            f"{streams} conversations of {context:,} tokens do not fit {count} × {gpu.name}: {most} do.",
            remedy="Leave --streams out, or take more memory.",
        )
    batch = min(most, MOST_STREAMS) if streams is None else streams
    text = known.parameters - entry.vision_params
    read = _parameters_read(text, known.active, known.experts, batch) * BITS[quant] / 8
    # On average a stream is halfway through its answer.
    cache = kv_bytes(entry, max(1, round(work.tokens_in + work.tokens_out / 2)))
    flops = 2.0 * known.active
    peak = PEAK_EFFICIENCY * count * gpu.peak * 1e12
    step = max((read + batch * cache) / (BANDWIDTH_EFFICIENCY * count * gpu.bandwidth * 1e9), batch * flops / peak)
    return Speed(peak / flops, batch / step, batch, False)


def _parameters_read(total: float, active: float, experts: int, tokens: int) -> float:
    """Parameters whose weights a step of so many tokens reads. Of E experts, each token takes one: (1 - 1/E)^tokens of
    them stay untouched on average."""
    if experts < 2:
        return total
    one = (total - active) / (experts - 1)
    return active - one + experts * one * (1 - (1 - 1 / experts) ** tokens)


@dataclass(frozen=True, slots=True)
class SelfHosted:
    """The work on machines of one's own, in a month.

    `capacity` is how many such requests one copy answers at 100 %, `copies` how many it takes at the utilisation asked
    for, `utilisation` what they then are.
    """

    machine: Machine
    speed: Speed
    capacity: float
    copies: int
    utilisation: float
    usd: float
    without_cache: float
    one_stream: float
    steps: tuple[str, ...]

    def break_even(self, hosted_usd: float, work: Work) -> tuple[float, float]:
        """The utilisation of one copy, and its requests a month, at which it costs what the host charges for them."""
        each = hosted_usd / work.requests
        if each == 0:
            return math.inf, math.inf
        requests = self.machine.monthly / each
        return requests / self.capacity, requests


def self_hosted(
    entry: CatalogEntry,
    machine: Machine,
    work: Work,
    quant: str,
    target: float,
    given: Speed | None,
    streams: int | None,
) -> SelfHosted:
    """The cost on machines of one's own, kept at most `target` busy. `given` is a measured speed."""
    if not 0 < target <= 1:
        raise UsageError(f"--utilisation {target}: is a share above 0, at most 1.")
    how = given or speed(entry, machine.gpu, machine.count, work, quant, streams)
    seconds = _seconds(how, work)
    capacity = HOURS * 3600 / seconds
    wanted = work.requests / (capacity * target) if capacity * target else math.inf
    if wanted > _MOST_COPIES:
        raise UsageError(
            f"{work.requests:,.0f} requests of {seconds:.3g} s take more than {_MOST_COPIES:,} copies of the model.",
            remedy="Look at --requests, --utilisation and the speeds.",
        )
    copies = max(1, math.ceil(wanted))
    usd = copies * machine.monthly
    uncached = HOURS * 3600 / _seconds(how, replace(work, cached=0.0))
    if given is None:
        alone = HOURS * 3600 / _seconds(speed(entry, machine.gpu, machine.count, work, quant, 1), work)
    else:
        alone = capacity
    kind = (
        "as given"
        if how.measured
        else f"assumed: {BANDWIDTH_EFFICIENCY:.0%} of bandwidth, {PEAK_EFFICIENCY:.0%} of peak"
    )
    fresh = work.tokens_in * (1 - work.cached)
    steps = [
        f"speed of one copy, {how.streams} at a time ({kind}): {how.prefill:,.0f} tokens/s in, {how.decode:,.0f} out",
        f"a request: {fresh:,.6g} / {how.prefill:,.0f} + {work.tokens_out:,.6g} / {how.decode:,.0f} "
        f"= {seconds:.4g} s of the machine",
        f"a month at 100 %: {HOURS * 3600:,.0f} s / {seconds:.4g} s = {capacity:,.0f} requests a copy",
        f"copies: {work.requests:,.0f} / ({capacity:,.0f} × {target:g}), rounded up = {copies}",
        *machine.steps(),
    ]
    if copies > 1:
        steps.append(f"{copies} copies × ${machine.monthly:,.2f} = ${usd:,.2f} a month")
    return SelfHosted(
        machine,
        how,
        capacity,
        copies,
        work.requests / (copies * capacity),
        usd,
        max(1, math.ceil(work.requests / (uncached * target))) * machine.monthly,
        max(1, math.ceil(work.requests / (alone * target))) * machine.monthly,
        tuple(steps),
    )


def _seconds(how: Speed, work: Work) -> float:
    """Seconds of one copy that a request takes: cached input takes none."""
    return work.tokens_in * (1 - work.cached) / how.prefill + work.tokens_out / how.decode
