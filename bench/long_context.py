"""A million tokens of context in a small Llama 4: is it what is planned, is a needle found, and what does a token cost?

The model has Llama 4's layers in small: of eight, every fourth is global, the others see their chunk of 8,192. Its
weights are constructed, not trained. A question's embedding is a direction that the first global layer's q turns into a
query; what lies in the cache is filled in directly, page by page: keys that are random directions, values that name the
word `hay`; and somewhere a needle, whose key fits the question and whose value names its answer. A needle's score is
such that a million keys drown it unless the query is as long as the temperature of its position makes it: the share of
attention that it gets is told by arithmetic, and the logits must say so. The local layers compute the chunk that the
question stands in, with random weights, which the answer's half of the residual stream does not see.

Memory is the peak (VmHWM) of a process that does no more, beside `puna plan` of the model's folder. A token's cost is
that of a step, of the whole model, and of one of the same shape whose layers are all local, at lengths up to a million.

    python bench/long_context.py --folder /tmp/puna-long --record
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common
import numpy as np
from plan_memory import planned, status

from puna.engine.engine import PREFILL_CHUNK
from puna.engine.runner import Batch, HostRunner, window
from puna.kernels import ops
from puna.kernels.layouts import ChunkedTable, to_bf16
from puna.models import llama4
from puna.models.config import write_hub
from puna.models.llama4_config import Llama4Config
from puna.models.rope import Rope
from puna.weights import names, parts
from puna.weights.checkpoint import CONFIG_NAME, open_checkpoint
from puna.weights.files import LazyTensor
from puna.weights.load import load_weights
from puna.weights.save import write_json, write_safetensors

TOKENS = 1_000_000
CONFIG = Llama4Config(
    "llama4", vocab_size=1024, dim=256, layers=8, heads=8, kv_heads=2, head_dim=64, hidden_dim=512, norm_eps=1e-5,
    rope=Rope(64, 5e5), context_length=1 << 20, interleaved_rope=True, chunk=8192, global_layers=(3, 7),
    expert_hidden_dim=256, experts=4, experts_per_token=1, moe_layers=(1, 3, 5, 7), qk_norm=True,
)  # fmt: skip
HAY = 1
"""The word that every value names, but for the needles'."""
NEEDLES = 8
"""Questions are the words from 2 on, their answers those after them."""
SCORE = 11.5
"""Of a needle's key for its question before the temperature: exp of it is a tenth of a million. At a million: 17."""
DRAWN = 64
"""Pages of hay that are drawn; all are among them."""
RETRIEVES = 3
"""The layer that finds them; the other global one is as random as the local ones."""
GROUP = 0
"""The heads of one key and value that find them; those of the other see nothing but zeros."""


@dataclass(frozen=True)
class Construction:
    """A model that answers what stands in its cache: weights by canonical name, and what to put into the cache."""

    config: Llama4Config
    weights: Mapping[str, Any]
    keys: Any
    """[NEEDLES, D]: that fit the questions."""
    words: Any
    """[V, D]: values that name a word."""
    score: float
    """Of a key that fits, before the temperature."""

    def question(self, needle: int) -> int:
        return 2 + needle

    def answer(self, needle: int) -> int:
        return 2 + NEEDLES + needle


