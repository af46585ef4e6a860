"""What a client's program here is made of: checks, each a sentence and a function, and their report.

What it is: standard library only, for it runs in each client's own environment, beside the client.
What it is not: a test of pytest's; `test_clients.py` runs the programs and reads the reports.
What is surprising: a check that fails does not keep the others from being tried: the report says how far a client gets.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ.get("PUNA_URL", "http://127.0.0.1:8080")
KEY = os.environ.get("PUNA_KEY", "none")
BASE = os.environ.get("PUNA_BASE_MODEL", "cria")
"""A trained model that continues text."""
CHAT = os.environ.get("PUNA_CHAT_MODEL", "tiny-chat")
"""A model of random weights with Llama 3.1's tokenizer and chat format: it says nonsense, in whatever form is asked."""

_CHECKS: list[tuple[str, Callable[[], Any]]] = []


def check(what: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Name what the decorated function (or coroutine function) shows; it raises where that does not hold."""

    def keep(function: Callable[[], Any]) -> Callable[[], Any]:
        _CHECKS.append((what, function))
        return function

    return keep


def run() -> None:
    """Run every check and print one JSON line for each."""
    for what, function in _CHECKS:
        failure = ""
        try:
            made = function()
            if inspect.iscoroutine(made):
                asyncio.run(made)
        except BaseException:
            failure = traceback.format_exc()
        print("\x1e" + json.dumps({"check": what, "failure": failure}), flush=True)
