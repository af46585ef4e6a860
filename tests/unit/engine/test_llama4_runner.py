"""A Llama 4 through the runner of the host: which one is chosen and why, and that pages, batches and pieces of a prompt
give what the whole text gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from puna.engine.native_runner import NATIVE, PLAIN, NativeRunner, host_runner, steps
from puna.engine.runner import Batch, HostRunner
from puna.kernels import ops
from puna.kernels.layouts import page_table
from puna.models import llama4
from puna.models.llama4_config import Llama4Config
from puna.models.rope import Rope
from puna.models.tree import Llama4Weights

CONFIG = Llama4Config(
    "llama4", 61, 32, 5, 4, 2, 16, 48, 1e-5, Rope(16, 5e5), 512, interleaved_rope=True, chunk=32, global_layers=(3,),
    expert_hidden_dim=40, experts=3, experts_per_token=1, moe_layers=(1, 3), qk_norm=True, temperature_floor=8,
)  # fmt: skip


@pytest.fixture(autouse=True, params=["auto", "reference"])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    ops.select(request.param)
    yield
    ops.select("auto")


def weights() -> Llama4Weights:
    random, shapes = np.random.default_rng(0), llama4.shapes(CONFIG)

    def parameter(name: str) -> Any:
        shape = shapes[name]
        return random.normal(0, 1.5 * shape[-1] ** -0.5 if len(shape) == 2 else 0.5, shape).astype(np.float32)

    return llama4.build(CONFIG, parameter)


def test_which_runner_serves_it() -> None:
    native = ops.threads() is not None
    assert type(host_runner(CONFIG, weights())) is (NativeRunner if native else HostRunner)
    assert steps(CONFIG)[0] == (NATIVE if native else PLAIN)


@pytest.mark.parametrize("kv_type", ["fp32", "fp16"])
def test_two_sequences_in_pieces_give_the_logits_of_the_whole_texts(kv_type: str) -> None:
    runner = host_runner(CONFIG, weights(), kv_type, 16)
    runner.allocate(12)
    random = np.random.default_rng(1)
    texts = [random.integers(0, 61, length, dtype=np.int32) for length in (75, 68)]
    whole = [runner.all_logits(text.tolist()) for text in texts]
    pages = random.permutation(12).reshape(2, 6).astype(np.int32)
    at = [0, 0]
    for counts in ((30, 1), (1, 40), (20, 5), (1, 1), (23, 21)):
        tokens = np.concatenate([text[a : a + n] for text, a, n in zip(texts, at, counts, strict=True)])
        got = runner.run(Batch(tokens, page_table(at, list(counts), pages), np.arange(len(tokens), dtype=np.int32)))
        want = np.concatenate([rows[a : a + n] for rows, a, n in zip(whole, at, counts, strict=True)])
        assert np.abs(got - want).max() < (1e-4 if kv_type == "fp32" else 2e-2) * np.abs(want).max()
        at = [a + n for a, n in zip(at, counts, strict=True)]
    assert at == [75, 68]