def construct(config: Llama4Config, score: float = SCORE, seed: int = 0) -> Construction:
    """The weights. The residual stream is three parts: a quarter says which word a token is, a half is the noise of
    other layers, the last quarter is the answer, which one layer writes to and the head alone reads."""
    random = np.random.default_rng(seed)
    d, part = config.dim, config.dim // 4
    heads, group = config.head_dim, config.heads // config.kv_heads
    shapes = llama4.shapes(config)
    weights: dict[str, Any] = {}
    for name, shape in shapes.items():
        weights[name] = (
            np.ones(shape) if len(shape) == 1 else random.normal(0, shape[-1] ** -0.5, shape)
        ).astype(np.float32)  # fmt: skip
        if name.startswith("layers.") and name.endswith(("o.weight", "down.weight")):
            weights[name] *= 0.05  # what they add stays small beside the word
            weights[name][:part] = weights[name][-part:] = 0
    words = _directions(random, config.vocab_size, part)
    embedding = np.zeros((config.vocab_size, d), np.float32)
    embedding[:, :part] = words * math.sqrt(d)  # so that the norm divides by about 1
    keys, values = _directions(random, NEEDLES, heads), _directions(random, config.vocab_size, heads)
    # q: from a question's direction to its key, as long as makes the score; the rest of the words ask for nothing.
    length = score * math.sqrt(heads) / math.sqrt(d)
    seen = np.zeros((heads, d), np.float32)
    seen[:, :part] = length * keys.T @ np.linalg.pinv(words[2 : 2 + NEEDLES].T)
    q = weights[f"layers.{RETRIEVES}.q.weight"] = np.zeros(shapes[f"layers.{RETRIEVES}.q.weight"], np.float32)
    o = np.zeros(shapes[f"layers.{RETRIEVES}.o.weight"], np.float32)
    for head in range(GROUP * group, (GROUP + 1) * group):
        q[head * heads : (head + 1) * heads] = seen
        o[-part : d - part + heads, head * heads : (head + 1) * heads] = np.eye(heads) * 10 / group
    weights[f"layers.{RETRIEVES}.o.weight"] = o
    for name in ("k", "v"):  # tokens of the question's chunk leave nothing that could be found
        weights[f"layers.{RETRIEVES}.{name}.weight"] = np.zeros(shapes[f"layers.{RETRIEVES}.{name}.weight"], np.float32)
    head = np.zeros((config.vocab_size, d), np.float32)
    head[:, -part : d - part + heads] = values
    return Construction(config, weights | {"embedding": embedding, "head": head}, keys, values, score)


