"""Open WebUI, as its package installs it: a server of its own that talks to ours by OpenAI's and Ollama's protocols."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from checks import CHAT, KEY, URL, check, run

PLACE = tempfile.mkdtemp()
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT = probe.getsockname()[1]
TOKEN = ""


def asked(path: str, body: dict[str, Any] | None = None) -> Any:
    """What Open WebUI answers; text where it is no JSON."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read()[:500]!r}") from error
    return json.loads(text) if text.startswith(("{", "[")) else text


def started() -> subprocess.Popen[bytes]:
    """Open WebUI with a new database."""
    settings = {
        "DATA_DIR": PLACE, "WEBUI_SECRET_KEY": "secret", "OFFLINE_MODE": "true", "HF_HUB_OFFLINE": "1",
        "OPENAI_API_BASE_URL": f"{URL}/v1", "OPENAI_API_KEY": KEY, "ENABLE_OLLAMA_API": "true",
        "OLLAMA_BASE_URL": URL, "RAG_EMBEDDING_ENGINE": "openai", "RAG_OPENAI_API_BASE_URL": f"{URL}/v1",
        "RAG_OPENAI_API_KEY": KEY, "DO_NOT_TRACK": "true", "SCARF_NO_ANALYTICS": "true",
    }  # fmt: skip
    program = str(Path(sys.executable).with_name("open-webui"))
    return subprocess.Popen(
        [program, "serve", "--host", "127.0.0.1", "--port", str(PORT)],
        env={**os.environ, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@check("its model list has ours; an account is made")
def models() -> None:
    global TOKEN
    made = asked("/api/v1/auths/signup", {"name": "A", "email": "a@example.org", "password": "long-enough-1"})
    TOKEN = made["token"]
    assert CHAT in {model["id"] for model in asked("/api/models")["data"]}


@check("a chat by way of it, whole and streamed")
def chat() -> None:
    talk = {"model": CHAT, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    whole = asked("/api/chat/completions", {**talk, "stream": False})
    assert whole["choices"][0]["finish_reason"] == "length"
    streamed = asked("/api/chat/completions", {**talk, "stream": True})
    assert "data: " in streamed
    assert '"finish_reason": "length"' in streamed or '"finish_reason":"length"' in streamed


if __name__ == "__main__":
    process = started()
    try:
        for _ in range(300):
            try:
                asked("/health")
                break
            except (OSError, AssertionError):
                time.sleep(0.5)
        run()
    finally:
        process.terminate()
        process.wait(30)
