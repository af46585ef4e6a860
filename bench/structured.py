"""Does an answer that must follow a JSON schema come as fast as free text? Tokens a second, prompts included in time.

Streams answer in the form of a tool call, sampled; then as many answer freely, each with as many tokens as the
structured one had, so that both batches shrink alike. They take turns in one process. Forced tokens count: they are
part of the answer. Random weights say nothing sensible, and string after string of random characters is the slow case
of a grammar: a trained model's tokens are likelier to be among the few that a mask would allow anyway.

    python bench/structured.py --model Llama-3.2-1B-Q4_K_M.gguf --record
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna.llm import LLM
from puna.types import Grammar, Sampling

SCHEMA = {
    "type": "object",
    "properties": {
        "tool": {"enum": ["search_flights", "book_hotel", "weather_forecast"]},
        "arguments": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 40},
                "date": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
                "guests": {"type": "integer", "minimum": 1, "maximum": 12},
                "notes": {"type": "array", "items": {"type": "string", "maxLength": 60}, "minItems": 2, "maxItems": 3},
                "confirmed": {"type": "boolean"},
            },
            "required": ["city", "date", "guests", "notes", "confirmed"],
            "additionalProperties": False,
        },
    },
    "required": ["tool", "arguments"],
    "additionalProperties": False,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cria", help="anything that `puna run` takes")
    parser.add_argument("--tokenizer", help="a file or folder in place of the model's own")
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/structured.jsonl")
    options = parser.parse_args()
    llm = LLM(options.model, tokenizer=options.tokenizer)
    engine = llm.take_engine()
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    prompt = llm.tokenizer.encode("Book me a hotel.", bos=llm.tokenizer.adds_bos)

    def answers(limits: list[int | None], structured: bool, seed: int) -> tuple[list[int], float]:
        """How many tokens each answer has, and seconds for all."""
        began = time.perf_counter()
        counts = {}
        for i, limit in enumerate(limits):
            sampling = Sampling(seed=seed + i, max_tokens=limit, ignore_eos=not structured)
            constraint = llm.grammars.compile(grammar).result() if structured else None
            counts[engine.submit(prompt, sampling, stop_ids=llm.stop_ids, constraint=constraint)] = 0
        while not engine.idle:
            for report in engine.step():
                if report.error is not None:
                    raise report.error
                counts[report.request] += len(report.tokens)
        return list(counts.values()), time.perf_counter() - began

    row: dict[str, Any] = {"question": f"structured {Path(options.model).stem}", "turns": options.turns}
    for streams in map(int, options.streams.split(",")):
        speeds: dict[str, list[float]] = {"structured": [], "free": []}
        lengths = []
        for turn in range(options.turns + 1):  # the first is not counted: it compiles the grammar
            made, seconds = answers([300] * streams, True, 1000 * turn)
            free, free_seconds = answers(list(made), False, 1000 * turn)
            assert free == made
            if turn:
                speeds["structured"].append(sum(made) / seconds)
                speeds["free"].append(sum(made) / free_seconds)
                lengths += made
        row[f"{streams} streams"] = {
            **{name: round(statistics.median(each), 1) for name, each in speeds.items()},
            "tokens": statistics.median(lengths),
            "ratio": {
                key: round(value, 3) for key, value in common.ratio(speeds["structured"], speeds["free"]).items()
            },
        }
    common.record("structured", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
