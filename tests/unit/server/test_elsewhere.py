"""Pictures that lie elsewhere: fetched from the hosts that were named, at the address that was looked up, or refused.

Nothing here asks the net: names are looked up by scripts, and answers come from scripts, or from a server of TLS on
this machine, whose certificate is for a name that only its test knows.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from puna.errors import PictureError, UsageError
from puna.gateway.one import OneModel
from puna.gateway.scripted import CARD, ScriptedBackend
from puna.server import elsewhere
from puna.server.app import create_app
from puna.server.elsewhere import Fetcher, host_of, is_public
from puna.server.pictures import Elsewhere
from puna.server.problems import RequestError
from puna.types import Message, Picture

HOST, OTHER, PUBLIC = "images.example.com", "cdn.example.com", "93.184.216.34"
PNG = b"\x89PNG somewhere"

Answer = Callable[[httpx2.Request], httpx2.Response]


def came(status: int = 200, data: bytes = PNG, **headers: str) -> httpx2.Response:
    """An answer that is not read yet."""

    async def pieces() -> AsyncIterator[bytes]:
        yield data

    return httpx2.Response(status, content=pieces(), headers=headers)


class Net:
    """A net of which names and answers are scripted; what was asked of both is kept."""

    def __init__(self, answer: Answer | None = None, *lookups: list[str]) -> None:
        self.asked: list[httpx2.Request] = []
        self.looked_up: list[tuple[str, int]] = []
        self._answer, self._lookups = answer or (lambda _: came()), list(lookups)

    async def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append((host, port))
        return self._lookups.pop(0) if self._lookups else [PUBLIC]

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request)
        return self._answer(request)

    def fetcher(self, *hosts: str) -> Fetcher:
        return Fetcher(hosts or (HOST, OTHER), resolve=self.resolve, transport=httpx2.MockTransport(self.answer))

    def fetch(self, *urls: str, hosts: tuple[str, ...] = ()) -> list[bytes]:
        pictures = tuple((0, Elsewhere(b"", url, "url")) for url in urls)
        fetcher = self.fetcher(*hosts)
        made = asyncio.run(fetcher.fetched((Message("user", "x", pictures=pictures),)))
        return [each.data for _, each in made[0].pictures]

    def refused(self, url: str, *hosts: str) -> str:
        with pytest.raises(RequestError) as caught:
            self.fetch(url, hosts=hosts)
        assert (caught.value.status, caught.value.param) == (400, "url")
        return str(caught.value)


def test_it_connects_to_the_address_that_was_looked_up_by_the_name_that_was_asked() -> None:
    net = Net(None, ["2606:2800:220:1:248:1893:25c8:1946", PUBLIC], ["127.0.0.1"])
    assert net.fetch(f"https://{HOST.upper()}/a%20b/c.png?size=2&x=y#part") == [PNG]
    (asked,) = net.asked
    assert net.looked_up == [(HOST, 443)]  # a name that would answer otherwise the second time is not asked again
    assert str(asked.url) == "https://[2606:2800:220:1:248:1893:25c8:1946]/a%20b/c.png?size=2&x=y"
    assert asked.extensions["sni_hostname"] == asked.headers["host"] == HOST
    assert not {"cookie", "authorization", "referer"} & set(asked.headers)


def test_a_name_that_leads_home_is_refused_whenever_it_does() -> None:
    net = Net(None, [PUBLIC], ["127.0.0.1"])
    assert net.fetch(f"https://{HOST}/a") == [PNG]
    assert "no host of the public net" in net.refused(f"https://{HOST}/a")
    assert len(net.asked) == 1


@pytest.mark.parametrize(
    "found",
    [
        "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "198.18.0.1", "192.0.2.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1",
        "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "ff0e::1", "::ffff:10.0.0.1",
        "::ffff:93.184.216.34", "::93.184.216.34", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::",
        "2001:db8::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "", "localhost", "2130706433",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_refuses_its_name_among_others_too(found: str) -> None:
    net = Net(None, [PUBLIC, found])
    told = net.refused(f"https://{HOST}/")
    assert HOST in told
    assert "127." not in told
    assert net.asked == []


def test_public_addresses_are() -> None:
    assert all(map(is_public, (PUBLIC, "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::200e")))


def test_a_name_without_addresses_is_refused() -> None:
    assert "no host of the public net" in Net(None, []).refused(f"https://{HOST}/")


SPELLINGS = [
    "http://images.example.com/",
    "https://127.0.0.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.1/",
    "https://[::1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://localhost/",
    "https://images.example.com@127.0.0.1/",
    "https://127.0.0.1@images.example.com/",
    "https://user:word@images.example.com/",
    "https://127.0.0.1\\@images.example.com/",
    "https://images.example.com\\@127.0.0.1/",
    "https://images.example.com\\.evil.example/",
    "https://images.example.com#@127.0.0.1/",
    "https://images.example.com./",
    "https://images.example.com:80/",
    "https://images.example.com:99999/",
    "https://images.example.com:/",
    "https://images.example.com:443:443/",
    "https://images.example.com%2f@127.0.0.1/",
    "https://images.example.com.evil.example/",
    "https://evil-images.example.com/",
    "https://sub.images.example.com/",
    "https://example.com/",
    "https://images。example。com/",
    "https://ımages.example.com/",
    "https://images.example.com/a b",
    "https://images.example.com/a\r\nHost: evil",
    "https://images.example.com/\x00",
    "https://images.example.com/é",
    "https:images.example.com/",
    "https:/images.example.com/",
    "https:///images.example.com/",
    "https:\\\\images.example.com/",
    " https://images.example.com/",
    "https://images.example.com/" + 9000 * "a",
    "https://",
]


@pytest.mark.parametrize("url", SPELLINGS)
def test_another_spelling_of_a_place_is_no_way_to_it(url: str) -> None:
    net = Net()
    if url == "https://images.example.com#@127.0.0.1/":  # a fragment, which stays at home
        assert net.fetch(url) == [PNG]
        assert str(net.asked[0].url) == f"https://{PUBLIC}/"
        return
    net.refused(url)
    assert (net.looked_up, net.asked) == ([], [])


def test_the_same_letters_by_unicodes_rules_are_others() -> None:
    net = Net()
    net.refused("https://\u212ait.example.com/", "kit.example.com")  # the sign of Kelvin
    assert net.looked_up == []
    assert net.fetch("https://KIT.example.com", hosts=("kit.example.com",)) == [PNG]


def test_without_hosts_nothing_is_fetched() -> None:
    net = Net()
    fetcher = Fetcher((), resolve=net.resolve)
    with pytest.raises(RequestError, match="not fetched from elsewhere"):
        asyncio.run(fetcher.fetched((Message("user", "", pictures=((0, Elsewhere(b"", f"https://{HOST}/", "p")),)),)))
    assert net.looked_up == []


@pytest.mark.parametrize(
    "word",
    ["", "127.0.0.1", "0x7f000001", "2130706433", "[::1]", "https://a.example", "a.example/", "*.example", "a.example.",
     "u@a.example", "a.1", "a:x", "a..b", "-a.example", 254 * "a"],
)  # fmt: skip
def test_a_host_is_named_plainly(word: str) -> None:
    with pytest.raises(UsageError, match="no name of a host"):
        Fetcher((word,))


def test_a_host_has_a_port() -> None:
    assert host_of("Images.Example.COM") == "images.example.com:443"
    net = Net()
    assert net.fetch("https://a.example:8443/x", hosts=("a.example:8443",)) == [PNG]
    assert net.asked[0].headers["host"] == "a.example:8443"
    assert "no host that this server fetches" in net.refused("https://a.example/x", "a.example:8443")


def leads(*where: str) -> Answer:
    """Answers that lead on, one after the other; then the picture."""
    left = list(where)
    return lambda _: httpx2.Response(302, headers={"location": left.pop(0)}) if left else came()


def test_a_redirect_is_a_new_address() -> None:
    net = Net(leads("/b", f"//{OTHER}/c", "d?e"))
    assert net.fetch(f"https://{HOST}/a") == [PNG]
    assert [(each.headers["host"], each.url.raw_path) for each in net.asked] == [
        (HOST, b"/a"), (HOST, b"/b"), (OTHER, b"/c"), (OTHER, b"/d?e"),
    ]  # fmt: skip
    assert net.looked_up == [(HOST, 443), (HOST, 443), (OTHER, 443), (OTHER, 443)]


@pytest.mark.parametrize(
    "where",
    ["http://images.example.com/", "https://127.0.0.1/", "https://[::1]/", "//evil.example/", "file:///etc/passwd",
     "\\\\evil.example/", "https://images.example.com@127.0.0.1/", "https://[", "gopher://images.example.com/"],
)  # fmt: skip
def test_a_redirect_leads_nowhere_else(where: str) -> None:
    net = Net(leads(where))
    net.refused(f"https://{HOST}/a")
    assert len(net.asked) == 1


def test_redirects_are_few_and_each_is_looked_up() -> None:
    net = Net(leads("/1", "/2", "/3", "/4"))
    assert "leads on more than 3 times" in net.refused(f"https://{HOST}/0")
    net = Net(leads("/1"), [PUBLIC], ["10.0.0.1"])
    assert "no host of the public net" in net.refused(f"https://{HOST}/0")
    assert len(net.asked) == 1


@pytest.mark.parametrize("status", [204, 206, 300, 304, 403, 404, 500])
def test_only_200_is_a_picture(status: int) -> None:
    assert f"answers {status}" in Net(lambda _: came(status)).refused(f"https://{HOST}/")


def test_an_answer_is_taken_as_it_is_and_no_further_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        while True:
            given.append(1)
            yield bytes(1 << 20)

    def lying(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=endless(), headers={"content-type": "image/png"})

    with pytest.raises(PictureError, match="bytes; at most"):
        Net(lying).fetch(f"https://{HOST}/")
    assert len(given) < 40
    assert Net(lambda _: came(**{"content-type": "text/html"})).fetch(f"https://{HOST}/") == [PNG]
    packed = Net(lambda _: came(**{"content-encoding": "gzip"}))
    assert "packs" in packed.refused(f"https://{HOST}/")
    assert "is empty" in Net(lambda _: came(data=b"")).refused(f"https://{HOST}/")
    monkeypatch.setattr(elsewhere, "MAX_FETCHED", len(PNG) + 1)
    assert Net().fetch(f"https://{HOST}/a", f"https://{HOST}/a") == [PNG, PNG]  # once
    with pytest.raises(RequestError, match="those before it"):
        Net().fetch(f"https://{HOST}/a", f"https://{HOST}/b")


def test_what_all_requests_hold_is_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "MAX_HELD", 2 * len(PNG))
    fetcher = Net().fetcher()

    def one() -> Any:
        pictures = ((0, Elsewhere(b"", f"https://{HOST}/", "p")),)
        return asyncio.run(fetcher.fetched((Message("user", "", pictures=pictures),)))

    first, second = one(), one()
    with pytest.raises(RequestError) as caught:
        one()
    assert caught.value.status == 503
    assert first == second
    del first
    one()


def test_a_host_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "PICTURE_SECONDS", 0.05)

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    assert "did not come within" in Net(lambda _: httpx2.Response(200, content=never())).refused(f"https://{HOST}/")


def test_what_fails_on_the_way_tells_nothing_of_the_way() -> None:
    def fails(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("10.1.2.3 refused")

    told = Net(fails).refused(f"https://{HOST}/")
    assert "does not answer" in told
    assert "10.1.2.3" not in told

    async def unknown(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    net = Net()
    net.resolve = unknown  # type: ignore[method-assign]
    assert "does not answer" in net.refused(f"https://{HOST}/")


# Made for this test, for a name that is nobody's; the key is no secret.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRgQOq5NoO7em73HG
/RElmKD1K93uVzlb8AqmLAI3/E6hRANCAARP79Lb0q4OyoE8Ljpn9Fyij/Raew/E
QZWH8sI9c/L6G3vRH176FBSY2LVpvpnaTingG5U5IIJ6+CaMYugpqi9+
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBoTCCAUegAwIBAgIUX8iyv3cL5oYVYC4PsHKzb5LXV9YwCgYIKoZIzj0EAwIw
GDEWMBQGA1UEAwwNcGljdHVyZXMudGVzdDAgFw0yNjExMjQxOTE5NDdaGA8yMTI2
MTAzMTE5MTk0N1owGDEWMBQGA1UEAwwNcGljdHVyZXMudGVzdDBZMBMGByqGSM49
AgEGCCqGSM49AwEHA0IABE/v0tvSrg7KgTwuOmf0XKKP9Fp7D8RBlYfywj1z8vob
e9EfXvoUFJjYtWm+mdpOKeAblTkggnr4Joxi6CmqL36jbTBrMB0GA1UdDgQWBBSf
0WjLyRWbKfUwiIqD5v/oOf+ojDAfBgNVHSMEGDAWgBSf0WjLyRWbKfUwiIqD5v/o
Of+ojDAPBgNVHRMBAf8EBTADAQH/MBgGA1UdEQQRMA+CDXBpY3R1cmVzLnRlc3Qw
CgYIKoZIzj0EAwIDSAAwRQIhAKe8CKZBITe7r6+QjHYLgcn+v/9JOKhFvgepmp3K
IOM6AiAmouG7wF70Zha51Ovy7vncOxllHaCc/RiEPAmD6kwmow==
-----END CERTIFICATE-----
"""


