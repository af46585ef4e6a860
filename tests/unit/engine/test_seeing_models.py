"""The models that see, small and random, in the engine: chunks, the cache and companions change no answer.

What is surprising: the definition is asked for every answer anew, with the whole text and all pictures at once, and
without a cache; so whatever the engine forgets or mixes up shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from puna.engine.engine import Engine
from puna.engine.native_runner import host_runner
from puna.engine.pictures import Run, Shown, attended
from puna.kernels.layouts import Pixels
from puna.models.config import DecoderConfig
from puna.models.llama3_vision_config import MllamaConfig, MllamaVisionConfig
from puna.models.llama4_config import Llama4Config, Llama4VisionConfig
from puna.models.registry import definition
from puna.models.rope import Rope
from puna.models.tree import Placed
from puna.types import Sampling

VOCAB, SIZE, MADE = 61, 12, 6
NUMBERS: dict[str, Any] = {
    "vocab_size": VOCAB, "dim": 48, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 8, "hidden_dim": 56,
    "norm_eps": 1e-5, "rope": Rope(8, 10000.0), "context_length": 128,
}  # fmt: skip
CONFIGS: dict[str, DecoderConfig] = {
    "mllama": MllamaConfig(
        generation="llama3.2", **NUMBERS, cross_layers=(1, 3), image_token=VOCAB,
        vision=MllamaVisionConfig(
            image_size=SIZE, dim=24, layers=3, global_layers=1, heads=3, hidden_dim=40, patch_size=4, taken=(1,)
        ),
    ),
    "llama4": Llama4Config(
        generation="llama4", **NUMBERS, interleaved_rope=True, expert_hidden_dim=40, experts=3, experts_per_token=1,
        moe_layers=(1, 3), global_layers=(3,), chunk=8, qk_norm=True,
        vision=Llama4VisionConfig(
            dim=24, layers=2, heads=3, hidden_dim=40, image_size=SIZE, patch_size=3, output_dim=20, shuffle=0.5
        ),
    ),
}  # fmt: skip
Asked = tuple[list[int], tuple[Shown, ...]]


@cache
def model(name: str) -> tuple[Any, Any, Any]:
    """Config, definition, weights."""
    config = CONFIGS[name]
    random, module = np.random.default_rng(5), definition(config)
    shapes = module.shapes(config)

    def parameter(name: str) -> Any:
        shape = shapes[name]
        if name == "norm" or ("norm" in name and name.endswith("weight")):
            return random.uniform(0.5, 1.5, shape).astype(np.float32)
        spread = 1.5 * shape[-1] ** -0.5 if len(shape) > 1 else 0.7
        return (spread * random.standard_normal(shape)).astype(np.float32)

    return config, module, module.build(config, parameter)


def picture(name: str, number: int, tiles: int) -> tuple[list[int], Any]:
    """A picture of so many tiles in a row: the ids that it takes, and it at a place."""
    values = np.random.default_rng(number).standard_normal((tiles, 3, SIZE, SIZE)).astype(np.float32)
    digest = (number + 100 * tiles).to_bytes(32, "big")
    if name == "mllama":
        pixels = Pixels(values, (1, tiles), 1)
        return [VOCAB], lambda at: Shown(at, 1, digest, pixels)
    each = 4  # tokens of a tile; a separator stands behind it
    pixels = Pixels(values, (1, tiles), tiles * (each + 1))
    runs = [(i * (each + 1), i * each, each) for i in range(tiles)]
    return (
        ([58] * each + [59]) * tiles,
        lambda at: Shown(at, tiles * (each + 1), digest, pixels, tuple(Run(at + a, b, c) for a, b, c in runs)),
    )


def prompt(name: str, *parts: int | tuple[int, int]) -> Asked:
    """Tokens, and pictures as (number, tiles)."""
    ids: list[int] = []
    shown: list[Shown] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            taken, at = picture(name, *part)
            shown.append(at(len(ids)))
            ids += taken
    return ids, attended(shown) if name == "mllama" else tuple(shown)


def plainly(name: str, asked: Asked) -> list[int]:
    """The greedy answer, each token from the whole text anew."""
    config, module, weights = model(name)
    ids, shown = list(asked[0]), asked[1]
    sights = [module.see(weights, config, each.pixels) for each in shown]
    placed = [
        Placed(0, at, sight[first : first + length] if length else sight)
        for each, sight in zip(shown, sights, strict=True)
        for at, first, length in each.runs or (Run(each.at, 0, 0),)
    ]
    for _ in range(MADE):
        hidden = module.forward(weights, config, np.array([ids], np.int32), placed=placed)
        ids.append(int(module.logits(weights, hidden)[0, -1, :VOCAB].argmax()))
    return ids[len(asked[0]) :]


def answers(engine: Engine, asked: Sequence[Asked]) -> tuple[list[list[int]], list[int]]:
    """What the engine says to all of them at once, and how many of each prompt's tokens it had."""
    numbers = [engine.submit(ids, Sampling(temperature=0, max_tokens=MADE), pictures=shown) for ids, shown in asked]
    made: dict[int, list[int]] = {number: [] for number in numbers}
    reused: dict[int, int] = {}
    while not engine.idle:
        for report in engine.step():
            if report.error is not None:
                raise report.error
            made[report.request] += report.tokens
            reused[report.request] = report.reused
        engine.check()
    return list(made.values()), [reused[number] for number in numbers]


@pytest.mark.parametrize("step_tokens", [3, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_the_definitions(name: str, step_tokens: int) -> None:
    config, _, weights = model(name)
    asked = [
        prompt(name, 1, 2, (1, 2), 3, 4),
        prompt(name, 1, 2, (2, 2), 3, 4),
        prompt(name, 1, (1, 1), (2, 3), *range(5, 17), (3, 1), 7),
        prompt(name, *range(1, 9)),
        prompt(name, (4, 2), *range(9, 29)),
    ]
    expected = [plainly(name, each) for each in asked]
    assert expected[0] != expected[1]  # they look
    engine = Engine(host_runner(config, weights, "fp32", page=16), pages=60, step_tokens=step_tokens, max_running=3)
    assert answers(engine, asked)[0] == expected
    made, reused = answers(engine, asked)  # from the cache, and not all at once: three run
    assert made == expected
    assert reused == [len(ids) - 1 for ids, _ in asked]
    assert engine._sights.seen == 6
