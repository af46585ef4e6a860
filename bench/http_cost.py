"""What does HTTP cost? A request's overhead, tokens a second of sixteen streams, and idle connections.

- overhead: a whole answer of one token through the server, against the same request asked of the same kind of backend
  in a process without HTTP; milliseconds, medians of interleaved pairs.
- streams: sixteen streams' tokens a second, through the server and without.
- idle: so many requests for streams that wait for the last byte of their bodies. How fast is another request answered
  beside them, how much memory do they take, and are all answered in the end?

The processor's time is that of the thread of the server's event loop. Ratios are below 1 where HTTP costs tokens.

    python bench/http_cost.py --model cria --record
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common
import httpx2

PROMPT = "Once upon a time"


class Direct:
    """The backend without HTTP, in this process."""

    def __init__(self, model: str) -> None:
        from puna import LLM
        from puna.gateway.local import LocalBackend

        self._loop = asyncio.new_event_loop()
        self._backend = LocalBackend(LLM(model))

    def ask(self, streams: int, tokens: int) -> float:
        """Seconds until so many answers of so many tokens are there."""
        from puna.types import Request, Sampling

        sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)

        async def one() -> None:
            async for _ in self._backend.generate(Request(PROMPT, sampling, raw=True)):
                pass

        async def every() -> None:
            await asyncio.gather(*(one() for _ in range(streams)))

        began = time.perf_counter()
        self._loop.run_until_complete(every())
        return time.perf_counter() - began


class Served:
    """The server in a process of its own. Its clients here only look for the end of what they read: they share the
    server's cores, and what a client does with an answer is not the server's."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, streams: int, tokens: int, stream: bool = False) -> float:
        """See Direct.ask; each on a connection of its own."""
        body = {
            "model": "", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream,
        }  # fmt: skip
        asked = request(self._port, json.dumps(body).encode(), "Connection: close\r\n")
        began = time.perf_counter()
        with selectors.DefaultSelector() as open_ones:
            for _ in range(streams):
                connection = socket.create_connection(("127.0.0.1", self._port))
                connection.sendall(asked)
                open_ones.register(connection, selectors.EVENT_READ, bytearray())
            left = streams
            while left:
                for key, _ in open_ones.select():
                    connection = key.fileobj  # type: ignore[assignment]
                    if piece := connection.recv(1 << 16):
                        key.data.extend(piece)
                        continue
                    left -= 1
                    open_ones.unregister(connection)
                    connection.close()
                    assert key.data.startswith(b"HTTP/1.1 200"), bytes(key.data)
                    assert not stream or b"data: [DONE]" in key.data, bytes(key.data)
        return time.perf_counter() - began


def request(port: int, body: bytes, more: str = "") -> bytes:
    """A request for completions as it goes over the wire."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{more}\r\n"
    )
    return head.encode() + body


def processor_seconds(process: int) -> float:
    """What the thread of the server's event loop has computed."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cria")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=200, help="of each of the sixteen streams")
    parser.add_argument("--idle", type=int, default=500, help="connections")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/http.jsonl")
    options = parser.parse_args()
    port = 18182
    server = subprocess.Popen(
        [sys.executable, "-m", "puna", "serve", options.model, "--port", str(port)],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx2.get(f"{url}/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.1)
        served, direct = Served(port), Direct(options.model)
        direct.ask(1, 1)
        served.ask(1, 1)
        row: dict[str, Any] = {"question": f"http {Path(options.model).stem}", "pairs": options.pairs}
        many = range(20)
        before = processor_seconds(server.pid)
        with_http, without = common.interleaved(
            options.pairs,
            lambda: statistics.median(served.ask(1, 1) for _ in many),
            lambda: statistics.median(direct.ask(1, 1) for _ in many),
        )
        row["processor_ms_a_request"] = 1e3 * (processor_seconds(server.pid) - before) / (options.pairs * len(many))
        extra = [a - b for a, b in zip(with_http, without, strict=True)]
        row["request_ms"] = {"served": 1e3 * statistics.median(with_http), "direct": 1e3 * statistics.median(without)}
        row["overhead_ms"] = {key: round(1e3 * value, 3) for key, value in common.summary(extra).items()}
        before = processor_seconds(server.pid)
        streamed, direct16 = common.interleaved(
            options.pairs, lambda: served.ask(16, options.tokens, stream=True), lambda: direct.ask(16, options.tokens)
        )
        made = 16 * options.tokens * options.pairs
        row["processor_us_a_token"] = 1e6 * (processor_seconds(server.pid) - before) / made
        row["tokens_per_second_16"] = {
            "served": 16 * options.tokens / statistics.median(streamed),
            "direct": 16 * options.tokens / statistics.median(direct16),
            "ratio": common.ratio(direct16, streamed),
        }
        row["idle"] = asyncio.run(idle(url, server.pid, options.idle))
    finally:
        server.terminate()
        server.wait(60)
    common.record("http", row | common.pedigree(), options.record)


async def idle(url: str, process: int, connections: int) -> dict[str, Any]:
    """See above."""

    def resident() -> int:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    asked = {"model": "", "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    port = int(url.rsplit(":", 1)[1])
    body = json.dumps(asked | {"stream": True, "max_tokens": 2, "ignore_eos": True}).encode()
    asked_for = request(port, body)
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
    for _, writer in streams:  # all but the last byte of the body: each stays open and waits
        writer.write(asked_for[:-1])
    await asyncio.sleep(1)
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        took = []
        for _ in range(20):
            began = time.perf_counter()
            assert (await client.post("/v1/completions", json=asked)).status_code == 200
            took.append(time.perf_counter() - began)
    during = resident()
    answered = 0
    for _, writer in streams:
        writer.write(body[-1:])
    for reader, writer in streams:
        answered += (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    return {
        "connections": connections,
        "answered": answered,
        "request_ms_beside": round(1e3 * statistics.median(took), 2),
        "memory_each": (during - before) // connections,
    }


if __name__ == "__main__":
    main()
