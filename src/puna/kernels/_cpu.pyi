"""What cpu/module.cpp, packing.cpp and decoder.cpp offer; everyone but puna.kernels.cpu uses that package instead.

Every op checks its arrays and raises TypeError or ValueError before it touches memory; the results are written to the
last argument. A vector of weights comes as its array and whether its words are bfloat16; a matrix as its array, its
type (0: float32 or float16, as the array says; 2: bfloat16; else one of `packed_types`), rows and columns; a KV cache
as its array and `kind`, a type too (1: float16).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
_Table = tuple[_Array, _Array, _Array]
"""puna.kernels.layouts.PageTable: positions, starts, pages."""
_Matrix = tuple[_Array, int, int, int]
_Gated = tuple[_Matrix, _Matrix, _Matrix]
"""gate, up and down."""

def tables() -> list[tuple[str, bool, str]]:
    """The instruction sets of this build, fastest first: name, whether this machine runs it, in words."""

def use(index: int) -> None:
    """Settle which of `tables()` serves."""

def keep_freed_memory() -> bool: ...
def set_threads(threads: int) -> None: ...
def threads() -> int: ...
def set_invariant(invariant: bool) -> None: ...

PANELS: int
"""Added to a packed type: the weights are panels."""

def packed_types() -> dict[str, int]:
    """The types of packed weights, by name."""

def regroup(packed: _Array, type: int, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Blocks as in a file to panels, in new memory."""

def regroup_mapped(matrices: Sequence[tuple[_Array, int, int, int]]) -> list[npt.NDArray[np.uint8]]:
    """The same for many matrices that lie in mapped files: their pages are given back as they are read."""

def embedding(table: _Array, type: int, rows: int, columns: int, ids: _Array, out: _Array) -> None: ...
def rms_norm(x: _Array, weight: _Array, bf16: bool, eps: float, out: _Array) -> None: ...
def linear(
    x: _Array, weight: _Array, type: int, rows: int, columns: int, bias: _Array | None, bias_bf16: bool, out: _Array
) -> None: ...
def rope(x: _Array, cos: _Array, sin: _Array, interleaved: bool, out: _Array) -> None: ...
def write_kv(cache_k: _Array, cache_v: _Array, kind: int, k: _Array, v: _Array, table: _Table) -> None: ...
def attention(
    q: _Array, k: _Array, v: _Array, kind: int, table: _Table | None, bf16: bool, chunk: int, out: _Array
) -> None: ...
def route(logits: _Array, ids: _Array, scores: _Array) -> None: ...
def experts(
    x: _Array, chosen: _Array, scores: _Array, used: list[int], parts: list[_Gated], shared: _Gated, out: _Array
) -> None: ...
def swiglu(gate: _Array, up: _Array, out: _Array) -> None: ...
def argmax(logits: _Array, out: _Array) -> None: ...
def encode(kind: int, values: _Array, out: _Array) -> bool: ...
def top_k(logits: _Array, ids: _Array, values: _Array) -> None: ...
def shortlist(rows: Sequence[_Array], scales: _Array, ids: _Array, values: _Array, sums: _Array) -> None: ...
def above(rows: Sequence[_Array], scales: _Array, tops: _Array, bounds: _Array, sums: _Array) -> None: ...
def allowed(rows: Sequence[_Array], masks: Sequence[_Array], out: _Array) -> None: ...
def probe_read(data: _Array) -> None: ...
def probe_products(kind: str, pieces: int) -> int: ...

_Leaf = tuple[_Array, int, int, int]
_Manner = tuple[int, int, bool, bool, bool]
"""Of a layer: how many experts (0: dense), its chunk (0: none), rope, norm of queries and keys, temperature."""

class Decoder:
    """A whole forward; see puna.kernels.cpu.Decoder."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        interleaved: bool,
        embedding: _Leaf,
        layers: Sequence[Sequence[_Leaf | None]],
        manners: Sequence[_Manner],
        chosen: int,
        norm: _Leaf,
        head: _Leaf | None,
    ) -> None: ...
    def run(
        self,
        ids: _Array,
        table: _Table | None,
        near: _Table | None,
        temperatures: _Array | None,
        cos: _Array,
        sin: _Array,
        keys: Sequence[_Array],
        values: Sequence[_Array],
        kind: int,
        wanted: _Array,
        hidden: bool,
        out: _Array,
    ) -> None: ...
