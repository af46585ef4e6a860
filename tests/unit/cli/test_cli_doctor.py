"""`puna doctor`: facts of this machine, the table of operations, and the control group's limits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import puna as package
from puna.cli import doctor
from puna.engine import native_runner
from puna.kernels import ops

Puna = Callable[..., Any]


@pytest.fixture(autouse=True)
def settled() -> Any:
    """The choice of kernels is the process's: put it back."""
    before = ops._host
    yield
    ops._host = before


def test_the_report(puna: Puna, home: Path) -> None:
    found = puna("doctor", "--json").json()
    assert found["puna"] == package.__version__
    assert found["cpu"]["cores"] == os.cpu_count()
    assert [row["op"] for row in found["operations"]] == list(ops.NAMES)
    assert all(row["implementation"] and row["reason"] for row in found["operations"])
    assert found["kernels"] == ops.summary()
    assert found["folders"]["PUNA_HOME"]["path"] == str(home)
    assert found["folders"]["PUNA_HOME"]["exists"] is False
    assert found["folders"]["PUNA_HOME"]["free_bytes"] > 0
    assert found["packages"]["numpy"]
    assert found["device"]["name"] == "cpu"
    assert found["steps"]["implementation"] in (native_runner.NATIVE, native_runner.PLAIN)
    text = puna("doctor").out
    assert f"{found['steps']['implementation']}: {found['steps']['reason']}" in text
    for name in ("PUNA_HOME", "hub cache", "packages", *ops.NAMES):
        assert f"\n{name} " in text


def test_kernels_are_the_ones_asked_for(puna: Puna) -> None:
    found = puna("doctor", "--kernels", "reference", "--json").json()
    assert {row["implementation"] for row in found["operations"]} == {"NumPy reference"}
    assert {row["reason"] for row in found["operations"]} == {"asked for by --kernels reference"}
    assert found["cpu"]["threads"] is None
    assert found["steps"] == {"implementation": "an op at a time", "reason": "asked for by --kernels reference"}
    pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")
    assert puna("doctor", "--kernels", "scalar", "--json").json()["steps"]["implementation"] == "one native call"


def test_devices(puna: Puna) -> None:
    torch = pytest.importorskip("torch")
    assert (
        puna("doctor", "--device", "meta", "--json").json()["device"]["description"]
        == f"meta, torch {torch.__version__}"
    )
    said = puna("doctor", "--device", "toaster")
    assert (said.code, said.out) == (2, "")
    assert "--device toaster" in said.err


def test_torch_is_not_imported(program: Callable[..., Any]) -> None:
    code = "import sys; from puna.cli.main import main; main(['doctor']); assert 'torch' not in sys.modules"
    assert program("-c", code).returncode == 0


def test_limits_of_control_groups(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    membership = "1:name=systemd:/x\n0::/outer/inner\n"
    assert doctor.cgroup_limit("cpu.max", membership, tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.cgroup_limit("cpu.max", membership, tmp_path) is None
    (tmp_path / "outer" / "cpu.max").write_text("150000 100000\n")
    assert doctor.cgroup_limit("cpu.max", membership, tmp_path) == "150000 100000"
    (inner / "cpu.max").write_text("max 100000\n")
    assert doctor.cgroup_limit("cpu.max", membership, tmp_path) == "150000 100000"
    assert doctor.cgroup_limit("cpu.max", "0::/\n", tmp_path) is None
    assert doctor.cgroup_limit("cpu.max", "", tmp_path) is None
    assert doctor.cgroup_limit("cpu.max", "0::/../../elsewhere", tmp_path) is None
