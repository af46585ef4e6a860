"""The C library's heaps, looked at by the C library (malloc_info(3)) in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from puna.weights.heap import trim_memory

HEAPS = """
import ctypes, sys, threading
from puna.weights.heap import one_heap
if sys.argv[1] == "one":
    one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
met = threading.Barrier(3)
def work():
    met.wait()
    assert libc.malloc(10_000)
    met.wait()
for thread in [threading.Thread(target=work) for _ in range(2)]:
    thread.start()
met.wait()
met.wait()
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has several heaps")
def test_threads_share_one_heap(tmp_path: Path) -> None:
    def heaps(which: str) -> int:
        subprocess.run([sys.executable, "-c", HEAPS, which, str(tmp_path / which)], check=True)
        return (tmp_path / which).read_text().count("<heap nr=")

    assert heaps("one") == 1
    assert heaps("many") > 1


def test_memory_is_given_back_wherever_it_can_be() -> None:
    trim_memory()  # elsewhere it does nothing
