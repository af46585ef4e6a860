"""The whole forward in C++ against `decoder.forward` on the same C++ ops, bit by bit, per instruction set.

What is surprising: where only some tokens' logits are wanted, the last layer is computed for those alone, so its
products may be those of few rows: the same numbers up to rounding, and the same caches bit for bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import puna
from puna.engine.native_runner import native_decoder
from puna.kernels import ops
from puna.kernels.layouts import BF16, Packed, PageTable, convert, empty_cache, page_table, words
from puna.models import decoder
from puna.models.config import DecoderConfig
from puna.models.rope import Rope
from puna.models.tree import DecoderWeights, KVCache, tree_map

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

CONFIG = DecoderConfig(
    generation="llama3", vocab_size=203, dim=44, layers=3, heads=6, kv_heads=3, head_dim=8, hidden_dim=84,
    norm_eps=1e-5, rope=Rope(8, 10_000.0), context_length=640,
)  # fmt: skip
UNUSUAL = replace(CONFIG, head_dim=10, rope=Rope(10, 500.0), tied_head=True, attention_bias=True, mlp_bias=True)
INTERLEAVED = replace(CONFIG, interleaved_rope=True, kv_heads=6, norm_eps=1e-3)
CONFIGS = {"plain": CONFIG, "unusual": UNUSUAL, "interleaved": INTERLEAVED}
I32 = npt.NDArray[np.int32]


@pytest.fixture(autouse=True)
def _cpp_ops() -> Iterator[None]:
    ops.select("auto")
    yield
    cpu.use()


@pytest.fixture(params=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return CONFIGS[request.param]


def weights_of(config: DecoderConfig, dtype: str = "fp32") -> DecoderWeights:
    random = np.random.default_rng(5)
    table = decoder.shapes(config)

    def parameter(name: str) -> Any:
        values = random.standard_normal(table[name], np.float32) * np.float32(0.3)
        return convert(values + np.float32(len(table[name]) == 1), dtype)

    return decoder.build(config, parameter)


PAGE = 16


def cache_of(config: DecoderConfig, pages: int = 9, kv_type: str = "fp32") -> KVCache:
    return decoder.make_cache(config, pages, PAGE, lambda shape: empty_cache(kv_type, shape))


def some_ids(tokens: int) -> I32:
    return np.random.default_rng(tokens).integers(0, CONFIG.vocab_size, tokens).astype(np.int32)


def at(start: int, tokens: int, pages: int = 9) -> PageTable:
    """One sequence in all pages of a cache, in no order."""
    return page_table([start], [tokens], np.random.default_rng(2).permutation(pages)[None])


def plain(
    weights: DecoderWeights,
    config: DecoderConfig,
    ids: I32,
    table: PageTable | None = None,
    cache: KVCache | None = None,
    wanted: I32 | None = None,
) -> npt.NDArray[np.float32]:
    """Logits of all tokens, or of those wanted, an op at a time."""
    tokens = ids[None] if table is None else ids
    hidden = decoder.forward(weights, config, tokens, table, cache).reshape(-1, config.dim)
    scores: npt.NDArray[np.float32] = decoder.logits(weights, hidden if wanted is None else hidden[wanted])
    return scores


def every(ids: I32) -> I32:
    return np.arange(ids.size, dtype=np.int32)


def assert_same_cache(got: KVCache, want: KVCache) -> None:
    for a, b in zip((*got.keys, *got.values), (*want.keys, *want.values), strict=True):
        np.testing.assert_array_equal(words(a), words(b))
        assert np.any(words(b))


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_prefill_is_bit_equal(isa: str, config: DecoderConfig, dtype: str, tokens: int) -> None:
    weights, ids, table = weights_of(config, dtype), some_ids(tokens), at(3, tokens)
    native = native_decoder(config, weights)
    mine, its = cache_of(config), cache_of(config)
    want = plain(weights, config, ids, table, its)
    np.testing.assert_array_equal(native.logits(ids, every(ids), table, mine.keys, mine.values), want)
    assert_same_cache(mine, its)
    hidden = decoder.forward(weights, config, ids, table, its)
    np.testing.assert_array_equal(native.hidden(ids, every(ids), table, mine.keys, mine.values), hidden)
    # The last token's logits alone: the same caches, and the same numbers up to rounding.
    third = cache_of(config)
    last = native.logits(ids, every(ids)[-1:], table, third.keys, third.values)
    assert last.shape == (1, config.vocab_size)
    assert_same_cache(third, its)
    assert float(np.max(np.abs(last[0] - want[-1]))) <= 3e-6 * float(np.max(np.abs(want)))
    # And no logits at all.
    fourth = cache_of(config)
    assert native.logits(ids, every(ids)[:0], table, fourth.keys, fourth.values).shape == (0, 203)
    assert_same_cache(fourth, its)


def test_token_by_token_is_bit_equal(isa: str, config: DecoderConfig, dtype: str) -> None:
    weights, ids = weights_of(config, dtype), some_ids(9)
    native = native_decoder(config, weights)
    mine, its = cache_of(config), cache_of(config)
    for i in range(9):
        token, table = ids[i : i + 1], at(i, 1)
        got = native.logits(token, every(token), table, mine.keys, mine.values)
        np.testing.assert_array_equal(got, plain(weights, config, token, table, its))
    assert_same_cache(mine, its)


def test_a_ragged_batch_is_bit_equal(isa: str, config: DecoderConfig, dtype: str) -> None:
    """Decoding, a draft and parts of prompts in one step; pages in no order."""
    first, counts = [40, 0, 20, 7, 33], [1, 30, 4, 12, 1]
    weights, ids = weights_of(config, dtype), some_ids(sum(counts))
    table = page_table(first, counts, np.random.default_rng(3).permutation(15).reshape(5, 3))
    native = native_decoder(config, weights)
    mine, its = cache_of(config, 15), cache_of(config, 15)
    want = plain(weights, config, ids, table, its)
    np.testing.assert_array_equal(native.logits(ids, every(ids), table, mine.keys, mine.values), want)
    assert_same_cache(mine, its)
    # Some rows only: none of the second sequence, the last two of the third, two apart of the fourth.
    for wanted in ([0, 33, 34, 36, 45, 47], [47], [30], [5, 6]):
        third, rows = cache_of(config, 15), np.array(wanted, np.int32)
        got = native.logits(ids, rows, table, third.keys, third.values)
        assert_same_cache(third, its)
        assert float(np.max(np.abs(got - want[rows]))) <= 3e-6 * float(np.max(np.abs(want)))


def test_invariant_logits_do_not_depend_on_the_cuts_or_the_batch(isa: str, config: DecoderConfig, dtype: str) -> None:
    """A text at once, and in parts beside another one: the same bits, and the same caches."""
    weights, ids, other = weights_of(config, dtype), some_ids(60), some_ids(20)
    pages = np.random.default_rng(3).permutation(8).reshape(2, 4)
    cpu.set_invariant(True)
    try:
        native = native_decoder(config, weights)
        whole, parts = cache_of(config, 8), cache_of(config, 8)
        want = native.logits(ids, every(ids), page_table([0], [60], pages[:1]), whole.keys, whole.values)
        native.logits(other, every(other), page_table([0], [20], pages[1:]), whole.keys, whole.values)
        start = done = 0
        for count, beside in ((33, 1), (1, 17), (7, 1), (19, 1)):
            step = np.concatenate([ids[start : start + count], other[done : done + beside]])
            table, last = page_table([start, done], [count, beside], pages), np.array([count - 1], np.int32)
            got = native.logits(step, last, table, parts.keys, parts.values)
            np.testing.assert_array_equal(got[0], want[start + count - 1])
            start, done = start + count, done + beside
        assert_same_cache(parts, whole)
    finally:
        cpu.set_invariant(False)


@pytest.mark.parametrize("tokens", [1, 6, 60])
def test_without_a_cache_it_is_bit_equal(isa: str, config: DecoderConfig, dtype: str, tokens: int) -> None:
    weights, ids = weights_of(config, dtype), some_ids(tokens)
    want = plain(weights, config, ids)
    native = native_decoder(config, weights)
    np.testing.assert_array_equal(native.logits(ids, every(ids)), want)
    last = native.logits(ids, every(ids)[-1:])
    assert float(np.max(np.abs(last[0] - want[-1]))) <= 3e-6 * float(np.max(np.abs(want)))


PACKED = replace(
    CONFIG, dim=64, heads=4, kv_heads=2, head_dim=32, hidden_dim=96, rope=Rope(32, 10_000.0), attention_bias=True
)


def packed_weights(kind: str, bits: int, keep: bool) -> DecoderWeights:
    """Random blocks of 32 numbers: a small float16 scale, then integers of `bits` bits."""
    random = np.random.default_rng(8)
    table = decoder.shapes(PACKED)

    def parameter(name: str) -> Any:
        shape = table[name]
        if len(shape) == 1:
            return random.standard_normal(shape, np.float32)
        blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // 32, 2 + 4 * bits), np.uint8)
        blocks[..., :2] = (
            random.uniform(0.001, 0.003 * 2 ** (8 - bits), blocks.shape[:-1])
            .astype(np.float16)[..., None]
            .view(np.uint8)
        )
        return cpu.prepare(Packed(kind, shape, blocks.reshape(*shape[:-1], -1)), keep)

    return decoder.build(PACKED, parameter)


@pytest.mark.parametrize("kv_type", ["fp32", "fp16", "bf16", "q8_0"])
@pytest.mark.parametrize(("kind", "bits", "keep"), [("Q8_0", 8, False), ("Q4_0", 4, False), ("Q4_0", 4, True)])
def test_packed_weights_and_caches_are_bit_equal(isa: str, kind: str, bits: int, keep: bool, kv_type: str) -> None:
    weights = packed_weights(kind, bits, keep)
    native = native_decoder(PACKED, weights)
    mine, its, ends = (cache_of(PACKED, 6, kv_type) for _ in range(3))
    pages = np.random.default_rng(4).permutation(6).reshape(2, 3)
    for start, tokens in ((0, 21), (21, 1), (22, 1)):
        ids, table = some_ids(2 * tokens), page_table([start] * 2, [tokens] * 2, pages)
        want = plain(weights, PACKED, ids, table, its)
        np.testing.assert_array_equal(native.logits(ids, every(ids), table, mine.keys, mine.values), want)
        wanted = table.starts[1:] - np.int32(1)
        last = native.logits(ids, wanted, table, ends.keys, ends.values)
        # int8 activations turn a rounding of attention into steps of a 127th.
        assert float(np.max(np.abs(last - want[wanted]))) <= 2e-2 * float(np.max(np.abs(want)))
    assert_same_cache(mine, its)


def test_weights_live_as_long_as_the_decoder() -> None:
    ids = some_ids(4)
    want = plain(weights_of(CONFIG), CONFIG, ids)
    native = native_decoder(CONFIG, weights_of(CONFIG))
    rubbish = [np.full(shape, np.nan, np.float32) for shape in decoder.shapes(CONFIG).values()]
    np.testing.assert_array_equal(native.logits(ids, every(ids)), want)
    assert rubbish


def test_tables_of_rope_grow() -> None:
    weights = weights_of(CONFIG)
    native = native_decoder(CONFIG, weights)
    for tokens in (3, 90, 600):
        ids = some_ids(tokens)
        np.testing.assert_array_equal(native.logits(ids, every(ids)), plain(weights, CONFIG, ids))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda w: replace(w, norm=w.norm[:-1].copy()), ValueError, r"norm must have the shape \[44\]"),
        (lambda w: replace(w, embedding=w.embedding[0]), ValueError, r"embedding \[44\] is not of the shape said"),
        (lambda w: replace(w, head=w.head.astype(np.float64)), TypeError, "head must be float32.*not float64"),
        (lambda w: replace(w, head=w.head.T.copy().T), ValueError, "head must be C-contiguous"),
        (lambda w: replace(w, layers=()), ValueError, "not whole"),
        (lambda w: broken(w, q=w.layers[1].k), ValueError, r"layers.1.q.weight must have the shape \[48, 44\]"),
        (lambda w: broken(w, up=replace(w.layers[1].up, bias=w.norm)), ValueError, r"layers.1.up.bias .*\[84\]"),
        (lambda w: broken(w, mlp_norm=None), ValueError, "layers.1.mlp_norm is missing"),
        (lambda w: broken(w, down=replace(w.layers[1].down, weight=None)), ValueError, "down.weight is missing"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(change: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        native_decoder(CONFIG, change(weights_of(CONFIG)))


def broken(weights: DecoderWeights, **parts: Any) -> DecoderWeights:
    """The tree with parts of its second layer replaced."""
    first, second, *rest = weights.layers
    return replace(weights, layers=(first, replace(second, **parts), *rest))


@pytest.mark.parametrize("change", [{"heads": 4}, {"head_dim": 7}, {"heads": 0, "kv_heads": 0}, {"kv_heads": 0}])
def test_dimensions_that_do_not_fit(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"Decoder: .* head size"):
        native_decoder(replace(CONFIG, **change), weights_of(CONFIG))


def test_calls_that_do_not_fit() -> None:
    """What a table may not say is in test_attention.py; here, that it is asked."""
    native = native_decoder(CONFIG, weights_of(CONFIG))
    ids, table = some_ids(6), page_table([0, 3], [4, 2], [[1], [0]])
    cache, untouched = cache_of(CONFIG, 2), cache_of(CONFIG, 2)
    k, v, rows = list(cache.keys), list(cache.values), every(ids)

    def refused(
        error: type[Exception],
        says: str,
        ids: Any = ids,
        wanted: Any = rows,
        table: Any = table,
        k: Any = k,
        v: Any = v,
    ) -> None:
        with pytest.raises(error, match=says):
            native.logits(ids, wanted, table, k, v)

    for outside in (-1, CONFIG.vocab_size):
        refused(
            ValueError,
            f"ids: {outside} is not in a vocabulary of 203",
            np.where(ids == ids[2], outside, ids).astype(np.int32),
        )
    refused(TypeError, "ids must be int32, not int64", ids.astype(np.int64))
    refused(ValueError, "ids: no tokens", ids[:0])
    refused(ValueError, "ids has the wrong number", ids[None])
    refused(ValueError, "ids must be C-contiguous", np.repeat(ids, 2)[::2])
    refused(ValueError, r"positions must have the shape \[6\]", table=page_table([0], [4], [[1]]))
    for positions in ([0, 1, 2, 3, 15, 16], [0, 1, 2, 3, 2**31 - 2, 2**31 - 1]):
        refused(ValueError, "1 pages a sequence", table=table._replace(positions=np.array(positions, np.int32)))
    refused(ValueError, "2 is not in a cache of 2", table=table._replace(pages=np.array([[1], [2]], np.int32)))
    refused(ValueError, "0 and 0 arrays for 3 layers", k=(), v=())
    refused(ValueError, "and no table", table=None)
    refused(ValueError, "3 and 2 arrays for 3 layers", v=v[:2])
    refused(ValueError, "2 and 2 arrays for 3 layers", k=k[:2], v=v[:2])
    refused(ValueError, r"keys must have the shape \[2, 16, 3, 8\]", k=[k[0], k[1], k[2][:1]])
    refused(ValueError, r"values must have the shape \[2, 16, 3, 8\]", v=[v[0], v[1][:, :, :2].copy(), v[2]])
    refused(ValueError, r"keys must have the shape \[2, 16, 3, 8\]", k=[k[0][..., :7].copy(), *k[1:]])
    refused(TypeError, "values must be float32", v=[v[0], v[1], v[2].astype(np.float64)])
    refused(TypeError, "keys and values must be of one type", v=[v[0], v[1], v[2].astype(np.float16)])
    refused(TypeError, "not Q4_0", k=[Packed("Q4_0", (2, 16, 3, 32), np.zeros((2, 16, 3, 18), np.uint8))] * 3)
    frozen = v[2].copy()
    frozen.flags.writeable = False
    refused(TypeError, "incompatible", v=[v[0], v[1], frozen])
    for bad in ([0, -1], [5, 6], [3, 2], [1, 1]):
        refused(ValueError, f"wanted: {bad[1]} is not one of 6 rows, or not above", wanted=np.array(bad, np.int32))
    refused(TypeError, "wanted must be int32", wanted=np.array([0]))
    for a, b in zip((*cache.keys, *cache.values), (*untouched.keys, *untouched.values), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_threads_at_once_get_their_own_results() -> None:
    """Of different lengths, so that they need scratch of different sizes."""
    config = replace(CONFIG, dim=128, hidden_dim=400)  # long enough that the lock of the interpreter is let go
    native = native_decoder(config, weights_of(config))
    texts = [some_ids(tokens) for tokens in (40, 90, 130, 61)]
    want = [native.logits(ids, every(ids)) for ids in texts]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(12):
            if not np.array_equal(native.logits(texts[i], every(texts[i])), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_computes_while_the_parent_does() -> None:
    program = """
