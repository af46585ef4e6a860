"""The page at `/`, and its files.

What it is: the built files of `page/` beside this one, read at the start and served from memory.
What it is not: a way to the disk: a request's path is looked up among the names that were there at the start.
What is surprising: the files need no key: they are the same for everybody, and hold nothing. What the page asks the
server for does.
"""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from puna.server.problems import RequestError

FOLDER = Path(__file__).parent / "page"
"""Where the built page lies."""

PREFIX = "/page/"
"""Under which path its files are served; the page itself is at `/`."""

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: speak with this server, and run its scripts; nothing inline, nothing from elsewhere."""

HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".html": "text/html",
          ".svg": "image/svg+xml", ".woff2": "font/woff2", ".webmanifest": "application/manifest+json",
          ".json": "application/json", ".txt": "text/plain", ".map": "application/json"}  # fmt: skip


@dataclass(frozen=True)
class PageFile:
    """A file of the page: its bytes, type, and what tells it from an older one."""

    data: bytes
    media_type: str
    etag: str


def page_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Every file of a folder by its path in it, `assets/app.js`; hidden ones are none."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or path.is_symlink() or any(part.startswith(".") for part in name.split("/")):
            continue
        data = path.read_bytes()
        kind = _TYPES.get(path.suffix.lower()) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        found[name] = PageFile(data, kind, f'"{hashlib.sha256(data).hexdigest()[:32]}"')
    return found


def page_router(files: Mapping[str, PageFile]) -> APIRouter:
    """The routes of a page made of these files."""
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        page = files.get("index.html")
        if page is None:
            return PlainTextResponse(
                "Puna answers here: OpenAI's API is under /v1, /openapi.json describes all routes. "
                "This installation has no page to chat with.\n",
                headers=HEADERS,
            )
        return _served(request, page)

    @router.api_route(PREFIX + "{name:path}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        found = files.get(name)
        if found is None:
            raise RequestError("The page has no such file.", status=404, code="not_found")
        return _served(request, found)

    return router


def _served(request: Request, file: PageFile) -> Response:
    # Asked for again each time, and sent only where it has changed: a new version of Puna has a new page at once.
    headers = {**HEADERS, "ETag": file.etag, "Cache-Control": "no-cache"}
    known = {word.strip().removeprefix("W/") for word in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    text = file.media_type.startswith("text/") or file.media_type.endswith(("json", "xml"))
    return Response(file.data, media_type=file.media_type + ("; charset=utf-8" if text else ""), headers=headers)
