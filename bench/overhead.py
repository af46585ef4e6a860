"""What of a step is the engine's own work (planning, sampling, bookkeeping), and not the model's?

Streams decode together; milliseconds of a step by part, medians over turns, and the share that is not the model.
`greedy` takes the likeliest token, `sampled` Puna's default sampling, `penalties` adds the three penalties. Random
weights make flat logits, the slowest case of sampling (see bench/sampling.py).

    python bench/overhead.py --model 1b.gguf --record
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna.types import Sampling

KINDS = {
    "greedy": Sampling(temperature=0.0, ignore_eos=True),
    "sampled": Sampling(seed=1, ignore_eos=True),
    "penalties": Sampling(
        seed=1, repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.2, ignore_eos=True
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF; `puna bench --shape` makes one")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=30, help="of each kind in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/overhead.jsonl")
    options = parser.parse_args()
    engine, vocabulary = common.engine(options.model, options.streams * (options.prompt + options.steps + 72))
    draw = random.Random(0)
    parts = ("schedule", "run", "sample")
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(options.turns):
        for kind, sampling in KINDS.items():
            for _ in range(options.streams):
                engine.submit(draw.choices(range(300, vocabulary), k=options.prompt), sampling)
            made = engine.statistics().made_tokens
            while engine.statistics().made_tokens < made + 2 * options.streams:  # all prompts are read
                engine.step()
            before = engine.statistics()
            for _ in range(options.steps):
                engine.step()
            after = engine.statistics()
            engine.cancel_all()
            taken[kind].append(
                {
                    part: (getattr(after, f"{part}_seconds") - getattr(before, f"{part}_seconds")) / options.steps
                    for part in parts
                }
            )
    row: dict[str, Any] = {
        "question": f"overhead {options.model.stem}",
        **{key: getattr(options, key) for key in ("streams", "prompt", "steps", "turns")},
        "vocabulary": vocabulary,
    }
    for kind, turns in taken.items():
        own = [(turn["schedule"] + turn["sample"]) / sum(turn.values()) for turn in turns]
        row[kind] = {f"{part}_ms": round(1e3 * statistics.median(turn[part] for turn in turns), 3) for part in parts}
        row[kind]["own"] = round(statistics.median(own), 4)
    common.record("overhead", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
