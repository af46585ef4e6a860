"""The ops in C++, for NumPy arrays: the thin Python side of the extension `puna.kernels._cpu`.

What it is: each function takes what its namesake in `puna.kernels.reference` takes, allocates the result and calls
C++, which checks every type, shape, stride, id and position before it touches memory. Which instruction set serves is
settled by `use()`; the threads of all ops are one pool.
What it is not: a place that converts. Activations are C-contiguous float32, ids and tables int32; any other type raises
TypeError, any shape, stride, id, position or page number that does not fit raises ValueError.
What is surprising: a page holds a multiple of 16 tokens. With AVX-512 BF16, `linear` on bfloat16 weights rounds its
input rows to bfloat16 (sums stay float32), and so does `attention` of more than 8 tokens of a sequence over a cache of
16 bits or less; every other instruction set keeps them in float32. `positions` and `rope_table` are not here: NumPy's
serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from puna.errors import DeviceError
from puna.kernels import _cpu, blocks, reference
from puna.kernels.blocks import TYPES
from puna.kernels.encode import KINDS, check, quantize, too_large
from puna.kernels.layouts import BF16, Cache, Mapped, Packed, PageTable, Panels, Weight, mapping
from puna.kernels.reference import SUM_PART, rope_table

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

PAGE_MULTIPLE = 16
"""Of which the tokens of a page and of a chunk are multiples (kernels.h: LEAST_PAGE)."""


def isas() -> list[str]:
    """The instruction sets this build has and this machine runs, fastest first."""
    return list(dict.fromkeys(name for name, runs, _ in _cpu.tables() if runs))


def use(isa: str | None = None, asked: str | None = None) -> tuple[str, str]:
    """Settle the instruction set (None: the fastest) for all calls from now on; returns its name and the reason.

    Raises DeviceError where the build does not have it or the machine cannot run it; `asked` is how the person asked
    for it (default: `--kernels ISA`).
    """
    tables = _cpu.tables()
    for index, (name, runs, reason) in enumerate(tables):
        if runs and isa in (None, name):
            _cpu.use(index)
            return name, reason
    built = any(name == isa for name, _, _ in tables)
    why = "this machine's processor does not have it" if built else "this build of Puna does not have it"
    raise DeviceError(f"{asked or f'--kernels {isa}'}: {why}.", remedy=f"One of: auto, reference, {', '.join(isas())}.")


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for later activations; True where it can (glibc).

    It holds for the whole process, which then stays as large as its largest prefill.
    """
    kept: bool = _cpu.keep_freed_memory()
    return kept


def set_threads(count: int) -> None:
    """How many threads the ops may use, the calling one included. Raises ValueError unless it lies in 1 to 1024."""
    _cpu.set_threads(count)


def set_invariant(invariant: bool) -> None:
    """Whether a token's bits depend on its own sequence's tokens only, not on how many of them share a call either.

    `linear` and `attention` then take any number of rows the way they take few: decode costs nothing more, a long
    prefill up to a fifth (docs/log.md). It holds for the whole process.
    """
    _cpu.set_invariant(invariant)


def threads() -> int:
    """How many threads the ops use: what was set, else what affinity and control group allow."""
    return _cpu.threads()


def _words(weight: Weight) -> tuple[npt.NDArray[Any], bool]:
    if isinstance(weight, (Packed, Panels)):
        raise TypeError(f"a vector must be float32, float16 or BF16, not {weight.kind}")
    return (weight.bits, True) if isinstance(weight, BF16) else (weight, False)


_TYPES: dict[str, int] = _cpu.packed_types()


def _matrix(weight: Weight, op: str) -> tuple[npt.NDArray[Any], int, int, int]:
    """What C++ takes for a matrix: its array, type, rows and columns."""
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weights of the shape {list(weight.shape)} are not a matrix")
    if isinstance(weight, (Packed, Panels)):
        kind = _TYPES.get(weight.kind)
        if kind is None:
            raise TypeError(f"no kernel reads {weight.kind} as it lies in a file; `prepare` it")
        rows, columns = weight.shape
        return weight.data, kind | _cpu.PANELS if isinstance(weight, Panels) else kind, rows, columns
    words, bf16 = _words(weight)
    rows, columns = words.shape
    return words, 2 if bf16 else 0, rows, columns


