"""An engine in a process of its own: what it answers, what its failure says, and that its stdout stays clean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from puna.bench.worker import EngineSpec, Worker
from puna.errors import PunaError

ENGINE = """
import json, sys, time
from puna.bench.protocol import serve

class Counting:
    version = "1.2"
    vocabulary = 1000
    seen = set()

    def load(self):
        print("chatter on stdout")
        sys.stderr.write("chatter on stderr\\n")

    def prefill(self, prompt):
        if len(prompt) == 13:
            raise RuntimeError("unlucky")
        if len(prompt) == 14:
            sys.exit(3)
        time.sleep(0.12)
        self.seen.add(tuple(prompt))
        return prompt[0]

    def decode(self, prompts, steps):
        different = len({tuple(prompt) for prompt in prompts})
        return 10000 * len(self.seen) + 100 * different + len(prompts[0]) + steps / 10

serve(Counting(**json.loads(sys.argv[1])))
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    (tmp_path / "counting.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Worker(EngineSpec("counting", "counting")) as started:
        yield started


def test_requests_and_answers(worker: Worker) -> None:
    assert worker.ask("load")["version"] == "1.2"
    assert worker.ask("decode", streams=8, context=5, steps=2) == {"seconds": 805.2}
    assert worker.ask("decode", streams=1, context=7, steps=2) == {"seconds": 107.2}
    # Once, and then for 0.3 seconds; the mean of those, with a new prompt each time.
    assert 0.12 <= worker.ask("first", tokens=20)["seconds"] < 0.24
    assert 0.12 <= worker.ask("prefill", tokens=20)["seconds"] < 0.24
    seen = worker.ask("decode", streams=1, context=7, steps=2)["seconds"]
    assert seen in (10000 * 4 + 107.2, 10000 * 3 + 107.2)  # a slow machine needs fewer


def test_a_failure_says_what_the_engine_said(worker: Worker) -> None:
    worker.ask("load")
    with pytest.raises(PunaError, match=r"counting failed at 'prefill': RuntimeError: unlucky") as error:
        worker.ask("prefill", tokens=13)
    assert "chatter on stdout\n" in error.value.remedy
    assert "chatter on stderr" in error.value.remedy
    assert worker.ask("first", tokens=12)["seconds"] >= 0.12  # it goes on
    with pytest.raises(PunaError, match="no such request: dance"):
        worker.ask("dance")
    with pytest.raises(PunaError, match="exit code 3"):
        worker.ask("prefill", tokens=14)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_memory_is_the_engine_s_own(worker: Worker) -> None:
    ballast = bytearray(200 << 20)  # counts for this process, and must not for the engine
    worker.ask("load")
    peak = worker.peak_bytes()
    assert peak is not None
    assert 1 << 20 < peak < 100 << 20
    assert len(ballast) == 200 << 20
