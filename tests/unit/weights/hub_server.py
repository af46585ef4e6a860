"""A Hugging Face hub on the loopback interface, for the tests of pulling.

What it is: the endpoints that the real huggingface_hub client and Puna's own downloads call (model info, tree, resolve
with HEAD and GET, a CDN that LFS files redirect to with `Range`), real bytes and checksums, and faults to order:
refusals, cut connections, wrong bytes, ignored ranges.
What it is not: the whole hub. A request it does not know is answered 404 and stands in `requests` like all others.
What is surprising: the CDN is called `localhost` and the hub `127.0.0.1`, so that they are two origins, as the real
ones are, and a token that leaks to the CDN is seen.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40
LATER_COMMIT = "2" * 40


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    range: str
    authorization: str
    host: str


@dataclass
class Repository:
    """Files by path; those ending in .safetensors, .gguf, .pth, .bin or .model are LFS files. `commits` keeps older."""

    files: dict[str, bytes]
    commit: str = COMMIT
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commits.setdefault(self.commit, self.files)

    def move(self, commit: str, files: dict[str, bytes]) -> None:
        self.commit, self.files = commit, files
        self.commits[commit] = files


class FakeHub:
    """The server and its faults.

    `cut[path] = [n, …]`: the next transfers of that file end after n bytes. `statuses[path] = [500, …]`: the next
    answers for that file (or for "api", or for "HEAD path") are these. `pace[path]`: seconds of rest after each 256 KB
    of that file. `wrong[path]`: these bytes are sent for that file instead.
    `whole`: files for which `Range` is ignored. `meta`: files of Meta's download server, by path; any other is 403.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.meta: dict[str, bytes] = {}
        self.cut: dict[str, list[int]] = {}
        self.statuses: dict[str, list[int]] = {}
        self.pace: dict[str, float] = {}
        self.wrong: dict[str, bytes] = {}
        self.whole: set[str] = set()
        self.tree: list[dict[str, Any]] | None = None
        self.info: Any = None
        self.token = "hf_right"
        self.granted = True
        self.requests: list[Request] = []
        self.slow: threading.Event | None = None
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self.slow is not None:
            self.slow.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def contents(self, path: str) -> list[Request]:
        """The requests that asked for the bytes of a file (by the end of its path)."""
        return [
            request
            for request in self.requests
            if request.method == "GET" and not request.path.startswith("/api/") and request.path.endswith(path)
        ]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up in the middle is what many tests are about: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `requests` instead."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server_hub
        path = unquote(urlsplit(self.path).path)
        header = self.headers.get
        hub.requests.append(
            Request(
                self.command, path, header("Range", ""), header("Authorization", ""), header("Host", "").split(":")[0]
            )
        )
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "cdn":
            repository = hub.repositories["/".join(parts[1:3])]
            self._content(repository.commits[parts[3]]["/".join(parts[4:])], "/".join(parts[4:]), {})
        elif parts[0] == "meta":
            name = "/".join(parts[1:])
            if name in hub.meta:
                self._content(hub.meta[name], name, {})
            else:
                self._send(403, b"<Error>AccessDenied</Error>", {})
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"{}", {})

    def _refused(self, name: str) -> bool:
        """Answer what the hub answers where there is no repository, or none for this caller."""
        hub = self.server_hub
        authorization = self.headers.get("Authorization", "")
        repository = hub.repositories.get(name)
        if authorization and authorization != f"Bearer {hub.token}":
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None:
            code = 404 if authorization else 401
            self._send(code, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif repository.gated and not (authorization and hub.granted):
            # The hub shows a gated repository's listing to everybody, and its files to those who were granted access.
            code = 403 if authorization else 401
            self._send(code, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        else:
            return False
        return True

    def _api(self, name: str, rest: list[str]) -> None:
        hub = self.server_hub
        if hub.statuses.get("api"):
            self._send(hub.statuses["api"].pop(0), b"{}", {})
            return
        repository = hub.repositories.get(name)
        if (repository is None or not repository.gated) and self._refused(name):
            return
        assert repository is not None
        if rest[:1] == ["revision"] or not rest:
            revision = "/".join(rest[1:]) or "main"
            if revision not in repository.branches and revision not in repository.commits:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            commit = revision if revision in repository.commits else repository.commit
            self._json({"id": name, "sha": commit, "siblings": []} if hub.info is None else hub.info)
        elif rest[:1] == ["tree"]:
            files = repository.commits[rest[1]]
            folder = "/".join(rest[2:])
            deep = "recursive=true" in urlsplit(self.path).query.lower()
            self._json(_tree(files, f"{folder}/" if folder else "", deep) if hub.tree is None else hub.tree)
        else:
            self._send(404, b"{}", {})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        hub = self.server_hub
        if self._refused(name):
            return
        if self.command == "HEAD" and hub.statuses.get(f"HEAD {path}"):
            self._send(hub.statuses[f"HEAD {path}"].pop(0), b"", {})
            return
        repository = hub.repositories[name]
        commit = repository.commit if revision in repository.branches else revision
        files = repository.commits.get(commit, {})
        if path not in files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = files[path]
        headers = {"X-Repo-Commit": commit}
        if _is_lfs(path):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"{hub.cdn}/cdn/{name}/{commit}/{path}"
            self._send(302, b"", headers)
        else:
            headers["ETag"] = f'"{git_sha1(content)}"'
            self._content(content, path, headers)

    def _content(self, content: bytes, path: str, headers: dict[str, str]) -> None:
        hub = self.server_hub
        if self.command == "GET" and hub.statuses.get(path):
            self._send(hub.statuses[path].pop(0), b"{}", {})
            return
        content = hub.wrong.get(path, content)
        wanted = self.headers.get("Range", "")
        code, body = 200, content
        if wanted and path not in hub.whole:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            if first >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            code, body = 206, content[first:]
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        end = hub.cut[path].pop(0) if hub.cut.get(path) else None
        self._send(code, body, headers, end=end, pace=hub.pace.get(path, 0.0))

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode() if not isinstance(value, bytes) else value, {})

    def _send(self, code: int, body: bytes, headers: dict[str, str], end: int | None = None, pace: float = 0.0) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:end]
        step = 256 << 10 if pace else len(body)
        for at in range(0, len(body), step or 1):
            self.wfile.write(body[at : at + step])
            time.sleep(pace)
        if end is not None:
            self.wfile.flush()
            if self.server_hub.slow is not None:
                self.server_hub.slow.wait(10)
            self.close_connection = True


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".pth", ".bin", ".model", ".gguf"))


def _tree(files: dict[str, bytes], folder: str, deep: bool) -> list[dict[str, Any]]:
    """What `/tree` lists for one folder: its files and its subfolders, and `deep` what is in these too."""
    items: list[dict[str, Any]] = []
    for path, content in files.items():
        if not path.startswith(folder):
            continue
        inside = path.removeprefix(folder)
        if "/" in inside:
            directory = folder + inside.split("/")[0]
            if not any(item["path"] == directory for item in items):
                items.append({"type": "directory", "path": directory, "oid": "d" * 40, "size": 0})
            if not deep:
                continue
        item = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if _is_lfs(path):
            pointer = hashlib.sha256(content).hexdigest()
            item["oid"] = git_sha1(pointer.encode())
            item["lfs"] = {"oid": pointer, "size": len(content), "pointerSize": 130}
        items.append(item)
    return items
