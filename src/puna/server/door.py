"""The door: who comes in, with what, and how much of it.

What it is: the middleware before every route (Host, Origin, keys, sizes, shapes, the request's id), the headers of
every response, and the limits of each key.
What it is not: a route, the keys' store (`keys.py`), or the parser of HTTP and its own limits (`wire.py`).
What is surprising: it is closed unless a path is named as open; a server without any key answers its own machine only,
and nothing that a proxy has passed on. A Host that is an address is always right: a page that was served under a
stranger's name can be led here by DNS rebinding, but then its Host is that name.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.errors import PunaError
from puna.server.caller import Caller
from puna.server.exchange import CURRENT, Exchange
from puna.server.keys import GENERATED, Key, KeyRing, KeyStore, digest_of
from puna.server.limits import Limits
from puna.server.nesting import Nesting
from puna.server.problems import RequestError, problem_of, protocol_of, shaped
from puna.server.rates import Rates, Suspects, reset_in
from puna.server.service import Call, new_id
from puna.types import Usage

LOG = logging.getLogger("puna.server")

OPEN_PATHS = frozenset({"/health", "/ready", "/"})
OPEN_PREFIXES = ("/page/",)
"""What answers without a key, whoever asks, and only to GET and HEAD: that the server is there, and the files of the
page, which are the same for everybody."""

FORM_PATHS = frozenset({"/v1/files"})
"""Where a body may be a form with files; everywhere else it is JSON."""

UNTYPED_PREFIX = "/api/"
"""Where a body is JSON whatever its type says: Ollama's clients name none, and the curl lines of its pages a form's. A
web page could send such a body to a server that it may not read from; but a browser says that it is one (`Origin`,
`Sec-Fetch-Site`), and is asked for the type."""

LOOPBACK_NAMES = frozenset({"localhost"})

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")
_KEY = re.compile(r"[\x21-\x7e]{1,512}")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f]|\\")
_JSON = re.compile(r"application/json(?:\s*;\s*charset=\"?utf-8\"?)?\s*;?", re.IGNORECASE)
_PROXIED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
_ONCE = ("host", "content-length", "transfer-encoding", "content-type", "authorization", "x-api-key", "origin")
_EXPOSED = "x-request-id, retry-after, x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens"
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 20


class Looker(Protocol):
    """Who is told of every exchange's end (`observe.Observatory`)."""

    def exchanged(self, exchange: Exchange) -> None:
        """It is over; nothing raised here may reach a client."""


@dataclass
class _Head:
    """A request's head, checked for shape: `names` holds what is read of the headers, by lower-case name."""

    method: str
    path: str
    names: dict[str, str]
    length: int | None
    chunked: bool

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)


