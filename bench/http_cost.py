"""What does HTTP cost? A request's overhead, tokens a second of sixteen streams, and idle connections.

- overhead: a whole answer of one token through the server, against the same request asked of the same kind of backend
  in a process without HTTP; milliseconds, medians of interleaved pairs.
- streams: sixteen streams' tokens a second, through the server and without.
- idle: so many open streams that have said a word and then say nothing for half a minute. Does each hear that the
  server is still there, how fast is another request answered beside them, how much memory do they take, and do all of
  them end as they should? (Their answers come from a script: no model has so many at once on this machine.)

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

from puna.server.streams import KEEP_ALIVE_SECONDS

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
    parser.add_argument("--held", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.held:
        held()
        return
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
        row["idle"] = asyncio.run(idle(options.idle))
    finally:
        server.terminate()
        server.wait(60)
    common.record("http", row | common.pedigree(), options.record)


def held() -> None:
    """A server whose answers say a word and then wait until somebody asks for "go on"; its address goes to stdout."""
    from collections.abc import AsyncGenerator

    from puna.gateway.one import OneModel
    from puna.gateway.scripted import ScriptedBackend
    from puna.server.app import create_app
    from puna.server.process import Limits, listen, serve, url_of
    from puna.types import Event, Request, Usage

    gate = asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[Event]:
        if request.prompt == "go on":
            gate.set()
        yield Event(text="Once", token_ids=(1,), prefilled=1)
        if request.prompt == "wait":
            await gate.wait()
        yield Event(text=" more.", token_ids=(2,), prefilled=1)
        yield Event(finish="stop", usage=Usage(1, 0, 2))

    async def run() -> None:
        models = OneModel(ScriptedBackend(script))
        bound = listen("127.0.0.1", 0)
        await serve(create_app(models), models, bound, Limits(), ready=lambda: print(url_of(bound), flush=True))

    asyncio.run(run())


async def idle(connections: int) -> dict[str, Any]:
    """See above."""
    server = subprocess.Popen(
        [sys.executable, __file__, "--held"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        port = int(url.rsplit(":", 1)[1])

        def resident() -> int:
            return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:

            async def beside() -> float:
                took = []
                for _ in range(20):
                    began = time.perf_counter()
                    assert (await client.post("/v1/completions", json={"prompt": "hello"})).status_code == 200
                    took.append(time.perf_counter() - began)
                return 1e3 * statistics.median(took)

            alone = await beside()
            before = resident()
            asked = request(port, json.dumps({"prompt": "wait", "stream": True}).encode())
            streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
            for _, writer in streams:
                writer.write(asked)
            for reader, _ in streams:  # every one has begun
                assert b"Once" in await reader.readuntil(b'"Once"')
            seconds = 2 * KEEP_ALIVE_SECONDS + 1
            beating = [0] * connections

            async def listen_to(number: int) -> bytes:
                said = b""
                while piece := await streams[number][0].read(1 << 16):
                    beating[number] += piece.count(b": still here")
                    said += piece
                    if said.endswith(b"0\r\n\r\n"):
                        break
                return said

            listening = asyncio.gather(*(listen_to(number) for number in range(connections)))
            await asyncio.sleep(seconds)
            row = {
                "connections": connections,
                "seconds": seconds,
                "request_ms_alone": round(alone, 2),
                "request_ms_beside": round(await beside(), 2),
                "memory_each": (resident() - before) // connections,
            }
            await client.post("/v1/completions", json={"prompt": "go on"})
            said = await listening
            for _, writer in streams:
                writer.close()
            row["heard_a_heartbeat"] = sum(beats > 0 for beats in beating)
            row["answered"] = sum(b" more." in text and b"data: [DONE]" in text for text in said)
            return row
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
