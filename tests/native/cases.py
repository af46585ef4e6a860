"""Writes what `driver.cpp` runs: inputs of every op over odd sizes, and what `puna.kernels.reference` makes of them.

    python tests/native/cases.py FILE

The file, little endian: `PUNACASE`, then cases until it ends. A case is its op (16 bytes, filled with zeros), its
numbers (int64 count, int64 each), its tolerance and the one for AVX-512 BF16 (float64: times the largest expected
number), its inputs and what is wanted of it; these are lists of arrays (int64 count). An array is the name of its type
(8 bytes: `F32`, `Q4_K`, `I32`), by how many bytes its end misses the guard page, its size in bytes (int64 each), and
the bytes.

What it is not: the tests of the Python module (`tests/unit/kernels/test_cpu.py`), which go further on the machine that
runs them.
What is surprising: activations are numbers that bfloat16 holds, because AVX-512 BF16 rounds them to it beside bfloat16
weights. Beside packed weights all instruction sets round them to 8 bits, and so does `quantized`.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from puna.kernels import ops
from puna.kernels import reference as ref
from puna.kernels.blocks import TYPES
from puna.kernels.encode import KINDS
from puna.kernels.layouts import (
    BF16,
    Packed,
    PageTable,
    Weight,
    convert,
    empty_cache,
    page_table,
    to_bf16,
    to_float32,
    words,
)
from puna.models.config import DecoderConfig
from puna.models.llama4_config import Llama4Config
from puna.models.registry import definition
from puna.models.rope import Rope
from puna.models.tree import ExpertLayer, KVCache

DTYPES = ("fp32", "fp16", "bf16")
FLOAT32 = 2e-6
"""The tolerance of an op whose sums are float32 and not long."""


@dataclass
class Case:
    """One call: the op, its numbers in the order of `Kernels`, how near the results must come, arrays in and out."""

    op: str
    numbers: tuple[int, ...]
    tolerance: float
    inputs: tuple[Any, ...]
    wanted: tuple[Any, ...]
    tolerance_bf16: float | None = None
    """Where bfloat16 products serve; None: the same."""


@dataclass
class Anywhere:
    """Weights, which may begin at any byte: a tensor of a mapped file."""

    kind: str
    data: npt.NDArray[Any]


NAMES = {"float32": "F32", "float16": "F16", "int32": "I32"}


def anywhere(weight: Weight) -> Anywhere:
    return Anywhere(kind_of(weight), words(weight))


def kind_of(array: Any) -> str:
    """The name of an array's type in the file."""
    if isinstance(array, BF16):
        return "BF16"
    return array.kind if isinstance(array, Packed | Anywhere) else NAMES[array.dtype.name]


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Random float32 of these sizes that bfloat16 holds; equal sizes and seeds give equal numbers."""
    rng = np.random.default_rng([seed, *shape])
    return to_float32(to_bf16(rng.standard_normal(shape, dtype=np.float32)))


def f32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Wanted numbers, computed in float64."""
    return values.astype(np.float32)