@dataclass
class Door:
    """Who may do what.

    `keys` is the store of keys, `single_key` one key given at the start; with neither, or a store that never held a
    key, everybody of this machine may do everything (`loopback_only`; without it, everybody). `hosts` are the names
    that the server goes by, beside addresses and localhost; None: any. `origins` are those of web pages that may call
    it ("https://chat.example", or "*" for all), beside its own. `open_paths` and `open_prefixes` answer without a key.
    """

    keys: KeyStore | None = None
    single_key: str | None = None
    limits: Limits = field(default_factory=Limits)
    hosts: frozenset[str] | None = frozenset()
    origins: frozenset[str] = frozenset()
    open_paths: frozenset[str] = OPEN_PATHS
    open_prefixes: tuple[str, ...] = OPEN_PREFIXES
    loopback_only: bool = True

    def __post_init__(self) -> None:
        self._ring = KeyRing(self.keys) if self.keys is not None else None
        self._rates = Rates()
        self._held: Counter[str] = Counter()  # bytes of bodies under way, by key
        self._suspects = Suspects(self.limits.bad_keys, self.limits.addresses)
        single = self.single_key
        self._single = None if single is None else digest_of(single)
        self._guessable = single is not None and not GENERATED.fullmatch(single)
        self._hosts = None if self.hosts is None else LOOPBACK_NAMES | {name.lower() for name in self.hosts}

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The application behind the door."""

        async def entered(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._visit(app, scope, receive, send)
            elif scope["type"] == "lifespan":
                await app(scope, receive, send)
            else:  # there are no WebSockets here
                await receive()
                await send({"type": "websocket.close", "code": 1008})

        return entered

    async def close(self) -> None:
        """Write down what keys have used, and close their store."""
        if self._ring is not None:
            await self._ring.close()

    # -- limits of keys (service.Ledger) ---------------------------------------------------------------------------

    async def stands(self, caller: Caller) -> None:
        """See service.Ledger."""
        await self._standing(caller)

    async def _standing(self, caller: Caller) -> Key | None:
        if self._ring is None or not caller.key:
            return None
        await self._ring.refresh()
        key = self._ring.get(caller.key)
        if key is not None:
            self._in_force(key)
        return key

    async def admit(self, caller: Caller) -> None:
        """See service.Ledger: whether the key still stands, and has tokens left of its minute and its day. Requests
        of a minute were counted when they came in."""
        key = await self._standing(caller)
        if key is None or self._ring is None:
            return
        bucket = self._rates.bucket(key.id, "tokens", key.tokens_per_minute)
        if bucket is not None and (wait := bucket.seconds_until(1)) > 0:
            raise _too_many(f"the key's limit of {key.tokens_per_minute} tokens a minute", wait)
        if key.tokens_per_day is not None and self._ring.used_today(key.id) >= key.tokens_per_day:
            now = datetime.now(UTC)
            midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
            raise RequestError(
                f"The key's {key.tokens_per_day} tokens of today are used up.",
                remedy="They are counted anew from midnight UTC.",
                status=429,
                code="insufficient_quota",
                retry_after=(midnight - now).total_seconds(),
            )

    async def spent(self, call: Call, usage: Usage) -> None:
        """See service.Ledger. Remembered tokens of a prompt count as computed ones do."""
        if self._ring is None or (key := self._ring.get(call.caller.key)) is None:
            return
        tokens = usage.prompt_tokens + usage.completion_tokens
        if bucket := self._rates.bucket(key.id, "tokens", key.tokens_per_minute):
            bucket.take(tokens)
        if tokens:
            self._ring.spend(key.id, tokens)

    # -- a visit ---------------------------------------------------------------------------------------------------

    async def _visit(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(id=new_id("req_"), method=str(scope["method"])[:16], path=str(scope["path"])[:256])
        client = scope.get("client")
        exchange.address = str(client[0]) if client else ""
        state = scope.setdefault("state", {})
        state["request_id"], state["caller"], state["exchange"] = exchange.id, Caller(scopes=frozenset()), exchange
        answer = _Answer(exchange, send)
        body = _Body(receive, self.limits, self._held)
        answer.body = body
        token = CURRENT.set(exchange)
        try:
            try:
                head = self._head(scope, exchange, answer)
                state["request_id"] = exchange.id
                if not self._preflight(head, answer):
                    caller = await self._let_in(scope, head, exchange, answer)
                    state["caller"] = caller
                    exchange.key, exchange.name = caller.key, caller.name
                    body.expect(head, caller.key)
                    await app(scope, body.receive, answer.send)
                else:
                    await answer.nothing(204)
            except RequestError as error:
                exchange.refused = exchange.refused or error.code
                await answer.fail(error)
            except Exception as error:
                if not isinstance(error, PunaError):
                    LOG.error("request %s failed", exchange.id, exc_info=error)
                if not await answer.fail(error):
                    raise
        finally:
            body.let_go()
            CURRENT.reset(token)
            exchange.seconds = time.monotonic() - exchange.began
            exchange.route = _template(scope)
            looker = getattr(getattr(scope.get("app"), "state", None), "observatory", None)
            if looker is not None:
                looker.exchanged(exchange)

    def _head(self, scope: Scope, exchange: Exchange, answer: _Answer) -> _Head:
        """The head, where its shape is right. Raises RequestError."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        limits = self.limits
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        if len(headers) > limits.headers or sum(len(n) + len(v) + 4 for n, v in headers) > limits.header_bytes:
            raise RequestError(
                f"A request has at most {limits.headers} header lines, {limits.header_bytes} bytes together.",
                status=431, code="headers_too_large",
            )  # fmt: skip
        names: dict[str, str] = {}
        for name, value in headers:
            word = name.decode("latin-1").lower()
            if word in names and word in _ONCE:
                raise _malformed(f"The header {word} is given twice.")
            names.setdefault(word, value.decode("latin-1").strip())
        if _ID.fullmatch(given := names.get("x-request-id", "")):
            exchange.id = given
        exchange.traceparent, exchange.tracestate = names.get("traceparent", ""), names.get("tracestate", "")[:512]
        if len(raw) + len(scope.get("query_string", b"")) > limits.target:
            raise RequestError(
                f"A path and its query have at most {limits.target} bytes.", status=414, code="target_too_long"
            )
        method = scope["method"]
        if method not in _METHODS:
            raise RequestError(f"{method[:16]} is no method here.", status=405, code="method_not_allowed")
        if scope.get("http_version") not in ("1.0", "1.1", "2", "3"):
            raise RequestError("This version of HTTP is not spoken here.", status=505, code="http_version")
        try:
            path = unquote_to_bytes(raw).decode()
        except UnicodeDecodeError:
            raise _malformed("The path is not UTF-8.") from None
        if not path.startswith("/") or _UNSEEN.search(path):
            raise _malformed("The path has characters that no path has, or does not begin with a slash.")
        length = names.get("content-length")
        chunked = "transfer-encoding" in names
        if chunked and length is not None:
            raise _malformed("Content-Length and Transfer-Encoding are both given.")
        if chunked and names["transfer-encoding"].lower() != "chunked":
            raise _malformed("The only transfer encoding is chunked.")
        if length is not None and not (length.isascii() and length.isdigit() and len(length) < 19):
            raise _malformed("Content-Length is no length.")
        head = _Head(method, path, names, None if length is None else int(length), chunked)
        self._check_host(head, scope)
        self._check_origin(head, answer)
        return head

    def _check_host(self, head: _Head, scope: Scope) -> None:
        host = head.names.get("host")
        if host is None:
            if scope.get("http_version") == "1.0":
                return
            raise _malformed("The header Host is missing.")
        found = _HOST.fullmatch(host)
        if found is None:
            raise _malformed("The header Host is no host.")
        name = found[1].lower().removesuffix(".")
        if self._hosts is None or name in self._hosts or _is_address(name):
            return
        raise RequestError(
            f"This server does not go by the name {name[:80]}.",
            remedy="Who runs it can allow the name.",
            status=421,
            code="host_not_allowed",
        )

    def _check_origin(self, head: _Head, answer: _Answer) -> None:
        """Web pages of others may not do anything here, and may read only where their origin is configured."""
        origin = head.names.get("origin")
        if origin is None:
            return
        if origin in self.origins or ("*" in self.origins and origin != "null"):
            answer.allow(origin)
            return
        if _authority(origin) == head.names.get("host", "").lower() and origin != "null":
            return
        if head.method not in _SAFE or (head.method == "OPTIONS"):
            raise RequestError(
                "Web pages of this origin may not use the server.",
                remedy="Who runs it can allow the origin.",
                status=403,
                code="origin_not_allowed",
            )

    def _preflight(self, head: _Head, answer: _Answer) -> bool:
        """Answer a browser that asks, before it sends a request, whether it may."""
        asked = head.names.get("access-control-request-method")
        if head.method != "OPTIONS" or asked is None or not answer.allowed:
            return False
        wanted = head.names.get("access-control-request-headers", "")
        fine = [word for word in wanted.lower().replace(" ", "").split(",") if re.fullmatch(r"[a-z0-9-]{1,64}", word)]
        answer.headers["access-control-allow-methods"] = ", ".join(sorted(_METHODS))
        if fine:
            answer.headers["access-control-allow-headers"] = ", ".join(fine[:64])
        answer.headers["access-control-max-age"] = "600"
        return True

    async def _let_in(self, scope: Scope, head: _Head, exchange: Exchange, answer: _Answer) -> Caller:
        """Who asks, where they may come in with what they bring. Raises RequestError."""
        path = head.path
        is_open = path in self.open_paths or any(path.startswith(prefix) for prefix in self.open_prefixes)
        if is_open and head.method in _SAFE:
            return Caller(scopes=frozenset())
        caller = await self._caller(head, exchange, answer)
        app = scope.get("app")
        if head.method not in _SAFE and getattr(getattr(app, "state", None), "draining", False):
            raise RequestError(
                "The server is shutting down and takes nothing new in.", remedy="Try again.", status=503,
                code="draining", retry_after=5,
            )  # fmt: skip
        if head.length is not None and head.length > self.limits.body:
            raise _too_large(self.limits.body)
        if head.has_body:
            if head.names.get("content-encoding", "identity").lower() != "identity":
                raise RequestError(
                    "Compressed bodies are not taken.", remedy="Send it as it is.", status=415,
                    code="unsupported_media_type",
                )  # fmt: skip
            if path.startswith(UNTYPED_PREFIX) and not {"origin", "sec-fetch-site"} & head.names.keys():
                others = [pair for pair in scope["headers"] if pair[0].lower() != b"content-type"]
                scope["headers"] = [*others, (b"content-type", b"application/json")]
                head.names["content-type"] = "application/json"
            kind = head.names.get("content-type", "")
            form = path in FORM_PATHS and kind.lower().startswith("multipart/form-data")
            if not form and not _JSON.fullmatch(kind):
                raise RequestError(
                    "The body must be JSON in UTF-8.",
                    remedy="Send the header Content-Type: application/json.",
                    status=415,
                    code="unsupported_media_type",
                )
        return caller

    async def _caller(self, head: _Head, exchange: Exchange, answer: _Answer) -> Caller:
        if self._ring is not None:
            await self._ring.refresh()
        needed = self._single is not None or bool(self._ring)
        if not needed:
            if self.loopback_only and (not _is_loopback(exchange.address) or any(n in head.names for n in _PROXIED)):
                raise RequestError(
                    "This server has no keys, and so answers only its own machine.",
                    remedy="`puna keys add NAME` makes a key there.",
                    status=401,
                    code="no_keys",
                )
            return Caller()
        given = _given_key(head.names)
        wait = self._suspects.wait(exchange.address)
        if given is not None:
            key = self._ring.find(given) if self._ring is not None else None
            single = self._single is not None and hmac.compare_digest(self._single, digest_of(given))
            if key is not None:  # it was not guessed, whoever else has tried from there
                self._in_force(key)
                self._count(key, answer)
                return key.caller()
            if single and not (self._guessable and wait > 0):
                return Caller(name="--api-key")
            if wait <= 0:
                self._suspects.note(exchange.address)
        if wait > 0:
            raise _too_many("the limit of wrong keys from one address", wait)
        if given is None:
            raise RequestError(
                "This server needs an API key.",
                remedy="Send it as Authorization: Bearer KEY, or as x-api-key.",
                status=401,
                code="missing_api_key",
            )
        raise RequestError("This API key is not known here.", status=401, code="invalid_api_key")

    def _in_force(self, key: Key) -> None:
        state = key.state(time.time())
        if state != "active":
            raise RequestError(
                f"This API key is {state}.", remedy="Ask who runs the server for another.", status=401,
                code="invalid_api_key",
            )  # fmt: skip

    def _count(self, key: Key, answer: _Answer) -> None:
        """One request more of this key. Raises RequestError where that is one too many."""
        requests = self._rates.bucket(key.id, "requests", key.requests_per_minute)
        answer.told = lambda: self._told(key)
        if requests is not None:
            if (wait := requests.seconds_until(1)) > 0:
                raise _too_many(f"the key's limit of {key.requests_per_minute} requests a minute", wait)
            requests.take(1)

    def _told(self, key: Key) -> dict[str, str]:
        """OpenAI's headers of limits, https://platform.openai.com/docs/guides/rate-limits."""
        told = {}
        for what, most in (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute)):
            if bucket := self._rates.bucket(key.id, what, most):
                told[f"x-ratelimit-limit-{what}"] = str(bucket.most)
                told[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.level())))
                told[f"x-ratelimit-reset-{what}"] = reset_in(bucket.seconds_until(bucket.most))
        return told


