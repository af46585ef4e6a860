"""Does `puna plan` say how much memory a model takes? Its total beside the peak of a process that uses all of it.

For each model a process of its own loads it as `puna run` does and has every user's context filled by the engine:
prompts that are computed, and an answer's tokens behind them. Its peak (VmHWM of /proc, which counts the mapped pages
of the file too) stands beside `total_bytes` of `puna plan --json` for the same users and context. Weights are random
where the models are; only sizes matter.

    python bench/plan_memory.py cria:512 1b-Q4_K_M.gguf:4096 1b-Q8_0.gguf:2048:4 --record

Each is MODEL:CONTEXT, or MODEL:CONTEXT:USERS. 4,096 tokens of the 1B shape take half a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

ANSWER = 16
"""Tokens that each user is answered, of its context."""


def status() -> dict[str, int]:
    """This process's memory in bytes, by /proc's names of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon", "RssFile")}


def worker(model: str, context: int, users: int) -> dict[str, Any]:
    """Load, fill, and say what it took at every stage."""
    import puna.cli.main  # noqa: F401 - part of the program whose memory is planned
    from puna.engine.runner import PAGE
    from puna.types import Sampling
    from puna.weights.find import find_model

    stages = {"imported": status()}
    each = -(-context // PAGE) * PAGE
    engine, vocabulary = common.engine(find_model(model), users * each)
    stages["loaded"] = status()
    draw = random.Random(0)
    for _ in range(users):
        prompt = draw.choices(range(3, vocabulary), k=context - ANSWER)
        engine.submit(prompt, Sampling(temperature=0.0, max_tokens=ANSWER, ignore_eos=True))
    began = time.perf_counter()
    while not engine.idle:
        for report in engine.step():
            if report.error is not None:
                raise report.error
        stages.setdefault("stepped", status())
    stages["filled"] = status()
    return {"seconds": time.perf_counter() - began, "stages": stages}


def planned(model: str, context: int, users: int, *more: str) -> dict[str, Any]:
    """What `puna plan` says of it."""
    command = [
        sys.executable, "-m", "puna", "plan", model, "--context", str(context), "--users", str(users), "--json",
        "--bandwidth", "10", "--peak", "1", "--memory", "16", *more,  # speeds are not asked for
    ]  # fmt: skip
    document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    plan: dict[str, Any] = document["plans"][0]
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL:CONTEXT[:USERS]")
    parser.add_argument("--record", action="store_true", help="append a row each to bench/results/plan-memory.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for entry in options.models:
        model, *numbers = entry.split(":") if not entry.startswith("llama") else entry.rsplit(":", 1)
        context, users = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 1
        if options.worker:
            print(json.dumps(worker(model, context, users)))
            return
        plan = planned(model, context, users)
        command = [sys.executable, __file__, "--worker", entry]
        answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peak = answer["stages"]["filled"]["VmHWM"]
        row = {
            "question": f"plan-memory {Path(model).stem}", "context": context, "users": users,
            "peak_mb": round(peak / 1e6, 1), "planned_mb": round(plan["total_bytes"] / 1e6, 1),
            "planned_over_peak": round(plan["total_bytes"] / peak, 4),
            **{key: round(plan[key] / 1e6, 1) for key in plan if key.endswith("_bytes") and key != "spare_bytes"},
            "measured": {
                stage: {key: round(value / 1e6, 1) for key, value in found.items()}
                for stage, found in answer["stages"].items()
            },
            "seconds": round(answer["seconds"], 1),
        }  # fmt: skip
        common.record("plan-memory", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