import os, sys, threading, warnings
import numpy as np
from test_forward import *
warnings.simplefilter("ignore")
cpu.set_threads(2)
config = replace(CONFIG, dim=128, hidden_dim=400)
native = native_decoder(config, weights_of(config))
ids = some_ids(120)
want = native.logits(ids, every(ids)[-1:])
stop = False
def busy():
    while not stop:
        native.logits(ids, every(ids)[-1:])
other = threading.Thread(target=busy)
other.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(native.logits(ids, every(ids)[-1:]), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
print("done")
"""
    assert run(program) == "done"


def test_the_process_ends_while_a_daemon_thread_computes_and_a_module_holds_a_decoder() -> None:
    program = """
import sys, threading, time
from test_forward import *
config = replace(CONFIG, dim=128, hidden_dim=400)
native = native_decoder(config, weights_of(config))
ids = some_ids(120)
def busy():
    while True:
        native.logits(ids, every(ids)[-1:])
threading.Thread(target=busy, daemon=True).start()
time.sleep(0.1)
print("done")
"""
    assert run(program) == "done"


def run(program: str) -> str:
    """What a Python program prints; it must succeed and say nothing on stderr."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(puna.__file__).parents[1]), str(here)])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that signal")
def test_a_signal_ends_a_long_call_between_layers() -> None:
    """As Ctrl-C does: what the handler raises comes out, and the layers that were to come have not run."""
    config = replace(CONFIG, dim=256, hidden_dim=1024, layers=80)
    one = weights_of(replace(config, layers=1))
    weights = replace(one, layers=one.layers * 80)  # the same arrays: no memory
    native = native_decoder(config, weights)
    cpu.use("scalar")
    cache, ids = cache_of(config, 38), some_ids(600)

    class InterruptError(Exception):
        pass

    def handler(number: int, frame: Any) -> None:
        raise InterruptError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        with pytest.raises(InterruptError):
            native.logits(ids, every(ids)[-1:], at(0, 600, 38), cache.keys, cache.values)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.any(cache.keys[0])
    assert not np.any(cache.keys[-1])
    ids = some_ids(2)
    np.testing.assert_array_equal(native.logits(ids, every(ids)), plain(weights, config, ids))


