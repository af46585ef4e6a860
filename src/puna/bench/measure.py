"""The whole measurement: engines side by side, kind of work by kind of work, into `results` and `ratios`.

What it is: for each kind of work every engine is tried, and those peers that come near the best of them then take turns
with Puna for as many pairs as were asked for. Limits of the machine are measured in each round, by Puna's process.
What it is not: output; `puna.cli.bench` shows what comes back.
What is surprising: a ratio is over the best peer of that kind of work, which need not be the same one twice; if two
come near, both are paired, and the smaller ratio is the one that stands.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from puna.bench import compare
from puna.bench.compare import Measure, Ratio
from puna.bench.engines import OURS, Say
from puna.bench.work import ALL, QUICK, START_PROMPT, Model, Work, bytes_read, least_seconds, operations
from puna.bench.worker import EngineSpec, Worker

NEAR = 1.2
"""Peers that take at most so many times as long as the best one are paired."""

RATIOS_OF_STARTS = ("cold_start", "peak_memory")
"""Loading and the first token alone are shown, and not compared: engines divide the same work differently."""


@dataclass
class Found:
    """What was measured: one value a quantity, engine and turn; seconds, or MB where that is the unit."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    ratios: dict[str, dict[str, Ratio]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    limits: list[dict[str, float]] = field(default_factory=list)

    def add(self, engine: str, values: dict[str, float]) -> None:
        """Note a measurement."""
        for name, value in values.items():
            self.values.setdefault(name, {}).setdefault(engine, []).append(value)

    def machine(self) -> dict[str, float]:
        """The median of each limit."""
        names = {name: None for limits in self.limits for name in limits}
        return {name: statistics.median(limits[name] for limits in self.limits if name in limits) for name in names}


def measure(
    ours: EngineSpec, peers: Sequence[EngineSpec], model: Model, works: Sequence[Work], pairs: int, say: Say
) -> Found:
    """Measure these kinds of work. One that does not fit the model's context is left out, and said so."""
    found = Found()
    with ExitStack() as stack:
        workers = {spec.name: stack.enter_context(Worker(spec)) for spec in (ours, *peers)}
        for name, worker in workers.items():
            found.versions[name] = worker.ask("load")["version"]
            say(f"{name} {found.versions[name]} is loaded")

        def limits() -> None:
            if taken := workers[OURS].ask("limits"):
                found.limits.append(taken)

        for work in works:
            if work.positions > model.config.context_length:
                say(f"{work.name}: left out, for it takes {work.positions} positions and the model has fewer")
            elif work.kind != "start":
                measures: dict[str, Measure] = {name: partial(_timed, worker, work) for name, worker in workers.items()}
                _compare(found, measures, (work.name,), pairs, limits, say)
                say(_figures(work, found))
    if started := [work for work in works if work.kind == "start" and work.positions <= model.config.context_length]:
        compared = tuple(work.name for work in started if work.name in RATIOS_OF_STARTS)
        starts: dict[str, Measure] = {spec.name: partial(_started, spec, model) for spec in (ours, *peers)}
        _compare(found, starts, compared, pairs, lambda: None, say)
        for work in started:
            say(_figures(work, found))
    return found


def _figures(work: Work, found: Found) -> str:
    """The medians of a kind of work so far, for whoever waits."""
    medians = {name: work.shown(statistics.median(values)) for name, values in found.values.get(work.name, {}).items()}
    return f"{work.name}: " + "; ".join(f"{name} {median:.4g} {work.unit}" for name, median in medians.items())


