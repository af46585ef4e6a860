"""A Llama 4 as one call in C++ against `llama4.forward` on the same C++ ops, bit by bit, per instruction set.

What it is not: the dense decoder (`test_forward`), or what the model computes (`tests/agreement`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from puna.engine.native_runner import NATIVE, PLAIN, native_decoder, steps
from puna.kernels import ops
from puna.kernels.encode import quantize
from puna.kernels.layouts import ChunkedTable, Packed, PageTable, convert, empty_cache, page_table, words
from puna.models import llama4
from puna.models.llama4_config import Llama4Config
from puna.models.rope import Rope
from puna.models.tree import KVCache, Llama4Weights

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

# Dense layers and mixtures, chunked and global ones of both; positions past several chunks and temperatures.
CONFIG = Llama4Config(
    "llama4", 203, 64, 4, 6, 3, 32, 96, 1e-5, Rope(32, 5e5), 512, interleaved_rope=True, chunk=32, global_layers=(1, 3),
    expert_hidden_dim=64, experts=5, experts_per_token=2, moe_layers=(0, 3), qk_norm=True, temperature_floor=8,
)  # fmt: skip
GUARD = replace(CONFIG, chunk=0, global_layers=(), moe_layers=(), experts=0, experts_per_token=0, qk_norm=False)
MAVERICK = replace(CONFIG, qk_norm=False, experts_per_token=1, temperature_tuning=False, moe_layers=(1, 3))
CONFIGS = {"mixed": CONFIG, "guard": GUARD, "maverick": MAVERICK}
PAGE, PAGES = 16, 14
Ints = npt.NDArray[np.int32]


@pytest.fixture(autouse=True)
def _cpp_ops() -> Iterator[None]:
    ops.select("auto")
    yield
    cpu.use()


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> Llama4Config:
    return CONFIGS[request.param]


def weights_of(config: Llama4Config, dtype: str) -> Llama4Weights:
    random, shapes = np.random.default_rng(5), llama4.shapes(config)

    def parameter(name: str) -> Any:
        shape = shapes[name]
        values = random.standard_normal(shape, np.float32) * np.float32(0.3) + np.float32(len(shape) == 1)
        if dtype == "Q8_0":
            plain = len(shape) == 1 or name.endswith("router.weight")
            return values if plain else ops.prepare(Packed("Q8_0", shape, quantize("Q8_0", values)))
        return convert(values, dtype)

    return llama4.build(config, parameter)


def cache_of(config: Llama4Config, kv_type: str, local: int | None = None) -> KVCache:
    return llama4.make_cache(config, PAGES, PAGE, lambda shape: empty_cache(kv_type, shape), local)


def ids(tokens: int) -> Ints:
    return np.random.default_rng(tokens).integers(0, CONFIG.vocab_size, tokens).astype(np.int32)


def table_of(first: list[int], counts: list[int], seed: int = 2) -> PageTable:
    each = PAGES // len(first)
    pages = np.random.default_rng(seed).permutation(PAGES)[: each * len(first)].reshape(len(first), each)
    return page_table(first, counts, pages)


def assert_same(
    config: Llama4Config, dtype: str, kv_type: str, calls: list[PageTable], local: int | None = None
) -> None:
    """All logits of all calls, and the caches after each."""
    weights = weights_of(config, dtype)
    native = native_decoder(config, weights)
    mine, its = (cache_of(config, kv_type, local) for _ in range(2))
    for table in calls:
        tokens = ids(len(table.positions))
        rows = np.arange(len(tokens), dtype=np.int32)
        hidden = llama4.forward(weights, config, tokens, table, its)
        want = llama4.logits(weights, hidden)
        assert np.isfinite(want).all()
        np.testing.assert_array_equal(native.logits(tokens, rows, table, mine.keys, mine.values), want)
        np.testing.assert_array_equal(native.hidden(tokens, rows, table, mine.keys, mine.values), hidden)
        for a, b in zip((*mine.keys, *mine.values), (*its.keys, *its.values), strict=True):
            np.testing.assert_array_equal(words(a), words(b))
            assert np.any(words(b))


@pytest.mark.parametrize(("dtype", "kv_type"), [("fp32", "fp32"), ("bf16", "fp16"), ("Q8_0", "q8_0")])
def test_steps_are_bit_equal(isa: str, config: Llama4Config, dtype: str, kv_type: str) -> None:
    """A prompt over chunks, a token, and sequences that stand apart, one of them a prompt's middle."""
    calls = [table_of([0], [45]), table_of([45], [1]), table_of([3, 70], [1, 37]), table_of([4, 107], [1, 1])]
    assert_same(config, dtype, kv_type, calls)


