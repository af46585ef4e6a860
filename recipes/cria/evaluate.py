"""Measures the exported model: the loss on every held-out story, samples, and a picture of the training run.

What it is: the last of four scripts. It writes results.json and curve.svg beside itself, with a copy of the run's log.
What it is not: a benchmark of speed.
What is surprising: the samples come from `puna.LLM`, so `puna run cria --dtype fp32` with the same prompt, seed and
temperature prints the same stories. In float32, because in bf16 kernels round at different places, and one word that
differs early makes another story; even in float32 a long story can turn on the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export import PACKAGE
from prepare import WORK
from train import batches, loss, split

from puna import LLM
from puna.models.tree import tree_map
from puna.weights.load import load

HERE = Path(__file__).parent
GREEDY = "Once upon a time"
"""The prompt of the sample at temperature 0; the tests know its text by heart."""
DRAWN = (
    ("Once upon a time", 1),
    ("One day, a little girl", 2),
    ("Lily and Ben", 3),
    ("Tom had a red ball.", 4),
    ("", 5),
)
"""Prompts and seeds of the samples at temperature 0.7."""
TEMPERATURE = 0.7


def held_out_loss(folder: Path, ids: np.ndarray) -> dict[str, float]:
    """Loss on the held-out stories, in float32 from the stored weights: nats a token, tokens scored, nats in all."""
    model = load(folder, dtype="fp32")
    weights = tree_map(lambda leaf: torch.from_numpy(np.array(leaf)), model.weights)
    total, count = 0.0, 0
    for batch in batches(split(ids), model.config.context_length, 4096, np.random.default_rng(0)):
        counted = int((batch[:, 1:] >= 0).sum())
        with torch.no_grad():
            total += counted * loss(weights, model.config, torch.from_numpy(batch)).item()
        count += counted
    return {"nats_per_token": total / count, "tokens": count, "nats": total}


def samples(folder: Path) -> list[dict[str, Any]]:
    """The stories the model tells, each with what it takes to have it told again."""
    llm = LLM(folder, dtype="fp32")
    told = []
    for prompt, seed, temperature in ((GREEDY, None, 0.0), *((p, s, TEMPERATURE) for p, s in DRAWN)):
        answer = llm.generate(prompt, temperature=temperature, seed=seed)
        told.append(
            {
                "prompt": prompt,
                "temperature": temperature,
                "seed": seed,
                "text": answer.text,
                "tokens": answer.completion_tokens,
                "finish_reason": answer.finish_reason,
            }
        )
    return told


def curve(lines: Sequence[dict[str, Any]]) -> str:
    """The run as a picture: training and held-out loss over tokens seen, as SVG."""
    width, height, left, bottom, top, right = 720, 360, 56, 44, 16, 16
    last = max(line["tokens"] for line in lines)
    low, high = 1.5, 4.0

    def point(tokens: float, value: float) -> tuple[float, float]:
        x = left + (width - left - right) * tokens / last
        y = top + (height - top - bottom) * (high - min(value, high)) / (high - low)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12" '
        'font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for k in range(round((high - low) / 0.5) + 1):
        x, y = point(0, low + 0.5 * k)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{width - right}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end" fill="#444">{low + 0.5 * k:.1f}</text>')
    step = 10 ** math.floor(math.log10(last))
    step = step if last / step >= 4 else step // 4 if last / step < 2 else step // 2
    for tokens in range(0, last + 1, step):
        x, y = point(tokens, low)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle" fill="#444">{tokens / 1e6:g}</text>')
    names = (("loss", "training (moving average)", "#b9a57a", 1.5), ("held_out", "held out", "#8a3b12", 2))
    for row, (key, label, colour, stroke) in enumerate(names):
        points = [point(line["tokens"], line[key]) for line in lines if key in line and line[key] <= high]
        drawn = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="{stroke}"/>')
        y = top + 18 + 18 * row
        parts.append(f'<line x1="{width - 210}" y1="{y - 4}" x2="{width - 190}" y2="{y - 4}" stroke="{colour}" '
                     f'stroke-width="{stroke}"/>')  # fmt: skip
        parts.append(f'<text x="{width - 184}" y="{y}" fill="#222">{label}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle" fill="#222">million tokens seen</text>')
    parts.append(
        f'<text x="14" y="{height / 2}" text-anchor="middle" fill="#222" transform="rotate(-90 14 {height / 2})">'
        "loss, nats a token</text></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the other scripts (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=PACKAGE, help="the exported model (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=HERE, help="folder to write to (default: %(default)s)")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)

    data = json.loads((args.work / "data.json").read_text())
    scored = held_out_loss(args.model, np.load(args.work / "held_out.npy"))
    log = (args.work / "log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    results = {
        "model_sha256": hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest(),
        "steps": lines[-1]["step"],
        "tokens_seen": lines[-1]["tokens"],
        "data": data,
        "held_out": {
            "nats_per_token": round(scored["nats_per_token"], 4),
            "bits_per_byte": round(scored["nats"] / math.log(2) / data["held_out"]["utf8_bytes"], 4),
            "tokens_scored": int(scored["tokens"]),
        },
        "samples": samples(args.model),
    }
    (args.to / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (args.to / "curve.svg").write_text(curve(lines))
    (args.to / "log.jsonl").write_text(log)
    print(json.dumps(results["held_out"]))
    for sample in results["samples"]:
        print(f"\n== temperature {sample['temperature']}, seed {sample['seed']}, {sample['finish_reason']}")
        print(f"[{sample['prompt']}]{sample['text']}")


if __name__ == "__main__":
    main()
