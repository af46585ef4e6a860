"""Pictures that lie elsewhere on the net: fetched from hosts that an operator named, and from no other.

What it is: `Fetcher`, which puts the picture itself where a message only names one (`pictures.Elsewhere`).
What it is not: a general client. It speaks HTTPS to names, sends nothing that a client chose but the path, and knows no
proxy, cookie or password.
What is surprising: a name is looked up once, and that address is connected to, with the name in TLS and in `Host`; who
answers the second question otherwise is not asked one. One address that is not public is enough to refuse a name. A
redirect is a new address: it is checked as the first was. What a host says of its answer (type, length) is not
believed, and a URL is held to one pattern and never parsed twice, so that no two readers can differ over it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urljoin
from weakref import WeakValueDictionary

from puna.errors import UsageError
from puna.server.limits import (
    MAX_FETCHED,
    MAX_HELD,
    MAX_HOPS,
    MAX_TARGET_BYTES,
    PICTURE_SECONDS,
    PICTURES_AT_ONCE,
)
from puna.server.pictures import KINDS, Elsewhere, check_sight
from puna.server.problems import RequestError
from puna.types import Backend, Message, Picture, Prompt

if TYPE_CHECKING:
    import ssl

    import httpx2

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a name, as text, in the order in which they should be tried."""

_NAME = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*"
_PLACE = rf"({_NAME})(?::([0-9]{{1,5}}))?"
_HOST = re.compile(_PLACE, re.I | re.A)
_URL = re.compile(rf"https://{_PLACE}([/?][a-z0-9._~:/?\[\]@!$&'()*+,;=%-]*)?(?:#[!-~]*)?", re.I | re.A)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.I)
"""A last label that makes of a name an IPv4 address, in one of its many spellings (https://url.spec.whatwg.org)."""

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


async def addresses(host: str, port: int) -> list[str]:
    """What the system says. Raises OSError, UnicodeError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(each[4][0]) for each in found]


def is_public(address: str) -> bool:
    """Whether it is an address of the public net: not this machine's, a private or shared net's, a link's, a group's,
    a reserved one, and none of IPv6 that stands for one of IPv4 (mapped, 6to4, Teredo, NAT64)."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address) and (
        found not in _GLOBAL_UNICAST or found.sixtofour is not None or found.teredo is not None
    ):
        return False
    return found.is_global and not found.is_multicast


def host_of(word: str) -> str:
    """A host as an operator names it, `NAME` or `NAME:PORT`, the port always there. Raises UsageError for others."""
    found = _HOST.fullmatch(word.strip())
    if found is None or len(found[1]) > 253 or _NUMBER.fullmatch(found[1].rpartition(".")[2]):
        raise UsageError(
            f"--image-hosts {word[:100]!r} is no name of a host.",
            remedy="It is like images.example.com, or images.example.com:8443; subdomains are named one by one.",
        )
    return f"{found[1].lower()}:{int(found[2] or 443)}"