PACKED = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""The types that have kernels, and where the float16 scales of a block lie."""


def packed(kind: str, rows: int, columns: int) -> Packed:
    """Random blocks: every byte is anything, but the scales are numbers of a usual size."""
    rng = np.random.default_rng([rows, columns])
    blocks = columns // TYPES[kind].block
    data = rng.integers(0, 256, (rows, blocks, TYPES[kind].size), dtype=np.uint8)
    for place in PACKED[kind]:
        scale = rng.uniform(-0.02, 0.02, (rows, blocks, 1)).astype(np.float16)
        data[..., place : place + 2] = scale.view(np.uint8)
    return Packed(kind, (rows, columns), data.reshape(rows, -1))


def quantized(x: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.float64]:
    """Activations as they meet packed weights: 8 bits with a scale for each block, of 32 or 256 as in `kind`."""
    rows, columns = x.shape
    block = TYPES[kind].block if kind in TYPES else 32
    parts = np.pad(x, ((0, 0), (0, -columns % block))).reshape(rows, -1, block)
    most = np.max(np.abs(parts), axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        integers = np.where(most > 0, np.rint(parts * (np.float32(127) / most)), 0)
    return (integers * (most / np.float32(127)).astype(np.float64)).reshape(rows, -1)[:, :columns]


def embedding() -> Iterator[Case]:
    """Rows of a table, exactly; all 65,536 words of the 16-bit types."""
    every = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    tables: list[Weight] = [convert(normal(11, dim), dtype) for dim in (1, 7, 33, 288) for dtype in DTYPES]
    tables += [packed(kind, 19, 512) for kind in PACKED]
    for table in (*tables, every.view(np.float16), BF16(every)):
        rows, dim = table.shape
        ids = np.arange(rows, dtype=np.int32)[::-1].copy()
        yield Case("embedding", (dim, rows, rows), 0, (anywhere(table), ids), (ref.embedding(table, ids),))


def rms_norm() -> Iterator[Case]:
    for rows, dim in ((1, 1), (3, 7), (4, 64), (2, 1000), (130, 257)):
        for dtype in DTYPES:
            x, weight = normal(rows, dim) * 30, convert(normal(dim, seed=1), dtype)
            want = ref.rms_norm(x.astype(np.float64), weight, 1e-5)
            yield Case(
                "rms_norm", (rows, dim), FLOAT32, (x, anywhere(weight), np.array([1e-5], np.float32)), (f32(want),)
            )


LINEAR = (
    *((rows, inner, 13) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12) for inner in (1, 31, 200)),
    (13, 1, 1), (17, 64, 9), (33, 31, 65), (49, 200, 70), (100, 63, 130), (800, 6, 5), (3, 517, 300), (50, 2200, 11),
)  # fmt: skip
"""Rows, inputs, outputs: few and many rows, parts of the inputs, and enough work for several threads."""


NONE = np.zeros(0, np.float32)


def linear() -> Iterator[Case]:
    for rows, inner, out in LINEAR:
        for dtype in DTYPES:
            x, weight = normal(rows, inner), convert(normal(out, inner, seed=1), dtype)
            bias = convert(normal(out, seed=2), dtype) if rows % 2 else None
            want = ref.linear(x.astype(np.float64), weight, bias)
            inputs = (x, anywhere(weight), NONE if bias is None else anywhere(bias))
            yield Case("linear", (rows, inner, out), 5e-6, inputs, (f32(want),))


LINEAR_PACKED = (
    (1, 256, 1), (2, 512, 16), (3, 256, 17), (5, 1280, 40), (9, 256, 7), (13, 512, 33), (25, 1280, 20), (40, 256, 100),
    (530, 256, 18), (3, 2560, 150),
)  # fmt: skip
"""As LINEAR, for blocks of 256; blocks of 32 get 32 inputs more, so that the last record is a short one."""


def linear_packed() -> Iterator[Case]:
    for kind in (*PACKED, "I8"):
        for rows, inner, out in LINEAR_PACKED:
            columns = inner if kind in TYPES and TYPES[kind].block == 256 else inner + 32
            weight, values = int8_blocks(out, columns) if kind == "I8" else blocks_of(kind, out, columns)
            x = normal(rows, columns)
            if rows == 2:
                x[1] = 0
            want = quantized(x, kind) @ values.astype(np.float64).T
            bias = normal(out, seed=2) if rows % 2 else None
            inputs = (x, weight, NONE if bias is None else bias)
            yield Case("linear", (rows, columns, out), 5e-6, inputs, (f32(want if bias is None else want + bias),))


def blocks_of(kind: str, rows: int, columns: int) -> tuple[Anywhere, npt.NDArray[np.float32]]:
    """Random blocks and their values."""
    weight = packed(kind, rows, columns)
    return anywhere(weight), to_float32(weight)


def int8_blocks(rows: int, columns: int) -> tuple[Anywhere, npt.NDArray[np.float32]]:
    """Random blocks of I8 (two float32 scales, 32 int8) and their values."""
    rng = np.random.default_rng([rows, columns])
    scales = rng.uniform(-0.02, 0.02, (rows, columns // 32, 2)).astype(np.float32)
    integers = rng.integers(-127, 128, (rows, columns // 32, 32), dtype=np.int8)
    values = (integers.reshape(rows, -1, 2, 16) * scales[..., None]).astype(np.float32)
    data = np.concatenate([scales.view(np.uint8), integers.view(np.uint8)], axis=-1)
    return Anywhere("I8", data), values.reshape(rows, columns)


def rope() -> Iterator[Case]:
    for tokens, heads, size in ((1, 1, 2), (5, 3, 6), (3, 2, 34), (130, 4, 64), (2, 3, 80)):
        for interleaved in (False, True):
            x = normal(tokens, heads, size)
            cos, sin = ref.rope_table(
                np.arange(tokens, dtype=np.int32), 10000.0 ** -np.linspace(0, 1, size // 2, dtype=np.float32)
            )
            want = ref.rope(x.astype(np.float64), cos, sin, interleaved)
            yield Case("rope", (tokens, heads, size, interleaved), FLOAT32, (x, cos, sin), (f32(want),))


ATTENTION = (
    ((0,), (19,), 16, 1, 1, 1), ((0, 3), (19, 16), 16, 6, 2, 20), ((22,), (1,), 16, 8, 8, 5),
    ((699, 20), (1, 1), 128, 4, 2, 16), ((147, 3, 40), (3, 3, 40), 48, 20, 4, 80), ((160,), (40,), 16, 3, 3, 33),
    ((1098, 1000), (2, 70), 64, 4, 2, 32), ((0,), (130,), 144, 2, 1, 64), ((61, 0), (9, 1), 32, 4, 2, 96),
)  # fmt: skip
"""First positions, tokens, page, heads, key/value heads, head size."""

CHUNKED = (
    ((0, 30), (40, 5), 16, 6, 2, 20, 16), ((37, 45, 64), (1, 8, 1), 16, 4, 2, 32, 16),
    ((70, 3), (90, 60), 48, 4, 2, 32, 80), ((1098, 2047), (2, 70), 64, 4, 2, 64, 1024),
    ((10,), (100,), 128, 3, 3, 33, 32),
)  # fmt: skip
"""The same and a chunk: of one page, across its edge, of no whole pages, over several stretches, within a page."""


CACHES = ("fp32", "fp16", "bf16", "q8_0")


def filled(kv_type: str, pages: int, page: int, G: int, D: int, seed: int) -> Any:
    """A KV cache of random numbers."""
    cache = empty_cache(kv_type, (pages, page, G, D))
    words(cache)[...] = ref.to_cache(normal(pages, page, G, D, seed=seed), cache)
    return cache


def laid_out(first: Sequence[int], counts: Sequence[int], page: int) -> PageTable:
    """A table of shuffled pages, as few as can be: the cache ends with one that is read."""
    width = max(-(-(at + count) // page) for at, count in zip(first, counts, strict=True))
    pages = np.random.default_rng(9).permutation(len(first) * width).reshape(len(first), width)
    return page_table(first, counts, pages)


def write_kv() -> Iterator[Case]:
    for kv_type in CACHES:
        for D in (32, 96) if kv_type == "q8_0" else (5, 32, 33):
            table, page, G = laid_out((14, 3), (4, 2), 16), 16, 2
            before = [filled(kv_type, table.pages.size, page, G, D, seed) for seed in (0, 1)]
            after = [filled(kv_type, table.pages.size, page, G, D, seed) for seed in (0, 1)]
            k, v = (normal(6, G, D, seed=seed) * 1.01 for seed in (2, 3))  # what no cache but float32 holds
            k[0, 0, :5] = (0, -0.0, 7e4, 1e-7, 65519)
            k[4, 0] = 0
            ref.write_kv(after[0], after[1], k, v, table)
            yield Case("write_kv", (*table.pages.shape, page, G, D), 0, (*before, k, v, *table), tuple(after))


def attention() -> Iterator[Case]:
    for kv_type in CACHES:
        for first, counts, page, H, G, D, chunk in [*((*case, 0) for case in ATTENTION), *CHUNKED]:
            if kv_type == "q8_0" and D % 32:
                continue
            table, q = laid_out(first, counts, page), normal(sum(counts), H, D)
            k, v = (filled(kv_type, table.pages.size, page, G, D, seed) for seed in (1, 2))
            want = ref.attention(q.astype(np.float64), k, v, table, chunk=chunk)
            # AVX-512 BF16 may round the queries and the weights of a prefill where the cache is not float32, and rounds
            # those of decode to 15 bits over Q8_0.
            for rounds in (0, 1):
                bf16 = 1e-2 if rounds and kv_type != "fp32" else 3e-4 if kv_type == "q8_0" else 3e-6
                numbers = (*table.pages.shape, page, H, G, D, rounds, chunk)
                yield Case("attention", numbers, 3e-6, (q, k, v, *table), (f32(want),), bf16)


def swiglu() -> Iterator[Case]:
    for count in (1, 3, 100, 70001):
        gate, up = normal(count) * 10, normal(count, seed=1)
        want = ref.swiglu(gate.astype(np.float64), up)
        yield Case("swiglu", (count,), FLOAT32, (gate, up), (f32(want),))
    gate = np.array([-1e4, -100, -88, -20, 0, 20, 88, 100, 1e4, np.nan], np.float32)
    want = ref.swiglu(gate.astype(np.float64), np.ones(len(gate)))
    yield Case("swiglu", (len(gate),), FLOAT32, (gate, np.ones_like(gate)), (f32(want),))


def argmax() -> Iterator[Case]:
    for rows, vocabulary in ((1, 1), (3, 15), (2, 65), (3, 1000), (2, 32003)):
        logits = np.round(normal(rows, vocabulary), 1)  # many equals: the first one counts
        yield Case("argmax", (rows, vocabulary), 0, (logits,), (ref.argmax(logits),))
        logits[:, vocabulary // 2 :] = np.nan
        yield Case("argmax", (rows, vocabulary), 0, (logits,), (ref.argmax(logits),))


def top_k() -> Iterator[Case]:
    for rows, vocabulary, k in ((1, 1, 1), (2, 15, 15), (3, 65, 2), (2, 1000, 700), (3, 32003, 40)):
        logits = np.round(normal(rows, vocabulary), 1)  # many equals
        logits[0, vocabulary // 2] = np.nan
        logits[-1, vocabulary // 3 :] = -np.inf
        yield Case("top_k", (rows, vocabulary, k), 0, (logits,), ref.top_k(logits, k))


def shortlist() -> Iterator[Case]:
    for rows, vocabulary, k in ((1, 1, 1), (2, 513, 40), (3, 1000, 65), (2, 32003, 65)):
        logits = normal(rows, vocabulary)
        logits[-1, vocabulary // 2 + 1 :] = -np.inf
        scales = np.linspace(0.5, 2, rows, dtype=np.float32)
        yield Case("shortlist", (rows, vocabulary, k), 5e-6, (logits, scales), ref.shortlist(list(logits), scales, k))


def above() -> Iterator[Case]:
    for rows, vocabulary in ((1, 1), (2, 513), (3, 1000), (2, 32003)):
        logits = normal(rows, vocabulary)
        scales, bounds = np.ones(rows, np.float32), np.zeros(rows, np.float32)
        inputs = (logits, scales, logits.max(axis=1), bounds)
        yield Case("above", (rows, vocabulary), 5e-6, inputs, (ref.above(list(logits), *inputs[1:]),))


def allowed() -> Iterator[Case]:
    for rows, vocabulary in ((1, 1), (2, 33), (3, 1000), (2, 32003)):
        logits = normal(rows, vocabulary)
        rng = np.random.default_rng(vocabulary)
        masks = rng.integers(0, 1 << 32, (rows, -(-vocabulary // 32)), dtype=np.uint64).astype(np.uint32)
        wanted = ref.allowed(list(logits), list(masks))
        yield Case("allowed", (rows, vocabulary), 0, (logits, masks.view(np.int32)), (wanted,))


def encode() -> Iterator[Case]:
    for kind in KINDS:
        if TYPES[kind].block == 1:
            continue
        for blocks in (1, 17, 300):
            values = normal(blocks, TYPES[kind].block)
            values[blocks // 2] = 0
            values[-1, 3] = 1e3
            yield Case("encode", (blocks,), 0, (values,), (Anywhere(kind, ref.encode(kind, values)),))


def probe() -> Iterator[Case]:
    """Nothing is wanted but that no byte beyond the last is read."""
    for count in (1, 17, 300_001):
        yield Case("probe", (3,), 0, (normal(count),), (NONE,))


def route() -> Iterator[Case]:
    for rows, count, k in ((1, 16, 1), (7, 3, 3), (33, 128, 2)):
        logits = normal(rows, count)
        yield Case("route", (rows, count, k), FLOAT32, (logits,), ref.route(logits, k))


def experts() -> Iterator[Case]:
    """Rows that share experts, alone and many, of dense and packed weights; one expert is nobody's."""
    for kind in ("fp32", "bf16", "Q8_0", "Q4_K"):
        block = TYPES[kind].block if kind in TYPES else 1
        dim, hidden, each = (block, 2 * block, block) if block > 1 else (19, 33, 7)

        def matrix(rows: int, columns: int, seed: int, kind: str = kind) -> Weight:
            if kind in TYPES:
                return packed(kind, rows, columns)
            return convert(f32(normal(rows, columns, seed=seed) * np.float32(0.3)), kind)

        def three(width: int, seed: int, dim: int = dim) -> tuple[Weight, Weight, Weight]:
            sizes = ((width, dim), (width, dim), (dim, width))
            return tuple(matrix(*size, seed + i) for i, size in enumerate(sizes))  # type: ignore[return-value]

        parts, shared = [three(each, 10 * e) for e in range(4)], three(hidden, 50)
        for rows, k in ((1, 1), (5, 2), (90, 1)):
            x, scores = normal(rows, dim, seed=3), np.abs(normal(rows, k, seed=4)) % np.float32(1)
            ids = np.array([[(row + slot) % 3 for slot in range(k)] for row in range(rows)], np.int32)
            want = ref.experts(x, ids, scores, parts.__getitem__, shared)
            leaves = [anywhere(weight) for part in (shared, *parts) for weight in part]
            tolerance = 5e-2 if block > 1 else 1e-5
            yield Case(
                "experts", (rows, k, dim, hidden, each, len(parts)), tolerance, (x, ids, scores, *leaves), (want,),
                max(tolerance, 3e-2),
            )  # fmt: skip


