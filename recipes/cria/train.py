"""Trains cria on what prepare.py wrote, through Puna's own model functions.

What it is: a plain loop. Muon turns the matrices, AdamW the embedding and the norms; the rate warms up, stays, and
falls to zero over the last steps, so that the end can be moved on a resumed run.
What it is not: Puna's trainer; it trains one small model on one CPU.
What is surprising: a row is one story, as every generation is one, and a batch holds stories of nearly one length. So
there is next to no padding, and attention, 40 % of the time in rows of 512 tokens, is half as much work. The signals
that stop a program save a checkpoint first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from prepare import BOS_ID, VOCAB_SIZE, WORK

from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.models.tree import DecoderWeights

CONFIG = DecoderConfig(
    generation="llama2",
    vocab_size=VOCAB_SIZE,
    dim=256,
    layers=5,
    heads=8,
    kv_heads=4,
    head_dim=32,
    hidden_dim=512,
    norm_eps=1e-5,
    rope=Rope(head_dim=32, theta=10_000.0),
    context_length=512,
    tied_head=True,
)
"""All row lengths are multiples of 256, the block of the packed formats."""

HELD_OUT = 250
"""Stories of the held-out file that are scored now and then during the run; evaluate.py scores all of them."""

PADDING = -100
"""A target that does not count: what torch's cross_entropy ignores unless told otherwise."""


def split(ids: np.ndarray) -> list[np.ndarray]:
    """The stories of a file of ids, each BOS story EOS."""
    return np.split(ids.astype(np.int64), np.flatnonzero(ids == BOS_ID)[1:])