def prepare(weight: Weight, keep: bool = False) -> Weight:
    """The weight as `linear` reads it fastest: packed types become `Panels` in new memory, the rest is itself.

    `keep` takes no new memory where it can be helped: a packed matrix stays as it is, and `linear` regroups it in each
    call (same bits, slower). Types without a kernel of their own become panels of int8 with a scale for each 16 columns
    in either case, which is exact. Raises ValueError where a type without a kernel cannot be written so.
    """
    if not isinstance(weight, Packed) or (keep and weight.kind in _TYPES):
        return weight
    rows, columns = weight.shape
    kind, data = weight.kind, weight.data
    if kind not in _TYPES:
        kind, data = "I8", _int8_blocks(weight)
    return Panels(kind, (rows, columns), _cpu.regroup(data, _TYPES[kind], rows, columns))


def prepare_mapped(weights: Sequence[Mapped]) -> list[Weight]:
    """`prepare` for packed matrices that lie in mapped files, whose pages are given back as they are read.

    The panels share one piece of memory. Other threads run meanwhile. Raises TypeError for a type without a kernel of
    its own, and ValueError for other memory, of which what is given back would be gone.
    """
    for weight in weights:
        if mapping(weight) is None:
            raise ValueError(f"prepare_mapped: {weight.kind} {list(weight.shape)} is no view of a mapped file")
    regrouped = _cpu.regroup_mapped([_matrix(weight, "prepare_mapped") for weight in weights])
    return [
        Panels(weight.kind, (weight.shape[0], weight.shape[1]), data)
        for weight, data in zip(weights, regrouped, strict=True)
    ]


