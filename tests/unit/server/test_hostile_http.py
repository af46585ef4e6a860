"""HTTP as an attacker speaks it, byte by byte over a socket: shapes of smuggling, sizes, slowness, paths.

What is surprising: each test ends by asking the same server whether it is well.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import Depends, FastAPI
from starlette.requests import Request

from puna.gateway.scripted import ScriptedBackend
from puna.server.app import create_app
from puna.server.bodies import Body
from puna.server.caller import Caller, needs
from puna.server.door import Door
from puna.server.limits import Limits
from puna.server.streams import Streamed
from puna.server.wire import protocol

LIMITS = Limits(body=100_000)
HASTY = Limits(head_seconds=0.3, body_seconds=0.3, whole_body_seconds=0.5, send_seconds=0.3)
HOST = b"Host: localhost\r\n"
AUTH = b"x-api-key: a-key-for-tests\r\n"
JSON = b"Content-Type: application/json\r\n"
POST = b"POST /echo HTTP/1.1\r\n" + HOST + AUTH + JSON


class Echo(Body):
    """What the test's own route takes."""

    value: Any = None


def app_of_tests(limits: Limits) -> FastAPI:
    """The server, with a route that echoes and one that never ends."""
    door = Door(single_key="a-key-for-tests", limits=limits)
    app = create_app(ScriptedBackend(), door=door)
    app.state.closed = threading.Event()
    app.state.door = door

    @app.post("/echo")
    async def echo(body: Echo, request: Request, caller: Annotated[Caller, Depends(needs("infer"))]) -> Any:
        return {"value": body.value, "names": sorted(request.headers)}

    @app.get("/endless")
    async def endless(caller: Annotated[Caller, Depends(needs("infer"))]) -> Streamed:
        async def pieces() -> AsyncGenerator[bytes]:
            try:
                while True:
                    yield bytes(1 << 16)
                    await asyncio.sleep(0)
            finally:
                app.state.closed.set()

        return Streamed(pieces(), lambda error: b"")

    return app


class Line:
    """The server of the tests: `ask` sends bytes on a connection of its own and reads what comes back."""

    def __init__(self, port: int, app: FastAPI) -> None:
        self.port, self.app = port, app

    def connect(self) -> socket.socket:
        """A connection that no test waits for longer than a loaded machine needs."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, *pieces: bytes, pause: float = 0.0) -> tuple[int, bytes]:
        """(status, body) of the first response; 0 where the connection was closed without one."""
        with self.connect() as connection:
            for piece in pieces:
                try:
                    connection.sendall(piece)
                except OSError:  # closed already: the answer may be there
                    break
                time.sleep(pause)
            return read(connection)

    def well(self) -> bool:
        """Whether it answers an honest client."""
        return self.ask(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") == (200, b'{"status":"ok"}')


def read(connection: socket.socket | Shared) -> tuple[int, bytes]:
    """(status, body) of a response; 0 where there is none."""
    response = http.client.HTTPResponse(connection)  # type: ignore[arg-type]
    try:
        response.begin()
        return response.status, response.read()
    except (http.client.BadStatusLine, ConnectionError):
        return 0, b""


class Shared:
    """A connection as several responses are read from it, one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def makefile(self, mode: str) -> Any:
        """What http.client reads from: not closed by it, since the next response is in it too."""
        self._file.close = lambda: None  # type: ignore[method-assign]
        return self._file


def served(limits: Limits) -> Iterator[Line]:
    """A server with these limits, until the iterator goes on."""
    app = app_of_tests(limits)
    config = uvicorn.Config(app, port=0, log_level="critical", http=protocol(limits), ws="none", server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield Line(server.servers[0].sockets[0].getsockname()[1], app)
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    yield from served(LIMITS)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Line]:
    """One whose patience is shorter than an honest client on a busy machine needs."""
    yield from served(HASTY)


def code(body: bytes) -> str:
    """The code of an error in OpenAI's shape."""
    return str(json.loads(body)["error"]["code"])