def test_chunked_layers_with_pages_of_their_own(isa: str) -> None:
    """Those that nobody sees any more are not there; a page number that is needed is checked."""
    whole = table_of([70], [9])
    local = np.full(whole.pages.shape, -1, np.int32)
    local[0, 4] = 2  # positions 64 to 79, the chunk's
    assert_same(CONFIG, "fp32", "fp32", [ChunkedTable(*whole, local)], local=3)
    native, cache = native_decoder(CONFIG, weights_of(CONFIG, "fp32")), cache_of(CONFIG, "fp32", 2)
    with pytest.raises(ValueError, match="2 is not in a cache of 2"):
        native.logits(ids(9), np.zeros(1, np.int32), ChunkedTable(*whole, local), cache.keys, cache.values)
    with pytest.raises(ValueError, match="must have the shape"):
        native.logits(ids(9), np.zeros(1, np.int32), whole, cache.keys, cache.values)


@pytest.mark.parametrize("tokens", [1, 75])
def test_a_whole_text_is_bit_equal(isa: str, config: Llama4Config, tokens: int) -> None:
    weights, text = weights_of(config, "fp32"), ids(tokens)
    want = llama4.logits(weights, llama4.forward(weights, config, text[None]))[0]
    got = native_decoder(config, weights).logits(text, np.arange(tokens, dtype=np.int32))
    np.testing.assert_array_equal(got, want)


def test_the_rows_that_are_wanted(isa: str) -> None:
    """The last layer, a mixture that is tempered, is computed for them alone."""
    weights, table, wanted = weights_of(CONFIG, "Q8_0"), table_of([3, 70], [20, 37]), np.array([7, 9, 56], np.int32)
    tokens, mine, its = ids(57), cache_of(CONFIG, "fp32"), cache_of(CONFIG, "fp32")
    want = llama4.logits(weights, llama4.forward(weights, CONFIG, tokens, table, its)[wanted])
    got = native_decoder(CONFIG, weights).logits(tokens, wanted, table, mine.keys, mine.values)
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())
    for a, b in zip((*mine.keys, *mine.values), (*its.keys, *its.values), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_chunk_that_the_c_takes_not() -> None:
    assert steps(CONFIG)[0] == NATIVE
    odd = replace(CONFIG, chunk=24)
    assert steps(odd) == (PLAIN, "the native call takes chunks of a multiple of 16 tokens, not of 24")
    with pytest.raises(ValueError, match="no multiple of 16"):
        native_decoder(odd, weights_of(odd, "fp32"))


def test_a_mixture_that_does_not_fit_is_refused() -> None:
    tree = weights_of(CONFIG, "fp32")
    with pytest.raises(ValueError, match="6 of 5 experts"):
        native_decoder(replace(CONFIG, experts_per_token=6), tree)
    layer: Any = tree.layers[0]
    odd = replace(
        layer, shared=replace(layer.shared, up=replace(layer.shared.up, weight=np.ones((63, 64), np.float32)))
    )
    with pytest.raises(ValueError, match=r"layers.0.shared.up.weight must have the shape \[64, 64\]"):
        native_decoder(CONFIG, replace(tree, layers=(odd, *tree.layers[1:])))
