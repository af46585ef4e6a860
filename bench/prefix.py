"""How much sooner does an answer begin where its system prompt was read before? Seconds to a first token.

`cold` computes the whole prompt, alone on the engine, with a system prompt that nobody had before. `alone` is a client
whose system prompt is in the cache, the others idle. `together` are all clients at once, each with the same system
prompt in the cache, the median of them; `together, cold` the same with a system prompt that nobody had before, which
one of them computes for all. `apart` are all clients at once, cold, each with a system prompt of its own, so that
nothing is shared: what `together` is compared with; it is measured once. Every client has `--own` tokens of its own
after it.

    python bench/prefix.py --model 1b.gguf --record
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna.engine.engine import Engine
from puna.types import Sampling


def firsts(engine: Engine, prompts: list[list[int]]) -> list[float]:
    """Seconds from now to each prompt's first token, all asked at once."""
    began = time.perf_counter()
    for prompt in prompts:
        engine.submit(prompt, Sampling(temperature=0.0, max_tokens=1, ignore_eos=True))
    times = []
    while not engine.idle:
        reports = engine.step()
        now = time.perf_counter() - began
        for report in reports:
            if report.error is not None:
                raise report.error
            times += [now] * len(report.tokens)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF; `puna bench --shape` makes one")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--system", type=int, default=2000, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=16, help="tokens of each client's own after them")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/prefix.jsonl")
    options = parser.parse_args()
    room = options.clients * (options.system + options.own + 128)
    engine, vocabulary = common.engine(options.model, room)
    draw = random.Random(0)

    def some(count: int) -> list[int]:
        return draw.choices(range(300, vocabulary), k=count)

    firsts(engine, [some(64)])  # the weights are where they belong after some steps
    for _ in range(8):
        firsts(engine, [some(8)])
    taken: dict[str, list[float]] = {"cold": [], "alone": [], "together": [], "together, cold": []}
    for _ in range(options.turns):
        system = some(options.system)
        taken["cold"] += firsts(engine, [system + some(options.own)])
        for _ in range(options.clients):
            taken["alone"] += firsts(engine, [system + some(options.own)])
        taken["together"] += firsts(engine, [system + some(options.own) for _ in range(options.clients)])
        system = some(options.system)
        taken["together, cold"] += firsts(engine, [system + some(options.own) for _ in range(options.clients)])
    taken["apart"] = firsts(engine, [some(options.system + options.own) for _ in range(options.clients)])
    cold, apart = (statistics.median(taken[name]) for name in ("cold", "apart"))
    row: dict[str, Any] = {
        "question": f"prefix {options.model.stem}",
        **{key: getattr(options, key) for key in ("clients", "system", "own", "turns")},
        **{
            name: {"seconds": round(statistics.median(times), 4), "faster": round(cold / statistics.median(times), 1)}
            for name, times in taken.items()
        },
        "together over apart": round(apart / statistics.median(taken["together"]), 1),
    }
    common.record("prefix", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