def test_an_honest_request(line: Line) -> None:
    status, body = line.ask(POST + b'Content-Length: 11\r\n\r\n{"value":1}')
    assert (status, json.loads(body)["value"]) == (200, 1)
    chunks = b'6\r\n{"valu\r\n5\r\ne":2}\r\n0\r\n\r\n'
    status, body = line.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert (status, json.loads(body)["value"]) == (200, 2)


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 11\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 11\r\n",
        b"Content-Length: 11\r\nContent-Length: 12\r\n",
        b"Content-Length: 11\r\nContent-Length: 11\r\n",
        b"Content-Length: 11, 11\r\n",
        b"Content-Length: +11\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 0x0b\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Content-Length : 11\r\n",
        b" Content-Length: 11\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: \x0bchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"X: 1\r\n\tTransfer-Encoding: chunked\r\nContent-Length: 11\r\n",
        b"X: a\rContent-Length: 11\r\n",
        b"X: a\x00b\r\nContent-Length: 11\r\n",
    ],
)
def test_a_body_of_two_lengths_is_no_request(line: Line, head: bytes) -> None:
    status, body = line.ask(POST + head + b'\r\n{"value":1}')
    assert 400 <= status < 500, body
    assert b'"value"' not in body
    assert line.well()


@pytest.mark.parametrize(
    "chunks",
    [
        b'0xb\r\n{"value":1}\r\n0\r\n\r\n',
        b'-b\r\n{"value":1}\r\n0\r\n\r\n',
        b'ffffffffffffffffff\r\n{"value":1}\r\n0\r\n\r\n',
        b'b\n{"value":1}\n0\n\n',
        b'b \r\n{"value":1}XX0\r\n\r\n',
        b'b\r\n{"value":1}garbage\r\n0\r\n\r\n',
    ],
)
def test_chunks_that_are_none(line: Line, chunks: bytes) -> None:
    status, body = line.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert 400 <= status < 500, body
    assert b'"value"' not in body
    assert line.well()


def test_what_follows_a_body_is_a_request_of_its_own(line: Line) -> None:
    inner = b"GET /version HTTP/1.1\r\n" + HOST + b"\r\n"
    text = b'{"value":"' + inner.replace(b"\r\n", b"\\r\\n") + b'"}'
    with line.connect() as connection:
        head = POST + b"Content-Length: %d\r\n\r\n" % len(text)
        connection.sendall(head + text + inner)  # the second comes without a key, whatever the first one had
        both = Shared(connection)
        status, body = read(both)
        assert (status, json.loads(body)["value"]) == (200, inner.decode())
        status, body = read(both)
        assert (status, code(body)) == (401, "missing_api_key")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"http://localhost/health", {400}),
        (b"http://evil.example/health", {400}),
        (b"*", {400}),
        (b"health", {400}),
        (b"/health%00", {400}),
        (b"/health%0d%0aX:%201", {400}),
        (b"/%ff", {400}),
        (b"/%c0%ae%c0%ae/", {400}),
        (b"/health\\..\\version", {400}),
        (b"/health%5c..%5cversion", {400}),
        (b"//health", {401}),
        (b"/health/../version", {401}),
        (b"/%2e%2e/%2e%2e/etc/passwd", {401}),
        (b"/health/", {401}),
        (b"/HEALTH", {401}),
        (b"/health;x=1", {401}),
        (b"/" + b"a" * 9000, {414, 431}),
        (b"/health?" + b"a" * 9000, {414, 431}),
        (b"/health?api_key=a-key-for-tests", {200}),
        (b"/version?api_key=a-key-for-tests", {401}),
    ],
)
def test_targets(line: Line, target: bytes, expected: set[int]) -> None:
    status, body = line.ask(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert status in expected, (status, body)
    assert line.well()


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (b"TRACE /health HTTP/1.1\r\n", {405}),
        (b"CONNECT localhost:1 HTTP/1.1\r\n", {400}),
        (b"FROB /health HTTP/1.1\r\n", {400}),
        (b"PROPFIND /health HTTP/1.1\r\n", {405}),
        (b"get /health HTTP/1.1\r\n", {400}),
        (b"GET /health HTTP/9.9\r\n", {400, 505}),
        (b"GET /health\r\n", {0, 400, 505}),
        (b"PRI * HTTP/2.0\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", {400}),
    ],
)
def test_methods_and_versions(line: Line, first: bytes, expected: set[int]) -> None:
    status, body = line.ask(first + HOST + b"\r\n")
    assert status in expected, (status, body)
    assert line.well()


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (b"", 400),
        (b"Host: localhost\r\nHost: evil.example\r\n", 400),
        (b"Host: evil.example\r\n", 421),
        (b"Host: localhost.evil.example\r\n", 421),
        (b"Host: localhost@evil.example\r\n", 400),
        (b"Host: evil.example/localhost\r\n", 400),
        (b"Host: \r\n", 400),
        (b"Host: LOCALHOST:8000\r\n", 200),
        (b"Host: localhost.\r\n", 200),
        (b"Host: 127.0.0.1:1\r\n", 200),
        (b"Host: [::1]:1\r\n", 200),
        (b"Host: 2130706433\r\n", 421),
    ],
)
def test_hosts(line: Line, hosts: bytes, expected: int) -> None:
    status, body = line.ask(b"GET /health HTTP/1.1\r\n" + hosts + b"\r\n")
    assert status == expected, body


