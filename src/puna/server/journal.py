"""Lines that are written down elsewhere than where they arise: the log of requests, and the audit log.

What it is: a queue and a thread that writes its lines to stderr or appends them to a file.
What it is not: Python's logging, which writes where it is called: a slow disk or a full pipe must not hold the event
loop.
What is surprising: where more lines come than can be written, some are left out, and the next line says how many.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

_MOST = 10_000


def now() -> str:
    """The time as logs have it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def append(path: Path, record: Mapping[str, object]) -> None:
    """Append one line of JSON to a file that only its owner may read. Blocks; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
        file.write(line(record))  # one write of less than a page or so: lines of two processes do not mix


def line(record: Mapping[str, object]) -> str:
    """One line of JSON; what a client sent cannot end it early."""
    return json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n"


class Journal:
    """Writes lines to a file, or to stderr for None. Nothing is raised to who writes."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._queue: queue.Queue[str | None] = queue.Queue(_MOST)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.dropped = 0

    def write(self, text: str) -> None:
        """Have a line written soon."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="puna-journal", daemon=True)
                self._thread.start()
            if self.dropped:
                text += line({"time": now(), "event": "lines_left_out", "count": self.dropped})
            try:
                self._queue.put_nowait(text)
                self.dropped = 0
            except queue.Full:
                self.dropped += 1

    def close(self) -> None:
        """Write what is waiting, and end. Blocks."""
        thread = self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join()
            self._thread = None

    def _run(self) -> None:
        failed = False
        while (text := self._queue.get()) is not None:
            while not self._queue.empty():  # several lines, one write
                more = self._queue.get()
                if more is None:
                    self._queue.put(None)
                    break
                text += more
            try:
                self._put(text)
                failed = False
            except OSError as error:
                if not failed:  # once, not for every line
                    _complain(f"puna: the log {self._path or 'on stderr'} cannot be written: {error}\n")
                failed = True

    def _put(self, text: str) -> None:
        if self._path is None:
            stream: TextIO = sys.stderr
            stream.write(text)
            stream.flush()
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w", encoding="utf-8") as file:
            file.write(text)


def _complain(text: str) -> None:
    try:
        sys.stderr.write(text)
    except OSError:  # it was stderr that failed: there is nobody left to tell
        return
