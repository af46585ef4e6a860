"""The constructed model of bench/long_context.py, in small: the share of attention that a needle gets is told by
arithmetic, which knows nothing of the code, and the logits of the engine's runner say the same."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from puna.engine.runner import HostRunner, window
from puna.forecast import cache_bytes
from puna.kernels import ops

BENCH = Path(__file__).resolve().parents[3] / "bench"
TOKENS = 4100


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("long_context")


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_needles_are_found_where_the_temperature_makes_queries_long_enough(long: Any, kernels: str) -> None:
    ops.select(kernels)
    config = replace(long.CONFIG, context_length=8192, chunk=64, temperature_floor=8)
    made = long.construct(config, score=7.0)
    for tuning in (True, False):
        # exp(7) is a fourth of 4,096 keys; at position 4,099 a query is 1.62 times as long.
        asked = replace(made, config=replace(config, temperature_tuning=tuning))
        runner = HostRunner(asked.config, long.build(asked), "fp16")
        pages = -(-TOKENS // runner.page)
        runner.allocate(pages, window(config))
        answers = long.retrieved(asked, runner, long.hay(asked, runner.page), TOKENS)
        assert [answer["named"] for answer in answers] == [tuning] * long.NEEDLES
        assert len({answer["position"] // runner.page for answer in answers}) == long.NEEDLES
        for answer in answers:
            assert answer["share"] == pytest.approx(answer["told"], abs=0.02)
            assert (answer["told"] > 0.8) == tuning
        held = pages * runner.page_bytes + window(config) * runner.local_page_bytes
        assert held == cache_bytes(config, "fp16", TOKENS, runner.page)
    ops.select("auto")
