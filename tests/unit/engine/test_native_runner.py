"""The runner of one native call a step: the plain runner's answers, and when it is chosen.

What it is not: the comparison bit by bit (`tests/unit/kernels/test_forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puna.engine.engine import PREFILL_CHUNK, Engine
from puna.engine.native_runner import NATIVE, PLAIN, NativeRunner, host_runner, steps
from puna.engine.runner import SHARES, Batch, HostRunner
from puna.kernels import ops
from puna.kernels.encode import quantize
from puna.kernels.layouts import Mapped, Packed, Panels, page_table
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.models.tree import DecoderWeights, leaves, tree_map
from puna.types import Sampling
from puna.weights.files import MappedFile

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


def greedy(runner: HostRunner, prompt: list[int], tokens: int) -> list[int]:
    engine = Engine(runner, pages=20)
    engine.submit(prompt, Sampling(temperature=0, max_tokens=tokens))
    return [token for _ in range(tokens + 2) for progress in engine.step() for token in progress.tokens]


@pytest.mark.parametrize("length", [1, 240, PREFILL_CHUNK + 30])
def test_answers_are_those_of_the_plain_runner(length: int) -> None:
    """From 240 tokens on the cache grows on the way, past 512 the prompt is read in two chunks."""
    tree, prompt = weights(), [(i * 7) % 101 for i in range(length)]
    assert greedy(NativeRunner(CONFIG, tree), prompt, 40) == greedy(HostRunner(CONFIG, tree), prompt, 40)


def test_steps_of_one_token_are_bit_equal() -> None:
    tree = weights()
    native, plain = NativeRunner(CONFIG, tree), HostRunner(CONFIG, tree)
    for runner in (native, plain):
        runner.allocate(5)
    for i in range(300):
        batch = Batch(np.array([i % 101], np.int32), page_table([i], [1], [[4, 0, 2, 1, 3]]), np.zeros(1, np.int32))
        np.testing.assert_array_equal(native.run(batch), plain.run(batch))
        np.testing.assert_array_equal(native.hidden(batch), plain.hidden(batch))


def test_logits_of_a_whole_text_are_bit_equal_and_leave_the_cache_alone() -> None:
    tree, text = weights(), [(i * 5) % 101 for i in range(70)]
    native = NativeRunner(CONFIG, tree)
    native.allocate(1)
    native.run(Batch(np.array(text[:3], np.int32), page_table([0], [3], [[0]]), np.array([2], np.int32)))
    before = native.read_page(0)
    np.testing.assert_array_equal(native.all_logits(text), HostRunner(CONFIG, tree).all_logits(text))
    assert native.read_page(0) == before


def test_which_runner_is_chosen() -> None:
    assert steps()[0] == NATIVE
    assert type(host_runner(CONFIG, weights())) is NativeRunner
    ops.select("scalar")
    assert steps()[0] == NATIVE
    ops.select("reference")
    assert steps() == (PLAIN, "asked for by --kernels reference")
    assert type(host_runner(CONFIG, weights())) is HostRunner


PACKED = replace(CONFIG, dim=64, head_dim=32, hidden_dim=96, rope=Rope(32, 10_000.0), tied_head=False)


def mapped_weights(folder: Path) -> DecoderWeights:
    """A tree whose matrices are Q8_0 in a mapped file."""
    random = np.random.default_rng(3)
    table = decoder.shapes(PACKED)
    vectors = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in table.items()}
    blocks = {name: quantize("Q8_0", vectors[name]) for name, shape in table.items() if len(shape) == 2}
    (folder / "weights").write_bytes(b"".join(block.tobytes() for block in blocks.values()))
    file, at = MappedFile(folder / "weights"), 0

    def parameter(name: str) -> Any:
        nonlocal at
        if name not in blocks:
            return vectors[name]
        stored = file.packed("Q8_0", table[name], at)
        at += stored.nbytes
        return Mapped(stored.kind, stored.shape, stored.data)

    return decoder.build(PACKED, parameter)


def kinds(runner: HostRunner) -> list[type]:
    return [type(leaf) for _, leaf in leaves(runner._weights) if len(leaf.shape) == 2]


@pytest.mark.parametrize("kind", [NativeRunner, HostRunner])
def test_mapped_weights_are_regrouped_after_the_first_answer_and_no_bit_changes(
    tmp_path: Path, kind: type[HostRunner]
) -> None:
    tree = mapped_weights(tmp_path)
    regrouped = tree_map(lambda leaf: ops.prepare(leaf) if isinstance(leaf, Packed) else leaf, tree)
    runner, settled = kind(PACKED, tree), kind(PACKED, regrouped)
    assert set(kinds(settled)) == {Panels}
    for each in (runner, settled):
        each.allocate(1)
    left = []
    for start, tokens in ((0, 30), (30, 1), (31, 2), (33, 1), (34, 1), (35, 1)):
        ids = np.array([(i * 7) % 101 for i in range(start, start + tokens)], np.int32)
        batch = Batch(ids, page_table([start], [tokens], [[0]]), np.array([tokens - 1], np.int32))
        np.testing.assert_array_equal(runner.run(batch), settled.run(batch))
        left.append(kinds(runner).count(Mapped))
    assert left[0] == 16  # the first answer is computed from the file
    assert all(before > after or after == 0 for before, after in pairwise(left))
    assert left[SHARES] == 0
    assert set(kinds(runner)) == {Panels}
    np.testing.assert_array_equal(runner.all_logits([5, 6, 7]), settled.all_logits([5, 6, 7]))
    assert {type(leaf) for _, leaf in leaves(tree) if len(leaf.shape) == 2} == {Mapped}  # the caller's is as it was


def test_a_share_that_there_is_no_memory_for_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = NativeRunner(PACKED, mapped_weights(tmp_path))
    first = runner.all_logits([1, 2, 3])

    def full(_: object) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("puna.kernels.ops.prepare_mapped", full)
        with pytest.raises(MemoryError):
            runner.all_logits([1])
    for _ in range(SHARES):
        np.testing.assert_array_equal(runner.all_logits([1, 2, 3]), first)
    assert set(kinds(runner)) == {Panels}


def test_a_tree_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm must have the shape \[24\]"):
        host_runner(CONFIG, replace(weights(), norm=np.ones(23, np.float32)))
