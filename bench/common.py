"""What every benchmark shares: interleaved pairs, their medians and intervals, and the pedigree of a figure.

What it is not: a benchmark. Each script beside this one answers one question and prints one JSON line.
What is surprising: engines run in processes of their own that stay up and take turns, because machines drift by tens of
per cent within a minute; the ratio of neighbours in time is what counts, not either absolute.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puna.bench.compare import paired_ratio

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor model, usable cores and memory, in a line."""
    model = platform.processor() or platform.machine()
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        model = next(
            (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), model
        )
        flags = " ".join(flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_bf16") if f" {flag}" in text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {flags}"


def pedigree() -> dict[str, Any]:
    """Commit (with + when the tree differs from it), command, machine, date and load, for a row of results."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "../src", "../CMakeLists.txt", "*.py"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "commit": commit + ("+" if dirty else ""),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def feed(runner: Any, tokens: Sequence[int], start: int) -> Any:
    """Logits [V] after the next tokens, from position `start`, of the only sequence of a runner of Puna's.

    From 0 on it is a new one, with room for 1,024 tokens.
    """
    import numpy as np

    from puna.engine.runner import Batch
    from puna.kernels.layouts import page_table

    pages = 1024 // runner.page
    if start == 0:
        runner.allocate(pages)
    table = page_table([start], [len(tokens)], np.arange(pages)[None])
    return runner.run(Batch(np.array(tokens, np.int32), table, np.array([len(tokens) - 1], np.int32)))[0]


def runner(model: Path) -> Any:
    """The runner that `puna run` uses, of a model's file."""
    from puna.engine.native_runner import host_runner
    from puna.kernels import ops
    from puna.weights.load import load

    ops.select()
    loaded = load(model)
    return host_runner(loaded.config, loaded.weights)


def engine(model: Path, room: int) -> tuple[Any, int]:
    """An engine on a model's file, with room for so many tokens in its cache; the size of the vocabulary."""
    from puna.engine.engine import Engine

    on = runner(model)
    return Engine(on, pages=-(-room // on.page)), on.config.vocab_size


def interleaved(pairs: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[list[float], list[float]]:
    """`pairs` measurements of each, taking turns and swapping who goes first; one of each before, not counted.

    A pause before each lets the other's threads, which spin for a while after their work, fall asleep.
    """
    ours(), theirs()
    a: list[float] = []
    b: list[float] = []
    for i in range(pairs):
        for mine in (True, False) if i % 2 == 0 else (False, True):
            time.sleep(0.5)
            (a if mine else b).append(ours() if mine else theirs())
    return a, b


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median with the smallest and the largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(better: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median of the paired ratios better/base, with its 95 % interval (`puna.bench.compare`)."""
    return asdict(paired_ratio(better, base))


class Worker:
    """A benchmark script running itself as one engine, answering JSON lines on a pipe."""

    def __init__(self, script: str, engine: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", engine, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, work: str) -> dict[str, Any]:
        """Have it do `work`; its answer. Raises RuntimeError when it has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(work + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self._process.wait()} at {work!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def record(name: str, row: dict[str, Any], keep: bool) -> None:
    """Print the row as one JSON line, and append it to results/NAME.jsonl when asked to."""
    line = json.dumps(row)
    print(line)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")
