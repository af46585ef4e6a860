"""The ops a model is written in, and which implementation serves each one, and why.

What it is: the signatures. An op goes by where its arrays live: NumPy arrays to our C++ (or to the NumPy reference
where the extension is absent or was not asked for), torch tensors to torch.
What it is not: arithmetic. Each op is defined in `reference.py`; read that for shapes and formulas.
What is surprising: the table holds for the whole process. It is settled on first use or by `select()`, and stays until
another `select()`; nothing is probed between two tokens. `table()` gives what was chosen, with the reason
(`puna doctor` shows it).
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from puna.errors import DeviceError, UsageError
from puna.kernels import host, reference
from puna.kernels.layouts import Adapted, Mapped, PageTable, Weight
from puna.settings import cpu_wanted
from puna.types import KERNELS

Array = Any
"""A numpy.ndarray or a torch.Tensor; every op takes and gives one kind."""

NAMES = (
    "embedding", "rms_norm", "linear", "positions", "rope_table", "rope", "write_kv", "attention", "temperature",
    "swiglu", "route", "experts", "argmax", "top_k", "shortlist", "above", "allowed", "encode",
    "layer_norm", "gelu", "attend", "gated", "concat", "pad",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One row of the table: the op, what serves it on the host, and why that one."""

    op: str
    implementation: str
    reason: str


class _Host:
    """The settled table for NumPy arrays: one attribute an op."""

    embedding: Any
    rms_norm: Any
    linear: Any
    positions: Any
    rope_table: Any
    rope: Any
    write_kv: Any
    attention: Any
    temperature: Any
    swiglu: Any
    route: Any
    experts: Any
    argmax: Any
    top_k: Any
    shortlist: Any
    above: Any
    allowed: Any
    encode: Any
    layer_norm: Any
    gelu: Any
    attend: Any
    gated: Any
    concat: Any
    pad: Any

    def __init__(self, kernels: str, asked: str, invariant: bool) -> None:
        self.kernels = kernels
        self.asked = asked
        self.invariant = invariant
        self.choices: list[Choice] = []
        self.threads: int | None = None
        native, why_not = None, ""
        if kernels != "reference":
            try:
                from puna.kernels import cpu as native_module

                native = native_module
            except ImportError as error:
                why_not = f"slower: the C++ extension is not built here ({error})"
                if kernels != "auto":
                    raise DeviceError(
                        f"{asked} needs the C++ extension, which is not built here ({error}).",
                        remedy="Install Puna with `pip install .` and a C++ compiler, or use --kernels reference.",
                    ) from error
        if native is None and invariant:
            raise DeviceError(
                f"NumPy's products depend on how many rows share one ({why_not or f'asked for by {asked}'}).",
                remedy="Leave out `invariant`, or use the C++ kernels.",
            )
        if native is not None:
            isa, reason = native.use(None if kernels == "auto" else kernels, asked)
            native.set_invariant(invariant)
            if kernels != "auto":
                reason = f"asked for by {asked}; {reason}"
            self.threads = native.threads()
            native.keep_freed_memory()
        for op in NAMES:
            fast = getattr(native, op, None) if native is not None else None
            quick = getattr(host, op, None) if kernels != "reference" else None
            if fast is not None:
                choice = Choice(op, f"C++ {isa}", reason)
            elif quick is not None:
                choice = Choice(op, "NumPy", "there is no C++ of it; faster than the reference")
            elif native is not None:
                choice = Choice(op, "NumPy reference", "cheap: NumPy is as fast as C++ here")
            else:
                choice = Choice(op, "NumPy reference", why_not or f"asked for by {asked}")
            if op == "attend" and native is not None and invariant:
                fast, choice = native.attend_alone, Choice(op, f"C++ {isa}", "asked for: invariant")
            setattr(self, op, fast or quick or getattr(reference, op))
            self.choices.append(choice)
        self.prepare = native.prepare if native is not None else _as_it_is
        self.prepare_mapped = native.prepare_mapped if native is not None else list


def _as_it_is(weight: Weight, keep: bool = False) -> Weight:
    return weight


_host: _Host | None = None