class _Body:
    """The body on its way in: counted, timed, and looked at before a parser sees it.

    What is wrong is raised to whoever reads, and kept: frameworks turn what they are raised into words of their own.
    """

    def __init__(self, receive: Receive, limits: Limits, held: Counter[str]) -> None:
        self._receive, self._limits, self._held = receive, limits, held
        self._size = self._taken = 0
        self._key = ""
        self._nesting: Nesting | None = None
        self._ends = 0.0
        self.whole = True
        self.problem: RequestError | None = None

    def expect(self, head: _Head, key: str) -> None:
        """What kind of body comes, and whose."""
        self._key = key
        self.whole = not head.has_body
        self._ends = time.monotonic() + self._limits.whole_body_seconds
        if head.has_body and "json" in head.names.get("content-type", "").lower():
            self._nesting = Nesting(self._limits.depth)

    async def receive(self) -> Message:
        """The next piece (ASGI). Raises RequestError."""
        if self.whole:
            return await self._receive()
        try:
            return await self._checked()
        except RequestError as error:
            self.problem = error
            raise

    async def _checked(self) -> Message:
        left = min(self._limits.body_seconds, self._ends - time.monotonic())
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            raise RequestError("The body came too slowly.", status=408, code="request_timeout") from None
        if message["type"] != "http.request":
            self.whole = True
            return message
        piece: bytes = message.get("body", b"")
        self._size += len(piece)
        if self._size > self._limits.body:
            raise _too_large(self._limits.body)
        self._hold()
        if self._nesting is not None and piece:
            await self._nesting.feed(piece)
        self.whole = not message.get("more_body", False)
        return message

    def _hold(self) -> None:
        """Count what has come among all that is held. Raises RequestError where that is too much."""
        limits, held = self._limits, self._held
        more = max(0, self._size - limits.small_body) - self._taken
        if more <= 0:
            return
        # A key alone may have all that one body takes, and else half: the rest is for the others.
        own = max(limits.body, limits.bodies // 2) if self._key else limits.bodies
        if held.total() + more > limits.bodies or held[self._key] + more > own:
            raise RequestError(
                "Too many large bodies are under way.", remedy="Try again.", status=503, code="busy", retry_after=5
            )
        held[self._key] += more
        self._taken += more

    def let_go(self) -> None:
        """The request is over, and its body gone."""
        self._held[self._key] -= self._taken
        self._taken = 0
        if not self._held[self._key]:
            del self._held[self._key]

    async def linger(self) -> None:
        """Read on for a moment and throw it away, so that a client in the middle of sending hears the answer before the
        connection is closed."""
        left = _LINGER_BYTES
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b"")) + 1
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return


