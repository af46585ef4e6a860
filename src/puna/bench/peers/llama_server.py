"""llama.cpp's own server, spoken to over HTTP on this machine: its continuous batching is there, not in the library.

What is surprising: it is a program that has to be built (`tools/server` of llama.cpp), so its path is an argument. A
thread a request reads its stream; what they hear meets in one queue.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import subprocess
import sys
import threading
import time

from puna.bench.protocol import serve


class LlamaServer:
    """See load.Serving."""

    def __init__(
        self, server: str, model: str, threads: int, repack: bool, slots: int, context: int, vocabulary: int
    ) -> None:
        self.vocabulary = vocabulary
        asked = subprocess.run([server, "--version"], capture_output=True, text=True)
        self.version = (asked.stderr + asked.stdout).partition("version:")[2].strip().splitlines()[0]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self._command = [
            server, "-m", model, "-t", str(threads), "-np", str(slots), "-c", str(slots * context),
            "--host", "127.0.0.1", "--port", str(self._port), "--no-warmup",
            *([] if repack else ["--no-repack"]),
        ]  # fmt: skip
        self._came: queue.Queue[tuple[int, int]] = queue.Queue()
        self._requests = 0

    def load(self) -> None:
        """Start the server and wait until it serves."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with code {self._process.returncode}")
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
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=3600)
        body = {
            "prompt": prompt, "n_predict": new, "stream": True, "ignore_eos": True, "temperature": 0,
            "cache_prompt": True, "return_tokens": True,
        }  # fmt: skip
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        left = new
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                tokens = min(left, len(json.loads(line[6:]).get("tokens") or ()))
                left -= tokens
                if tokens:
                    self._came.put((request, tokens))
        if left:  # the last piece may hold tokens back for ever, such as half a character
            self._came.put((request, left))

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait()


if __name__ == "__main__":
    engine = LlamaServer(**json.loads(sys.argv[1]))
    serve(engine)
    engine.close()
