"""What the tests of the C++ ops share: `isa`, which runs a test once for each instruction set of this machine.

What is surprising: a table is chosen by its place, because AVX-512 is there twice, without and with the bfloat16
product. The fastest serves again after each test, so that none depends on the order of the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    from puna.kernels import cpu
except ImportError:  # its tests skip themselves, saying so
    TABLES = []
else:
    TABLES = [(index, reason) for index, (_, runs, reason) in enumerate(cpu._cpu.tables()) if runs]


@pytest.fixture(params=TABLES, ids=[reason.removeprefix("cpuid: ") for _, reason in TABLES])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set serves this test; what it needs of the processor."""
    index, reason = request.param
    cpu._cpu.use(index)
    yield reason
    cpu.use()