class Fetcher:
    """Fetches pictures from these hosts (`host_of`'s words), none by default.

    `resolve` gives addresses, `public` judges them, `context` is TLS's; tests bring their own, and a `transport`.
    Raises UsageError for what is no host.
    """

    def __init__(
        self,
        hosts: Iterable[str] = (),
        *,
        resolve: Resolve = addresses,
        public: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = frozenset(host_of(each) for each in hosts)
        self._resolve, self._public, self._context, self._transport = resolve, public, context, transport
        self._slots = asyncio.Semaphore(PICTURES_AT_ONCE)
        self._held = WeakValueDictionary[int, Picture]()
        self._count = self._coming = 0

    async def seen(self, prompt: Prompt) -> Prompt:
        """A prompt with every picture at hand; another is given back as it is. Raises as `fetched`."""
        if not isinstance(prompt, tuple):
            return prompt
        messages = tuple(each for each in prompt if isinstance(each, Message))
        return await self.fetched(messages) if messages else prompt

    async def fetched(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Messages with every picture at hand. Raises RequestError, naming the field, for a URL that is not fetched."""
        if not any(isinstance(each, Elsewhere) for message in messages for _, each in message.pictures):
            return messages
        here: dict[str, Picture] = {}
        left = MAX_FETCHED
        made: list[Message] = []
        for message in messages:
            pictures: list[tuple[int, Picture]] = []
            for at, each in message.pictures:
                if isinstance(each, Elsewhere):
                    if each.url not in here:
                        here[each.url] = await self._one(each, left)
                        left -= len(here[each.url].data)
                    each = here[each.url]
                pictures.append((at, each))
            made.append(replace(message, pictures=tuple(pictures)))
        return tuple(made)

    async def _one(self, picture: Elsewhere, most: int) -> Picture:
        """The picture, of at most so many bytes."""
        import httpx2

        from puna.text.pictures import check_length

        if not self._hosts:
            raise _refusal(picture, "is not honoured: pictures are not fetched from elsewhere", "unsupported_parameter")
        data = bytearray()
        held = sum(len(each.data) for each in self._held.values())

        def take(piece: bytes) -> None:
            data.extend(piece)
            self._coming += len(piece)
            check_length(len(data))
            if len(data) > most:
                raise _refusal(picture, f"and those before it have more than {MAX_FETCHED:,} bytes")
            if held + self._coming > MAX_HELD:
                raise RequestError(
                    "Too many pictures are under way.", remedy="Try again.", status=503, code="busy", retry_after=5
                )

        url = picture.url
        try:
            async with self._slots, asyncio.timeout(PICTURE_SECONDS):
                for _ in range(MAX_HOPS + 1):
                    onward = await self._hop(url, picture, take)
                    if onward is None:
                        break
                    url = onward
                else:
                    raise _refusal(picture, f"leads on more than {MAX_HOPS} times")
        except TimeoutError:
            raise _refusal(picture, f"did not come within {PICTURE_SECONDS:g} seconds") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError):
            raise _refusal(picture, "cannot be fetched: its host does not answer as it should") from None
        finally:
            self._coming -= len(data)
        if not data:
            raise _refusal(picture, "is empty")
        made = Picture(bytes(data))
        self._count += 1
        self._held[self._count] = made
        return made

    async def _hop(self, url: str, picture: Elsewhere, take: Callable[[bytes], None]) -> str | None:
        """Take what lies at a URL; where it leads on, say where to. Raises what httpx2 and the system raise."""
        import httpx2

        host, port, target = self._parts(url, picture)
        found = await self._resolve(host, port)
        if not found or not all(self._public(each) for each in found):
            raise _refusal(picture, f"is not fetched: {host} is no host of the public net")
        address = f"[{found[0]}]" if ":" in found[0] else found[0]
        if self._context is None:
            self._context = httpx2.create_ssl_context(trust_env=False)
        # A client a hop: nothing that one host said (a cookie, an open connection) is of use for another.
        client = httpx2.AsyncClient(
            verify=self._context,
            transport=self._transport,
            trust_env=False,
            follow_redirects=False,
            timeout=PICTURE_SECONDS,
        )
        headers = {
            "Host": host if port == 443 else f"{host}:{port}",
            "User-Agent": "puna",
            "Accept": ", ".join(KINDS),
            "Accept-Encoding": "identity",
        }
        async with client:
            request = client.build_request(
                "GET", f"https://{address}:{port}{target}", headers=headers, extensions={"sni_hostname": host}
            )
            response = await client.send(request, stream=True)
            try:
                if response.status_code in (301, 302, 303, 307, 308) and "location" in response.headers:
                    return _joined(url, response.headers["location"])
                if response.status_code != 200:
                    raise _refusal(picture, f"cannot be fetched: its host answers {response.status_code}")
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    raise _refusal(picture, "cannot be fetched: its host packs what was asked for as it is")
                async for piece in response.aiter_raw():
                    take(piece)
            finally:
                await response.aclose()
        return None

    def _parts(self, url: str, picture: Elsewhere) -> tuple[str, int, str]:
        """Host, port and path with query of a URL that may be fetched. Raises RequestError for another."""
        found = _URL.fullmatch(url) if len(url) <= MAX_TARGET_BYTES else None
        if found is None:
            raise _refusal(picture, "is no URL of the form https://name/path, which is all that is fetched")
        host, port, target = found[1].lower(), int(found[2] or 443), found[3] or "/"
        if f"{host}:{port}" not in self._hosts:
            raise _refusal(picture, f"is not fetched: {host[:100]} is no host that this server fetches pictures from")
        return host, port, target if target.startswith("/") else f"/{target}"


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:  # of a location that is no URL
        return ""


async def at_hand(fetcher: Fetcher, backend: Backend, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Messages for a model, which must see where they hold pictures, each fetched. Raises RequestError."""
    check_sight(backend, messages)
    return await fetcher.fetched(messages)


def _refusal(picture: Elsewhere, why: str, code: str = "invalid_image_url") -> RequestError:
    remedy = "Send the picture itself: data:image/png;base64,..."
    return RequestError(f"{picture.param} {why}.", remedy=remedy, code=code, param=picture.param)