class _Answer:
    """The response on its way out, with the headers that every response has."""

    body: _Body

    def __init__(self, exchange: Exchange, send: Send) -> None:
        self._exchange, self._send = exchange, send
        self.headers: dict[str, str] = {}
        self.allowed = False
        self.told: Any = dict
        self.started = self._muted = False

    def allow(self, origin: str) -> None:
        """Let pages of this origin read the response."""
        self.allowed = True
        self.headers |= {
            "access-control-allow-origin": origin, "vary": "Origin", "access-control-expose-headers": _EXPOSED,
        }  # fmt: skip

    async def send(self, message: Message) -> None:
        """Pass a message of the application on (ASGI); its response to what the door refused is replaced."""
        if self._muted:
            return
        if not self.started:
            if self.body.problem is not None:
                self._muted = True
                self._exchange.refused = self.body.problem.code
                await self.fail(self.body.problem)
                return
            self.started = True
            self._exchange.status = message["status"]
            message["headers"] = self._complete(list(message.get("headers", [])))
        await self._send(message)

    def _complete(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        own = {
            "x-request-id": self._exchange.id,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
            **({} if self.allowed else {"cross-origin-resource-policy": "same-origin"}),
            **self.headers,
            **self.told(),
        }
        there = {name.lower() for name, _ in headers}
        for name, value in own.items():
            if (word := name.encode()) not in there:
                headers.append((word, value.encode("latin-1")))
        return headers

    async def nothing(self, status: int) -> None:
        """A response without content."""
        await self._whole(status, {}, b"")

    async def fail(self, error: Exception) -> bool:
        """Tell the error in the words of the path's protocol; False where a response has begun already."""
        if self.started:
            return False
        problem = problem_of(error, self._exchange.id)
        data = json.dumps(shaped(problem, protocol_of(self._exchange.path))).encode()
        headers = {"content-type": "application/json", **{k.lower(): v for k, v in problem.headers.items()}}
        await self._whole(problem.status, headers, data)
        return True

    async def _whole(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.started = True
        self._exchange.status = status
        if status != 204:
            headers["content-length"] = str(len(data))
        early = not self.body.whole
        if early:
            headers["connection"] = "close"
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": self._complete(raw)})
        if self._exchange.method == "HEAD":
            data = b""
        if early:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            await self.body.linger()
            data = b""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


def open_door() -> Door:
    """A door that lets everybody do everything: for tests, and for a program that brings its own."""
    return Door(hosts=None, loopback_only=False)


def allowed_hosts(bound: str, names: Iterable[str] = ()) -> frozenset[str]:
    """The names for `Door.hosts` of a server bound to this address or name, and known by these too."""
    return frozenset(name.lower() for name in (bound, *names) if name and not _is_address(name.lower()))


def _given_key(names: dict[str, str]) -> str | None:
    """The key that a request brings. Raises RequestError for two different ones, and for what is none."""
    found = []
    if bearer := names.get("authorization"):
        kind, _, word = bearer.partition(" ")
        if kind.lower() != "bearer":
            raise RequestError("The header Authorization must be: Bearer KEY.", status=401, code="invalid_api_key")
        found.append(word.strip())
    if other := names.get("x-api-key"):
        found.append(other)
    if len(set(found)) > 1:
        raise RequestError("The request brings two different keys.", status=401, code="invalid_api_key")
    if found and not _KEY.fullmatch(found[0]):
        raise RequestError("This API key is not known here.", status=401, code="invalid_api_key")
    return found[0] if found else None


def _authority(origin: str) -> str:
    """Host and port of an origin, "" where it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # "http://[" is none
        return ""


def _template(scope: Scope) -> str:
    """The path of the route that answered, its parameters by name."""
    return str(getattr(scope.get("route"), "path", ""))


def _is_address(name: str) -> bool:
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    """Whether a client is on this machine; one without an address came through a socket of the file system."""
    if not address:
        return True
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _malformed(what: str) -> RequestError:
    return RequestError(what, status=400, code="malformed_request")


def _too_large(most: int) -> RequestError:
    return RequestError(f"A body has at most {most} bytes here.", status=413, code="body_too_large")


def _too_many(what: str, wait: float) -> RequestError:
    return RequestError(
        f"This is over {what}.", remedy=f"Try again in {reset_in(wait)}.", status=429,
        code="rate_limit_exceeded", retry_after=-(-wait // 1),
    )  # fmt: skip
