"""Other people's clients, unmodified, against a running server: `make test-clients`.

What it is: a server of three models in a process of its own, an environment a client (they disagree about versions),
and a program a client (`programs/`) whose checks are reported. docs/reference/clients.md is made of the reports.
What it is not: part of `make test`: the environments take 9 GB and a while to install.
What is surprising: an environment is made once and kept in .venv-clients/; remove it there to have newer versions.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
ENVIRONMENTS = Path(os.environ.get("PUNA_CLIENTS") or REPOSITORY / ".venv-clients")
TABLE = REPOSITORY / "docs" / "reference" / "clients.md"
KEY = "puna-for-the-tests-of-clients"
MODELS = {"PUNA_BASE_MODEL": "cria", "PUNA_CHAT_MODEL": "tiny-chat"}


@dataclass(frozen=True)
class Client:
    """A client: the program that uses it, what people call it, what it needs installed, whose version is told."""

    program: str
    name: str
    packages: tuple[str, ...]
    version_of: str

    @property
    def place(self) -> Path:
        """The folder of its environment."""
        return ENVIRONMENTS / Path(self.program).name.replace(".", "-")


TORCH = "torch==2.13.0"
CLIENTS = (
    Client("use_openai.py", "openai (Python)", ("openai",), "openai"),
    Client("use_anthropic.py", "anthropic (Python)", ("anthropic",), "anthropic"),
    Client("use_ollama.py", "ollama (Python)", ("ollama",), "ollama"),
    Client("use_ollama.mjs", "ollama (JavaScript)", ("ollama",), "ollama"),
    Client("use_langchain.py", "LangChain", ("langchain-openai",), "langchain-openai"),
    Client("use_llama_index.py", "LlamaIndex", ("llama-index-llms-openai-like",), "llama-index-llms-openai-like"),
    Client("use_litellm.py", "LiteLLM", ("litellm",), "litellm"),
    Client("use_instructor.py", "Instructor", ("instructor",), "instructor"),
    Client("use_pydantic_ai.py", "Pydantic AI", ("pydantic-ai-slim[openai]",), "pydantic-ai-slim"),
    Client("use_llm.py", "llm", ("llm",), "llm"),
    Client("use_lm_eval.py", "lm-evaluation-harness", (TORCH, "lm-eval[api]"), "lm-eval"),
    Client("use_guidellm.py", "GuideLLM", (TORCH, "guidellm"), "guidellm"),
    Client("use_open_webui.py", "Open WebUI", (TORCH, "open-webui"), "open-webui"),
)

REPORTS: dict[Client, tuple[str, list[dict[str, str]]]] = {}
"""Each client's version, and what came of its checks."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Iterator[str]:
    """The address of a server with cria, stories260K and a random Llama 3.1 with its real tokenizer and chat format."""
    from small_models import random_chat_model, stories

    place = tmp_path_factory.mktemp("served")
    random_chat_model(place / "tiny-chat", reference)
    stories(place / "stories260K.gguf", reference)
    port = _free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "puna", "serve", "cria", str(place / "tiny-chat"), str(place / "stories260K.gguf"),
            "--port", str(port), "--api-key", KEY,
        ],
        env={**os.environ, "PUNA_HOME": str(place / "home")}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server does not get ready"
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@functools.cache
def interpreter(client: Client) -> list[str]:
    """The command that runs the client's programs, its environment made first where it is not there."""
    place, done = client.place, client.place / "installed"
    node = client.program.endswith(".mjs")
    if not done.exists():
        place.mkdir(parents=True, exist_ok=True)
        if node:
            subprocess.run(["npm", "install", "--silent", "--prefix", str(place), *client.packages], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            for package in client.packages:
                subprocess.run([str(place / "bin/python"), "-m", "pip", "install", "-q", package], check=True)
        done.touch()
    return ["node"] if node else [str(place / "bin" / "python")]


def version(client: Client) -> str:
    """The version of the client that was used."""
    if client.program.endswith(".mjs"):
        package = client.place / "node_modules" / client.version_of / "package.json"
        return str(json.loads(package.read_text())["version"])
    ask = f"import importlib.metadata as m; print(m.version({client.version_of!r}))"
    done = subprocess.run([*interpreter(client), "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_client(client: Client, server: str, tmp_path: Path) -> None:
    if client.program.endswith(".mjs") and not shutil.which("npm"):
        pytest.skip("needs Node.js and npm")
    command = interpreter(client)
    program = HERE / "programs" / client.program
    if client.program.endswith(".mjs"):
        program = Path(shutil.copy(program, client.place))  # modules are found beside the program
    done = subprocess.run(
        [*command, str(program)],
        env={**os.environ, "PUNA_URL": server, "PUNA_KEY": KEY, **MODELS}, cwd=tmp_path,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    lines = [line[1:] for line in done.stdout.split("\n") if line.startswith("\x1e")]
    reports = [json.loads(line) for line in lines]
    assert reports, done.stdout + done.stderr
    REPORTS[client] = version(client), reports
    failed = {report["check"]: report["failure"] for report in reports if report["failure"]}
    assert not failed, "\n\n".join(f"{what}\n{failure}" for what, failure in failed.items())


def test_the_table_says_what_was_exercised() -> None:
    """Written anew whenever all clients were run; docs/reference/clients.md is this test's result."""
    if set(REPORTS) != set(CLIENTS):
        pytest.skip("only some clients were run")
    lines = [
        "# Clients",
        "",
        "What was exercised, with each client as its makers publish it, against a running `puna serve`. Made by",
        "`make test-clients`.",
        "",
        "| Client | Version | Checks |",
        "|---|---|---|",
    ]
    for client in CLIENTS:
        told, reports = REPORTS[client]
        checks = "; ".join(report["check"] + (" (**fails**)" if report["failure"] else "") for report in reports)
        lines.append(f"| {client.name} | {told} | {checks} |")
    TABLE.write_text("\n".join(lines) + "\n", "utf-8")