def _directions(random: Any, count: int, dim: int) -> Any:
    found = random.normal(0, 1, (count, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def build(made: Construction) -> Any:
    """The tree of its weights."""
    return llama4.build(made.config, lambda name: made.weights[name])


def hay(made: Construction, page: int, seed: int = 1) -> Any:
    """Pages of the global layers' cache, float16 [DRAWN, 2, layers, page, G, D]: keys of all layers, then values."""
    config, random = made.config, np.random.default_rng(seed)
    layers = len(config.global_layers)
    pages = np.zeros((DRAWN, 2, layers, page, config.kv_heads, config.head_dim), np.float16)
    pages[:, 0] = _directions(random, pages[:, 0, ..., 0].size, config.head_dim).reshape(pages[:, 0].shape)
    pages[:, 1, layer_of(config), :, GROUP] = made.words[HAY]
    return pages


def layer_of(config: Llama4Config) -> int:
    """Which of the global layers it is that finds needles."""
    return config.global_layers.index(RETRIEVES)


def fill(runner: HostRunner, made: Construction, pages: Any, count: int, needles: Mapping[int, int]) -> None:
    """The first `count` pages of the cache: `hay`, one after the other, and needles at their positions."""
    of = layer_of(made.config)
    for number in range(count):
        page, begin = pages[number % DRAWN], number * runner.page
        inside = {at: needle for at, needle in needles.items() if begin <= at < begin + runner.page}
        if inside:
            page = page.copy()
            for at, needle in inside.items():
                page[0, of, at - begin, GROUP] = made.keys[needle]
                page[1, of, at - begin, GROUP] = made.words[made.answer(needle)]
        runner.write_page(number, page.tobytes())


def table_at(runner: HostRunner, first: int, count: int, width: int) -> ChunkedTable:
    """The table of `count` tokens from position `first` of one sequence: its pages in order, its local ones in turn."""
    pages, most = np.arange(width, dtype=np.int32)[None], window(runner.config, runner.page)
    local = pages % most
    local[0, : (first - first % runner.config.chunk) // runner.page] = -1
    positions = np.arange(first, first + count, dtype=np.int32)
    return ChunkedTable(positions, np.array([0, count], np.int32), pages, np.ascontiguousarray(local))


def step(runner: HostRunner, ids: Any, first: int, width: int) -> Any:
    """Logits [V] after the last of `ids`, which stand from position `first` on and are of one chunk."""
    ids = np.asarray(ids, np.int32)
    return runner.run(Batch(ids, table_at(runner, first, len(ids), width), np.array([len(ids) - 1], np.int32)))[0]


def prefill(runner: HostRunner, made: Construction, end: int, width: int) -> None:
    """Compute the tokens of the last chunk before position `end`, words that are no question."""
    random, chunk = np.random.default_rng(2), made.config.chunk
    at = (end - 1) // chunk * chunk
    while at < end:
        count = min(PREFILL_CHUNK, end - at)
        step(runner, random.integers(2 + 2 * NEEDLES, made.config.vocab_size, count), at, width)
        at += count


def told(made: Construction, pages: Any, count: int, needle: int, position: int) -> float:
    """The share of attention that a needle gets of a question at `position`, of it and `count` pages of hay, by
    arithmetic in float64. (The hay that other needles stand in place of is not missed.)"""
    config, warm = made.config, 1.0
    if config.temperature_tuning:
        warm += config.temperature_scale * math.log1p(math.floor((position + 1) / config.temperature_floor))
    keys = pages[:, 0, layer_of(config), :, GROUP].astype(np.float64)
    each = np.exp(made.score * warm * (keys @ made.keys[needle].astype(np.float64))).sum(axis=1)
    times = np.bincount(np.arange(count) % DRAWN, minlength=DRAWN)
    return float(1 / (1 + (each * times).sum() * math.exp(-made.score * warm)))


def found(logits: Any, made: Construction, needle: int) -> float:
    """The share of attention that the logits say the needle got, of it and the hay."""
    answer, hay = (made.words[word] for word in (made.answer(needle), HAY))
    gram = np.array([[1.0, answer @ hay], [answer @ hay, 1.0]])
    parts = np.linalg.solve(gram, np.array([logits[made.answer(needle)], logits[HAY]], np.float64))
    return float(parts[0] / parts.sum())


def write(folder: Path, made: Construction) -> None:
    """The model as the hub's files, in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: LazyTensor(name, shape, "bf16", partial(to_bf16, made.weights[name]))
        for name, shape in llama4.shapes(made.config).items()
    }
    outgoing = parts.write(names.plan(made.config, "hub"), tensors, folder)
    write_safetensors(folder, outgoing, lambda _: None)
    write_json(folder / CONFIG_NAME, write_hub(made.config, dtype="bfloat16", bos_id=0, eos_ids=(0,)))


def retrieved(made: Construction, runner: HostRunner, pages: Any, tokens: int) -> list[dict[str, Any]]:
    """Fill the cache of a runner with hay and needles at eight depths, and ask for each at the last of `tokens`."""
    chunk = made.config.chunk
    begin, last, width = (tokens - 1) // chunk * chunk, tokens - 1, -(-tokens // runner.page)
    count = begin // runner.page
    depths = {(2 * i + 1) * begin // (2 * NEEDLES): i for i in range(NEEDLES)}
    fill(runner, made, pages, count, depths)
    prefill(runner, made, last, width)
    answers = []
    for at, needle in depths.items():
        logits = step(runner, [made.question(needle)], last, width)
        answers.append(
            {
                "position": at,
                "named": int(logits.argmax()) == made.answer(needle),
                "share": round(found(logits, made, needle), 4),
                "told": round(told(made, pages, count, needle, last), 4),
            }
        )
    return answers


def cost(runner: HostRunner, positions: Sequence[int], width: int, turns: int) -> list[float]:
    """Seconds of a step of one token at each position, the median of some turns."""
    seconds: list[list[float]] = [[] for _ in positions]
    for _ in range(turns + 1):
        for taken, at in zip(seconds, positions, strict=True):
            began = time.perf_counter()
            step(runner, [HAY], at, width)
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) for taken in seconds]


def worker(folder: Path, tokens: int, turns: int) -> dict[str, Any]:
    """The whole of it, in a process of its own."""
    import puna.cli.main  # noqa: F401 - part of the program whose memory is planned

    ops.select()
    made = construct(CONFIG)
    weights, _ = load_weights(open_checkpoint(folder))
    runner = HostRunner(CONFIG, weights, "fp16")
    width = -(-tokens // runner.page)
    runner.allocate(width, window(CONFIG, runner.page))
    pages = hay(made, runner.page)
    began = time.perf_counter()
    warm = retrieved(made, runner, pages, tokens)
    filled, peak = time.perf_counter() - began, status()["VmHWM"]
    # The same question of the same cache, its query left as long as it is.
    cold_config = replace(CONFIG, temperature_tuning=False)
    cold = replace(made, config=cold_config)
    runner.config = cold_config
    last, count = tokens - 1, (tokens - 1) // CONFIG.chunk * CONFIG.chunk // runner.page
    drowned = [
        {
            "named": int((logits := step(runner, [made.question(needle)], last, width)).argmax())
            == made.answer(needle),
            "share": round(found(logits, made, needle), 4),
            "told": round(told(cold, pages, count, needle, last), 4),
        }
        for needle in range(NEEDLES)
    ]
    runner.config = CONFIG
    chunks = tokens // CONFIG.chunk  # the last token of a chunk, so that local layers see all they ever do
    positions = [k * CONFIG.chunk - 1 for k in (chunks // 8, chunks // 4, chunks // 2, chunks)]
    whole = cost(runner, positions, width, turns)
    local_config = replace(CONFIG, global_layers=())
    local = HostRunner(local_config, weights, "fp16")
    local.allocate(1, window(local_config, local.page))
    for at in range(0, CONFIG.chunk, PREFILL_CHUNK):
        step(local, np.full(PREFILL_CHUNK, HAY), at, width)
    alone = cost(local, positions, width, turns)
    slope, base = np.polyfit(positions, whole, 1)
    return {
        "peak_bytes": peak,
        "filled_seconds": round(filled, 2),
        "needles": warm,
        "without_temperature": drowned,
        "positions": positions,
        "step_ms": [round(1e3 * s, 3) for s in whole],
        "local_layers_step_ms": [round(1e3 * s, 3) for s in alone],
        "local_last_over_first": round(alone[-1] / alone[0], 3),
        "line_ms": {"base": round(1e3 * base, 3), "per_million": round(1e9 * slope, 2)},
        "off_the_line": round(float(np.max(np.abs(base + slope * np.array(positions) - whole) / whole)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/puna-long"), help="where the model is written")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--turns", type=int, default=5, help="of the steps that are timed")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/long-context.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.folder, options.tokens, options.turns)))
        return
    write(options.folder, construct(CONFIG))
    plan = planned(str(options.folder), options.tokens, 1, "--kv-type", "fp16")
    command = [sys.executable, __file__, "--worker", "--folder", str(options.folder), "--tokens", str(options.tokens)]
    command += ["--turns", str(options.turns)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    peak = answer.pop("peak_bytes")
    row = {
        "question": "long-context", "tokens": options.tokens,
        "peak_mb": round(peak / 1e6, 1), "planned_mb": round(plan["total_bytes"] / 1e6, 1),
        "planned_over_peak": round(plan["total_bytes"] / peak, 4),
        "planned_cache_mb": round(plan["cache_bytes"] / 1e6, 1),
        **answer,
    }  # fmt: skip
    common.record("long-context", row | common.pedigree(), options.record)


if __name__ == "__main__":
    main()