def test_tls_is_for_the_name_at_the_address_that_was_looked_up(tmp_path: Path) -> None:
    pem = tmp_path / "server.pem"
    pem.write_text(CERTIFICATE)
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(PNG), PNG))
        await writer.drain()
        writer.close()

    async def main() -> None:
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ours.load_cert_chain(pem)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=ours)
        port = server.sockets[0].getsockname()[1]

        async def here(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        async def fetch(name: str, context: ssl.SSLContext | None) -> bytes:
            fetcher = Fetcher((f"{name}:{port}",), resolve=here, public=lambda _: True, context=context)
            picture = Elsewhere(b"", f"https://{name}:{port}/a.png", "p")
            made = await fetcher.fetched((Message("user", "", pictures=((0, picture),)),))
            return made[0].pictures[0][1].data

        async with server:
            assert await fetch("pictures.test", ssl.create_default_context(cafile=str(pem))) == PNG
            for name, context in (
                ("another.test", ssl.create_default_context(cafile=str(pem))),
                ("pictures.test", None),
            ):
                with pytest.raises(RequestError, match="does not answer"):
                    await fetch(name, context)
        assert len(heard) == 1
        assert heard[0].startswith(b"GET /a.png HTTP/1.1\r\n")
        assert b"host: pictures.test:%d\r\n" % port in heard[0].lower()

    asyncio.run(main())


ROUTES: list[tuple[str, dict[str, Any], str]] = [
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "@"}}]}]},
        "messages.0.content.0.image_url.url",
    ),
    (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "@", "detail": "auto"}]}]},
        "input.0.content.0.image_url",
    ),
    (
        "/v1/messages",
        {
            "max_tokens": 5,
            "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "@"}}]}],
        },
        "messages.0.content.0.source.url",
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), ROUTES)
def test_every_protocol_fetches_through_it_and_only_for_a_model_that_sees(
    path: str, body: dict[str, Any], param: str
) -> None:
    def put(url: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: put(url, each) for key, each in value.items()}
        return [put(url, each) for each in value] if isinstance(value, list) else url if value == "@" else value

    def post(url: str, net: Net, *hosts: str, sees: bool = True) -> tuple[httpx.Response, tuple[Message, ...]]:
        backend = ScriptedBackend(card=replace(CARD, sees=sees))
        app = create_app(OneModel(backend), pictures=net.fetcher(*hosts) if hosts else None)

        async def main() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
                return await client.post(path, json={"model": "scripted", **put(url, body)})

        response = asyncio.run(main())
        asked: Any = backend.requests[0].prompt if backend.requests else ()
        return response, asked

    net = Net()
    response, asked = post(f"https://{HOST}/a", net, HOST)
    assert response.status_code == 200, response.text
    assert asked == (Message("user", "", pictures=((0, Picture(PNG)),)),)
    for url, hosts, sees in (
        (f"https://{HOST}/a", (), True),
        (f"https://{OTHER}/a", (HOST,), True),
        (f"https://{HOST}/a", (HOST,), False),
    ):
        net = Net()
        response, asked = post(url, net, *hosts, sees=sees)
        assert (response.status_code, asked, net.looked_up) == (400, (), [])
        assert not sees or param in response.text


@pytest.mark.parametrize("path", ["/tokenize", "/apply-template"])
def test_what_counts_tokens_fetches_too(path: str) -> None:
    net = Net()
    app = create_app(OneModel(ScriptedBackend(card=replace(CARD, sees=True))), pictures=net.fetcher())
    part = {"type": "image_url", "image_url": {"url": f"https://{HOST}/a"}}

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post(path, json={"messages": [{"role": "user", "content": [part]}]})

    assert asyncio.run(main()).status_code == 200
    assert len(net.asked) == 1
