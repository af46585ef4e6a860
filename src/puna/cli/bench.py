"""`puna bench`: how fast a model is on this machine, beside other engines and beside what the machine can do.

What it is: flags to a measurement (`puna.bench`), and its figures to a table or a document.
What it is not: a measurement.
What is surprising: progress goes to stderr line by line, at a terminal and elsewhere: a measurement takes minutes, and
whoever keeps its log wants to know what it did.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from puna.cli import terminal
from puna.errors import UsageError
from puna.settings import BenchSettings
from puna.weights.embedded import EMBEDDED
from puna.weights.find import find_model


def main(settings: BenchSettings) -> int:
    """Run the command."""
    from puna.bench import engines, measure, work

    _check(settings)
    works = work.chosen(settings.only, settings.full)
    peers = engines.chosen(settings.against)
    threads = settings.threads or _usable_cores()
    python = sys.executable if settings.peer_python is None else str(settings.peer_python)
    engines.check_all(peers, python)
    if settings.shape is not None:
        target, model = engines.target_of_shape(settings.shape, settings.type or DEFAULT_TYPE, terminal.note)
    else:
        name = settings.model or EMBEDDED
        target, model = engines.target_of_model(find_model(name), name)
    others = engines.specs(peers, target, threads, python, terminal.note)
    found = measure.measure(engines.ours(target, threads), others, model, works, settings.pairs, terminal.note)
    document = {
        "model": settings.shape or settings.model or EMBEDDED,
        "random_weights": settings.shape is not None,
        "type": settings.type or DEFAULT_TYPE if settings.shape is not None else target.kind,
        "weights_bytes": target.nbytes,
        "threads": threads,
        "machine": found.machine(),
        "results": measure.results(found, model),
        "ratios": measure.over_best(found),
        "pairs": measure.pairs_of(found),
    }
    if settings.json:
        terminal.document(document)
    else:
        show(document)
    return 0


DEFAULT_TYPE = "Q4_K_M"


def show(document: dict[str, Any]) -> None:
    """The table for people."""
    machine = document["machine"]
    terminal.facts(
        [
            ("model", f"{document['model']} ({document['type']}, {terminal.size(document['weights_bytes'])})"),
            ("threads", str(document["threads"])),
            (
                "machine",
                ", ".join(
                    f"reads {value / 1e9:.1f} GB/s" if name == "read" else f"{name} {value / 1e9:.0f} GOP/s"
                    for name, value in machine.items()
                )
                or "not measured: the C++ kernels are not built here",
            ),
        ]
    )
    print()
    terminal.table(
        ("WORK", "ENGINE", "MEDIAN", "SPREAD", "UNIT", "GB/S", "GOP/S", "OF THE LIMIT"),
        [
            (
                row["work"],
                row["engine"],
                _number(row["median"]),
                "-".join(map(_number, row["spread"])),
                row["unit"],
                "" if row["gb_s"] is None else _number(row["gb_s"]),
                "" if row["gop_s"] is None else _number(row["gop_s"]),
                "" if row["share_of_limit"] is None else f"{row['share_of_limit']:.0%} of {row['limit']}",
            )
            for row in document["results"]
        ],
    )
    if document["pairs"]:
        print()
        terminal.table(
            ("WORK", "PUNA OVER", "RATIO", "95 %", "PAIRS"),
            [
                (
                    row["work"],
                    row["against"],
                    f"{row['median']:.2f}",
                    f"{row['low']:.2f}-{row['high']:.2f}",
                    str(row["pairs"]),
                )
                for row in document["pairs"]
            ],
        )


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _check(settings: BenchSettings) -> None:
    """Refuse what cannot be honoured together, or at all. Raises UsageError."""
    if settings.shape is not None and settings.model is not None:
        raise UsageError("MODEL and --shape are both given.", remedy="Name the model, or the shape of one to make up.")
    if settings.type is not None and settings.shape is None:
        raise UsageError(
            "--type is the type of made-up weights, and there is no --shape.",
            remedy="Add --shape NAME, or leave --type out: a model is measured as it is stored.",
        )
    if settings.only is not None and settings.full:
        raise UsageError("--only and --full are both given.", remedy="Name what to measure, or have it all.")
    if settings.pairs < 1:
        raise UsageError(f"--pairs must be 1 or larger, not {settings.pairs}.", remedy="A record takes 11.")
    if settings.threads is not None and not 1 <= settings.threads <= 1024:
        raise UsageError(f"--threads must lie between 1 and 1024, not {settings.threads}.", remedy="Leave it out.")
    if settings.peer_python is not None and settings.against is None:
        raise UsageError("--peer-python is given, and --against names no peer.", remedy="Add --against.")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
