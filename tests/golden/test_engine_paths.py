"""One text, whichever way the engine takes to it: alone, in a crowd, in pieces, remembered, preempted, guessed.

What it is: stories260K and cria in float32, each with a text recorded for every type of KV cache (engine_paths.json;
stories260K's greedy one is the published text), walked through every path on every kernel set; and, where the kernels
are asked to be invariant, the logits themselves, bit for bit, with bf16 and packed weights too.
What is surprising: a path starts anywhere. The recorded ids are cut at some place, what stands before it is the prompt,
and the answer must be the rest; so a short text has a long prompt as well. `python tests/golden/test_engine_paths.py`
records the texts anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.engine import turns as turns_module
from puna.engine.engine import Engine
from puna.engine.native_runner import host_runner
from puna.engine.runner import HostRunner
from puna.engine.sampler import sample
from puna.engine.speculation import PromptLookup, StepCost
from puna.kernels import cpu, ops
from puna.types import Sampling
from puna.weights.find import find_model
from puna.weights.load import LoadedModel, load

RECORDED = Path(__file__).with_name("engine_paths.json")
PAGE = 16
SEED = 11
DRAWN: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": SEED}
TOKENS = {"stories260K": 256, "cria": 120}
START = "Once upon a time, there was a little girl named Lily."
"""What a text begins with; stories260K's greedy one begins with nothing."""
KV_TYPES = {"stories260K": ("fp32", "bf16", "fp16"), "cria": ("fp32", "bf16", "fp16", "q8_0")}
"""stories260K's heads have 8 numbers, and q8_0 packs 32."""


@cache
def loaded_model(model: str, folder: Path, kernels: str, dtype: str | None, quant: str | None) -> LoadedModel:
    if model == "cria":
        return load(find_model("cria"), dtype=dtype or "auto", quant=quant)
    return load(folder / "stories260K.bin", tokenizer=folder / "tok512.bin", dtype=dtype or "auto", quant=quant)


@dataclass
class House:
    """Where runners come from: a model on a kernel set, with a cache of a type."""

    model: str
    folder: Path
    kernels: str
    kv_type: str
    dtype: str | None = "fp32"
    quant: str | None = None
    invariant: bool = False

    def runner(self) -> HostRunner:
        loaded = self.loaded()
        return host_runner(loaded.config, loaded.weights, self.kv_type, PAGE)

    def loaded(self) -> LoadedModel:
        ops.select(self.kernels, self.invariant)  # packed matrices are grouped for it
        return loaded_model(self.model, self.folder, self.kernels, self.dtype, self.quant)

    def start(self, published: bool = False) -> list[int]:
        tokenizer = self.loaded().tokenizer
        return tokenizer.encode("" if published else START, bos=tokenizer.adds_bos)


Rows = list[np.ndarray]


class Watch:
    """The logits from which each token of a request was drawn."""

    def __init__(self) -> None:
        self.rows: dict[Any, Rows] = {}

    def sample(self, logits: np.ndarray, samplers: list[Any], masks: list[Any]) -> list[Any]:
        for row, sampler in zip(logits, samplers, strict=True):
            if sampler in self.rows:
                self.rows[sampler].append(row.copy())
        return sample(logits, samplers, masks)

    def on(self, engine: Engine, request: int) -> Rows:
        return self.rows.setdefault(engine._requests[request].live[0].sampler, [])


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    monkeypatch.setattr(turns_module, "sample", made.sample)
    monkeypatch.setattr(StepCost, "share", lambda self, rows: 0.05)  # guesses pay, whatever the machine is at
    return made


@pytest.fixture(autouse=True)
def _auto_kernels() -> Iterator[None]:
    yield
    ops.select("auto")


def finish(engine: Engine, request: int) -> list[int]:
    """Step until all is done; the request's tokens of choice 0. The books are checked on the way."""
    tokens: list[int] = []
    for step in range(20_000):
        if engine.idle:
            engine.check()
            assert engine.statistics().pages_used == 0
            return tokens
        for report in engine.step():
            assert report.error is None, report.error
            if (report.request, report.choice) == (request, 0):
                tokens += report.tokens
        if step % 16 == 0:
            engine.check()
    raise AssertionError("it does not end")


@dataclass
class Walk:
    """A path's task: the ids before the cut, how to draw, and what must come of it."""

    house: House
    prompt: list[int]
    sampling: dict[str, Any]
    answer: list[int]
    watch: Watch

    @property
    def count(self) -> int:
        return len(self.answer)

    def engine(self, **options: Any) -> Engine:
        return Engine(self.house.runner(), **{"pages": 64, **options})

    def ask(self, engine: Engine, **more: Any) -> tuple[int, Rows]:
        priority = more.pop("priority", 0)
        sampling = Sampling(**self.sampling, max_tokens=self.count, ignore_eos=True, **more)
        request = engine.submit(self.prompt, sampling, priority=priority)
        return request, self.watch.on(engine, request)

    def alone(self, **options: Any) -> tuple[list[int], Rows]:
        engine = self.engine(**options)
        request, rows = self.ask(engine)
        return finish(engine, request), rows


