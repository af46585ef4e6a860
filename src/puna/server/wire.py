"""HTTP's parser, with limits before there is a request: the size of a head, and the time that one may take.

What it is: uvicorn's protocol over httptools (llhttp), which has neither limit: its head may grow without end, and a
connection that says nothing is kept for ever.
What it is not: the door, which sees a request once its head is whole, and speaks to the client in its protocol's words;
here a refusal is a bare status and the end of the connection.
What is surprising: a field of a trailer (after a chunked body) would be added to the request's headers, behind what a
proxy has checked; here it is dropped. Targets with a scheme and an authority, which only proxies are sent, are refused.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from puna.server.limits import Limits

_PIECE = 256 << 10
"""Bytes that asyncio reads at once, at most."""

_SLACK = 8
"""Bytes of chunk headers that a byte of a body may bring: a chunk of one byte has five beside it."""


def protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """The class for `uvicorn.Config(http=…)`."""

    class Wire(HttpToolsProtocol):
        """One connection."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._heads = 0  # heads that have begun
            self._in_head = self._in_body = False
            self._fed = self._taken = 0  # bytes of this head, or since it; those of them that were a body's
            self._late: asyncio.TimerHandle | None = None
            self._unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """A client connects; its first head is due."""
            super().connection_made(transport)
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            """The client is gone."""
            self._disarm()
            self._read()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Bytes arrive."""
            if self.transport.is_closing():
                return
            if not self._in_body:
                self._arm()
            heads = self._heads
            super().data_received(data)
            if self.transport.is_closing() or heads != self._heads:  # of a head's first piece nobody knows the begin
                return
            self._fed += len(data)
            if self._in_head and self._fed > limits.header_bytes + limits.target:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            elif self._in_body and self._fed > limits.header_bytes + _SLACK * (self._taken + _PIECE):
                self._refuse(HTTPStatus.BAD_REQUEST)  # extensions of chunks, or trailers, without end

        def on_message_begin(self) -> None:
            """A request's first byte."""
            self._heads += 1
            self._in_head, self._in_body = True, False
            self._fed = self._taken = 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            """A field of the head, or of a trailer."""
            if self._in_head:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            """The head is whole: the request begins."""
            self._in_head, self._in_body = False, True
            self._fed = 0
            self._disarm()
            if self.transport.is_closing():
                return
            if not self.url.startswith(b"/"):
                self._refuse(HTTPStatus.BAD_REQUEST)
                return
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            """A piece of the body."""
            self._taken += len(body)
            if not self.transport.is_closing():
                super().on_body(body)

        def on_message_complete(self) -> None:
            """The request is whole."""
            self._in_body = False
            if not self.transport.is_closing():
                super().on_message_complete()

        def pause_writing(self) -> None:
            """The client does not read as fast as it is sent to."""
            super().pause_writing()
            self._unread = self.loop.call_later(limits.send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            """It has caught up."""
            self._read()
            super().resume_writing()

        def _read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _arm(self) -> None:
            if self._late is None:
                self._late = self.loop.call_later(limits.head_seconds, self._too_late)

        def _disarm(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _too_late(self) -> None:
            self._late = None
            if self.cycle is not None and not self.cycle.response_complete:
                self._arm()  # the answer before it takes its time: its client is not closed upon
            else:
                self._refuse(HTTPStatus.REQUEST_TIMEOUT)

        def _refuse(self, status: HTTPStatus) -> None:
            """Say so and close, unless an answer is under way: then only close."""
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete:
                line = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                self.transport.write(line.encode())
            self.transport.close()

    return Wire