def select(kernels: str = "auto", invariant: bool = False) -> None:
    """Settle which implementation serves NumPy arrays; call it once, at start. `kernels` is one of KERNELS.

    `auto` is what the environment variable PUNA_CPU names, else the fastest. With `invariant` a token's bits depend on
    nothing but its own sequence's tokens: not on the batch, the cuts of a prompt, or what was in the cache already.
    Raises UsageError for another name and DeviceError when that implementation cannot run on this machine, or is not
    invariant.
    """
    global _host
    asked = f"--kernels {kernels}"
    if kernels == "auto" and (kernels := cpu_wanted()) != "auto":
        asked = f"PUNA_CPU={kernels}"
    if kernels not in KERNELS:
        raise UsageError(f"{asked}: no such kernels.", remedy=f"One of: {', '.join(KERNELS)}.")
    if _host is None or (_host.kernels, _host.asked, _host.invariant) != (kernels, asked, invariant):
        _host = _Host(kernels, asked, invariant)


def table() -> list[Choice]:
    """What serves each op on NumPy arrays, and why."""
    return _settled().choices


def summary() -> str:
    """The table in a few words, for a record of a run: `C++ avx512`, or `NumPy reference`."""
    return next(choice.implementation for choice in table() if choice.op == "linear")


def threads() -> int | None:
    """How many threads the C++ uses; None where NumPy serves, which has its own rule."""
    return _settled().threads


def machine() -> str:
    """The processor's architecture as the platform names it (`x86_64`, `aarch64`)."""
    return platform.machine()


def _settled() -> _Host:
    if _host is None:
        select()
    assert _host is not None
    return _host


def _serving(x: Array) -> Any:
    if isinstance(x, np.ndarray):
        return _host or _settled()
    from puna.kernels import torch_ops  # found in sys.modules after the first time

    return torch_ops


def prepare(weight: Weight, keep: bool = False) -> Weight:
    """A matrix on the host as the settled table holds it best; what needs no change is returned itself.

    C++ regroups packed types (`Packed` to `Panels`) in new memory, so the caller can let go of the original. `keep`
    leaves them where they are, for a file that fits memory once only; products are then slower. A type for which there
    is no kernel becomes panels even so. The reference leaves everything as it is.
    """
    prepared: Weight = _settled().prepare(weight, keep)
    return prepared


def prepare_mapped(weights: Sequence[Mapped]) -> list[Weight]:
    """`prepare` for many matrices that are views of mapped files.

    C++ gives the files' pages back as it reads them, so memory never holds a matrix twice, and other threads of Python
    run all the while.
    """
    prepared: list[Weight] = _settled().prepare_mapped(weights)
    return prepared


def embedding(table: Any, ids: Array) -> Array:
    """Rows of `table` [V, dim] for `ids` [*] → [*, dim]."""
    return _serving(ids).embedding(table, ids)


