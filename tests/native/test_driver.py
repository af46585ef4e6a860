"""The kernels without Python: under the sanitizers, compiled by Clang, and for Arm under an emulator.

What it is: `driver.cpp` built four ways, each fed the cases that `cases.py` makes of `puna.kernels.reference`, and its
pool small regions by the ten thousand.
What is surprising: zig, which PyPI has as `ziglang`, is a Clang that cross-compiles with a C library of its own; it
builds that library for a target when it first meets it, which takes a minute or two.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of cases, made by a program as `cases.py` says."""
    file = tmp_path_factory.mktemp("native") / "cases"
    subprocess.run([sys.executable, HERE / "cases.py", file], check=True)
    return file


@pytest.fixture(scope="session")
def zig() -> str:
    """The path of zig; the test is skipped, saying so, where it is not installed."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        pytest.skip("needs zig (pip install ziglang)")
    return str(Path(found.origin).parent / "zig")


def build(name: str, *options: str) -> Path:
    """Build the driver in `build/NAME` (what is there is used again); its path."""
    folder = REPOSITORY / "build" / name
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # where the group `build` is
    for command in (
        ["cmake", "-S", REPOSITORY, "-B", folder, "-G", "Ninja", "-DPUNA_DRIVER=ON", *options],
        ["cmake", "--build", folder],
    ):
        done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert "warning:" not in done.stdout + done.stderr
    return folder / "driver"


def run(*command: str | Path) -> list[str]:
    """Run the driver; the names of the instruction sets it tried. Fails on a mismatch, and where it died or hung.

    It computes for a minute at most, under the emulator on a busy machine for a few.
    """
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return re.findall(r"^(\w+) \(.*\): \d+ cases, 0 failed$", done.stdout, re.MULTILINE)


def regions(*driver: str | Path) -> None:
    """Have the driver's pool run small regions, for some seconds each on as many threads as cores and on more."""
    for threads in ("2", "3", "8"):
        done = subprocess.run((*driver, "regions", "5", threads), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        assert done.stdout.endswith(f"regions on {threads} threads\n")


@pytest.mark.sanitize
def test_addresses_and_undefined_behaviour(cases: Path) -> None:
    """Every instruction set of this machine, on one thread and on three, with what the compiler can watch."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
    driver = build("sanitize", "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS={flags}")
    for threads in ("1", "3"):
        assert set(run(driver, cases, threads)) == set(cpu.isas())
    regions(driver)


@pytest.mark.sanitize
def test_data_races(cases: Path) -> None:
    """Every instruction set of this machine, on two threads and on five."""
    driver = build("races", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-fsanitize=thread -g1")
    for threads in ("2", "5"):
        assert set(run(driver, cases, threads)) == set(cpu.isas())
    regions(driver)


def build_by_zig(zig: str, name: str, machine: str) -> Path:
    """Build the driver for this kind of machine, linked with zig's own C library; its path."""
    return build(
        name,
        f"-DCMAKE_CXX_COMPILER={zig};c++",
        f"-DCMAKE_CXX_COMPILER_TARGET={machine}-linux-musl",
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={machine}",
        # CMake's probes are not linked: zig would build its library anew for the flags of each.
        "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",
    )


@pytest.mark.arm
def test_clang(cases: Path, zig: str) -> None:
    """Every instruction set of this machine as Clang compiles it, as on a Mac."""
    driver = build_by_zig(zig, "clang", MACHINE)
    assert set(run(driver, cases)) == set(cpu.isas())
    regions(driver)


@pytest.mark.arm
def test_arm(cases: Path, zig: str) -> None:
    """NEON, on a processor without the dot product and on one that has everything the emulator knows."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("needs an emulator of 64-bit Arm (Debian: qemu-user-static)")
    driver = build_by_zig(zig, "arm", "aarch64")
    assert run(emulator, "-cpu", "cortex-a53", driver, cases) == ["neon", "scalar"]
    assert run(emulator, "-cpu", "max", driver, cases) == ["neon", "neon", "scalar"]
    for processor in ("cortex-a53", "max"):  # without and with the atomic instructions of Armv8.1
        regions(emulator, "-cpu", processor, driver)