def test_unaligned_weights_are_read_where_they_lie() -> None:
    """As in a mapped file, where a tensor may start at any byte."""

    def moved(leaf: Any) -> Any:
        bits = leaf.bits
        room = np.zeros(bits.nbytes + 2, np.uint8)
        view = room[2:].view(np.uint16).reshape(bits.shape)
        view[...] = bits
        return BF16(view)

    weights = weights_of(CONFIG, "bf16")
    shifted = replace(tree_map(moved, replace(weights, inv_freq=weights.norm)), inv_freq=weights.inv_freq)
    ids = some_ids(5)
    want = native_decoder(CONFIG, weights).logits(ids, every(ids))
    np.testing.assert_array_equal(native_decoder(CONFIG, shifted).logits(ids, every(ids)), want)


@pytest.mark.parametrize(("heads", "head_dim"), [(1 << 62, 4), (4, 1 << 62), (1 << 32, 1 << 32)])
def test_sizes_whose_product_overflows_are_refused(heads: int, head_dim: int) -> None:
    """2^62 heads of 4 numbers are 2^64: as 64 bits, none, which is the size of empty weights."""

    def leaf(*shape: int) -> Any:
        return np.zeros(shape, np.float32), 0, shape[0], shape[1] if len(shape) == 2 else 1

    qkv = [leaf(0, 8), None] * 3
    layer = [leaf(8), *qkv, leaf(8, 0), None, leaf(8), leaf(4, 8), None, leaf(4, 8), None, leaf(8, 4), None]
    with pytest.raises(ValueError, match="heads"):
        cpu._cpu.Decoder(heads, heads, head_dim, 1e-5, False, leaf(5, 8), [layer], [cpu.Manner()], 0, leaf(8), None)
