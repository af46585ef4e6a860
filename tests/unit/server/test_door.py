"""The door: keys, scopes, limits, Host, Origin, and the headers of every response.

What is surprising: the client speaks to the application itself, without a socket; `test_hostile_http.py` has those.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request as HttpRequest

from puna.gateway.scripted import ScriptedBackend, saying
from puna.server import nesting
from puna.server.app import create_app
from puna.server.bodies import Body
from puna.server.caller import SCOPES, Caller, needs
from puna.server.door import OPEN_PATHS, OPEN_PREFIXES, Door, allowed_hosts, open_door
from puna.server.keys import KeyStore, new_secret
from puna.server.limits import Limits
from puna.server.problems import RequestError
from puna.server.rates import Bucket, Suspects, reset_in
from puna.server.service import Call, Service, collect, service_of
from puna.types import Event, Request, Sampling, Usage


class Prompt(Body):
    """What the tests' own route takes."""

    text: str


def application(door: Door | None = None) -> tuple[FastAPI, ScriptedBackend]:
    """The server with a route that answers and one that fails, and its backend."""
    backend = ScriptedBackend(saying("Hello"))
    app = create_app(backend, door=door)

    @app.post("/v1/say")
    @app.post("/v1/messages/say")
    @app.post("/api/say")
    async def say(
        body: Prompt,
        request: HttpRequest,
        caller: Annotated[Caller, Depends(needs("infer"))],
        service: Annotated[Service, Depends(service_of)],
    ) -> dict[str, Any]:
        async with service.use(caller, "") as found:
            call = Call(request.state.request_id, caller, "text_completion", found.card.name)
            wholes, usage = await collect(service.answer(call, found, Request(body.text)))
        return {"text": wholes[0].text, "tokens": usage.prompt_tokens + usage.completion_tokens}

    @app.get("/v1/fail")
    async def fail(caller: Annotated[Caller, Depends(needs("infer"))]) -> None:
        raise ZeroDivisionError("the secret of the house")

    @app.get("/v1/manage")
    async def manage(caller: Annotated[Caller, Depends(needs("manage"))]) -> None:
        return None

    return app, backend


class Client:
    """Asks an application, from an address."""

    def __init__(self, app: FastAPI, address: str = "127.0.0.1") -> None:
        self.app, self.address = app, address
        self._runner = asyncio.Runner()

    def __call__(self, method: str, path: str, key: str = "", **options: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})

        async def ask() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app, client=(self.address, 1), raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, headers=headers, **options)

        return self._runner.run(ask())

    def say(self, key: str = "", text: str = "abcde", **options: Any) -> httpx2.Response:
        """Ask for an answer: ten tokens, five of the prompt and five of "Hello"."""
        return self("POST", "/v1/say", key, json={"text": text}, **options)

    def run(self, work: Any) -> Any:
        """Run a coroutine on the client's loop."""
        return self._runner.run(work)

    def close(self) -> None:
        """End what the application began."""
        self._runner.run(self.app.state.service.ledger.close())
        self._runner.close()


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    """Makes clients of an application with this door."""
    made: list[Client] = []

    def make(door: Door | None = None, address: str = "127.0.0.1") -> Client:
        made.append(Client(application(door)[0], address))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(tmp_path / "server.db")
    yield store
    store.close()


def code(response: httpx2.Response) -> str:
    """The code of an error in OpenAI's shape."""
    return str(response.json()["error"]["code"])


def until(work: Callable[[], bool]) -> float:
    """Seconds until it is so; fails after ten."""
    began = time.monotonic()
    while not work():
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    return time.monotonic() - began


# -- routes --------------------------------------------------------------------------------------------------------


def routes(app: FastAPI) -> list[APIRoute]:
    """Every route, those of included routers too, whichever way this version of FastAPI keeps them."""
    found, left = [], list(app.routes)
    while left:
        route = left.pop()
        if isinstance(route, APIRoute):
            found.append(route)
        elif (inner := getattr(route, "original_router", None)) is not None:
            left += inner.routes
    return found


def scope_of(route: APIRoute) -> str | None:
    """The scope that a route asks for."""
    left = [route.dependant]
    while left:
        dependant = left.pop()
        if (scope := getattr(dependant.call, "scope", None)) in SCOPES:
            return str(scope)
        left += dependant.dependencies
    return None


