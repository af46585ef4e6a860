"""A server on this machine as an engine under load: started, asked over HTTP by many clients at once, ended.

What it is: what `peers/llama_server.py` and `puna_server.py` share; each says how its server is started and asked.
What it is not: a load generator for servers elsewhere (`puna bench serve`).
What is surprising: a thread a request reads its stream; what they hear meets in one queue.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any


class ServerUnderLoad:
    """See load.Serving. `command` starts it on a port; `path` and `body` (of a prompt's ids, and the tokens to make)
    ask; `counted` says how many tokens a piece of the stream brings, after so many before it."""

    def __init__(
        self,
        command: Callable[[int], list[str]],
        path: str,
        body: Callable[[list[int], int], dict[str, Any]],
        counted: Callable[[dict[str, Any], int], int],
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._command, self._path, self._body, self._counted = command(self.port), path, body, counted
        self._came: queue.Queue[tuple[int, int]] = queue.Queue()
        self._requests = 0
        self._process: subprocess.Popen[bytes] | None = None

    def load(self) -> None:
        """Start the server and wait until it serves. Raises RuntimeError where it ends instead."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._command[0]} ended with code {self._process.returncode}")
            time.sleep(0.05)

    def submit(self, prompt: list[int], new: int) -> int:
        """See load.Serving."""
        self._requests += 1
        threading.Thread(target=self._ask, args=(self._requests, prompt, new), daemon=True).start()
        return self._requests

    def advance(self) -> dict[int, int]:
        """See load.Serving."""
        found: dict[int, int] = {}
        wait = True
        while True:
            try:
                request, tokens = self._came.get(wait, 0.05)
            except queue.Empty:
                return found
            found[request] = found.get(request, 0) + tokens
            wait = False

    def _ask(self, request: int, prompt: list[int], new: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        body = json.dumps(self._body(prompt, new))
        connection.request("POST", self._path, body, {"Content-Type": "application/json"})
        left = new
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                tokens = min(left, self._counted(json.loads(line[6:]), new - left))
                left -= tokens
                if tokens:
                    self._came.put((request, tokens))
        if left:  # the last piece may hold tokens back for ever, such as half a character
            self._came.put((request, left))

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