def single(walk: Walk) -> tuple[list[int], Rows]:
    return walk.alone()


def in_a_crowd(walk: Walk) -> tuple[list[int], Rows]:
    """Among 31 others, of which some begin as it does, and which come and go while it runs."""
    engine = walk.engine(pages=400, max_running=32, step_tokens=96)
    vocabulary = walk.house.loaded().config.vocab_size
    pick = np.random.default_rng(0)
    for i in range(31):
        shared = walk.prompt[: i % 3 * 20]
        prompt = [*shared, *pick.integers(3, vocabulary, 1 + 2 * i).tolist()]
        engine.submit(prompt, Sampling(temperature=i % 2, seed=i, max_tokens=5 + 3 * i, ignore_eos=True))
        if i == 15:
            request, rows = walk.ask(engine)
    tokens = finish(engine, request)
    assert engine.statistics().computed_tokens > len(walk.prompt) + walk.count + 31 * 30
    return tokens, rows


def in_pieces(size: int) -> Callable[[Walk], tuple[list[int], Rows]]:
    return lambda walk: walk.alone(step_tokens=size)


def remembered(walk: Walk) -> tuple[list[int], Rows]:
    """The second time: all of the prompt but its last tokens is in the cache."""
    engine = walk.engine(pages=64)
    finish(engine, walk.ask(engine)[0])
    before = engine.statistics().reused_tokens
    request, rows = walk.ask(engine)
    tokens = finish(engine, request)
    assert engine.statistics().reused_tokens - before == len(walk.prompt) - 1
    return tokens, rows


def preempted(walk: Walk) -> tuple[list[int], Rows]:
    """A pool for one: whoever is more important takes its pages, again and again."""
    pages = -(-(len(walk.prompt) + walk.count) // PAGE) + 1
    engine = walk.engine(pages=pages)
    request, rows = walk.ask(engine)
    tokens: list[int] = []
    for step in range(walk.count * 4):
        if step % 12 == 11 and step < walk.count:
            engine.submit([5 + step] * (PAGE * pages - 10), Sampling(max_tokens=3, ignore_eos=True), priority=1)
        tokens += [token for report in engine.step() if report.request == request for token in report.tokens]
        engine.check()
    tokens += finish(engine, request)
    statistics = engine.statistics()
    assert statistics.preemptions >= walk.count // 12 - 1
    assert statistics.evictions > 0
    return tokens, rows


def looked_up(walk: Walk) -> tuple[list[int], Rows]:
    return walk.alone(speculate=PromptLookup)


class Told:
    """Guesses what comes, but for every fifth place."""

    def __init__(self, text: list[int]) -> None:
        self.text = [token if i % 5 else 7 for i, token in enumerate(text)]

    def propose(self, tokens: list[int], most: int) -> list[int]:
        return self.text[len(tokens) : len(tokens) + most]


def guessed(walk: Walk) -> tuple[list[int], Rows]:
    engine = walk.engine(speculate=lambda: Told(walk.prompt + walk.answer))
    request, rows = walk.ask(engine)
    tokens = finish(engine, request)
    statistics = engine.statistics()
    assert statistics.guessed_tokens > statistics.right_guesses > walk.count // 3
    return tokens, rows


def one_of_three(walk: Walk) -> tuple[list[int], Rows]:
    """Choice 0 of three, that share the prompt's pages."""
    engine = walk.engine(max_running=3)
    request, rows = walk.ask(engine, n=3)
    return finish(engine, request), rows


PATHS: dict[str, Callable[[Walk], tuple[list[int], Rows]]] = {
    "single": single,
    "in a crowd": in_a_crowd,
    "pieces of 1": in_pieces(1),
    "pieces of 7": in_pieces(7),
    "pieces of 64": in_pieces(64),
    "remembered": remembered,
    "preempted": preempted,
    "looked up": looked_up,
    "guessed": guessed,
    "one of three": one_of_three,
}


def kernel_names() -> list[str]:
    """Fastest first."""
    return [*cpu.isas(), "reference"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, dict[str, list[int]]]]:
    data: dict[str, dict[str, dict[str, list[int]]]] = json.loads(RECORDED.read_text())
    return data


@pytest.fixture(scope="module")
def folder(reference: Path) -> Path:
    return reference / "checkpoints" / "stories260K"