def test_heads_that_are_too_large(line: Line) -> None:
    get = b"GET /health HTTP/1.1\r\n" + HOST
    status, body = line.ask(get + b"".join(b"a%d: b\r\n" % at for at in range(100)) + b"\r\n")
    assert (status, code(body)) == (431, "headers_too_large")
    status, body = line.ask(get + b"a: " + b"b" * 33_000 + b"\r\n\r\n")
    assert (status, code(body)) == (431, "headers_too_large")
    assert line.ask(get + b"a: ", *[b"b" * 10_000] * 400, pause=0.0001)[0] == 431  # it never ends
    assert line.ask(b"GET /", *[b"a" * 10_000] * 400, pause=0.0001)[0] == 431
    assert line.well()


def test_an_endless_head_takes_no_memory(line: Line) -> None:
    with line.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\na: ")
        with pytest.raises(OSError):
            connection.sendall(b"b" * (64 << 20))  # far beyond what the buffers of two sockets hold
    assert line.well()


def test_clients_that_are_slow(hasty: Line) -> None:
    assert hasty.ask(b"GET /health HTTP/1.1\r\n", *[b"a: b\r\n"] * 30, pause=0.02)[0] == 408
    assert hasty.ask()[0] == 408  # says nothing at all
    status, body = hasty.ask(POST + b'Content-Length: 11\r\n\r\n{"val')
    assert (status, code(body)) == (408, "request_timeout")
    status, body = hasty.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 14, pause=0.05)
    assert (status, code(body)) == (408, "request_timeout")  # each piece in time, the whole is not


def test_bodies_that_are_too_large(line: Line) -> None:
    status, body = line.ask(POST + b"Content-Length: 100001\r\n\r\n")
    assert (status, code(body)) == (413, "body_too_large")  # before any of it was sent
    status, body = line.ask(POST + b"Content-Length: 100001\r\nExpect: 100-continue\r\n\r\n")
    assert status == 413
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    status, body = line.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 11)
    assert (status, code(body)) == (413, "body_too_large")
    status, _ = line.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1;" + b"a" * 60_000] * 200)
    assert status in (0, 400)  # an extension without end
    assert line.well()


def test_a_key_is_asked_for_before_the_body_is_read(line: Line) -> None:
    head = b"POST /echo HTTP/1.1\r\n" + HOST + JSON + b"Content-Length: 90000\r\n\r\n"
    with line.connect() as connection:
        connection.sendall(head)
        status, body = read(connection)
        assert (status, code(body)) == (401, "missing_api_key")