def _compare(
    found: Found,
    measures: dict[str, Measure],
    compared: tuple[str, ...],
    pairs: int,
    before: Callable[[], None],
    say: Say,
) -> None:
    """Try every engine, then pair Puna with the peers near the best of them in what is `compared`."""
    what = " and ".join(compared)
    say(f"{what}: trying {'; '.join(measures)}")
    # The first time warms up: files are read, caches filled.
    tried = compare.take_turns(measures, 2)
    near = [
        name
        for quantity in compared
        for name in compare.near_best(
            {name: taken[-1][quantity] for name, taken in tried.items() if name != OURS and quantity in taken[-1]}, NEAR
        )
    ]
    contenders = [name for name in measures if name == OURS or name in near]
    say(f"{what}: {pairs} times {'; '.join(contenders)}")
    taken = compare.take_turns({name: measures[name] for name in contenders}, pairs, before)
    for name in measures:
        # Who came nowhere near has what it was tried with.
        for values in taken.get(name, tried[name][1:]):
            found.add(name, values)
    for quantity in compared:
        mine = [values[quantity] for values in taken[OURS] if quantity in values]
        found.ratios[quantity] = {
            name: compare.paired_ratio([values[quantity] for values in taken[name]], mine)
            for name in contenders
            if name != OURS and mine
        }


def _timed(worker: Worker, work: Work) -> dict[str, float]:
    """Seconds of a step of some work by an engine that is loaded."""
    if work.kind == "prefill":
        return {work.name: worker.ask("prefill", tokens=work.tokens)["seconds"]}
    answer = worker.ask("decode", streams=work.streams, context=work.context, steps=work.steps)
    return {work.name: answer["seconds"]}


def _started(spec: EngineSpec, model: Model) -> dict[str, float]:
    """A fresh process: seconds until the model is loaded, of a short prompt, and of both from the process's start; MB
    at its peak once it has read a longer prompt and made some tokens."""
    began = time.perf_counter()
    with Worker(spec) as worker:
        load = worker.ask("load")["seconds"]
        first = worker.ask("first", tokens=START_PROMPT)["seconds"]
        values = {"load": load, "first_token": first, "cold_start": time.perf_counter() - began}
        for work in QUICK[1], QUICK[0]:
            if work.positions <= model.config.context_length:
                _timed(worker, work)
        peak = worker.peak_bytes()
        return values if peak is None else values | {"peak_memory": peak / 1e6}


def results(found: Found, model: Model) -> list[dict[str, Any]]:
    """A row a measurement: work, engine, version, median, spread (smallest, largest), unit, count, share of the limit.

    The share is the least time that this machine could take for the work over the time taken, None where there is no
    such limit; `limit` says what sets it, and `gb_s` and `gop_s` what was reached.
    """
    machine = found.machine()
    rows = []
    for work in ALL:
        for engine, values in found.values.get(work.name, {}).items():
            shown = sorted(map(work.shown, values))
            seconds = statistics.median(values)
            row: dict[str, Any] = {
                "work": work.name, "engine": engine, "version": found.versions[engine],
                "median": work.shown(seconds), "spread": [shown[0], shown[-1]], "unit": work.unit, "count": len(values),
                "share_of_limit": None, "limit": None, "gb_s": None, "gop_s": None,
            }  # fmt: skip
            if work.kind != "start":
                row["gb_s"] = bytes_read(work, model) / seconds / 1e9
                row["gop_s"] = operations(work, model) / seconds / 1e9
            if (least := least_seconds(work, model, machine)) is not None:
                row["share_of_limit"], row["limit"] = least[0] / seconds, least[1]
            rows.append(row)
    return rows


def over_best(found: Found) -> dict[str, float]:
    """Kind of work → Puna over the best peer: the smallest of the paired ratios, above 1 where Puna is better."""
    return {work: min(each.median for each in ratios.values()) for work, ratios in found.ratios.items() if ratios}


def pairs_of(found: Found) -> list[dict[str, Any]]:
    """Every ratio with its interval: work, the peer, median, low and high (95 %), how many pairs."""
    return [
        {"work": work, "against": peer, **asdict(ratio)}
        for work, ratios in found.ratios.items()
        for peer, ratio in ratios.items()
    ]