def test_every_route_asks_for_a_key_and_a_scope(client: Callable[..., Client], store: KeyStore) -> None:
    store.add("somebody")
    ask = client(Door(store))
    every = routes(create_app(ScriptedBackend()))
    assert {"/health", "/ready", "/metrics", "/version", "/puna/engine"} <= {route.path for route in every}
    for route in every:
        path = route.path.replace("{", "").replace("}", "")
        for method in route.methods:
            if route.path in OPEN_PATHS or route.path.startswith(OPEN_PREFIXES):
                assert method in ("GET", "HEAD")
                assert ask(method, path).status_code != 401
                continue
            assert scope_of(route), f"{method} {route.path} takes no scope"
            answer = ask(method, path, json={} if method in ("POST", "PUT", "PATCH") else None)
            assert answer.status_code == 401, f"{method} {route.path} answers without a key"
    for path in ("/openapi.json", "/docs", "/redoc", "/nowhere", "/health/", "/metrics/x", "/page"):
        assert ask("GET", path).status_code == 401, path
    for path in ("/", "/health", "/page/x"):  # open to who looks, and to nobody who sends
        assert ask("POST", path, json={}).status_code == 401, path


def test_a_route_without_a_scope_is_found() -> None:
    app = FastAPI()

    @app.get("/bare")
    async def bare() -> None: ...

    assert [scope_of(route) for route in routes(app)] == [None]


def test_a_key_does_what_its_scopes_say(client: Callable[..., Client], store: KeyStore) -> None:
    _, infer = store.add("infers")
    _, observe = store.add("observes", scopes=("observe",))
    ask = client(Door(store))
    assert ask.say(infer).json() == {"text": "Hello", "tokens": 10}
    assert (ask.say(observe).status_code, code(ask.say(observe))) == (403, "missing_scope")
    assert ask("GET", "/metrics", observe).status_code == 200
    assert ask("GET", "/metrics", infer).status_code == 403
    assert ask("GET", "/v1/manage", infer).status_code == 403


def test_a_key_uses_its_models_only(client: Callable[..., Client], store: KeyStore) -> None:
    _, mine = store.add("mine", models=("scripted", "other"))
    _, others = store.add("others", models=("another",))
    ask = client(Door(store))
    assert ask.say(mine).status_code == 200
    assert (ask.say(others).status_code, code(ask.say(others))) == (404, "model_not_found")


# -- keys ----------------------------------------------------------------------------------------------------------


def test_how_a_key_is_sent(client: Callable[..., Client], store: KeyStore) -> None:
    _, key = store.add("a")
    _, other = store.add("b")
    ask = client(Door(store))

    def with_headers(**headers: str) -> int:
        return ask(
            "GET", "/version", headers={name.replace("_", "-"): text for name, text in headers.items()}
        ).status_code

    assert with_headers(authorization=f"Bearer {key}") == 200
    assert with_headers(authorization=f"bearer  {key}") == 200
    assert with_headers(x_api_key=key) == 200
    assert with_headers(x_api_key=key, authorization=f"Bearer {key}") == 200
    assert with_headers(x_api_key=key, authorization=f"Bearer {other}") == 401
    assert with_headers(authorization=key) == 401
    assert with_headers(authorization=f"Basic {key}") == 401
    assert with_headers(authorization="Bearer ") == 401
    assert with_headers(x_api_key=key[:-1]) == 401
    assert with_headers(x_api_key=key + "x") == 401
    assert with_headers(cookie=f"api_key={key}") == 401
    assert ask("GET", f"/version?api_key={key}&key={key}").status_code == 401
    refused = ask("GET", "/version")
    assert (refused.status_code, refused.headers["www-authenticate"], code(refused)) == (
        401,
        "Bearer",
        "missing_api_key",
    )
    assert key not in ask("GET", "/version", key[:-1]).text


def test_a_key_is_looked_for_the_same_way_whether_there_is_one_or_not(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from puna.server import keys

    key, secret = store.add("a")
    ring = keys.KeyRing(store)
    asyncio.run(ring.refresh())
    done: list[str] = []
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: done.append("compared") or compare(a, b))
    digest = keys.digest_of
    monkeypatch.setattr(keys, "digest_of", lambda text: done.append("hashed") or digest(text))
    steps = []
    for given in (secret, new_secret(), "", "puna-", secret[:-1] + ("A" if secret[-1] != "A" else "B")):
        done.clear()
        assert ring.find(given) == (key if given == secret else None)
        steps.append(tuple(done))
    assert set(steps) == {("hashed", "compared")}