def cases() -> list[Any]:
    """Every (model, cache, draw, kernels, path); those that are not a sample of it are slow.

    A sample: every path on the fastest kernels, greedy and drawn by turns, and every cache and kernel set on one path.
    """
    made = []
    for model, kv_types in KV_TYPES.items():
        for kv_type in kv_types:
            for draw in ("greedy", "drawn"):
                for kernels in kernel_names():
                    for i, path in enumerate(PATHS):
                        fast = kernels == kernel_names()[0]
                        usual = kv_type == "fp32" and fast and draw == ("greedy", "drawn")[i % 2]
                        turn = path == "pieces of 7" and draw == "greedy" and kernels != "reference"
                        slow = not (usual or turn)
                        if kernels == "reference" and (path == "in a crowd" or path == "preempted" or model == "cria"):
                            continue  # minutes
                        name = f"{model}, {kv_type}, {draw}, {kernels}, {path}"
                        marks = [pytest.mark.slow] if slow else []
                        made.append(pytest.param(model, kv_type, draw, kernels, path, marks=marks, id=name))
    return made


@pytest.mark.parametrize(("model", "kv_type", "draw", "kernels", "path"), cases())
def test_the_text_is_the_recorded_one(
    folder: Path, recorded: Any, watch: Watch, model: str, kv_type: str, draw: str, kernels: str, path: str
) -> None:
    house = House(model, folder, kernels, kv_type)
    ids: list[int] = recorded[model][kv_type][draw]
    sampling = DRAWN if draw == "drawn" else {"temperature": 0}
    start = house.start(published=(model, draw) == ("stories260K", "greedy"))
    # A drawn token's random number goes by its place in the answer, so a drawn text cannot be entered half way.
    cut = 0 if draw == "drawn" else len(ids) // 2
    walk = Walk(house, [*start, *ids[:cut]], sampling, ids[cut:], watch)
    tokens, rows = PATHS[path](walk)
    assert tokens == ids[cut:]
    assert len(rows) == walk.count


def test_the_recorded_text_is_the_published_one(folder: Path, recorded: Any) -> None:
    tokenizer = loaded_model("stories260K", folder, "auto", "fp32", None).tokenizer
    published = json.loads((folder / "expected_greedy.json").read_text())["text"]
    ids = recorded["stories260K"]["fp32"]["greedy"]
    assert tokenizer.decode([tokenizer.bos_id, *ids], skip_special=True).strip() == published.strip()


INVARIANT = [
    ("stories260K", "fp32", None, "fp32"),
    ("cria", None, None, "fp16"),
    ("cria", None, "Q8_0", "q8_0"),
    ("cria", None, "Q4_K_M", "bf16"),
]
"""Model, weights' type, packed type, cache: those whose products take another way for many rows."""


@pytest.mark.parametrize(
    "kernels", [pytest.param(isa, marks=[pytest.mark.slow] if isa == "scalar" else []) for isa in cpu.isas()]
)
@pytest.mark.parametrize(("model", "dtype", "quant", "kv_type"), INVARIANT)
def test_invariant_logits_are_the_same_bits_on_every_path(
    folder: Path, watch: Watch, kernels: str, model: str, dtype: str | None, quant: str | None, kv_type: str
) -> None:
    house = House(model, folder, kernels, kv_type, dtype, quant, invariant=True)
    prompt = [*house.start(), *(np.arange(130) * 37 % 400 + 3).tolist()]
    walk = Walk(house, prompt, {"temperature": 0.8, "seed": SEED}, [0] * 24, watch)
    tokens, rows = PATHS["single"](walk)
    walk.answer = tokens
    assert len(rows) == 24
    for path, way in PATHS.items():
        again, theirs = way(walk)
        assert again == tokens, path
        np.testing.assert_array_equal(np.array(theirs), np.array(rows), err_msg=path)


def record(folder: Path) -> None:
    texts: dict[str, dict[str, dict[str, list[int]]]] = {}
    for model, kv_types in KV_TYPES.items():
        for kv_type in kv_types:
            for draw, sampling in (("greedy", {"temperature": 0}), ("drawn", DRAWN)):
                house = House(model, folder, cpu.isas()[0], kv_type)
                start = house.start(published=(model, draw) == ("stories260K", "greedy"))
                engine = Engine(house.runner(), pages=64)
                request = engine.submit(start, Sampling(**sampling, max_tokens=TOKENS[model], ignore_eos=True))
                ids = finish(engine, request)
                texts.setdefault(model, {}).setdefault(kv_type, {})[draw] = ids
                print(model, kv_type, draw, repr(house.loaded().tokenizer.decode(ids)))
    lines = json.dumps(texts).replace("{", "{\n").replace("}", "\n}").replace("], ", "],\n")
    RECORDED.write_text(lines + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]) / "checkpoints" / "stories260K")