FORWARD = (
    # weights, cache, first positions, tokens, wanted rows (None: all), hidden states
    ("fp32", "fp32", (0, 3, 20), (19, 1, 6), (2, 5, 18, 19, 25), False), ("fp16", "fp16", (37,), (1,), None, False),
    ("bf16", "bf16", (0, 0), (3, 40), (), False), ("bf16", "fp32", (5, 0), (1, 16), (0, 16), True),
    ("fp32", "", (0,), (21,), None, False), ("Q8_0", "q8_0", (0, 30, 31), (18, 1, 1), (17, 18, 19), False),
    ("Q4_K", "fp16", (16, 2), (3, 2), None, False), ("Q6_K", "", (0,), (9,), (3, 4), True),
)  # fmt: skip


def forward() -> Iterator[Case]:
    """Whole forwards over ragged batches, of layers with and without biases, pairs of rope split and side by side."""
    for index, arguments in enumerate(FORWARD):
        yield forward_case(index, *arguments)


def forward_case(
    index: int,
    dtype: str,
    kv_type: str,
    first: Sequence[int],
    counts: Sequence[int],
    wanted: Sequence[int] | None,
    hidden: bool,
) -> Case:
    block = TYPES[dtype].block if dtype in TYPES else 1
    D, dim, bias = (32, max(64, block), False) if block > 1 else (8, 44, index % 2 == 0)
    heads = max(6 * D, block) // D
    config = DecoderConfig(
        generation="llama3", vocab_size=53, dim=dim, layers=2, heads=heads, kv_heads=heads // 2, head_dim=D,
        hidden_dim=max(96, block), norm_eps=1e-5, rope=Rope(D, 10_000.0), context_length=64,
        attention_bias=bias, mlp_bias=bias, interleaved_rope=index % 2 == 1,
    )  # fmt: skip
    return whole(config, index, dtype, kv_type, first, counts, wanted, hidden)


