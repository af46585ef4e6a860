"""`puna --help` answers at once: its time beyond that of an empty Python program is bounded.

What is surprising: the time is the processor's, so that a machine with other work does not matter; and the bound is on
the difference between two programs run in turns, so that a slow one slows both and the test stays about Puna.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import puna

SOURCE = Path(puna.__file__).resolve().parents[1]
"""Where the package under test lies, so that programs import the same one: installed, or this checkout's."""
PAIRS = 5
LIMIT_S = 0.25
"""Beyond bare Python, which itself takes 0.02 to 0.05 s: together they stay under 0.3 s."""


def extra_seconds(arguments: list[str]) -> float:
    """Median over interleaved pairs of the processor's time for `python *arguments` minus that for `-c pass`."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}

    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], env=environment, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return statistics.median(seconds(*arguments) - seconds("-c", "pass") for _ in range(PAIRS))


def test_help_answers_at_once() -> None:
    assert extra_seconds(["-m", "puna", "--help"]) < LIMIT_S


def test_a_slow_start_is_found() -> None:
    busy = f"import time\nwhile time.process_time() < {LIMIT_S + 0.1}: pass"
    assert extra_seconds(["-c", busy]) >= LIMIT_S
