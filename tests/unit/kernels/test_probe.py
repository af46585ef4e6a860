"""The probes of the machine's limits: how much work they say they did on each instruction set, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

LANES = {"scalar": 4, "neon": 4, "avx2": 8, "avx512": 16}


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    yield
    cpu.use()


@pytest.mark.parametrize("isa", cpu.isas())
def test_products_are_counted(isa: str) -> None:
    cpu.use(isa)
    one = cpu.probe_products("fp32", 1)
    assert one == (1 << 16) * 10 * LANES[isa]  # rounds, independent sums, lanes
    assert cpu.probe_products("fp32", 5) == 5 * one
    # The narrower kinds multiply two and four numbers a lane, where the instruction is there.
    assert cpu.probe_products("bf16", 1) in (0, 2 * one)
    assert cpu.probe_products("int8", 1) in (0, 4 * one)
    if isa in ("avx2", "avx512"):
        assert cpu.probe_products("int8", 1) == 4 * one


def test_what_is_no_kind_of_product_is_refused() -> None:
    with pytest.raises(ValueError, match="no kind fp8"):
        cpu.probe_products("fp8", 1)
    with pytest.raises(ValueError, match="pieces"):
        cpu.probe_products("fp32", 0)


@pytest.mark.parametrize("isa", cpu.isas())
def test_reading(isa: str) -> None:
    cpu.use(isa)
    for size in (0, 1, 1000, (1 << 20) + 7):  # floats: less than a piece, and several with an odd rest
        cpu.probe_read(np.ones(size, np.float32))
    with pytest.raises(TypeError, match="float32"):
        cpu.probe_read(np.ones(4, np.float64))
    with pytest.raises(ValueError, match="contiguous"):
        cpu.probe_read(np.ones(8, np.float32)[::2])