MIXTURES = (
    ("fp32", "fp32", (0, 20, 37), (19, 1, 6), (2, 5, 18, 19, 25), False), ("bf16", "fp16", (37,), (1,), None, True),
    ("Q8_0", "q8_0", (0, 30), (40, 1), None, False), ("fp32", "", (0,), (45,), (), False),
    ("Q4_K", "", (0,), (35,), (3, 34), False),
)  # fmt: skip


def mixtures() -> Iterator[Case]:
    """Whole forwards of Llama 4s: dense layers and mixtures, chunked and global; the last layer is a mixture.

    Beside packed weights every expert is chosen: activations rounded to 8 bits turn a router's near ties.
    """
    for index, (dtype, kv_type, first, counts, wanted, hidden) in enumerate(MIXTURES):
        block = TYPES[dtype].block if dtype in TYPES else 1
        heads = max(4, block // 32)
        config = Llama4Config(
            "llama4", 53, max(64, block), 3, heads, heads // 2, 32, max(96, block), 1e-5, Rope(32, 5e5), 64,
            interleaved_rope=True, chunk=16, global_layers=(1,), expert_hidden_dim=max(32, block), experts=5,
            experts_per_token=5 if block > 1 else 1 + index % 2, moe_layers=(1, 2), qk_norm=index != 1,
            temperature_floor=8,
        )  # fmt: skip
        yield whole(config, index, dtype, kv_type, first, counts, wanted, hidden)


def whole(
    config: DecoderConfig,
    index: int,
    dtype: str,
    kv_type: str,
    first: Sequence[int],
    counts: Sequence[int],
    wanted: Sequence[int] | None,
    hidden: bool,
) -> Case:
    """A whole forward of random weights, and the caches it finds."""
    model, c4 = definition(config), config if isinstance(config, Llama4Config) else None
    block, D, dim = TYPES[dtype].block if dtype in TYPES else 1, config.head_dim, config.dim
    shapes, rng = model.shapes(config), np.random.default_rng(index)

    def parameter(name: str) -> Weight:
        shape = shapes[name]
        plain = len(shape) == 1 or name.endswith("router.weight")
        if not plain and dtype in TYPES and TYPES[dtype].block > 1:
            return packed(dtype, *shape)
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.3) + np.float32(len(shape) == 1)
        return convert(to_float32(to_bf16(values)), dtype if dtype in DTYPES else "fp32")

    weights, tokens = model.build(config, parameter), sum(counts)
    ids = rng.integers(0, config.vocab_size, tokens).astype(np.int32)
    table, page, cache = page_table(first, counts, [[0]]), tokens, None
    before: tuple[Any, ...] = ()
    if kv_type:
        table, page = laid_out(first, counts, 16), 16

        def caches() -> list[Any]:
            shape = (table.pages.size, page, config.kv_heads, D)
            return [filled(kv_type, *shape, seed) for seed in range(2 * config.layers)]

        before, after = tuple(caches()), caches()
        cache = KVCache(tuple(after[: config.layers]), tuple(after[config.layers :]))
    cos, sin = ref.rope_table(np.arange(max(table.positions) + 1, dtype=np.int32), weights.inv_freq)
    states = model.forward(weights, config, ids if kv_type else ids[None], table if kv_type else None, cache)
    rows = np.arange(tokens, dtype=np.int32) if wanted is None else np.array(wanted, np.int32)
    want = states.reshape(-1, dim)[rows]
    if not hidden:
        want = model.logits(weights, want)

    def leaf(weight: Weight | None) -> Any:
        return NONE if weight is None else anywhere(weight)

    manners, longer, sparse = [], NONE, (0, 0, 0)
    if c4 is not None:
        longer = ref.temperatures(table.positions, c4.temperature_floor, c4.temperature_scale, np.float32)
        sparse = c4.experts, c4.experts_per_token, c4.expert_hidden_dim
    inputs: list[Any] = [ids, cos, sin, *table, rows, np.array([config.norm_eps], np.float32), longer]
    layers: list[Any] = [leaf(weights.embedding), leaf(weights.norm), leaf(weights.head)]
    for i, layer in enumerate(weights.layers):
        far, mixed = c4 is not None and i in c4.global_layers, isinstance(layer, ExpertLayer)
        manners += [mixed, 0 if far else config.chunk, not far, c4 is not None and c4.qk_norm and not far, far]
        layers.append(leaf(layer.attention_norm))
        for linear in (layer.q, layer.k, layer.v, layer.o):
            layers += [leaf(linear.weight), leaf(linear.bias)]
        layers.append(leaf(layer.mlp_norm))
        if isinstance(layer, ExpertLayer):
            layers.append(leaf(layer.router.weight))
            layers += [leaf(weight) for part in (layer.shared, *layer.experts) for weight in part.matrices()]
        else:
            for linear in (layer.gate, layer.up, layer.down):
                layers += [leaf(linear.weight), leaf(linear.bias)]
    inputs += [np.array(manners, np.int32), *layers]
    numbers = (
        *table.pages.shape, page, config.vocab_size, dim, config.heads, config.kv_heads, D, config.hidden_dim,
        config.layers, config.interleaved_rope, hidden, *sparse,
    )  # fmt: skip
    # Beside packed weights the activations are rounded to 8 bits, layer by layer.
    tolerance = 1e-1 if block > 1 else 2e-5 if kv_type in ("", "fp32") else 2e-3
    return Case("forward", numbers, tolerance, (*inputs, *before), (want,), max(tolerance, 5e-2))


