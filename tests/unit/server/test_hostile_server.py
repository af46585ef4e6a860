"""What a stranger may cost everybody else: time of the event loop, memory, disk, and turns of a batch.

What it is not: HTTP's own shapes (`test_hostile_http.py`), or keys and pages of others (`test_door.py`).
"""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from puna import LLM
from puna.errors import CheckpointError, ContextError, QueueFullError, TokenizerError
from puna.gateway.local import TOKEN_CHARS, LocalBackend
from puna.gateway.one import OneModel
from puna.gateway.scripted import ScriptedBackend
from puna.server import openai_batches, store
from puna.server.app import create_app
from puna.server.caller import Caller
from puna.server.nesting import MAX_THINGS, Nesting
from puna.server.ollama_bodies import seconds
from puna.server.openai_completions import CompletionBody
from puna.server.openai_responses import ResponseBody
from puna.server.problems import RequestError, problem_of
from puna.server.sampling import to_sampling
from puna.server.store import Batch, Store
from puna.types import Event, Message, Request, Tool, Usage


def test_a_prompt_that_no_context_has_room_for_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("cria")
    backend = LocalBackend(llm)
    most = TOKEN_CHARS * backend.card.context_length

    async def all_of_it() -> None:
        monkeypatch.setattr(llm.tokenizer, "encode", lambda *a, **k: pytest.fail("it was encoded"))
        monkeypatch.setattr(llm, "given_ids", lambda *a, **k: pytest.fail("it was encoded"))
        long = "a" * (most + 1)
        asked: list[Any] = [
            anext(backend.generate(Request(long))),
            anext(backend.generate(Request((Message("user", long[1:]), Message("user", "ab"))))),
            anext(backend.generate(Request((Message("user", "a"),), tools=(Tool("f", long),)))),
            backend.encode(long, raw=True),
            backend.embed([long]),
            backend.score(long, ["a"]),
            backend.score("a", ["a", long]),
        ]
        for each in asked:
            with pytest.raises(ContextError, match=r"characters are far more"):
                await each
        monkeypatch.undo()
        assert len(await backend.encode("a" * 4000, raw=True)) > 100  # longer than the context, and still counted
        await backend.close()

    asyncio.run(all_of_it())


@pytest.mark.parametrize(
    "thing", [b"{},", b"[],", b'"a",', b'"k":1,', b'"\\"",'], ids=["objects", "arrays", "texts", "keys", "escapes"]
)
def test_a_body_of_a_million_faults_is_refused_before_they_are_looked_for(thing: bytes) -> None:
    Nesting(64).take(b"[" + thing * (MAX_THINGS // 4))
    with pytest.raises(RequestError) as caught:
        asyncio.run(Nesting(64).feed(b"[" + thing * (MAX_THINGS + 2)))
    assert (caught.value.status, caught.value.code) == (413, "body_too_large")
    asyncio.run(Nesting(64).feed(b"[" + b"1," * (4 * MAX_THINGS)))  # a long prompt of ids is no harm


def test_of_a_list_one_fault_is_found() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate({"prompt": [{}] * 1000})
    assert caught.value.error_count() < 10


@pytest.mark.parametrize("name", ["n", "best_of", "logprobs", "prompt_logprobs"])
def test_numbers_larger_than_any_float(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_sampling(**{name: 10**400})
    assert caught.value.param == name
    with pytest.raises(RequestError) as caught:
        seconds(10**400)
    assert caught.value.param == "keep_alive"


@pytest.mark.parametrize("name", ["id", "call_id"])
def test_what_no_context_bounds_is_not_kept_at_any_length(name: str) -> None:
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", name: "x" * 256}
    ResponseBody.model_validate({"input": [item]})
    with pytest.raises(ValidationError):
        ResponseBody.model_validate({"input": [{**item, name: "x" * 257}]})


def test_what_is_kept_is_for_its_owners_eyes(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir(mode=0o755)  # made by somebody else
    kept = Store(folder)
    kept.add_file("a", "n", "batch", "f1", [b"12345"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    kept.close()
    assert modes, "nothing was kept"
    assert set(modes.values()) == {0o600}, modes


def test_batches_that_are_not_over_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BATCHES", 2)
    kept = Store()
    for number in "ab":
        kept.add_batch(Batch(number, "me", {}, "in_progress", 0, {}))
    with pytest.raises(RequestError) as caught:
        kept.add_batch(Batch("c", "me", {}, "validating", 0, {}))
    assert (caught.value.status, caught.value.code) == (429, "too_many_batches")
    kept.add_batch(Batch("c", "other", {}, "validating", 0, {}))
    kept.turn("a", "cancelled")
    kept.add_batch(Batch("d", "me", {}, "validating", 0, {}))
    kept.close()


def test_a_batch_that_finds_no_room_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key whose tokens are used up has lines that wait for hours; those of other keys do not wait with them."""
    monkeypatch.setattr(openai_batches, "FIRST_WAIT", 1000.0)

    async def script(request: Request) -> AsyncGenerator[Event]:
        if request.namespace == "poor":
            raise QueueFullError("Full.")
        yield Event(text="yes", finish="stop", usage=Usage(1, 0, 1))

    async def both() -> str:
        app = create_app(OneModel(ScriptedBackend(script)))
        kept: Store = app.state.store
        line = b'{"custom_id":"%d","method":"POST","url":"/v1/completions","body":{"prompt":"a"}}\n'
        for owner in ("poor", "rich"):
            caller = openai_batches._written(Caller(owner, namespace=owner))
            kept.add_file(owner, "n", "batch", f"file-{owner}", [b"".join(line % i for i in range(20))])
            about: dict[str, Any] = {
                "endpoint": "/v1/completions",
                "input_file_id": f"file-{owner}",
                "output_seconds": None,
            }
            about["expires_at"] = time.time() + 1000
            kept.add_batch(Batch(owner, owner, caller, "validating", 0 if owner == "poor" else 1, about))
        async with app.router.lifespan_context(app), asyncio.timeout(60):
            while (rich := kept.batch("rich")) is None or rich.status != "completed":
                await asyncio.sleep(0.005)
            poor = kept.batch("poor")
            assert poor is not None
            return poor.status

    assert asyncio.run(both()) == "in_progress"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Token id 9 is no token of /opt/me/models/x y/../m/tokenizer.json.", None),
        ("/srv/models/a.gguf is damaged.", "a.gguf is damaged."),
        ("In '/srv/models/a.gguf' (of /srv/models).", "In 'a.gguf' (of models)."),
        ("1/2 of a/b, https://hub.example/a/b, q4/k", "1/2 of a/b, https://hub.example/a/b, q4/k"),
    ],
)
def test_where_files_lie_is_not_told(text: str, told: str | None) -> None:
    said = problem_of(CheckpointError(text)).message
    assert "/opt" not in said
    assert "models/" not in said
    assert told is None or said == told


def test_a_tokens_error_names_no_folder() -> None:
    async def ask() -> str:
        backend = LocalBackend(LLM("cria"))
        with pytest.raises(TokenizerError) as caught:
            await backend.decode([999_999])
        await backend.close()
        assert "/" in caught.value.message  # to who runs it, it says where
        return problem_of(caught.value).message

    assert "/" not in asyncio.run(ask())