def test_large_bodies_under_way_are_bounded_together() -> None:
    """What is held counts for all, is given back whatever becomes of a request, and small bodies come in still."""
    begun = POST + b"Content-Length: 90000\r\n\r\n" + b'{"value":"' + b"a" * 59_990
    for line in served(Limits(body=100_000, bodies=100_000, small_body=1000)):
        with line.connect() as first:
            first.sendall(begun)
            whole = POST + b"Content-Length: 60000\r\n\r\n" + b'{"value":"' + b"a" * 59_988 + b'"}'
            until = time.monotonic() + 20
            while (found := line.ask(whole))[0] != 503:  # until the first one's bytes have come in
                assert found[0] == 200
                assert time.monotonic() < until
            assert code(found[1]) == "busy"
            assert line.ask(POST + b'Content-Length: 11\r\n\r\n{"value":1}')[0] == 200
        until = time.monotonic() + 20
        while line.ask(whole)[0] != 200:  # the first one's client is gone
            assert time.monotonic() < until
        while line.app.state.door._held:  # the last one's is given back once it is answered
            assert time.monotonic() < until


def test_a_trailer_is_no_header(line: Line) -> None:
    trailer = b'b\r\n{"value":1}\r\n0\r\nX-Forwarded-For: 1.2.3.4\r\nAuthorization: Bearer other\r\n\r\n'
    status, body = line.ask(POST + b"Transfer-Encoding: chunked\r\n\r\n" + trailer)
    assert status == 200
    assert not {"x-forwarded-for", "authorization"} & set(json.loads(body)["names"])


@pytest.mark.parametrize("origin", [b"http://[", b"http://[::1", b"http://a]b", b"//", b"http://localhost@other", b"%"])
def test_an_origin_that_is_none(line: Line, origin: bytes) -> None:
    text = b'{"value":1}'
    head = POST + b"Origin: " + origin + b"\r\nContent-Length: %d\r\n\r\n" % len(text)
    status, body = line.ask(head + text)
    assert (status, code(body)) == (403, "origin_not_allowed")


def test_deep_json(line: Line) -> None:
    def ask(text: bytes) -> tuple[int, bytes]:
        return line.ask(POST + b"Content-Length: %d\r\n\r\n" % len(text) + text)

    deep = b"[" * 63 + b"]" * 63
    assert ask(b'{"value":' + deep + b"}")[0] == 200
    status, body = ask(b'{"value":[' + deep + b"]}")
    assert (status, code(body)) == (400, "body_too_deep")
    status, body = ask(b"[" * 90_000)
    assert (status, code(body)) == (400, "body_too_deep")
    status, body = ask(b'{"a":' * 15_000)
    assert (status, code(body)) == (400, "body_too_deep")
    assert ask(b'{"value":"' + b"[" * 90_000 + b'"}')[0] == 200  # a text of brackets is a text
    status, body = ask(('{"value":' + "[" * 20_000).encode("utf-16"))
    assert (status, code(body)) == (400, "invalid_json")
    assert ask(b'{"value":' + b"1" * 50_000 + b"}")[0] == 400
    assert line.well()


@pytest.mark.parametrize(
    "text", [b"", b"nul", b'{"value":NaN}', b'{"value":1}x', b"\xff\xfe", b'"\xed\xa0\x80"', b'{"value":1e999}']
)
def test_json_that_is_none(line: Line, text: bytes) -> None:
    status, body = line.ask(POST + b"Content-Length: %d\r\n\r\n" % len(text) + text)
    assert status < 500, body
    assert line.well()


def test_an_upgrade_is_not_taken(line: Line) -> None:
    head = (
        b"GET /health HTTP/1.1\r\n"
        + HOST
        + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    )
    status, _ = line.ask(head + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
    assert status == 200
    assert line.ask(head.replace(b"websocket", b"h2c") + b"\r\n")[0] == 200


def test_a_client_that_does_not_read_is_given_up(hasty: Line) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\n" + HOST + AUTH + b"\r\n")
        assert hasty.app.state.closed.wait(20)


def test_many_requests_at_once_on_one_connection(line: Line) -> None:
    with line.connect() as connection:
        connection.sendall((b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") * 50)
        every = Shared(connection)
        assert [read(every)[0] for _ in range(50)] == [200] * 50