def cases() -> Iterator[Case]:
    """Every case, small ones of an op first."""
    for op in (
        embedding, rms_norm, linear, linear_packed, rope, write_kv, attention, swiglu, argmax, top_k, shortlist, above,
        allowed, encode, probe, route, experts, forward, mixtures,
    ):  # fmt: skip
        yield from op()


def _write_array(file: BinaryIO, array: Any) -> None:
    data = array.data if isinstance(array, Anywhere) else words(array)
    file.write(kind_of(array).encode().ljust(8, b"\0"))
    file.write(struct.pack("<2q", isinstance(array, Anywhere), data.nbytes))
    file.write(np.ascontiguousarray(data).tobytes())


def write(path: Path) -> int:
    """Write all cases; returns their number."""
    count = 0
    with path.open("wb") as file:
        file.write(b"PUNACASE")
        for case in cases():
            file.write(case.op.encode().ljust(16, b"\0"))
            bf16 = case.tolerance if case.tolerance_bf16 is None else case.tolerance_bf16
            file.write(struct.pack(f"<q{len(case.numbers)}q", len(case.numbers), *case.numbers))
            file.write(struct.pack("<2d", case.tolerance, bf16))
            for arrays in (case.inputs, case.wanted):
                file.write(struct.pack("<q", len(arrays)))
                for array in arrays:
                    _write_array(file, array)
            count += 1
    return count


if __name__ == "__main__":
    ops.select("reference")
    print(f"{write(Path(sys.argv[1]))} cases")
