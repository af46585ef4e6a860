"""What sampling costs a step: 16 rows of 128,256 logits, one `sample` call, by kind of request.

    python bench/sampling.py --record

Milliseconds: the median of 40 calls of each kind in turns, and the smallest. Logits are normal
numbers with a deviation of 2 (`flat`: a share of 0.95 is most of the vocabulary), or those with 40 likely ones on
top, as a trained model has (`trained`).
What it is not: a test. It says nothing of what is drawn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import common

from puna.engine.sampler import Sampler, sample
from puna.kernels import ops
from puna.types import Sampling

VOCABULARY = 128_256
REQUESTS = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(temperature=0.7, top_p=1.0),
    "default (top_p 0.95)": Sampling(),
    "top_k 40": Sampling(top_k=40, top_p=1.0),
    "min_p 0.05": Sampling(min_p=0.05, top_p=1.0),
    "top_k, top_p, min_p": Sampling(top_k=40, top_p=0.9, min_p=0.02),
    "penalties": Sampling(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.2),
    "dry": Sampling(dry_multiplier=0.8),
    "bias and bans": Sampling(logit_bias=tuple((i, 1.0) for i in range(300)), banned_tokens=tuple(range(500, 600))),
    "mirostat": Sampling(mirostat_tau=5.0, top_p=1.0),
    "xtc": Sampling(xtc_probability=0.5),
    "top_n_sigma": Sampling(top_n_sigma=1.0, top_p=1.0),
    "typical": Sampling(typical_p=0.9, top_p=1.0),
    "logprobs 5": Sampling(logprobs=5),
    "masked, greedy": Sampling(temperature=0),
    "masked": Sampling(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/sampling.jsonl")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    flat = rng.normal(0, 2, (args.rows, VOCABULARY)).astype(np.float32)
    trained = flat.copy()
    for row in trained:
        row[rng.integers(0, VOCABULARY, 40)] += rng.exponential(6, 40) + 12
    prompt = rng.integers(0, VOCABULARY, 1000).tolist()
    mask = rng.integers(0, 1 << 32, (VOCABULARY + 31) // 32, dtype=np.uint64).astype(np.uint32)
    ops.select()
    report: dict[str, Any] = {
        "question": f"sampling {args.rows} rows of {VOCABULARY}", "threads": ops.threads(), "kernels": ops.summary(),
    }  # fmt: skip
    for name, logits in (("trained", trained), ("flat", flat)):
        spent: dict[str, list[float]] = {kind: [] for kind in REQUESTS}
        samplers = {kind: [Sampler(s, prompt) for _ in range(args.rows)] for kind, s in REQUESTS.items()}
        for turn in range(args.calls if name == "trained" else max(3, args.calls // 8)):
            for kind in REQUESTS:
                masks = [mask] * args.rows if kind.startswith("masked") else None
                began = time.perf_counter()
                draws = sample(logits, samplers[kind], masks)
                if turn:
                    spent[kind].append(time.perf_counter() - began)
                for sampler, draw in zip(samplers[kind], draws, strict=True):
                    sampler.accept(draw.token)
        report[name] = {
            kind: {"median_ms": round(statistics.median(each) * 1e3, 2), "min_ms": round(min(each) * 1e3, 2)}
            for kind, each in spent.items()
        }
    common.record("sampling", report | common.pedigree(), args.record)


if __name__ == "__main__":
    main()
