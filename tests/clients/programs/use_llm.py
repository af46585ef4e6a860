"""Simon Willison's `llm` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import BASE, CHAT, KEY, URL, check, run

HOME = Path(tempfile.mkdtemp())
(HOME / "extra-openai-models.yaml").write_text(
    f"- model_id: chat\n  model_name: {CHAT}\n  api_base: {URL}/v1\n  api_key_name: puna\n  supports_schema: true\n"
    f"- model_id: base\n  model_name: {BASE}\n  api_base: {URL}/v1\n  api_key_name: puna\n  completion: true\n"
)
(HOME / "keys.json").write_text(json.dumps({"puna": KEY}))


def said(*arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        env={**os.environ, "LLM_USER_PATH": str(HOME)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@check("a chat prompt, streamed and not; a conversation goes on")
def chat() -> None:
    said("-m", "chat", "-o", "max_tokens", "6", "Hello")
    said("-m", "chat", "-o", "max_tokens", "6", "--no-stream", "Hello")
    said("-c", "-m", "chat", "-o", "max_tokens", "6", "More")


@check("a completion model")
def completion() -> None:
    assert said("-m", "base", "-o", "max_tokens", "12", "-o", "seed", "1", "Once upon a time").strip()


@check("--schema")
def schema() -> None:
    text = said("-m", "chat", "--schema", '{"type":"object","properties":{"x":{"enum":[1,2]}},"required":["x"],'
                '"additionalProperties":false}', "A number")  # fmt: skip
    assert json.loads(text)["x"] in (1, 2)


run()