def batches(stories: Sequence[np.ndarray], context: int, size: int, order: np.random.Generator) -> list[np.ndarray]:
    """Every story once, in batches of ids [B, T + 1] with B · T at most `size`, padded with PADDING.

    A row is a story; the stories of a batch are of one length, or nearly, and otherwise drawn from `order`, which also
    puts the batches in their order. A story longer than the context is cut.
    """
    shuffled = [stories[i][: context + 1] for i in order.permutation(len(stories))]
    shuffled.sort(key=len, reverse=True)
    made = []
    while shuffled:
        longest = len(shuffled[0])
        count = max(1, size // (longest - 1))
        batch = np.full((min(count, len(shuffled)), longest), PADDING, np.int64)
        for row, story in zip(batch, shuffled, strict=False):
            row[: len(story)] = story
        made.append(batch)
        del shuffled[:count]
    return [made[i] for i in order.permutation(len(made))]


def endless(
    stories: Sequence[np.ndarray], context: int, size: int, seed: int, skip: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(epoch, batch) without end, each epoch in an order of its own; the first `skip` batches are left out."""
    epoch = 0
    while True:
        for batch in batches(stories, context, size, np.random.default_rng((seed, epoch))):
            if skip:
                skip -= 1
            else:
                yield epoch, batch
        epoch += 1


def initial(config: DecoderConfig, seed: int) -> dict[str, torch.Tensor]:
    """Canonical name → parameter: matrices of variance 1 / columns, or zero where they write to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in decoder.shapes(config).items():
        if len(shape) == 1:
            value = torch.ones(shape)
        elif name.endswith((".o.weight", ".down.weight")):
            value = torch.zeros(shape)
        else:
            std = 0.02 if name == "embedding" else shape[1] ** -0.5
            value = torch.randn(shape, generator=generator) * std
        parameters[name] = value.requires_grad_()
    return parameters


def tree(config: DecoderConfig, parameters: dict[str, torch.Tensor]) -> DecoderWeights:
    """The weights `puna.models.decoder` takes, all on torch."""
    weights = decoder.build(config, parameters.__getitem__)
    return dataclasses.replace(weights, inv_freq=torch.from_numpy(weights.inv_freq))


def loss(weights: DecoderWeights, config: DecoderConfig, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats a token over rows [B, T + 1] of ids, PADDING left out."""
    tokens, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
    scores = decoder.logits(weights, decoder.forward(weights, config, tokens))
    return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), ignore_index=PADDING)


def rate(step: int, warmup: int, steps: int, decay: int) -> float:
    """The share of the peak rate at a step, from 0: up over `warmup`, then one, down to zero over the last `decay`."""
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill leaves the old one or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def snapshot(
    step: int, tokens: int, parameters: dict[str, torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """What a resumed run needs."""
    return {
        "step": step,
        "tokens": tokens,
        "parameters": {name: p.detach() for name, p in parameters.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }


def resume(
    checkpoint: Path, log: Path, parameters: dict[str, torch.Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, int]:
    """Put a checkpoint in place and cut the log back to it: (steps done, tokens seen); zeros where there is none."""
    if not checkpoint.exists():
        log.write_text("")
        return 0, 0
    state = torch.load(checkpoint, weights_only=True)
    with torch.no_grad():
        for name, value in state["parameters"].items():
            parameters[name].copy_(value)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    step, tokens = state["step"], state["tokens"]
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
    log.write_text("".join(line + "\n" for line in lines))
    print(f"resumed at step {step}", flush=True)
    return step, tokens


def main() -> None:
    """The run. The defaults are those of the recorded one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="folder of prepare.py's files and the checkpoint")
    parser.add_argument("--steps", type=int, default=2700)
    parser.add_argument("--decay", type=int, default=1500, help="last steps, over which the rate falls to zero")
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--size", type=int, default=4096, help="tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="of the matrices, by Muon, its step as large as AdamW's")
    parser.add_argument("--embedding-lr", type=float, default=4e-3, help="of the embedding and the norms, by AdamW")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=100, help="steps between held-out losses and checkpoints")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast: slower where the CPU multiplies bf16")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    stories = split(np.load(args.work / "train.npy"))
    fixed = np.random.default_rng(0)
    held_out = batches(split(np.load(args.work / "held_out.npy"))[:HELD_OUT], CONFIG.context_length, args.size, fixed)
    parameters = initial(CONFIG, args.seed)
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and name != "embedding"]
    others = [p for name, p in parameters.items() if p.ndim == 1 or name == "embedding"]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )
    weights = tree(CONFIG, parameters)
    checkpoint, log = args.work / "checkpoint.pt", args.work / "log.jsonl"
    step, tokens = resume(checkpoint, log, parameters, optimizers)

    def objective(rows: torch.Tensor) -> torch.Tensor:
        return loss(weights, CONFIG, rows)

    with torch.no_grad():
        objective(torch.zeros(1, 2, dtype=torch.int64))  # settles the table of ops before it is traced
    compiled = objective if args.no_compile else torch.compile(objective, dynamic=True)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32)
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    since, since_tokens, running = time.perf_counter(), 0, 0.0
    for epoch, batch in endless(stories, CONFIG.context_length, args.size, args.seed, step):
        if step >= args.steps or stopping:
            break
        rows = torch.from_numpy(batch)
        share = rate(step, args.warmup, args.steps, args.decay)
        for optimizer, peak in zip(optimizers, (args.lr, args.embedding_lr), strict=True):
            optimizer.param_groups[0]["lr"] = share * peak
        with bf16:
            value = compiled(rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = value.item() if running == 0.0 else 0.9 * running + 0.1 * value.item()
        if not math.isfinite(running):
            raise FloatingPointError(f"the loss is {running} at step {step}")
        step += 1
        counted = int((rows[:, 1:] >= 0).sum())
        tokens, since_tokens = tokens + counted, since_tokens + counted
        measure = step % args.every == 0 or step == args.steps
        if step % 10 == 0 or measure:
            now = time.perf_counter()
            line: dict[str, Any] = {
                "step": step,
                "epoch": epoch,
                "tokens": tokens,
                "loss": round(running, 4),
                "lr": round(share * args.lr, 6),
                "tokens_per_s": round(since_tokens / (now - since)),
            }
            if measure:
                with torch.no_grad(), bf16:
                    losses = [objective(torch.from_numpy(part)).item() for part in held_out]
                counts = [int((part[:, 1:] >= 0).sum()) for part in held_out]
                line["held_out"] = round(float(np.average(losses, weights=counts)), 4)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            since, since_tokens = time.perf_counter(), 0
        if measure:
            save(checkpoint, snapshot(step, tokens, parameters, optimizers))
    save(checkpoint, snapshot(step, tokens, parameters, optimizers))


if __name__ == "__main__":
    main()
