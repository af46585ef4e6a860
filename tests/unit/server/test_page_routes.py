"""The page's files: what is served, how browsers are told to treat it, and what is not served."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from puna.gateway.scripted import ScriptedBackend
from puna.server.app import create_app
from puna.server.page_routes import CSP, page_files


def ask(app: FastAPI, path: str, method: str = "GET", **headers: str) -> httpx2.Response:
    """One request."""

    async def work() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app, client=("127.0.0.1", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(work())


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An application with a small page, and a secret beside it."""
    (tmp_path / "secret.txt").write_text("secret")
    folder = tmp_path / "page"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html><title>Puna</title>")
    (folder / "assets" / "app.js").write_text("export {}")
    (folder / "assets" / "app.css").write_text("p {}")
    (folder / "icon.svg").write_text("<svg/>")
    (folder / ".hidden").write_text("hidden")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    files = page_files(folder)
    monkeypatch.setattr("puna.server.app.page_files", lambda: files)
    return create_app(ScriptedBackend())


@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("/", "text/html; charset=utf-8", "<!doctype html><title>Puna</title>"),
        ("/page/index.html", "text/html; charset=utf-8", "<!doctype html><title>Puna</title>"),
        ("/page/assets/app.js", "text/javascript; charset=utf-8", "export {}"),
        ("/page/assets/app.css", "text/css; charset=utf-8", "p {}"),
        ("/page/icon.svg", "image/svg+xml; charset=utf-8", "<svg/>"),
    ],
)
def test_files_and_what_a_browser_may_do_with_them(page: FastAPI, path: str, kind: str, text: str) -> None:
    answer = ask(page, path)
    assert (answer.status_code, answer.text) == (200, text)
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-security-policy"] == CSP
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    again = ask(page, path, **{"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]
    assert ask(page, path, **{"If-None-Match": '"other", W/' + answer.headers["etag"]}).status_code == 304
    assert ask(page, path, **{"If-None-Match": '"other"'}).status_code == 200
    assert ask(page, path, "HEAD").content == b""
    assert ask(page, path, "POST").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "/page/", "/page/nothing", "/page/assets", "/page/.hidden", "/page/link.txt", "/page/../secret.txt",
        "/page/%2e%2e/secret.txt", "/page/..%2fsecret.txt", "/page/assets/..%2findex.html", "/page//index.html",
        "/page/%00", "/page/index.html%00", "/page/..\\secret.txt", "/page/INDEX.HTML",
    ],
)  # fmt: skip
def test_nothing_else_is_reached(page: FastAPI, path: str) -> None:
    answer = ask(page, path.replace("\\", "%5c"))
    assert 400 <= answer.status_code < 500
    assert "secret" not in answer.text


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in CSP.split(";"))
    assert rules["default-src"] == "'none'"
    assert not any(word in CSP for word in ("unsafe", "http:", "https:", "*"))
    assert rules["script-src"] == rules["connect-src"] == "'self'"


def test_without_a_page_it_says_what_answers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.server.app.page_files", dict)
    app = create_app(ScriptedBackend())
    answer = ask(app, "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert "/v1" in answer.text
    missing = ask(app, "/page/x")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"


def test_the_map_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("one")
    files = page_files(tmp_path)
    (tmp_path / "later.txt").write_text("two")
    assert set(files) == {"index.html"}
    assert page_files(tmp_path / "nothing") == {}