def test_a_key_is_compared_whole(store: KeyStore) -> None:
    from puna.server.keys import KeyRing, digest_of

    key, secret = store.add("a")
    other = new_secret()
    ring = KeyRing(store)
    asyncio.run(ring.refresh())
    ring._keys[digest_of(other)[:12]] = key  # as if the first twelve digits of two keys' hashes were the same
    assert ring.find(other) is None
    assert ring.find(secret) == key


def test_keys_change_while_the_server_runs(client: Callable[..., Client], store: KeyStore, tmp_path: Path) -> None:
    ask = client(Door(store))
    assert ask("GET", "/version").status_code == 200  # no key yet, and this machine
    elsewhere = KeyStore(tmp_path / "server.db")  # as `puna keys` in another process has it
    _, key = elsewhere.add("late")
    assert until(lambda: ask("GET", "/version").status_code == 401) < 5
    assert ask("GET", "/version", key).status_code == 200
    elsewhere.revoke("late")
    assert until(lambda: ask("GET", "/version", key).status_code == 401) < 5
    refused = ask("GET", "/version", key)
    assert "revoked" in refused.json()["error"]["message"]
    assert ask("GET", "/version").status_code == 401  # a server whose keys are all revoked is not open again
    elsewhere.close()


def test_a_key_ends(client: Callable[..., Client], store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = store.add("brief", expires=time.time() + 1000)
    ask = client(Door(store))
    assert ask("GET", "/version", secret).status_code == 200
    later = time.time() + 1001
    monkeypatch.setattr("puna.server.door.time.time", lambda: later)
    assert "expired" in ask("GET", "/version", secret).json()["error"]["message"]


def test_a_server_without_keys_answers_its_own_machine_only(client: Callable[..., Client]) -> None:
    for address, status in (
        ("127.0.0.1", 200), ("127.8.8.8", 200), ("::1", 200), ("::ffff:127.0.0.1", 200),
        ("10.0.0.1", 401), ("::ffff:10.0.0.1", 401), ("fe80::1%eth0", 401), ("localhost.evil", 401),
    ):  # fmt: skip
        ask = client(Door(), address)
        assert ask("GET", "/version").status_code == status, address
        assert ask("GET", "/health").status_code == 200
    ask = client(Door())
    for name in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
        assert code(ask("GET", "/version", headers={name: "127.0.0.1"})) == "no_keys"


def test_one_key_given_at_the_start(client: Callable[..., Client]) -> None:
    ask = client(Door(single_key="just this"[:4]), "10.0.0.1")
    assert ask("GET", "/metrics", "just").status_code == 200  # it may do all
    assert ask("GET", "/metrics", "justt").status_code == 401
    assert ask("GET", "/metrics").status_code == 401


def test_what_is_remembered_of_prompts_is_kept_apart(store: KeyStore) -> None:
    a, first = store.add("a", priority=3)
    b, second = store.add("b")
    app, backend = application(Door(store, "single"))
    ask = Client(app)
    for key in (first, second, "single"):
        assert ask.say(key).status_code == 200
    assert [(each.namespace, each.priority) for each in backend.requests] == [(a.id, 3), (b.id, 0), ("", 0)]
    assert len({a.id, b.id, ""}) == 3
    ask.close()


# -- limits --------------------------------------------------------------------------------------------------------


def test_requests_a_minute(client: Callable[..., Client], store: KeyStore) -> None:
    _, key = store.add("a", requests_per_minute=3)
    _, other = store.add("b", requests_per_minute=3)
    ask = client(Door(store))
    left = [ask.say(key).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    refused = ask.say(key)
    assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert refused.headers["x-ratelimit-reset-requests"].endswith("s")
    assert ask.say(other).status_code == 200


def test_tokens_a_minute(client: Callable[..., Client], store: KeyStore) -> None:
    _, key = store.add("a", tokens_per_minute=15)
    ask = client(Door(store))
    first = ask.say(key)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "15"
    assert ask.say(key).status_code == 200  # 5 were left: it may overdraw
    refused = ask.say(key)
    assert (refused.status_code, code(refused)) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 25  # 6 tokens are missing, 15 come a minute
    assert ask("GET", "/version", key).status_code == 200


def test_tokens_a_day_outlive_the_server(store: KeyStore, tmp_path: Path) -> None:
    _, secret = store.add("a", tokens_per_day=25)
    ask = Client(application(Door(store))[0])
    assert [ask.say(secret).status_code for _ in range(2)] == [200, 200]
    ask.close()
    again = KeyStore(tmp_path / "server.db")
    assert list(again.used(time.strftime("%Y-%m-%d", time.gmtime())).values()) == [20]
    ask = Client(application(Door(again))[0])
    assert ask.say(secret).status_code == 200
    refused = ask.say(secret)
    assert (refused.status_code, code(refused)) == (429, "insufficient_quota")
    assert 1 <= int(refused.headers["retry-after"]) <= 24 * 3600 + 1
    ask.close()


def test_an_answer_that_ended_early_counts(store: KeyStore) -> None:
    _, secret = store.add("a", tokens_per_day=1000)
    door = Door(store)

    async def work() -> int:
        app, backend = application(door)
        service: Service = app.state.service
        await door._ring.refresh()  # type: ignore[union-attr]
        key = door._ring.find(secret)  # type: ignore[union-attr]
        assert key is not None
        events = service.answer(Call("c", key.caller(), "chat", "scripted"), backend, Request("abc", Sampling()))
        async for _ in events:
            break
        await events.aclose()
        await door.close()
        return sum(store.used(time.strftime("%Y-%m-%d", time.gmtime())).values())

    assert asyncio.run(work()) == 8  # three of the prompt, five of the piece that came


def test_a_key_without_tokens_loads_no_model(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = store.add("a", tokens_per_day=1)
    door = Door(store)

    async def work() -> None:
        app, _ = application(door)
        service: Service = app.state.service
        await door.spent(Call("c", key.caller(), "chat", "scripted"), Usage(0, 0, 0))
        await door.admit(key.caller())
        door._ring.spend(key.id, 1)  # type: ignore[union-attr]
        monkeypatch.setattr(service.models, "use", lambda *a, **k: pytest.fail("a model was asked for"))
        with pytest.raises(RequestError, match="used up"):
            async with service.use(key.caller(), "scripted"):
                pass
        await door.close()

    asyncio.run(work())


def test_a_key_that_is_revoked_ends_its_answers(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = store.add("a")
    monkeypatch.setattr("puna.server.service.LOOK_AGAIN", 0.0)
    door = Door(store)

    async def script(_: Request) -> AsyncGenerator[Event]:
        yield Event(text="One", token_ids=(1,), prefilled=1)
        store.revoke("a")
        door._ring._looked -= 10  # type: ignore[union-attr]
        yield Event(text=" two", token_ids=(2,), prefilled=1)
        yield Event(finish="stop", usage=Usage(1, 0, 2))

    async def work() -> list[str]:
        backend = ScriptedBackend(script)
        app = create_app(backend, door=door)
        service: Service = app.state.service
        said = []

        async def listen() -> None:
            call = Call("c", key.caller(), "chat", "scripted")
            async for event in service.answer(call, backend, Request("abc", Sampling())):
                said.append(event.text)

        with pytest.raises(RequestError, match="revoked"):
            await listen()
        assert backend.running == 0
        await door.close()
        return said

    assert asyncio.run(work()) == ["One"]


def test_a_key_that_was_revoked_ends_a_job_too(store: KeyStore) -> None:
    key, _ = store.add("a")
    door = Door(store)

    async def work() -> None:
        call = Call("c", key.caller(), "chat", "scripted")
        await door.admit(call.caller)
        store.revoke("a")
        door._ring._looked -= 10  # type: ignore[union-attr]
        with pytest.raises(RequestError, match="revoked") as refused:
            await door.admit(call.caller)
        assert refused.value.status == 401
        await door.spent(call, Usage(1, 0, 1))
        await door.close()

    asyncio.run(work())


def test_wrong_keys_from_one_address(store: KeyStore) -> None:
    _, key = store.add("a")
    app, _ = application(Door(store, "guess-me", limits=Limits(bad_keys=3)))
    ask, other = Client(app, "10.0.0.1"), Client(app, "10.0.0.2")
    assert [ask("GET", "/version", f"wrong{at}").status_code for at in range(5)] == [401, 401, 401, 429, 429]
    refused = ask("GET", "/version", "wrong")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert ask("GET", "/version", "guess-me").status_code == 429  # it may have been guessed at last
    assert ask("GET", "/version", key).status_code == 200  # this cannot be guessed: no neighbour shuts its owner out
    assert other("GET", "/version", "guess-me").status_code == 200
    other._runner.close()
    ask.close()


def test_addresses_take_bounded_memory() -> None:
    suspects = Suspects(2, 10)
    for at in range(1000):
        suspects.note(f"10.0.{at // 256}.{at % 256}")
    assert len(suspects._buckets) == 10
    assert suspects.wait("10.0.0.1") == 0
    for at in range(3):  # one customer's addresses of IPv6
        suspects.note(f"2001:db8::{at}")
    assert suspects.wait("2001:db8::ffff") > 0
    assert suspects.wait("2001:db8:0:1::") == 0


def test_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("puna.server.rates.time.monotonic", lambda: now[0])
    bucket = Bucket(60)
    bucket.take(90)
    assert (bucket.level(), bucket.seconds_until(1)) == (-30, 31)
    now[0] = 31
    assert (bucket.level(), bucket.seconds_until(1)) == (1, 0)
    now[0] = 1000
    assert bucket.level() == 60
    assert [reset_in(seconds) for seconds in (0, 0.2, 59, 60, 61.5)] == ["0s", "1s", "59s", "1m0s", "1m2s"]


# -- web pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        ("https://evil.example", 403),
        ("http://localhost:3000", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("https://good.example", 200),
        ("https://GOOD.example", 403),
        ("https://good.example.evil", 403),
    ],
)
def test_pages_of_others_change_nothing(client: Callable[..., Client], origin: str, status: int) -> None:
    ask = client(Door(origins=frozenset({"https://good.example"})))
    answer = ask.say(headers={"origin": origin})
    assert answer.status_code == status
    if status == 403:
        assert code(answer) == "origin_not_allowed"
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == ("https://good.example" if origin == "https://good.example" else None)
    read = ask("GET", "/version", headers={"origin": origin})
    assert read.headers.get("access-control-allow-origin") == allowed


def test_a_form_of_a_page_is_no_json(client: Callable[..., Client]) -> None:
    ask = client(Door())
    text = '{"text":"abc"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json"):
        answer = ask("POST", "/v1/say", content=text, headers={"content-type": kind} if kind else {})
        assert (answer.status_code, code(answer)) == (415, "unsupported_media_type"), kind
    for kind in ("application/json", "Application/JSON; charset=UTF-8", 'application/json; charset="utf-8"'):
        assert ask("POST", "/v1/say", content=text, headers={"content-type": kind}).status_code == 200, kind
    assert (
        ask("POST", "/v1/say", content=text, headers={"content-type": "application/json; charset=utf-16"}).status_code
        == 415
    )
    for coding in ("gzip", "br", "zstd"):
        headers = {"content-type": "application/json", "content-encoding": coding}
        assert ask("POST", "/v1/say", content=text, headers=headers).status_code == 415


def test_a_browser_asks_beforehand(client: Callable[..., Client], store: KeyStore) -> None:
    store.add("a")
    ask = client(Door(store, origins=frozenset({"https://good.example"})))
    headers = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    answer = ask("OPTIONS", "/v1/say", headers={"origin": "https://good.example", **headers})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert answer.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers
    refused = ask("OPTIONS", "/v1/say", headers={"origin": "https://evil.example", **headers})
    assert refused.status_code == 403
    assert not [name for name in refused.headers if name.startswith("access-control")]
    failed = ask("GET", "/version", headers={"origin": "https://good.example"})  # an error is readable there too
    assert (failed.status_code, failed.headers["access-control-allow-origin"]) == (401, "https://good.example")


def test_names_the_server_goes_by(client: Callable[..., Client]) -> None:
    ask = client(Door(hosts=allowed_hosts("0.0.0.0", ["LLM.example"])))
    for host, status in (
        ("llm.example", 200), ("llm.example:8000", 200), ("LLM.EXAMPLE", 200), ("localhost", 200), ("10.1.2.3", 200),
        ("[2001:db8::1]:80", 200), ("evil.example", 421), ("x.llm.example", 421),
    ):  # fmt: skip
        assert ask("GET", "/health", headers={"host": host}).status_code == status, host
    assert allowed_hosts("my.machine") == {"my.machine"}
    assert client(open_door())("GET", "/health", headers={"host": "anything.example"}).status_code == 200


# -- responses -----------------------------------------------------------------------------------------------------


def test_every_response_has_its_headers(client: Callable[..., Client]) -> None:
    ask = client(Door())
    for path, status in (("/health", 200), ("/nowhere", 404), ("/v1/fail", 500), ("/version%7f", 400)):
        answer = ask("GET", path)
        assert answer.status_code == status
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
    ids = {ask("GET", "/health").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("given", "taken"),
    [("mine_1-A", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("a\tb", False), ("ä", False)],
)
def test_a_clients_own_id(client: Callable[..., Client], given: str, taken: bool) -> None:
    answer = client(Door())("GET", "/health", headers={"x-request-id": given.encode()})
    assert (answer.headers["x-request-id"] == given) == taken


def test_what_went_wrong_inside_stays_inside(client: Callable[..., Client], caplog: pytest.LogCaptureFixture) -> None:
    answer = client(Door())("GET", "/v1/fail", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "mine" in answer.json()["error"]["message"]
    assert "request mine failed" in caplog.text
    assert "the secret of the house" in caplog.text


def test_refusals_speak_the_paths_protocol(client: Callable[..., Client]) -> None:
    ask = client(Door(single_key="k"))
    assert ask("GET", "/v1/say").json()["error"]["type"] == "authentication_error"
    assert ask("POST", "/v1/messages/say", json={}).json()["type"] == "error"
    assert isinstance(ask("POST", "/api/say", json={}).json()["error"], str)
    head = ask("HEAD", "/v1/say")
    assert (head.status_code, head.content) == (401, b"")


def test_a_server_that_shuts_down_takes_nothing_new_in(client: Callable[..., Client]) -> None:
    ask = client(Door())
    ask.app.state.draining = True
    refused = ask.say()
    assert (refused.status_code, code(refused), refused.headers["retry-after"]) == (503, "draining", "5")
    assert ask("GET", "/metrics").status_code == 200
    assert ask("GET", "/ready").status_code == 503
    assert ask("GET", "/health").status_code == 200


# -- bodies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (rb'{"a":[1,2,{"b":"[[[[[["}]}', 3),
        (rb'["\"[[[[", "\\", [[]], "\\\"[["]', 3),
        (rb'["\\\\\\", ["a\"]]"]]', 2),
        (b'{"\xc3\xa9[":{"x":{}}}', 3),
        (b'"[[[["', 0),
        (b"[[],[],[[]]]", 3),
    ],
)
def test_depth_is_that_of_the_brackets_outside_of_strings(text: bytes, depth: int, cut: int) -> None:
    pieces = [text[at : at + cut] for at in range(0, len(text), cut)]

    def count(most: int) -> None:
        found = nesting.Nesting(most)
        for piece in pieces:
            found.take(piece)

    count(depth)
    if depth:
        with pytest.raises(RequestError, match="deep"):
            count(depth - 1)


def test_a_body_of_too_many_values() -> None:
    found = nesting.Nesting(64)
    found.take(b"[" + b"1," * nesting.MAX_VALUES)
    with pytest.raises(RequestError, match="values"):
        found.take(b"1,1")
    text = nesting.Nesting(64)
    text.take(b'["' + b"," * (nesting.MAX_VALUES + 2) + b'"]')  # commas of a text are none


def test_counting_takes_time_in_proportion() -> None:
    def seconds(text: bytes) -> float:
        began = time.perf_counter()
        nesting.Nesting(64).take(text)
        return time.perf_counter() - began

    for text in (b'"' + rb"\"" * 30_000, b'"a' * 20_000, rb"\\" * 30_000, b'""' * 30_000, b"[]" * 30_000):
        assert seconds(text) < 1.0  # it takes a hundredth of it; a count that starts anew at each quote takes seconds
