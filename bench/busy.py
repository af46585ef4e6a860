"""What is left of the decode speed while another program takes one core? The share of the undisturbed speed kept.

An engine decodes one stream with as many threads as there are cores; a spin loop pinned to the last of them starts and
stops, in turns. A pool that splits its work evenly, or whose threads wait for each other by spinning, keeps little.

    python bench/busy.py --model llama3.2-1b-Q4_K_M.gguf --against llama.cpp --record
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna.bench import engines
from puna.bench.work import DECODE_CONTEXT
from puna.bench.worker import Worker

STEPS = 8
"""Tokens at a time: an engine that keeps a twentieth of its speed shall not take minutes."""

SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


def decode(worker: Worker) -> float:
    """Seconds a token."""
    seconds: float = worker.ask("decode", streams=1, context=DECODE_CONTEXT, steps=STEPS)["seconds"]
    return seconds


def disturbed(worker: Worker, core: int) -> float:
    """The same beside a spin loop."""
    spin = subprocess.Popen([sys.executable, "-c", SPIN, str(core)], stdout=subprocess.PIPE)
    try:
        assert spin.stdout is not None
        spin.stdout.readline()  # it is there
        return decode(worker)
    finally:
        spin.kill()
        spin.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF; `puna bench --shape` makes one")
    parser.add_argument("--against", help="peers, as for puna bench")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--pairs", type=int, default=11, help="turns of each engine")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/busy.jsonl")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    target, _ = engines.target_of_model(options.model, options.model.stem)
    peers = engines.chosen(options.against)
    engines.check_all(peers, options.peer_python)
    specs = [
        engines.ours(target, len(cores)),
        *engines.specs(peers, target, len(cores), options.peer_python, lambda said: print(said, file=sys.stderr)),
    ]
    row: dict[str, Any] = {"question": "busy", "model": options.model.stem, "threads": len(cores)}
    for spec in specs:
        with Worker(spec) as worker:
            worker.ask("load")
            decode(worker)
            alone, beside = [], []
            for _ in range(options.pairs):
                alone.append(decode(worker))
                beside.append(disturbed(worker, cores[-1]))
        row[spec.name] = {
            "tokens_s": 1 / statistics.median(alone),
            "disturbed_tokens_s": 1 / statistics.median(beside),
            "share_kept": common.ratio(alone, beside),
        }
        print(spec.name, row[spec.name], file=sys.stderr)
    common.record("busy", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