def _int8_blocks(weight: Packed) -> npt.NDArray[np.uint8]:
    """Blocks of I8 (see kernels.h): 32 columns as two float32 scales and 32 int8."""
    integers, scales = blocks.exact_int8(weight.kind, weight.data)
    out = np.empty((*weight.data.shape[:-1], weight.shape[-1] // 32, 40), np.uint8)
    out[..., :8] = scales.view(np.uint8).reshape(*out.shape[:-1], 8)
    out[..., 8:] = integers.view(np.uint8).reshape(*out.shape[:-1], 32)
    return out


_KINDS = {"float32": 0, "float16": 1, "uint16": 2, "uint8": _TYPES["Q8_0"]}
"""kernels.h's WeightType, by the type of the words."""


def _cache(cache: Cache) -> tuple[npt.NDArray[Any], int]:
    """A KV cache's words, and which WeightType they are."""
    if isinstance(cache, BF16):
        return cache.bits, _KINDS["uint16"]
    if isinstance(cache, Packed):
        if cache.kind != "Q8_0":
            raise TypeError(f"a KV cache is float32, float16, BF16 or Packed Q8_0, not {cache.kind}")
        return cache.data, _KINDS["uint8"]
    if cache.dtype.itemsize == 1 or cache.dtype.name == "uint16":  # words without their wrapper
        raise TypeError(f"a KV cache is float32, float16, BF16 or Packed Q8_0, not {cache.dtype}")
    return cache, _KINDS.get(cache.dtype.name, _KINDS["float32"])


def _caches(k: Cache, v: Cache) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
    keys, kind = _cache(k)
    values, other = _cache(v)
    if kind != other:
        raise TypeError("keys and values must be of one type")
    return keys, values, kind


def embedding(table: Weight, ids: I32) -> F32:
    """Rows of `table` [V, dim] for `ids` [*] → [*, dim]. Raises ValueError for an id outside the table."""
    words, kind, rows, dim = _matrix(table, "embedding")
    out = np.empty((*ids.shape, dim), np.float32)
    _cpu.embedding(words, kind, rows, dim, ids, out)
    return out


def rms_norm(x: F32, weight: Weight | None, eps: float) -> F32:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; without a weight its numbers are one."""
    words, bf16 = _words(np.ones(x.shape[-1], np.float32) if weight is None else weight)
    out = np.empty(x.shape, np.float32)
    _cpu.rms_norm(x, words, bf16, eps, out)
    return out


def linear(x: F32, weight: Weight, bias: Weight | None = None) -> F32:
    """x [*, in] · weight [out, in]ᵀ + bias [out] → [*, out]."""
    words, kind, rows, columns = _matrix(weight, "linear")
    addend, addend_bf16 = (None, False) if bias is None else _words(bias)
    out = np.empty((*x.shape[:-1], rows), np.float32)
    _cpu.linear(x, words, kind, rows, columns, addend, addend_bf16, out)
    return out


def rope(x: F32, cos: F32, sin: F32, interleaved: bool) -> F32:
    """Rotate pairs of x [*, T, H, D] by cos and sin [*, T, D/2]: neighbours when `interleaved`, else halves."""
    out = np.empty(x.shape, np.float32)
    _cpu.rope(x, cos, sin, interleaved, out)
    return out


def write_kv(cache_k: Cache, cache_v: Cache, k: F32, v: F32, table: PageTable) -> None:
    """Store k, v [N, G, D] in the caches [pages, page, G, D] where `table` says, in place.

    The caches' type says how numbers are rounded: see `puna.kernels.reference.to_cache`. Raises ValueError for a table
    that does not fit, before anything is stored. No two tokens may go to the same place.
    """
    keys, values, kind = _caches(cache_k, cache_v)
    _cpu.write_kv(keys, values, kind, k, v, table)


def attention(q: F32, k: Cache, v: Cache, table: PageTable | None, bf16: bool = False, chunk: int = 0) -> F32:
    """Causal attention of q [N, H, D] over caches [pages, page, G, D], or of whole stretches: see the reference.

    A token's result has the same bits alone and among up to 8 of its sequence, and again among any larger number;
    between the two it differs by rounding, unless `set_invariant` forbids it. Other sequences and the size of a page
    never matter. With `bf16` the second of them rounds queries, keys, values and the softmax's numerators to bfloat16,
    where the processor multiplies that faster and the cache is not float32. A chunk that is no multiple of 16, as no
    released model has, goes to the reference. Raises ValueError for a table that does not fit.
    """
    if chunk % PAGE_MULTIPLE:
        return reference.attention(q, k, v, table, bf16, chunk)
    keys, values, kind = _caches(k, v)
    out = np.empty(q.shape, np.float32)
    _cpu.attention(q, keys, values, kind, table, bf16, chunk, out)
    return out


def attend_alone(q: F32, k: F32, v: F32) -> F32:
    """The reference's `attend` of q [*, Tq, H, D] over k and v [*, Tk, G, D], a query's bits being its own.

    Each query is a sequence by itself that stands on the last key. For many queries NumPy's products are faster.
    """
    *lead, tokens, _, D = q.shape
    seen = k.shape[-3]
    out = np.empty(q.shape, np.float32)
    starts, place = np.arange(tokens + 1, dtype=np.int32), np.zeros((tokens, 1), np.int32)
    table = PageTable(np.full(tokens, seen - 1, np.int32), starts, place)
    for index in np.ndindex(*lead):
        page = np.zeros((2, 1, -(-seen // 16) * 16, k.shape[-2], D), np.float32)
        page[0, 0, :seen], page[1, 0, :seen] = k[index], v[index]
        out[index] = attention(np.ascontiguousarray(q[index]), page[0], page[1], table)
    return out


def swiglu(gate: F32, up: F32) -> F32:
    """silu(gate) · up."""
    out = np.empty(gate.shape, np.float32)
    _cpu.swiglu(gate, up, out)
    return out


def route(logits: F32, k: int) -> tuple[I32, F32]:
    """The experts of each token, and sigmoid of their logits; see the reference. Errors as `top_k`."""
    shape = (*logits.shape[:-1], max(k, 0))
    ids, scores = np.empty(shape, np.int32), np.empty(shape, np.float32)
    _cpu.route(logits, ids, scores)
    return ids, scores


def experts(
    x: F32,
    chosen: I32,
    scores: F32,
    part: Callable[[int], tuple[Weight, Weight, Weight]],
    shared: tuple[Weight, Weight, Weight],
) -> F32:
    """SwiGLU of x, and the sum over a token's experts of SwiGLU of score · x; see the reference.

    A row's bits depend on the others as in `linear`.
    """

    def three(matrices: tuple[Weight, Weight, Weight]) -> Any:
        return tuple(_matrix(weight, "experts") for weight in matrices)

    used = sorted(set(chosen.ravel().tolist()))
    rows, out = x.reshape(-1, x.shape[-1]), np.empty(x.shape, np.float32)
    slots = (len(rows), chosen.shape[-1])
    _cpu.experts(
        rows, chosen.reshape(slots), scores.reshape(slots), used, [three(part(e)) for e in used], three(shared),
        out.reshape(rows.shape),
    )  # fmt: skip
    return out


def argmax(logits: F32) -> I32:
    """The id of the largest logit (the first of equals): [*, V] → int32 [*]."""
    out = np.empty(logits.shape[:-1], np.int32)
    _cpu.argmax(logits, out)
    return out


def probe_read(data: F32) -> None:
    """Read all of `data` on all threads, and nothing else: whoever times it has the bandwidth of the memory."""
    _cpu.probe_read(data)


def probe_products(kind: str, pieces: int) -> int:
    """Multiply and add on all threads with the instruction for `kind` (fp32, bf16, int8); how many products that were.

    0 where the instruction set has no such instruction. A piece takes one thread a fraction of a millisecond. Raises
    ValueError for another kind.
    """
    products: int = _cpu.probe_products(kind, pieces)
    return products


def _leaf(weight: Weight) -> tuple[npt.NDArray[Any], int, int, int]:
    """`_matrix`, or the same for a vector: one column."""
    if len(weight.shape) == 2:
        return _matrix(weight, "Decoder")
    words, bf16 = _words(weight)
    return words, 2 if bf16 else 0, weight.shape[0], 1


class Manner(NamedTuple):
    """What a layer of a `Decoder` does: how many experts it has (0: none, it is dense), the chunk that it sees (0:
    everything), rope, a norm of queries and keys without weights, and longer queries by temperature."""

    experts: int = 0
    chunk: int = 0
    turned: bool = True
    normed: bool = False
    tempered: bool = False


class Decoder:
    """A whole forward of a decoder (`models/decoder.py`, the text of `models/llama4.py`) as one call, over the same
    weights.

    What it is: these ops in those files' order, so the same bits, without Python between them; the lock of the
    interpreter is released once a call. Two threads may call at once. Caches are the caller's. Of the last layer only
    rows that are wanted are computed, and those between them in a sequence.
    """

    def __init__(
        self,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        interleaved: bool,
        inv_freq: F32,
        embedding: Weight,
        layers: Sequence[Sequence[Weight | None]],
        norm: Weight,
        head: Weight | None,
        manners: Sequence[Manner] | None = None,
        experts_per_token: int = 0,
        temperature: tuple[int, float] | None = None,
    ) -> None:
        """A layer is its 16 leaves in the order of `models.tree.Layer`, a weight before its bias; None: no bias. That
        of a mixture has, after the norm of its feed-forward, the router, and gate, up and down of the shared one and of
        each expert. `manners` has one a layer; None: all are the dense decoder's. `temperature` is the floor and the
        scale of layers that are tempered.

        Raises TypeError for a weight of a type that no kernel reads, ValueError for a shape that does not fit.
        """
        self._decoder = _cpu.Decoder(
            heads, kv_heads, head_dim, eps, interleaved,
            _leaf(embedding),
            [[None if leaf is None else _leaf(leaf) for leaf in layer] for layer in layers],
            [Manner() for _ in layers] if manners is None else list(manners), experts_per_token,
            _leaf(norm),
            None if head is None else _leaf(head),
        )  # fmt: skip
        self._temperature = temperature
        self._vocabulary = embedding.shape[0]
        self._inv_freq = inv_freq
        self._dim = embedding.shape[1]
        self._rope = rope_table(np.arange(0, dtype=np.int32), inv_freq)

    def logits(
        self,
        tokens: I32,
        wanted: I32,
        table: PageTable | None = None,
        keys: Sequence[Cache] = (),
        values: Sequence[Cache] = (),
    ) -> F32:
        """Logits [M, V] of the rows `wanted` [M] (ascending) of tokens [N], which stand where `table` says.

        `keys` and `values` are a layer's cache [pages, page, G, D] each; the tokens' are written there. Without a table
        the tokens are one whole stretch. Raises TypeError or ValueError for arrays, ids, rows or a table that do not
        fit, before anything is written.
        """
        out = np.empty((len(wanted), self._vocabulary), np.float32)
        self._run(tokens, wanted, table, keys, values, out, hidden=False)
        return out

    def hidden(
        self,
        tokens: I32,
        wanted: I32,
        table: PageTable | None = None,
        keys: Sequence[Cache] = (),
        values: Sequence[Cache] = (),
    ) -> F32:
        """As `logits`, with hidden states after the last norm: [M, dim]."""
        out = np.empty((len(wanted), self._dim), np.float32)
        self._run(tokens, wanted, table, keys, values, out, hidden=True)
        return out

    def _run(
        self,
        tokens: I32,
        wanted: I32,
        table: PageTable | None,
        keys: Sequence[Cache],
        values: Sequence[Cache],
        out: F32,
        *,
        hidden: bool,
    ) -> None:
        caches = [_cache(cache) for cache in (*keys, *values)]
        kind = caches[0][1] if caches else 0
        if any(other != kind for _, other in caches):
            raise TypeError("keys and values must be of one type")
        words = [array for array, _ in caches]
        needed = len(tokens)
        if table is not None and words:  # what the pages hold bounds what a position may ask for
            needed = min(int(table.positions.max(initial=0)) + 1, table.pages.shape[-1] * words[0].shape[1])
        cos, sin = self._rope
        if len(cos) < needed:
            # Both are replaced at once: another thread may be about to read them.
            rows = np.arange(max(needed, 2 * len(cos), 256), dtype=np.int32)
            self._rope = cos, sin = rope_table(rows, self._inv_freq)
        near = None if table is None or table.local is None else PageTable(table.positions, table.starts, table.local)
        longer = None
        if self._temperature is not None:
            positions = np.arange(len(tokens), dtype=np.int32) if table is None else table.positions
            longer = reference.temperatures(positions, *self._temperature, np.float32)
        self._decoder.run(
            tokens, table, near, longer, cos, sin, words[: len(keys)], words[len(keys) :], kind, wanted, hidden, out
        )  # fmt: skip


def encode(kind: str, values: F32) -> U8:
    """float32 values [*, n · block] as blocks of a GGML type: uint8 [*, n · size]; errors as `encode.quantize`.

    The same bytes as its, on every instruction set. Types that are no blocks are left to NumPy.
    """
    if kind not in KINDS or TYPES[kind].block == 1:
        return quantize(kind, values)
    form = TYPES[kind]
    out = np.empty((*values.shape[:-1], form.row_bytes(values.shape[-1])), np.uint8)
    check(kind, values)
    if not _cpu.encode(_TYPES[kind], values, out):
        raise too_large(kind)
    return out


def top_k(logits: F32, k: int) -> tuple[I32, F32]:
    """The ids and values of the k largest logits, see the reference: [*, V] → two of [*, k].

    Raises ValueError unless 1 ≤ k ≤ V.
    """
    shape = (*logits.shape[:-1], k) if k >= 0 else (*logits.shape[:-1], 0)
    ids, values = np.empty(shape, np.int32), np.empty(shape, np.float32)
    _cpu.top_k(logits, ids, values)
    return ids, values


def shortlist(rows: Sequence[F32], scales: F32, k: int) -> tuple[I32, F32, F32]:
    """The k largest of each row and the sums of its exponentials, see the reference. Raises ValueError as `top_k`."""
    shape = (len(rows), max(k, 0))
    ids, values = np.empty(shape, np.int32), np.empty(shape, np.float32)
    parts = -(-rows[0].size // SUM_PART) if rows else 0
    sums = np.empty((len(rows), parts), np.float32)
    _cpu.shortlist(rows, scales, ids, values, sums)
    return ids, values, sums


def above(rows: Sequence[F32], scales: F32, tops: F32, bounds: F32) -> F32:
    """The sums of `shortlist` of only the logits above a bound, see the reference."""
    sums = np.empty((len(rows), -(-rows[0].size // SUM_PART) if rows else 0), np.float32)
    _cpu.above(rows, scales, tops, bounds, sums)
    return sums


def allowed(rows: Sequence[F32], masks: Sequence[npt.NDArray[np.uint32]]) -> F32:
    """Copies of the rows without what the masks do not allow, see the reference. Raises ValueError as it does."""
    out = np.empty((len(rows), rows[0].size if rows else 0), np.float32)
    _cpu.allowed(rows, masks, out)
    return out


use()
