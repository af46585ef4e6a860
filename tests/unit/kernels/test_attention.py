"""Attention over pages in C++ against the reference (in float64), per instruction set, type of cache and odd size; and
what its bits may depend on.

What is surprising: page numbers are shuffled and every page that no sequence owns is NaN, so a wrong page shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.errors import DeviceError
from puna.kernels import ops
from puna.kernels import reference as ref
from puna.kernels.layouts import Cache, Packed, PageTable, empty_cache, page_table, words

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

F32 = npt.NDArray[np.float32]
TYPES = ("fp32", "bf16", "fp16", "q8_0")
TABLES = [(index, reason) for index, (_, runs, reason) in enumerate(cpu._cpu.tables()) if runs]


@pytest.fixture(params=TABLES, ids=[reason.removeprefix("cpuid: ") for _, reason in TABLES], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of this file runs once an instruction set."""
    index, reason = request.param
    cpu._cpu.use(index)
    yield reason
    cpu.set_invariant(False)
    cpu.use()


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def filled(kv_type: str, values: F32) -> Cache:
    """A cache [pages, page, G, D] of those numbers, written by the reference."""
    cache = empty_cache(kv_type, values.shape)
    words(cache)[...] = ref.to_cache(values, cache)
    return cache


def laid_out(
    first: Sequence[int], counts: Sequence[int], page: int, G: int, D: int, seed: int = 1
) -> tuple[PageTable, F32, F32]:
    """A table of shuffled pages, and keys and values [pages, page, G, D] in which what no token sees is NaN.

    Position p of sequence b has the same numbers whatever the page's size.
    """
    random = np.random.default_rng(seed)
    ends = [at + count for at, count in zip(first, counts, strict=True)]
    width = -(-max(ends) // page) + 1
    pages = random.permutation(len(first) * width + 2)[: len(first) * width].reshape(len(first), width)
    caches = np.full((2, len(first) * width + 2, page, G, D), np.nan, np.float32)
    for b, end in enumerate(ends):
        for cache, numbers in zip(caches, normal(100 * seed + b, 2, max(ends), G, D), strict=True):
            for p in range(end):
                cache[pages[b, p // page], p % page] = numbers[p]
        pages[b, -(-end // page) :] = -7  # never read
    return page_table(first, counts, pages), caches[0], caches[1]


def tolerance(kv_type: str, counts: Sequence[int], isa: str, pairs: bool) -> float:
    """Of the largest result: float32's, 15 bits' over Q8_0 with VNNI, bfloat16's in prefill where it may (`pairs`)."""
    if pairs and max(counts) > 8 and kv_type != "fp32" and "BF16" in isa:
        return 1e-2
    return 3e-4 if kv_type == "q8_0" and "VNNI" in isa else 3e-6


def check(
    isa: str,
    kv_type: str,
    R: int,
    G: int,
    D: int,
    first: Sequence[int],
    counts: Sequence[int],
    page: int,
    chunk: int = 0,
) -> None:
    table, keys, values = laid_out(first, counts, page, G, D)
    q, k, v = normal(3, sum(counts), R * G, D), filled(kv_type, keys), filled(kv_type, values)
    want = ref.attention(q.astype(np.float64), k, v, table, chunk=chunk)
    if chunk:  # what no token of the call sees may be gone
        for b, at in enumerate(first):
            table.pages[b, : at // chunk * chunk // page] = -7
    assert np.all(np.isfinite(want))
    for invariant, bf16 in ((False, False), (False, True), (True, True)):
        cpu.set_invariant(invariant)
        got = cpu.attention(q, k, v, table, bf16, chunk)
        most = tolerance(kv_type, counts, isa, bf16 and not invariant)
        assert got.dtype == np.float32
        assert float(np.max(np.abs(got - want))) <= most * max(float(np.max(np.abs(want))), 1e-30)
    cpu.set_invariant(False)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize(("R", "G"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 2), (5, 2), (8, 1)])
@pytest.mark.parametrize("size", [1, 5, 32, 48, 64, 160])
def test_ragged_batches(isa: str, kv_type: str, R: int, G: int, size: int) -> None:
    size = -(-size // 32) * 32 if kv_type == "q8_0" else size
    check(isa, kv_type, R, G, size, [22, 0, 3, 30], [1, 1, 3, 8], 16)
    check(isa, kv_type, R, G, size, [0, 60, 10, 147], [19, 11, 1, 3], 48)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("page", [16, 80, 128, 1200])
def test_long_contexts(isa: str, kv_type: str, page: int) -> None:
    """Past every block of keys of both ways: decoding and a part of a prompt in one call."""
    check(isa, kv_type, 3, 2, 32, [1099, 511, 1030, 500, 0], [1, 2, 70, 1, 140], page)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("chunk", [16, 80, 512, 1040])
def test_chunks(isa: str, kv_type: str, chunk: int) -> None:
    """Within one, across an edge or several, with both ways in a call, and with pages that chunks cut through."""
    for page in (16, 48, 128):
        check(isa, kv_type, 3, 2, 32, [1099, 510, 1030, 511, 0, chunk], [1, 4, 70, 1, 140, 1], page, chunk)


@pytest.mark.parametrize("kv_type", TYPES)
def test_a_chunk_does_not_depend_on_who_shares_the_call(kv_type: str) -> None:
    """Bit for bit: a token in a prompt that crosses chunks, and in one that begins where its chunk does."""
    table, keys, values = laid_out([0], [100], 16, 2, 32)
    q, k, v = normal(6, 100, 6, 32), filled(kv_type, keys), filled(kv_type, values)

    def part(at: int, count: int) -> F32:
        return cpu.attention(q[at : at + count], k, v, page_table([at], [count], table.pages), True, 48)

    whole, few = part(0, 100), np.concatenate([part(at, 4) for at in range(0, 100, 4)])
    for at, count, among in ((48, 48, whole), (40, 20, whole), (96, 4, few), (46, 8, few), (47, 1, few), (48, 1, few)):
        assert np.array_equal(part(at, count), among[at : at + count])
    # A chunk's tokens have the bits of a sequence that begins with it.
    alone = cpu.attention(q[48:96], k, v, page_table([0], [48], table.pages[:, 3:]), True)
    assert np.array_equal(alone, whole[48:96])


def test_a_chunk_of_no_whole_pages_goes_to_the_reference() -> None:
    table, k, v = laid_out([20], [5], 16, 2, 16)
    q = normal(1, 5, 4, 16)
    assert np.array_equal(cpu.attention(q, k, v, table, chunk=10), ref.attention(q, k, v, table, chunk=10))
    with pytest.raises(ValueError, match="a chunk of 24 is no multiple of 16"):
        cpu._cpu.attention(q, k, v, 0, table, False, 24, np.empty_like(q))


@given(
    kv_type=st.sampled_from(TYPES),
    sequences=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), min_size=1, max_size=4),
    page=st.integers(1, 8),
    R=st.integers(1, 5),
    G=st.integers(1, 3),
    D=st.integers(1, 70),
)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(isa: str, kv_type: str, sequences: list[tuple[int, int]], page: int, R: int, G: int, D: int) -> None:
    D = -(-D // 32) * 32 if kv_type == "q8_0" else D
    first, counts = zip(*sequences, strict=True)
    check(isa, kv_type, R, G, D, first, counts, 16 * page)


@pytest.mark.parametrize("T", [1, 8, 19, 130])
def test_whole_stretches_need_no_table(T: int) -> None:
    for H, G, D, chunk in ((4, 2, 16, 0), (3, 3, 5, 0), (4, 2, 16, 32), (3, 3, 5, 48)):
        q, k, v = normal(1, 2, T, H, D), normal(2, 2, T, G, D), normal(3, 2, T, G, D)
        want = ref.attention(*(a.astype(np.float64) for a in (q, k, v)), None, chunk=chunk)
        got = cpu.attention(q, k, v, None, chunk=chunk)
        assert float(np.max(np.abs(got - want))) <= 3e-6 * float(np.max(np.abs(want)))


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("at", [0, 70, 99])
def test_what_is_no_number_stays_seen(isa: str, kv_type: str, at: int) -> None:
    """In a query, a key or a value: NaN where the reference has it, and nowhere else. Zeros are no such thing."""
    table = page_table([99], [1], np.array([[1, 0]]))
    for damaged in ("query", "key", "value", "zeros"):
        q, caches = normal(1, 1, 6, 64), normal(2, 2, 2, 64, 2, 64)
        if damaged == "query":
            q[0, 2, 7] = np.nan
        elif damaged == "zeros":
            q[0, :3], caches[1, :, :, 1] = 0, 0
        else:
            caches[int(damaged == "value"), 1 - at // 64, at % 64, 1, 40] = np.nan
        k, v = (filled(kv_type, cache) for cache in caches)
        want, got = ref.attention(q.astype(np.float64), k, v, table), cpu.attention(q, k, v, table)
        assert np.array_equal(np.isnan(got), np.isnan(want))
        assert np.isnan(want).any() == (damaged != "zeros")


def test_scores_that_overflow_naive_exponentials() -> None:
    """Scores near 1,000: float32 holds them to 6e-5, and their exponentials are off by as much."""
    for tokens in (1, 30):
        table, k, v = laid_out([40 - tokens], [tokens], 16, 1, 16)
        q = normal(1, tokens, 2, 16) * 200
        want = ref.attention(q.astype(np.float64), k, v, table)
        assert float(np.max(np.abs(cpu.attention(q, k, v, table) - want))) <= 2e-4 * float(np.max(np.abs(want)))


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize("R", [1, 3, 4, 7])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_token_does_not_depend_on_who_shares_the_call(bf16: bool, kv_type: str, R: int) -> None:
    """Bit for bit: alone or among up to 8 of its sequence, in any batch; and again among any larger number."""
    first, T, G, D = (0, 460, 580), 120, 2, 64
    q = normal(1, 3, T, R * G, D)
    table, keys, values = laid_out(first, [T] * 3, 64, G, D)
    k, v = filled(kv_type, keys), filled(kv_type, values)

    def part(sequences: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> list[F32]:
        some = page_table(
            [first[b] + t for b, t in zip(sequences, starts, strict=True)], counts, table.pages[[*sequences]]
        )
        rows = [q[b, t : t + n] for b, t, n in zip(sequences, starts, counts, strict=True)]
        return np.split(cpu.attention(np.concatenate(rows), k, v, some, bf16), some.starts[1:-1])

    singles = np.stack([np.concatenate(part([b] * T, range(T), [1] * T)) for b in range(3)])
    whole = np.stack(part([0, 1, 2], [0] * 3, [T] * 3))
    for sequences, starts, counts in (
        ([0], [51], [1]), ([1], [112], [8]), ([2, 0, 1], [3, 0, 117], [2, 5, 3]), ([2, 1, 0], [0, 111, 60], [8, 9, 1]),
        ([1], [0], [50]), ([0, 2], [103, 0], [17, 120]), ([1, 1, 0, 2], [0, 90, 5, 7], [90, 30, 1, 4]),
    ):  # fmt: skip
        for got, b, t, n in zip(part(sequences, starts, counts), sequences, starts, counts, strict=True):
            assert np.array_equal(got, (singles if n <= 8 else whole)[b, t : t + n]), (b, t, n)


@pytest.mark.parametrize("kv_type", TYPES)
def test_neither_the_size_of_a_page_nor_its_number_matters(kv_type: str) -> None:
    """Bit for bit, both ways in one call."""
    first, counts = [700, 0, 120, 513], [1, 300, 8, 40]
    q, results = normal(1, sum(counts), 6, 32), []
    for page in (16, 64, 112, 128, 704):
        table, keys, values = laid_out(first, counts, page, 2, 32)
        results.append(cpu.attention(q, filled(kv_type, keys), filled(kv_type, values), table, True))
    for other in results[1:]:
        assert np.array_equal(results[0], other)


@pytest.mark.parametrize("kv_type", TYPES)
def test_sequences_may_share_pages(kv_type: str) -> None:
    """Two that begin alike read the same pages; a third has a copy of its own: the same bits."""
    table, keys, values = laid_out([70, 70, 70], [1, 20, 20], 16, 2, 32)
    for cache in (keys, values):
        cache[table.pages[1, :4]] = cache[table.pages[0, :4]]
        cache[table.pages[2, :6]] = cache[table.pages[1, :6]]
    shared = table.pages.copy()
    shared[1, :4] = shared[0, :4]
    q = normal(4, 41, 4, 32)
    q[21:] = q[1:21]
    k, v = filled(kv_type, keys), filled(kv_type, values)
    got = cpu.attention(q, k, v, table._replace(pages=shared), True)
    assert np.array_equal(got, cpu.attention(q, k, v, table, True))
    assert np.array_equal(got[1:21], got[21:])


@pytest.mark.parametrize("kv_type", TYPES)
def test_invariant_attention_does_not_depend_on_the_cuts(kv_type: str) -> None:
    """A prompt at once, in parts, and token by token beside others: the same bits."""
    table, keys, values = laid_out([0, 600], [700, 20], 64, 2, 32)
    k, v, q = filled(kv_type, keys), filled(kv_type, values), normal(5, 720, 6, 32)
    cpu.set_invariant(True)
    whole = cpu.attention(q, k, v, table, True)
    for at, count in ((0, 1), (3, 5), (250, 300), (699, 1)):
        some = page_table([at, 619], [count, 1], table.pages)
        got = cpu.attention(np.concatenate([q[at : at + count], q[-1:]]), k, v, some, True)
        assert np.array_equal(got, np.concatenate([whole[at : at + count], whole[-1:]]))


def test_a_call_whose_partial_results_are_too_many_at_once(isa: str) -> None:
    """Then they are merged some spans at a time."""
    if "AVX-512" not in isa:
        pytest.skip("the cuts are the same code on every instruction set, and slow on others")
    cpu.set_invariant(True)
    end, T = 40_000, 260
    k, v = normal(1, 1, end, 1, 1), normal(2, 1, end, 1, 1)
    q = normal(3, T, 32, 1)
    whole = cpu.attention(q, k, v, page_table([end - T], [T], [[0]]))
    for t in (0, 7, 200, 255):
        got = cpu.attention(q[t : t + 5], k, v, page_table([end - T + t], [5], [[0]]))
        assert np.array_equal(got, whole[t : t + 5])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_invariant_products_do_not_depend_on_the_rows(dtype: str) -> None:
    from puna.kernels.layouts import convert

    weight, x = convert(normal(1, 70, 90), dtype), normal(2, 40, 90)
    cpu.set_invariant(True)
    whole = cpu.linear(x, weight)
    for at, count in ((0, 1), (7, 8), (20, 13), (3, 33)):
        assert np.array_equal(cpu.linear(x[at : at + count].copy(), weight), whole[at : at + count])


def test_select_settles_invariance() -> None:
    table, k, v = laid_out([0], [40], 16, 1, 16)
    q = normal(1, 40, 1, 16)
    try:
        ops.select(invariant=True)
        whole = cpu.attention(q, k, v, table)
        assert np.array_equal(cpu.attention(q[30:31], k, v, page_table([30], [1], table.pages)), whole[30:31])
        ops.select()
        assert not np.array_equal(cpu.attention(q, k, v, table), whole)
        with pytest.raises(DeviceError, match="asked for by --kernels reference"):
            ops.select("reference", invariant=True)
    finally:
        ops.select("auto")


WELL = page_table([0, 17], [2, 3], [[0, 3], [2, 1]])


@pytest.mark.parametrize(
    ("table", "error", "says"),
    [
        (WELL._replace(positions=WELL.positions.astype(np.int64)), TypeError, "positions must be int32"),
        (WELL._replace(positions=WELL.positions[:4]), ValueError, r"positions must have the shape \[5\]"),
        (WELL._replace(positions=np.int32([0, 1, -1, 0, 1])), ValueError, "-1 is not the position after"),
        (WELL._replace(positions=np.int32([0, 2, 17, 18, 19])), ValueError, "2 is not the position after"),
        (WELL._replace(positions=np.int32([0, 1, 30, 31, 32])), ValueError, "2 pages a sequence.* position 32 needs 3"),
        (WELL._replace(starts=np.int32([0, 2, 4])), ValueError, "starts must go from 0 to 5"),
        (WELL._replace(starts=np.int32([1, 2, 5])), ValueError, "starts must go from 0 to 5"),
        (WELL._replace(starts=np.int32([0, 5, 5])), ValueError, "starts must ascend"),
        (WELL._replace(starts=np.int32([])), ValueError, "starts must go"),
        (WELL._replace(pages=WELL.pages[:1]), ValueError, r"pages must have the shape \[2, 2\]"),
        (WELL._replace(pages=np.int32([[4, 0], [2, 1]])), ValueError, "4 is not in a cache of 4"),
        (WELL._replace(pages=np.int32([[0, 0], [2, -1]])), ValueError, "-1 is not in a cache of 4"),
    ],
)  # fmt: skip
def test_tables_that_do_not_fit_are_refused(table: PageTable, error: type[Exception], says: str) -> None:
    cache, new = np.zeros((4, 16, 1, 4), np.float32), np.ones((5, 1, 4), np.float32)
    with pytest.raises(error, match=says):
        cpu.attention(new, cache, cache, table)
    with pytest.raises(error, match=says):
        cpu.write_kv(cache, cache.copy(), new, new, table)
    assert not cache.any()


def test_what_no_position_needs_may_be_any_page() -> None:
    cache, new = np.zeros((4, 16, 1, 4), np.float32), np.ones((5, 1, 4), np.float32)
    cpu.write_kv(cache, cache, new, new, WELL._replace(pages=np.int32([[0, 99], [2, 1]])))
    assert cache[0, :2].all()
    assert cache[1, 1:4].all()
    assert cache.sum() == 20


@pytest.mark.parametrize("page", [1, 8, 24])
def test_pages_of_other_sizes_are_refused(page: int) -> None:
    cache, new = np.zeros((4, page, 1, 4), np.float32), np.ones((1, 1, 4), np.float32)
    with pytest.raises(ValueError, match=f"pages of {page} tokens; they must be a multiple of 16"):
        cpu.attention(new, cache, cache, page_table([0], [1], [[0]]))


def test_other_caches_are_refused() -> None:
    q, table = normal(1, 1, 2, 32), page_table([0], [1], [[0]])
    k = empty_cache("fp16", (1, 16, 1, 32))
    with pytest.raises(TypeError, match="keys and values must be of one type"):
        cpu.attention(q, k, empty_cache("bf16", (1, 16, 1, 32)), table)
    for raw in (
        np.zeros((1, 16, 1, 34), np.uint8),
        np.zeros((1, 16, 1, 32), np.uint16),
        np.zeros((1, 16, 1, 32), np.int8),
    ):
        with pytest.raises(TypeError, match="Packed Q8_0, not"):
            cpu.attention(q, raw, raw, table)
    with pytest.raises(TypeError, match="float64"):
        cpu.attention(q, np.zeros((1, 16, 1, 32)), np.zeros((1, 16, 1, 32)), table)
    other = Packed("Q4_0", (1, 16, 1, 32), np.zeros((1, 16, 1, 18), np.uint8))
    with pytest.raises(TypeError, match="not Q4_0"):
        cpu.attention(q, other, other, table)
    eight: Any = empty_cache("q8_0", (1, 16, 1, 64))
    with pytest.raises(ValueError, match="attention"):
        cpu.attention(q, eight, eight, table)
    with pytest.raises(ValueError, match="write_kv"):
        cpu.write_kv(eight, eight, q[:, :1], q[:, :1], table)
    with pytest.raises(ValueError, match="whole number of Q8_0 blocks"):
        empty_cache("q8_0", (1, 16, 1, 48))
    with pytest.raises(ValueError, match="unknown type"):
        empty_cache("fp8", (1, 16, 1, 48))
