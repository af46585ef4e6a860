"""The thread pool of the C++ extension: the ways in which pools hang, each provoked.

What it is: most tests run a child process, because a hang at start or exit is theirs to show; `run` fails after a
minute. What is surprising: results are compared bit for bit, since threads only share out rows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from puna.kernels.layouts import page_table

cpu = pytest.importorskip("puna.kernels.cpu", reason="the C++ extension is not built here")

SOURCE = Path(puna.__file__).resolve().parents[1]
"""Where the package under test lies, so that programs import the same one: installed, or this checkout's."""

SETUP = """
import os, threading, time
import numpy as np
from puna.kernels import cpu
rng = np.random.default_rng(0)
x = rng.standard_normal((3, 512), dtype=np.float32)
w = rng.standard_normal((1000, 512), dtype=np.float32)
def work():
    return cpu.linear(x, w)
"""


def run(program: str) -> str:
    """What a child process prints; fails when it hangs or ends with an error."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def threads_restored() -> Any:
    before = cpu.threads()
    yield
    cpu.set_threads(before)


def test_exit_with_workers_asleep_and_with_workers_awake() -> None:
    assert run("cpu.set_threads(4); work(); time.sleep(0.02); print('asleep')") == "asleep"
    assert run("cpu.set_threads(4); work(); print('awake')") == "awake"


def test_exit_while_daemon_threads_are_in_a_call() -> None:
    """Calls of milliseconds give up Python's lock, and these threads want it back when the interpreter has ended."""
    program = """
x = rng.standard_normal((40, 2000), dtype=np.float32)
w = rng.standard_normal((3000, 2000), dtype=np.float32)
def forever():
    while True:
        work()
for _ in range(2):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.05)
print('end')
"""
    assert run(program) == "end"


def test_the_first_region_may_open_before_any_worker_runs() -> None:
    run("for n in range(2, 40):\n    cpu.set_threads(n % 7 + 1)\n    work()\n    work()")


def test_sleeping_workers_wake() -> None:
    """Chunks that sleep their turn out are taken by more than one thread, also after a pause."""
    program = """
big = rng.standard_normal((20000, 512), dtype=np.float32)
cpu.set_threads(2)
def other_threads_time():
    before, own = time.process_time(), time.thread_time()
    for _ in range(20):
        cpu.linear(x, big)
        time.sleep(0.002)
    return (time.process_time() - before) - (time.thread_time() - own)
other_threads_time()
print(other_threads_time())
"""
    assert float(run(program)) > 0.005


def test_fork_rebuilds_the_pool() -> None:
    program = """
import warnings
warnings.simplefilter("ignore")
cpu.set_threads(3)
want = work()
child = os.fork()
if child == 0:
    ok = np.array_equal(work(), want) and cpu.threads() == 3
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert np.array_equal(work(), want)
print("both")
"""
    assert run(program) == "both"


def test_fork_while_another_thread_is_in_a_region() -> None:
    program = """
import warnings
warnings.simplefilter("ignore")
cpu.set_threads(2)
big = rng.standard_normal((20000, 512), dtype=np.float32)
want = work()
stop = False
def busy():
    while not stop:
        cpu.linear(x, big)
other = threading.Thread(target=busy)
other.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(work(), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
print("done")
"""
    assert run(program) == "done"


def test_two_threads_at_once_get_their_own_results(threads_restored: None) -> None:
    cpu.set_threads(2)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2000, 400), dtype=np.float32)
    inputs = [rng.standard_normal((24, 400), dtype=np.float32) for _ in range(4)]  # long enough that the GIL is let go
    want = [cpu.linear(x, weight) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not np.array_equal(cpu.linear(inputs[i], weight), want[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert wrong == []


def test_results_do_not_depend_on_the_number_of_threads(threads_restored: None) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((700, 300), dtype=np.float32)
    q = rng.standard_normal((82, 4, 16), dtype=np.float32)
    k = rng.standard_normal((47 * 2, 32, 2, 16), dtype=np.float32)
    pages = rng.permutation(94).reshape(2, 47)
    table = page_table([1460, 1440], [40, 42], pages)
    results = []
    for threads in (1, 2, 4):
        cpu.set_threads(threads)
        assert cpu.threads() == threads
        few, many = (cpu.linear(rng_rows(rows), weight) for rows in (2, 120))
        last = cpu.attention(q[:2], k, k, page_table([1499, 1481], [1, 1], pages))
        results.append((few, many, cpu.attention(q, k, k, table), last))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)


def rng_rows(rows: int) -> Any:
    return np.random.default_rng(rows).standard_normal((rows, 300), dtype=np.float32)


def test_set_threads_while_another_thread_works(threads_restored: None) -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((2000, 400), dtype=np.float32), rng.standard_normal((24, 400), dtype=np.float32)
    want = cpu.linear(x, weight)
    stop, wrong = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            if not np.array_equal(cpu.linear(x, weight), want):
                wrong.append(1)

    worker = threading.Thread(target=work)
    worker.start()
    for threads in (1, 4, 2, 3, 1, 2):
        cpu.set_threads(threads)
        time.sleep(0.005)
    stop.set()
    worker.join(timeout=60)
    assert not worker.is_alive()
    assert wrong == []


@pytest.mark.parametrize("bad", [0, -1, 5000])
def test_set_threads_refuses(bad: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1024"):
        cpu.set_threads(bad)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_threads_follow_the_affinity_mask() -> None:
    assert run("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); work(); print(cpu.threads())") == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_importing_starts_no_thread() -> None:
    """The pool is built by the first region. NumPy's own threads are counted before and after."""
    program = """
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
cpu.set_threads(3)
unchanged = count() == before
work()
print(unchanged, count() - before)
"""
    assert run(program) == "True 2"
