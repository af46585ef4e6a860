"""Arguments that fit no op, given to `puna.kernels._cpu` itself: TypeError or ValueError, never a crash.

What it is: a program that draws calls which fit, spoils some of their arguments, and makes them. It runs in a child
process, so that a crash is a failure of the test that started it.
What is surprising: arrays end where an unreadable page begins, so that an op which reads or writes past one dies there.
A spoiled call may still fit, and then must only come back. Whether results are right is asked elsewhere.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import puna
from puna.kernels.layouts import page_table

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
SOURCE = Path(puna.__file__).resolve().parents[1]
Array = npt.NDArray[Any]

CALLS = 2000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect by its Linux name")
def test_what_does_not_fit_is_refused_before_memory_is_touched(tmp_path: Path) -> None:
    last = tmp_path / "last"
    done = subprocess.run(
        [sys.executable, __file__, last],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    call = last.read_bytes().rstrip(b"\0").decode() if last.exists() else "none"
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nThe last call: {call}"
    served, refused = map(int, done.stdout.split()[-2:])
    assert served > CALLS // 20
    assert refused > CALLS // 4


# ---- the program ----

_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory that ends where an unreadable page begins; it stays until the process ends, unless it is reused."""

    def __init__(self, size: int) -> None:
        self._size = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, self._size + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if _libc.mprotect(ctypes.c_void_p(address + self._size), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def copy(self, array: Array) -> Array:
        """The array, moved to the end of this memory."""
        placed = np.ndarray(array.shape, array.dtype, self._map, self._size - array.nbytes)
        placed[...] = array
        return placed


class Arena:
    """Guarded memory for the arrays of one call, used again by the next."""

    def __init__(self) -> None:
        self._free: dict[int, list[Guarded]] = {}
        self._used: list[tuple[int, Guarded]] = []

    def place(self, array: Array) -> Array:
        if array.dtype.hasobject:  # which no foreign memory may hold
            return array.copy()
        pages = -(-max(array.nbytes, 1) // mmap.PAGESIZE)
        free = self._free.setdefault(pages, [])
        memory = free.pop() if free else Guarded(array.nbytes)
        self._used.append((pages, memory))
        return memory.copy(array)

    def reset(self) -> None:
        for pages, memory in self._used:
            self._free[pages].append(memory)
        self._used.clear()


def floats(*shape: int) -> Array:
    return np.random.default_rng(list(shape)).standard_normal(shape, dtype=np.float32)


def integers(*values: int) -> Array:
    return np.array(values, np.int32)


TYPES = cpu._cpu.packed_types()
Q8_0 = np.zeros((7, 2 * 34), np.uint8)
"""A packed matrix [7, 64]."""


def places() -> tuple[Array, Array, Array]:
    """Two sequences of 3 and 2 tokens in a cache of 5 pages."""
    table = page_table([14, 30], [3, 2], [[4, 1], [0, 3]])
    return table.positions, table.starts, table.pages


def caches(kind: int) -> Array:
    width = {0: np.float32, 1: np.float16, 2: np.uint16, TYPES["Q8_0"]: np.uint8}[kind]
    return np.zeros((5, 16, 2, 34 if width == np.uint8 else 32), width)


def leaf(*shape: int) -> tuple[Array, int, int, int]:
    return floats(*shape), 0, shape[0], shape[1] if len(shape) > 1 else 1


def one_gated(dim: int, hidden: int) -> Any:
    return leaf(hidden, dim), leaf(hidden, dim), leaf(dim, hidden)


def layer() -> list[Any]:
    parts: list[Any] = [leaf(12)]
    for rows, columns in ((64, 12), (32, 12), (32, 12), (12, 64)):
        parts += [leaf(rows, columns), leaf(rows)]
    parts.append(leaf(12))
    for rows, columns in ((20, 12), (20, 12), (12, 20)):
        parts += [leaf(rows, columns), None]
    return parts


def new_decoder(*arguments: Any) -> Any:
    return cpu._cpu.Decoder(*arguments)


def mixture() -> list[Any]:
    return [*layer()[:10], leaf(3, 12), *(matrix for _ in range(4) for matrix in one_gated(12, 20))]


DENSE = (0, 0, True, False, False)
WHOLE = (2, 1, 32, 1e-5, False, leaf(9, 12), [layer(), layer()], [DENSE, DENSE], 0, leaf(12), None)
MIXED = (
    2, 1, 32, 1e-5, False, leaf(9, 12), [mixture(), layer()], [(3, 16, True, True, False), (0, 0, False, False, True)],
    2, leaf(12), None,
)  # fmt: skip


def run(*arguments: Any) -> None:
    DECODER.run(*arguments)


def run_mixed(*arguments: Any) -> None:
    MIXTURE.run(*arguments)


DECODER, MIXTURE = new_decoder(*WHOLE), new_decoder(*MIXED)


def one_group(kind: int) -> Array:
    return np.ascontiguousarray(caches(kind)[:, :, :1])


def calls() -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every function of the module with arguments that fit, in several ways where it has several."""
    m, out = cpu._cpu, floats
    all_calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (m.embedding, (floats(7, 5), 0, 7, 5, integers(6, 0, 3), out(3, 5))),
        (m.embedding, (Q8_0, TYPES["Q8_0"], 7, 64, integers(6, 0, 3), out(3, 64))),
        (m.rms_norm, (floats(3, 5), floats(5), False, 1e-5, out(3, 5))),
        (m.linear, (floats(3, 5), floats(7, 5), 0, 7, 5, floats(7), False, out(3, 7))),
        (m.linear, (floats(20, 5), floats(7, 5).astype(np.float16), 0, 7, 5, None, False, out(20, 7))),
        (m.linear, (floats(3, 64), Q8_0, TYPES["Q8_0"], 7, 64, None, False, out(3, 7))),
        (m.rope, (floats(3, 2, 8), floats(3, 4), floats(3, 4), True, out(3, 2, 8))),
        (m.swiglu, (floats(3, 5), floats(3, 5), out(3, 5))),
        (m.argmax, (floats(3, 50), integers(0, 0, 0))),
        (m.encode, (TYPES["Q4_0"], floats(2, 64), np.zeros((2, 36), np.uint8))),
        (m.encode, (TYPES["Q6_K"], floats(2, 256), np.zeros((2, 210), np.uint8))),
        (m.top_k, (floats(3, 50), np.zeros((3, 4), np.int32), out(3, 4))),
        (m.shortlist, ([floats(600), floats(600)], floats(2) ** 2, np.zeros((2, 4), np.int32), out(2, 4), out(2, 2))),
        (m.above, ([floats(600), floats(600)], floats(2) ** 2, floats(2), floats(2), out(2, 2))),
        (m.allowed, ([floats(50), floats(50)], [np.zeros(2, np.uint32), np.zeros(2, np.uint32)], out(2, 50))),
        (m.regroup, (Q8_0, TYPES["Q8_0"], 7, 64)),
        (m.probe_read, (floats(100),)),
        (
            m.attention,
            (floats(2, 5, 4, 8), floats(2, 5, 2, 8), floats(2, 5, 2, 8), 0, None, False, 16, out(2, 5, 4, 8)),
        ),
        (m.route, (floats(3, 8), np.zeros((3, 2), np.int32), out(3, 2))),
        (
            m.experts,
            (
                floats(3, 8), integers(0, 2, 2).reshape(3, 1), floats(3, 1), [0, 2],
                [one_gated(8, 5), one_gated(8, 6)], one_gated(8, 7), out(3, 8),
            ),
        ),
        (new_decoder, WHOLE),
        (new_decoder, MIXED),
        (
            run,
            (
                integers(1, 2, 3), None, None, None, floats(3, 16), floats(3, 16), [], [], 0, integers(0, 2), False,
                out(2, 9),
            ),
        ),
    ]  # fmt: skip
    for kind in (0, 1, 2, TYPES["Q8_0"]):
        k, q, cache = floats(5, 2, 32), floats(5, 4, 32), caches(kind)
        all_calls += [
            (m.write_kv, (cache, cache.copy(), kind, k, k, places())),
            (m.attention, (q, cache, cache, kind, places(), False, 0, out(5, 4, 32))),
            (m.attention, (q, cache, cache, kind, places(), False, 16, out(5, 4, 32))),
            (
                run,
                (
                    integers(1, 2, 3, 8, 0), places(), None, None, floats(40, 16), floats(40, 16),
                    [one_group(kind), one_group(kind)], [one_group(kind), one_group(kind)], kind, integers(1, 4), True,
                    out(2, 12),
                ),
            ),
            (
                run_mixed,
                (
                    integers(1, 2, 3, 8, 0), places(), places(), floats(5), floats(40, 16), floats(40, 16),
                    [one_group(kind), one_group(kind)], [one_group(kind), one_group(kind)], kind, integers(1, 4), True,
                    out(2, 12),
                ),
            ),
        ]  # fmt: skip
    return all_calls


NUMBERS = (-1, 0, 1, 2, 3, 64, 66, 127, 255, 2**31 - 1, 2**31, -(2**31) - 1, 2**60, 2**63 - 1, 2**63, -(2**63))
WORDS = (-(2**31), -1, 0, 1, 4, 5, 16, 17, 32, 2**31 - 16, 2**31 - 1)
DTYPES = (
    "float64",
    "float16",
    "int64",
    "uint32",
    "int32",
    "uint16",
    "uint8",
    "bool",
    "complex64",
    ">f4",
    ">i4",
    "S4",
    "O",
)


def spoiled(data: st.DataObject, value: Any, place: Callable[[Array], Array]) -> Any:
    """Something else in the place of an argument, which may fit by chance."""
    draw = data.draw
    if isinstance(value, list | tuple) and value:
        copy, how = list(value), draw(st.sampled_from(("one", "one", "one", "shorter", "longer")))
        if how == "one":
            at = draw(st.integers(0, len(copy) - 1))
            copy[at] = spoiled(data, copy[at], place)
        elif how == "shorter":
            del copy[draw(st.integers(0, len(copy) - 1))]
        else:
            copy.append(copy[-1])
        return tuple(copy) if isinstance(value, tuple) else copy
    if not isinstance(value, np.ndarray):
        return draw(st.sampled_from((*NUMBERS, None, True, 1.5, float("nan"), "x", [], (), place(floats(3)))))
    hows = [
        "type",
        "shape",
        "shape",
        "shape",
        "less",
        "strides",
        "unaligned",
        "read-only",
        "whole",
        "nothing",
        "transposed",
        "scalar",
    ]
    how = draw(st.sampled_from(hows + ["numbers"] * (6 if value.dtype == np.int32 else 1)))
    if how == "numbers":
        copy = value.copy()
        if copy.size:
            at = draw(st.integers(0, copy.size - 1))
            word = draw(st.sampled_from(WORDS))
            with np.errstate(all="ignore"):
                copy.flat[at] = np.array(word).astype(copy.dtype) if copy.dtype.kind in "iu" else 0
        return place(copy)
    if how == "type":
        return place(np.zeros(value.shape, draw(st.sampled_from(DTYPES))))
    if how == "shape":
        shape = list(value.shape)
        shape.insert(draw(st.sampled_from((0, len(shape)))), draw(st.sampled_from((0, 1, 2))))
        return place(np.resize(value, shape) if value.size else np.zeros(shape, value.dtype))
    if how == "less" and value.ndim:
        axis, size = draw(st.integers(0, value.ndim - 1)), draw(st.integers(0, 2))
        shape = list(value.shape)
        shape[axis] = size if draw(st.booleans()) else shape[axis] + size
        return place(np.resize(value, shape) if value.size else np.zeros(shape, value.dtype))
    if how == "strides" and value.ndim:
        return place(np.repeat(value, 2, axis=-1))[..., :: draw(st.sampled_from((2, -2)))]
    if how == "unaligned":
        raw = place(np.zeros(value.nbytes + 1, np.uint8))[: value.nbytes]
        return raw.view(value.dtype).reshape(value.shape) if value.nbytes else value
    if how == "read-only":
        copy = place(value)
        copy.flags.writeable = False
        return copy
    if how == "whole":
        return np.broadcast_to(place(np.zeros((), value.dtype)), value.shape)
    if how == "nothing":
        return draw(st.sampled_from((None, 0, [], value.tolist())))
    if how == "transposed":
        return place(value).T
    return value.reshape(-1)[:1].reshape(()) if value.size else value


def placed(value: Any, place: Callable[[Array], Array]) -> Any:
    """The same arguments with their arrays in guarded memory."""
    if isinstance(value, list | tuple):
        return type(value)(placed(item, place) for item in value)
    return place(value) if isinstance(value, np.ndarray) else value


def described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        numbers = f" {value.tolist()}" if value.dtype == np.int32 and value.size < 20 else ""
        return f"{value.dtype}{list(value.shape)} by {list(value.strides)}{numbers}"
    return f"[{', '.join(map(described, value))}]" if isinstance(value, list | tuple) else repr(value)


def main(last: Path) -> None:
    every, arena, came = calls(), Arena(), Counter[str]()
    tables = [index for index, (_, runs, _) in enumerate(cpu._cpu.tables()) if runs]
    for op, arguments in every:  # unspoiled they fit
        op(*placed(arguments, arena.place))
        arena.reset()
    with last.open("wb") as file:

        @settings(
            max_examples=CALLS,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def call(data: st.DataObject) -> None:
            arena.reset()
            op, arguments = data.draw(st.sampled_from(every))
            spoil = [placed(argument, arena.place) for argument in arguments]
            for _ in range(data.draw(st.integers(1, 2))):
                at = data.draw(st.integers(0, len(spoil) - 1))
                spoil[at] = spoiled(data, spoil[at], arena.place)
            table = data.draw(st.sampled_from(tables))
            text = f"{op.__name__} on table {table}: {described(spoil)}".encode()[:8000]
            os.pwrite(file.fileno(), text.ljust(8000, b"\0"), 0)
            cpu._cpu.use(table)
            try:
                op(*spoil)
            except (TypeError, ValueError):
                came["refused"] += 1
            else:
                came["served"] += 1

        call()
    print(came["served"], came["refused"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
