"""The runner of one native call a step: the plain runner's answers, and when it is chosen.

What it is not: the comparison bit by bit (`tests/unit/kernels/test_forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from puna.engine.engine import PREFILL_CHUNK, Engine
from puna.engine.native_runner import NATIVE, PLAIN, NativeRunner, host_runner, steps
from puna.engine.runner import HostRunner
from puna.kernels import ops
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.models.tree import DecoderWeights
from puna.types import Sampling

pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

CONFIG = DecoderConfig(
    generation="llama3", vocab_size=101, dim=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden_dim=40,
    norm_eps=1e-5, rope=Rope(6, 10_000.0), context_length=1200, tied_head=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _auto_kernels() -> Iterator[None]:
    ops.select("auto")
    yield
    ops.select("auto")


def weights() -> DecoderWeights:
    random = np.random.default_rng(3)
    table = decoder.shapes(CONFIG)
    return decoder.build(CONFIG, lambda name: random.normal(0, 0.5, table[name]).astype(np.float32))


def greedy(runner: HostRunner, prompt: list[int], tokens: int) -> list[int | None]:
    engine = Engine(runner)
    engine.submit(prompt, Sampling(temperature=0, max_tokens=tokens))
    made = []
    while engine.active is not None:
        progress = engine.step()
        if progress.token is not None:
            made.append(progress.token)
    return made


@pytest.mark.parametrize("length", [1, 240, PREFILL_CHUNK + 30])
def test_answers_are_those_of_the_plain_runner(length: int) -> None:
    """From 240 tokens on the cache grows on the way, past 512 the prompt is read in two chunks."""
    tree, prompt = weights(), [(i * 7) % 101 for i in range(length)]
    assert greedy(NativeRunner(CONFIG, tree), prompt, 40) == greedy(HostRunner(CONFIG, tree), prompt, 40)


def test_steps_of_one_token_are_bit_equal() -> None:
    tree = weights()
    native, plain = NativeRunner(CONFIG, tree), HostRunner(CONFIG, tree)
    for i in range(300):  # the cache grows at 256
        np.testing.assert_array_equal(native.run([i % 101], i), plain.run([i % 101], i))


def test_logits_of_a_whole_text_are_bit_equal_and_leave_the_cache_alone() -> None:
    tree, text = weights(), [(i * 5) % 101 for i in range(70)]
    native = NativeRunner(CONFIG, tree)
    native.run(text[:3], 0)
    before = [array.copy() for array in native._room(3).keys]
    np.testing.assert_array_equal(native.all_logits(text), HostRunner(CONFIG, tree).all_logits(text))
    for array, old in zip(native._room(3).keys, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_which_runner_is_chosen() -> None:
    assert steps()[0] == NATIVE
    assert type(host_runner(CONFIG, weights())) is NativeRunner
    ops.select("scalar")
    assert steps()[0] == NATIVE
    ops.select("reference")
    assert steps() == (PLAIN, "asked for by --kernels reference")
    assert type(host_runner(CONFIG, weights())) is HostRunner


def test_a_tree_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm must have the shape \[24\]"):
        host_runner(CONFIG, replace(weights(), norm=np.ones(23, np.float32)))
