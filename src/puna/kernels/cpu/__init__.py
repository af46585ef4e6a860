"""The ops in C++, for NumPy arrays: the thin Python side of the extension `puna.kernels._cpu`.

What it is: each function takes what its namesake in `puna.kernels.reference` takes, allocates the result and calls
C++, which checks every type, shape, stride, id and position before it touches memory. Which instruction set serves is
settled by `use()`; the threads of all ops are one pool.
What it is not: a place that converts. Activations and caches are C-contiguous float32, ids and positions int32; any
other type raises TypeError, any shape, stride, id or position that does not fit raises ValueError.
What is surprising: with AVX-512 BF16, `linear` on bfloat16 weights rounds its input rows to bfloat16 (sums stay
float32); every other instruction set keeps them in float32. `rope_table` is not here: NumPy's serves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import DeviceError
from puna.kernels import _cpu
from puna.kernels.layouts import BF16, Weight

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


def isas() -> list[str]:
    """The instruction sets this build has and this machine runs, fastest first."""
    return list(dict.fromkeys(name for name, runs, _ in _cpu.tables() if runs))


def use(isa: str | None = None) -> tuple[str, str]:
    """Settle the instruction set (None: the fastest) for all calls from now on; returns its name and the reason.

    Raises DeviceError where the build does not have it or the machine cannot run it.
    """
    tables = _cpu.tables()
    for index, (name, runs, reason) in enumerate(tables):
        if runs and isa in (None, name):
            _cpu.use(index)
            return name, reason
    built = any(name == isa for name, _, _ in tables)
    why = "this machine's processor does not have it" if built else "this build of Puna does not have it"
    raise DeviceError(f"--kernels {isa}: {why}.", remedy=f"One of: auto, reference, {', '.join(isas())}.")


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for later activations; True where it can (glibc).

    It holds for the whole process, which then stays as large as its largest prefill.
    """
    kept: bool = _cpu.keep_freed_memory()
    return kept


def set_threads(count: int) -> None:
    """How many threads the ops may use, the calling one included. Raises ValueError unless it lies in 1 to 1024."""
    _cpu.set_threads(count)


def threads() -> int:
    """How many threads the ops use: what was set, else what affinity and control group allow."""
    return _cpu.threads()


def _words(weight: Weight) -> tuple[npt.NDArray[Any], bool]:
    return (weight.bits, True) if isinstance(weight, BF16) else (weight, False)


def embedding(table: Weight, ids: I32) -> F32:
    """Rows of `table` [V, dim] for `ids` [*] → [*, dim]. Raises ValueError for an id outside the table."""
    words, bf16 = _words(table)
    out = np.empty((*ids.shape, *words.shape[1:]), np.float32)
    _cpu.embedding(words, bf16, ids, out)
    return out


def rms_norm(x: F32, weight: Weight, eps: float) -> F32:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension."""
    words, bf16 = _words(weight)
    out = np.empty(x.shape, np.float32)
    _cpu.rms_norm(x, words, bf16, eps, out)
    return out


def linear(x: F32, weight: Weight, bias: Weight | None = None) -> F32:
    """x [*, in] · weight [out, in]ᵀ + bias [out] → [*, out]."""
    words, bf16 = _words(weight)
    addend, addend_bf16 = (None, False) if bias is None else _words(bias)
    out = np.empty((*x.shape[:-1], words.shape[0]), np.float32)
    _cpu.linear(x, words, bf16, addend, addend_bf16, out)
    return out


def rope(x: F32, cos: F32, sin: F32, interleaved: bool) -> F32:
    """Rotate pairs of x [*, T, H, D] by cos and sin [*, T, D/2]: neighbours when `interleaved`, else halves."""
    out = np.empty(x.shape, np.float32)
    _cpu.rope(x, cos, sin, interleaved, out)
    return out


def write_kv(cache_k: F32, cache_v: F32, k: F32, v: F32, positions: I32) -> None:
    """Store k, v [B, T, G, D] in the caches [B, S, G, D] at `positions` [B, T], in place; -1 is not stored.

    Raises ValueError for a position below -1 or beyond the cache, before anything is stored.
    """
    _cpu.write_kv(cache_k, cache_v, k, v, positions)


def attention(q: F32, k: F32, v: F32, positions: I32 | None) -> F32:
    """Causal grouped attention: q [B, T, H, D], k and v [B, S, G, D] → [B, T, H, D].

    Raises ValueError for a position below -1 or beyond the cache.
    """
    out = np.empty(q.shape, np.float32)
    _cpu.attention(q, k, v, positions, out)
    return out


def swiglu(gate: F32, up: F32) -> F32:
    """silu(gate) · up."""
    out = np.empty(gate.shape, np.float32)
    _cpu.swiglu(gate, up, out)
    return out


def argmax(logits: F32) -> I32:
    """The id of the largest logit (the first of equals): [*, V] → int32 [*]."""
    out = np.empty(logits.shape[:-1], np.int32)
    _cpu.argmax(logits, out)
    return out


use()
