"""How much faster is a saved session loaded from the disk than computed? Seconds to a first token, for both.

A prompt is computed by an engine that has seen nothing, chunk by chunk, to its first token. What the cache then has is
saved, a new engine takes the runner (its cache is empty), the system forgets the file's pages, and the session is
loaded and the same prompt asked again: `restored` is all of that, from the model's identity and the file's sums to the
first token. `from memory` is the same where the system still has the file. Loading the model is in neither. The first
token must be the same; weights are random, but keys and values are what they would be.

    python bench/sessions.py --model 1b.gguf --tokens 8000,32000 --record

32,000 tokens of the 1B shape take some minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna import sessions
from puna.engine.engine import Engine
from puna.kernels import ops
from puna.types import Sampling
from puna.weights.checkpoint import open_checkpoint
from puna.weights.session_file import model_identity


def first(engine: Engine, prompt: list[int]) -> tuple[int, int, float]:
    """The first token after a prompt, how many of its tokens were there already, and seconds to it."""
    began = time.perf_counter()
    engine.submit(prompt, Sampling(temperature=0.0, max_tokens=1))
    while not engine.idle:
        for report in engine.step():
            if report.error is not None:
                raise report.error
    return report.tokens[0], report.reused, time.perf_counter() - began


def forget(path: Path) -> None:
    """Have the system read the file from the disk the next time."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF; `puna bench --shape` makes one")
    parser.add_argument("--tokens", default="8000,32000", help="lengths of prompts")
    parser.add_argument("--turns", type=int, default=3, help="of loading; a prompt is computed once")
    parser.add_argument("--folder", type=Path, help="where the session is saved; a temporary one unless said")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/sessions.jsonl")
    options = parser.parse_args()
    runner = common.runner(options.model)
    draw = random.Random(0)
    row: dict[str, Any] = {
        "question": f"sessions {options.model.stem}", "kv_type": runner.kv_type, "turns": options.turns,
    }  # fmt: skip

    def identity() -> dict[str, str]:
        model = model_identity(open_checkpoint(options.model), "auto", "")
        return {"model": model, "kernels": ops.summary(), "kv_type": runner.kv_type}

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "session"
        for tokens in map(int, options.tokens.split(",")):
            prompt = draw.choices(range(300, runner.config.vocab_size), k=tokens)
            pages = -(-tokens // runner.page) + 2
            engine = Engine(runner, pages=pages)
            for _ in range(4):  # the weights are where they belong after some steps
                first(engine, draw.choices(range(300, runner.config.vocab_size), k=8))
            token, _, computed = first(engine, prompt)
            began = time.perf_counter()
            sessions.save(path, identity(), prompt, engine, runner)
            saved = time.perf_counter() - began
            taken: dict[str, list[float]] = {"restored": [], "from memory": []}
            for _ in range(options.turns):
                for name, seconds in taken.items():
                    if name == "restored":
                        forget(path)
                    engine = Engine(runner, pages=pages)
                    began = time.perf_counter()
                    found = sessions.load(path, identity(), engine, runner)
                    again, reused, _ = first(engine, prompt)
                    seconds.append(time.perf_counter() - began)
                    if (again, found.note) != (token, "") or reused < tokens - runner.page:
                        raise SystemExit(f"{reused} of {tokens} tokens were restored. {found.note}")
            row[f"{tokens} tokens"] = {
                "computed_seconds": round(computed, 3),
                "saved_seconds": round(saved, 3),
                "gigabytes": round(path.stat().st_size / 1e9, 3),
                **{
                    name: {
                        "seconds": round(statistics.median(seconds), 4),
                        "faster": round(computed / statistics.median(seconds), 1),
                    }
                    for name, seconds in taken.items()
                },
            }
            path.unlink()
    common.record("sessions", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