def rms_norm(x: Array, weight: Any, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; None for a weight is ones."""
    return _serving(x).rms_norm(x, weight, eps)


def linear(x: Array, weight: Any, bias: Any = None) -> Array:
    """x [*, in] · weight [out, in]ᵀ + bias [out] → [*, out]; with adapters, what they add to their rows of x."""
    if not isinstance(weight, Adapted):
        return _serving(x).linear(x, weight, bias)
    y = linear(x, weight.base, bias)
    for rows, down, up in weight.parts:
        y[rows] += linear(linear(x[rows], down), up)
    return y


def positions(ids: Array) -> Array:
    """The positions of ids [B, T] whose rows are whole stretches: 0 to T - 1 in each, int32 [B, T]."""
    return _serving(ids).positions(ids)


def rope_table(positions: Array, inv_freq: Any) -> tuple[Array, Array]:
    """cos and sin of position · inv_freq: [*, T] and [D/2] → two of [*, T, D/2]."""
    tables: tuple[Array, Array] = _serving(positions).rope_table(positions, inv_freq)
    return tables


def rope(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotate pairs of x [*, T, H, D]: neighbours when `interleaved`, else halves."""
    return _serving(x).rope(x, cos, sin, interleaved)


def write_kv(cache_k: Array, cache_v: Array, k: Array, v: Array, table: PageTable) -> None:
    """Store k, v [N, G, D] in the caches [pages, page, G, D] where `table` says, in place."""
    _serving(k).write_kv(cache_k, cache_v, k, v, table)


def attention(q: Array, k: Array, v: Array, table: PageTable | None, bf16: bool = False, chunk: int = 0) -> Array:
    """Causal grouped attention of q [N, H, D] over caches k and v [pages, page, G, D] → [N, H, D].

    Without a table q [B, T, H, D], k and v [B, T, G, D] are whole stretches from position 0 → [B, T, H, D]. `bf16`
    allows an implementation to round what it multiplies to bfloat16. With a `chunk`, a token at position p sees nothing
    before p // chunk · chunk.
    """
    return _serving(q).attention(q, k, v, table, bf16, chunk)


def temperature(q: Array, positions: Array, floor: int, scale: float) -> Array:
    """q [*, T, H, D] times 1 + scale · log(1 + ⌊(p + 1) / floor⌋) for its positions p [*, T]."""
    return _serving(q).temperature(q, positions, floor, scale)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) · up."""
    return _serving(gate).swiglu(gate, up)


def route(logits: Array, k: int) -> tuple[Array, Array]:
    """The experts of each token, the k of the largest logits [*, E], and sigmoid of those: two of [*, k]."""
    chosen: tuple[Array, Array] = _serving(logits).route(logits, k)
    return chosen


def experts(
    x: Array,
    chosen: Array,
    scores: Array,
    part: Callable[[int], tuple[Any, Any, Any]],
    shared: tuple[Any, Any, Any],
) -> Array:
    """SwiGLU of x, and the sum over a token's experts of SwiGLU of score · x: x [*, dim], chosen and scores [*, k].

    `part` gives the gate, up and down of an expert, and is asked for those that were chosen: no other is touched.
    `shared` are those that every token passes.
    """
    return _serving(x).experts(x, chosen, scores, part, shared)


def argmax(logits: Array) -> Array:
    """The id of the largest logit: [*, V] → int32 [*]."""
    return _serving(logits).argmax(logits)


def top_k(logits: Array, k: int) -> tuple[Array, Array]:
    """The ids and values of the k largest logits, equals by their lower id: [*, V] → two of [*, k]."""
    largest: tuple[Array, Array] = _serving(logits).top_k(logits, k)
    return largest


def shortlist(rows: Sequence[Array], scales: Array, k: int) -> tuple[Array, Array, Array]:
    """Of R rows of logits [V]: ids and values [R, k] as of `top_k`, and the sums of exp((x − max) · scale) over parts
    of the row, [R, parts], with a scale [R] for each row. For NumPy arrays; see the reference."""
    found: tuple[Array, Array, Array] = _serving(scales).shortlist(rows, scales, k)
    return found


def above(rows: Sequence[Array], scales: Array, tops: Array, bounds: Array) -> Array:
    """The sums of `shortlist` [R, parts] of only the logits above a bound [R]; tops [R] are the rows' maxima.

    For NumPy arrays; see the reference.
    """
    return _serving(scales).above(rows, scales, tops, bounds)


def allowed(rows: Sequence[Array], masks: Sequence[Array]) -> Array:
    """Copies [R, V] of R rows of logits [V], minus infinity where the mask uint32 [ceil(V / 32)] has a bit 0.

    For NumPy arrays; see the reference.
    """
    return _serving(rows[0]).allowed(rows, masks)


def encode(kind: str, values: Array) -> Array:
    """float32 values [*, n · block] as blocks of a GGML type: uint8 [*, n · size]; errors as `encode.quantize`."""
    return _serving(values).encode(kind, values)


def layer_norm(x: Array, weight: Any, bias: Any, eps: float) -> Array:
    """(x − mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimension."""
    return _serving(x).layer_norm(x, weight, bias, eps)


def gelu(x: Array) -> Array:
    """x · (1 + erf(x / √2)) / 2."""
    return _serving(x).gelu(x)


def attend(q: Array, k: Array, v: Array) -> Array:
    """Attention of q [*, Tq, H, D] over all of k and v [*, Tk, G, D] → [*, Tq, H, D]: nothing is hidden from anyone."""
    return _serving(q).attend(q, k, v)


def gated(x: Array, gate: Any) -> Array:
    """x · tanh(gate), gate [1]."""
    return _serving(x).gated(x, gate)


def concat(parts: Sequence[Any], axis: int = -2) -> Array:
    """Rows after one another: parts [*, T, dim], a vector [dim] of weights being a row, → [*, sum of T, dim].

    The leading dimensions broadcast. At least one part is an array, not a weight. With `axis` -1 columns, of arrays.
    """
    array = next((part for part in parts if isinstance(part, np.ndarray)), parts[0])
    return _serving(array).concat(parts, axis)


def pad(x: Array, rows: int) -> Array:
    """x [*, T, dim] with rows of zeros after it: [*, rows, dim]."""
    return _serving(x).pad(x, rows)
