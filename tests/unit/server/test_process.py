"""The server's process: what it listens at, and that its end loses no answer.

What is surprising: the servers are programs of their own (`answering.py`), since a signal is a process's; what they
answer goes on when the test says so, so nothing depends on time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import puna
from puna.errors import UsageError
from puna.server.process import is_loopback, listen, url_of

SECONDS = 30.0
SOURCE = Path(puna.__file__).resolve().parents[1]


class Program:
    """A server, and a client that reads one answer."""

    def __init__(self, drain_seconds: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("answering.py")), str(drain_seconds)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SOURCE)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.client = socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)
        self.client.sendall(b"GET /answer HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.file = self.client.makefile("rb")

    def until(self, data: bytes) -> bytes:
        """All that comes up to these bytes."""
        found = b""
        while data not in found:
            line = self.file.readline()
            assert line, found
            found += line
        return found

    def closed_to_others(self) -> bool:
        """Whether it takes no more in."""
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS).close()
        except OSError:
            return True
        return False

    def go_on(self) -> None:
        """Let the answer go on."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()


@pytest.fixture
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    """A server with so many seconds to drain, an answer of which is under way."""
    one = Program(request.param)
    try:
        assert b'data: "one"' in one.until(b"one")
        yield one
    finally:
        one.process.kill()
        one.process.wait()
        one.client.close()
        for pipe in (one.process.stdin, one.process.stdout, one.file):
            if pipe is not None:
                pipe.close()


@pytest.mark.parametrize("program", [600.0], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_answer_end_and_takes_nothing_new(program: Program, number: signal.Signals) -> None:
    program.process.send_signal(number)
    end = time.monotonic() + SECONDS
    while not program.closed_to_others():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert program.process.poll() is None
    program.go_on()
    assert b'data: "two"' in program.until(b"end")
    assert program.process.wait(SECONDS) == 0


@pytest.mark.parametrize("program", [0.0], indirect=True)
def test_what_takes_too_long_ends_with_an_error_event(program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    found = program.until(b"engine_stopped")
    event = next(line for line in found.splitlines() if line.startswith(b"data: {"))
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "The engine was closed."
    assert program.until(b"0\r\n")  # the response is whole: its last chunk came
    assert program.process.wait(SECONDS) == 0


@pytest.mark.parametrize("program", [600.0], indirect=True)
def test_a_second_signal_ends_it_at_once(program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + SECONDS
    while not program.closed_to_others():  # it has heard the first
        assert time.monotonic() < end
        time.sleep(0.01)
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(SECONDS) == 128 + signal.SIGTERM


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert port > 0
        assert url_of(first) == f"http://127.0.0.1:{port}"
        first.listen()
        with pytest.raises(UsageError, match=f"127.0.0.1 port {port} cannot be had"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "300.1.1.1", "a\0b", "x" * 300])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(UsageError, match="there is no such address"):
        listen(host, 0)


@pytest.mark.parametrize(
    ("host", "port", "loopback", "url"),
    [
        ("127.0.0.1", 80, True, "http://127.0.0.1:80"),
        ("127.9.9.9", 80, True, "http://127.9.9.9:80"),
        ("0.0.0.0", 80, False, "http://127.0.0.1:80"),
        ("192.0.2.7", 80, False, "http://192.0.2.7:80"),
        ("::1", 80, True, "http://[::1]:80"),
        ("::", 80, False, "http://[::1]:80"),
        ("fe80::1%eth0", 80, False, "http://[fe80::1%eth0]:80"),
    ],
)
def test_who_can_reach_it(host: str, port: int, loopback: bool, url: str) -> None:
    class Bound:
        def getsockname(self) -> tuple[Any, ...]:
            return (host, port, 0, 0)

    bound: Any = Bound()
    assert is_loopback(bound) is loopback
    assert url_of(bound) == url
