"""The decoder's own promises: its tree, its cache and its batches, on the NumPy reference.

What it is not: agreement with anybody else (`tests/agreement`), or the sizes of released models (`test_shapes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from puna.kernels import ops
from puna.kernels.layouts import PageTable, page_table
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.models.tree import DecoderWeights, KVCache, Linear, leaves, tree_map

CONFIG = DecoderConfig(
    generation="llama3", vocab_size=23, dim=12, layers=2, heads=6, kv_heads=3, head_dim=4, hidden_dim=20,
    norm_eps=1e-5, rope=Rope(4, 10_000.0), context_length=64,
)  # fmt: skip
UNUSUAL = replace(CONFIG, head_dim=6, rope=Rope(6, 10_000.0), tied_head=True, attention_bias=True, mlp_bias=True)
Ints = npt.NDArray[np.int32]


@pytest.fixture(autouse=True)
def _on_the_reference() -> Iterator[None]:
    ops.select("reference")
    yield
    ops.select("auto")


def random_weights(config: DecoderConfig) -> DecoderWeights:
    """Numbers with which every part of the model shows in the answer."""
    random = np.random.default_rng(11)
    table = decoder.shapes(config)
    return decoder.build(config, lambda name: random.standard_normal(table[name], np.float32) * np.float32(0.4))


def empty(config: DecoderConfig, pages: int, page: int, fill: float = 0.0) -> KVCache:
    return decoder.make_cache(config, pages, page, lambda shape: np.full(shape, fill, np.float32))


def scores(
    weights: DecoderWeights,
    config: DecoderConfig,
    ids: Any,
    table: PageTable | None = None,
    cache: KVCache | None = None,
) -> Any:
    return decoder.logits(weights, decoder.forward(weights, config, np.asarray(ids, np.int32), table, cache))


@pytest.fixture(params=[CONFIG, UNUSUAL], ids=["plain", "unusual"])
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    """An ordinary decoder, and one with biases, a tied head and a head_dim that is not dim / heads."""
    value: DecoderConfig = request.param
    return value


def test_shapes_and_names(config: DecoderConfig) -> None:
    table = decoder.shapes(config)
    unusual = config is UNUSUAL
    assert table["embedding"] == (23, 12)
    assert table["layers.1.q.weight"] == ((36, 12) if unusual else (24, 12))
    assert table["layers.1.k.weight"] == ((18, 12) if unusual else (12, 12))
    assert table["layers.0.o.weight"] == ((12, 36) if unusual else (12, 24))
    assert table["layers.0.gate.weight"] == (20, 12)
    assert table["layers.0.down.weight"] == (12, 20)
    assert ("head" in table) != unusual
    biases = {name: shape for name, shape in table.items() if name.endswith(".bias")}
    assert len(biases) == (14 if unusual else 0)
    if unusual:
        assert biases["layers.0.q.bias"] == (36,)
        assert biases["layers.0.o.bias"] == (12,)
        assert biases["layers.0.up.bias"] == (20,)
    assert decoder.parameter_count(config) == sum(int(np.prod(shape)) for shape in table.values())


def test_build_asks_once_in_order_and_leaves_give_the_names_back(config: DecoderConfig) -> None:
    asked: list[str] = []

    def parameter(name: str) -> str:
        asked.append(name)
        return f"<{name}>"

    tree = decoder.build(config, parameter)
    assert asked == list(decoder.shapes(config))
    named = dict(leaves(tree))
    np.testing.assert_array_equal(named.pop("inv_freq"), config.rope.inv_freq())
    assert named == {name: f"<{name}>" for name in asked}
    assert tree.layers[1].k.weight == "<layers.1.k.weight>"
    assert (tree.head is None) == config.tied_head


def test_tree_map_keeps_the_form(config: DecoderConfig) -> None:
    weights = random_weights(config)
    doubled = tree_map(lambda leaf: leaf * 2, weights)
    assert isinstance(doubled, DecoderWeights)
    assert isinstance(doubled.layers[0].q, Linear)
    assert [name for name, _ in leaves(doubled)] == [name for name, _ in leaves(weights)]
    for (name, before), (_, after) in zip(leaves(weights), leaves(doubled), strict=True):
        np.testing.assert_array_equal(after, before * 2, err_msg=name)


def test_make_cache() -> None:
    cache = empty(CONFIG, 5, 9)
    assert [a.shape for a in (*cache.keys, *cache.values)] == [(5, 9, 3, 4)] * 4
    assert len({id(a) for a in (*cache.keys, *cache.values)}) == 4


def test_a_table_and_a_cache_belong_together() -> None:
    weights = random_weights(CONFIG)
    with pytest.raises(ValueError, match="belong together"):
        scores(weights, CONFIG, [1], page_table([0], [1], [[0]]))
    with pytest.raises(ValueError, match="belong together"):
        scores(weights, CONFIG, [[1]], None, empty(CONFIG, 1, 4))


def test_only_the_places_of_the_tokens_are_written(config: DecoderConfig) -> None:
    weights = random_weights(config)
    cache = empty(config, 4, 3, fill=7.0)
    # One sequence's positions 2 and 3, in pages 3 and 1; another's position 0, in page 2.
    scores(weights, config, [1, 2, 3], page_table([2, 0], [2, 1], [[3, 1], [2, 9]]), cache)
    written = np.zeros((4, 3), bool)
    written[[3, 1, 2], [2, 0, 0]] = True
    for array in (*cache.keys, *cache.values):
        assert np.all(array[~written] == 7.0)
        assert np.all(array[written] != 7.0)


def test_sequences_do_not_show_in_each_other(config: DecoderConfig) -> None:
    weights = random_weights(config)
    alone = scores(weights, config, [3, 1, 4], page_table([0], [3], [[0]]), empty(config, 1, 3))
    for other in (0, 9):
        table = page_table([0, 0, 0], [2, 3, 1], [[1, 4], [3, 0], [2, 7]])
        both = scores(weights, config, [other, 5, 3, 1, 4, other], table, empty(config, 5, 2))
        np.testing.assert_allclose(both[2:5], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [1, 6, 2], [8, 1]])
def test_chunks_give_what_the_whole_gives(config: DecoderConfig, sizes: list[int]) -> None:
    weights = random_weights(config)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 9), dtype=np.int32)
    pages = np.array([[5, 0, 3], [2, 4, 1]], np.int32)
    whole_cache, cache = empty(config, 6, 4), empty(config, 6, 4)
    whole = scores(weights, config, ids.reshape(-1), page_table([0, 0], [9, 9], pages), whole_cache).reshape(2, 9, -1)
    no_cache = scores(weights, config, ids)
    edges = np.cumsum([0, *sizes])
    pieces = [
        scores(weights, config, ids[:, a:b].reshape(-1), page_table([a, a], [b - a, b - a], pages), cache)
        for a, b in pairwise(edges)
    ]
    pieces = [piece.reshape(2, -1, piece.shape[-1]) for piece in pieces]
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(no_cache, whole, rtol=1e-4, atol=1e-5)
    for one, other in zip((*cache.keys, *cache.values), (*whole_cache.keys, *whole_cache.values), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_token_sees_nothing_after_it(config: DecoderConfig) -> None:
    weights = random_weights(config)
    ids = np.array([3, 1, 4, 1, 5, 9], np.int32)
    changed = ids.copy()
    changed[4] = 2
    table = page_table([0], [6], [[1, 0]])
    for cached in (True, False):
        one, other = (
            scores(weights, config, x, table, empty(config, 2, 4)) if cached else scores(weights, config, x[None])[0]
            for x in (ids, changed)
        )
        np.testing.assert_array_equal(one[:4], other[:4])
        assert np.abs(one[4:] - other[4:]).max() > 0.01


def test_rewriting_the_cache_forgets_what_was_there(config: DecoderConfig) -> None:
    """Going back to a position (a branch, a rejected draft) needs no clearing: what lies beyond is not seen."""
    weights, pages = random_weights(config), [[1, 0]]
    cache = empty(config, 2, 4)
    scores(weights, config, [3, 1, 4, 1, 5, 9], page_table([0], [6], pages), cache)
    again = scores(weights, config, [7, 8], page_table([2], [2], pages), cache)
    fresh = scores(weights, config, [3, 1, 7, 8], page_table([0], [4], pages), empty(config, 2, 4))
    np.testing.assert_allclose(again, fresh[2:], rtol=1e-4, atol=1e-5)


def test_position_matters(config: DecoderConfig) -> None:
    """The same two tokens the other way round, read by a third: rope tells them apart."""
    weights = random_weights(config)
    one, other = (scores(weights, config, [[*pair, 4]])[0, 2] for pair in ([3, 1], [1, 3]))
    assert np.abs(one - other).max() > 1e-3
