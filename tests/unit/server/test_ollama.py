"""Ollama's protocol, spoken by the `ollama` package over a real socket; its own models parse strictly."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import ollama
import pytest
from hub_server import FakeHub, Repository
from huggingface_hub import constants

from puna.errors import StoppedError
from puna.gateway.scripted import CARD, Script, ScriptedBackend, encoded, saying
from puna.server.app import create_app
from puna.server.caller import Caller
from puna.server.door import Door
from puna.server.ollama_bodies import seconds
from puna.server.ollama_models import OLLAMA_VERSION, counted
from puna.types import Event, Grammar, Message, Request, Sampling, TokenLogprob, Tool, ToolCall, ToolCallPiece, Usage
from puna.weights import fetch

SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": SCHEMA}}
HI: Any = [{"role": "user", "content": "Hi"}]


class KeyDoor(Door):
    """A door for everybody that gives them these scopes."""

    def __init__(self, caller: Caller) -> None:
        super().__init__(hosts=None, loopback_only=False)
        self.caller = caller

    def middleware(self, app: Any) -> Any:
        async def as_caller(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                scope["state"]["caller"] = self.caller
            await app(scope, receive, send)

        return super().middleware(as_caller)


class Stage:
    """A server on a backend whose script a test sets."""

    def __init__(self, backend: ScriptedBackend, door: KeyDoor, url: str) -> None:
        self.backend, self.door, self.url = backend, door, url
        self.client = ollama.Client(host=url, timeout=30)

    def play(self, script: Script) -> None:
        self.backend._script = script

    @property
    def asked(self) -> Request:
        return self.backend.requests[-1]

    def post(self, path: str, **fields: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}/api/{path}", json={"model": "scripted", "stream": False, **fields})


@pytest.fixture(scope="module")
def one(serve_module: Any) -> Stage:
    backend, door = ScriptedBackend(), KeyDoor(Caller())
    return Stage(backend, door, serve_module(create_app(backend, door=door)))


@pytest.fixture
def stage(one: Stage) -> Iterator[Stage]:
    one.play(saying("Hello", " there", "."))
    yield one
    one.backend._card, one.door.caller = CARD, Caller()


def events_of(*events: Event) -> Script:
    async def script(request: Request) -> AsyncGenerator[Event]:
        for event in events:
            yield event

    return script


def test_a_prompt_whole_and_in_lines(stage: Stage) -> None:
    whole = stage.client.generate("scripted", "Hi", system="Be brief.")
    assert (whole.response, whole.done, whole.done_reason, whole.model) == ("Hello there.", True, "stop", "scripted")
    prompt = (Message("system", "Be brief."), Message("user", "Hi"))
    assert (whole.prompt_eval_count, whole.eval_count) == (len(encoded(prompt)), 12)
    assert stage.asked.prompt == prompt
    assert whole.created_at is not None
    assert abs((datetime.now(UTC) - datetime.fromisoformat(whole.created_at)).total_seconds()) < 60
    lines = list(stage.client.generate("scripted", "Hi", stream=True))
    assert [part.response for part in lines] == ["Hello", " there", ".", ""]
    assert [part.done for part in lines] == [False, False, False, True]
    last = lines[-1]
    times = (last.load_duration, last.prompt_eval_duration, last.eval_duration)
    assert all(isinstance(each, int) and each >= 0 for each in times)
    assert last.total_duration == sum(times)  # type: ignore[arg-type]


def test_durations_are_those_of_the_answer(stage: Stage) -> None:
    async def slow(request: Request) -> AsyncGenerator[Event]:
        yield Event(prefilled=1)
        await asyncio.sleep(0.05)
        yield Event(text="a", token_ids=(1,))
        await asyncio.sleep(0.02)
        yield Event(finish="stop", usage=Usage(3, 0, 2))

    stage.play(slow)
    made = stage.client.generate("scripted", "Hi")
    assert made.prompt_eval_duration is not None
    assert made.eval_duration is not None
    assert made.prompt_eval_duration >= 50e6
    assert made.eval_duration >= 20e6


def test_a_raw_prompt_and_a_model_without_a_chat_format(stage: Stage) -> None:
    stage.client.generate("scripted", "Once", raw=True)
    assert (stage.asked.prompt, stage.asked.raw) == ("Once", True)
    assert stage.post("generate", prompt="a", raw=True, system="b").status_code == 400
    stage.backend._card = replace(CARD, chat=False)
    stage.client.generate("scripted", "Once")
    assert (stage.asked.prompt, stage.asked.raw) == ("Once", True)


def test_a_conversation_whole_in_lines_and_async(stage: Stage) -> None:
    made = stage.client.chat("scripted", [{"role": "system", "content": "S"}, *HI])
    assert (made.message.role, made.message.content, made.done_reason) == ("assistant", "Hello there.", "stop")
    assert stage.asked.prompt == (Message("system", "S"), Message("user", "Hi"))
    parts = list(stage.client.chat("scripted", HI, stream=True))
    assert [part.message.content for part in parts] == ["Hello", " there", ".", ""]

    async def run() -> str:
        client = ollama.AsyncClient(host=stage.url)
        text = ""
        async for part in await client.chat("scripted", HI, stream=True):
            text += part.message.content or ""
        return text

    assert asyncio.run(run()) == "Hello there."


def test_the_default_is_lines_whatever_the_body_is_called(stage: Stage) -> None:
    body = json.dumps({"model": "scripted", "prompt": "Hi"})
    form = {"content-type": "application/x-www-form-urlencoded"}
    made = httpx2.post(f"{stage.url}/api/generate", content=body, headers=form)
    assert made.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(each)["done"] for each in made.text.splitlines()] == [False, False, False, True]
    for browser in ({"origin": "http://evil"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-origin"}):
        answer = httpx2.post(f"{stage.url}/api/generate", content=body, headers=form | browser)
        assert answer.status_code in (403, 415)


def test_calls_of_tools_come_whole(stage: Stage) -> None:
    cuts = ['{"ci', 'ty": "Par', 'is"}']
    stage.play(
        events_of(
            Event(text="Look."),
            Event(tool_calls=(ToolCallPiece(0, "a", "weather"),)),
            *(Event(tool_calls=(ToolCallPiece(0, arguments=cut),)) for cut in cuts),
            Event(tool_calls=(ToolCallPiece(1, "b", "clock", "{}"),)),
            Event(finish="stop", usage=Usage(5, 0, 9)),
        )
    )
    whole = stage.client.chat("scripted", HI, tools=[TOOL])
    parts = list(stage.client.chat("scripted", HI, tools=[TOOL], stream=True))
    streamed = [call for part in parts for call in part.message.tool_calls or ()]
    for calls in (whole.message.tool_calls or (), streamed):
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("weather", {"city": "Paris"}),
            ("clock", {}),
        ]
    assert [len(part.message.tool_calls or ()) for part in parts] == [0, 1, 1, 0]
    assert whole.message.content == "Look."
    tool = stage.asked.tools[0]
    assert (tool.name, tool.description, json.loads(tool.parameters)) == ("weather", "Of a city", SCHEMA)
    stage.backend._card = replace(CARD, tools=False)
    with pytest.raises(ollama.ResponseError, match="no form for tools"):
        stage.client.chat("scripted", HI, tools=[TOOL])


def test_results_of_tools_find_their_calls(stage: Stage) -> None:
    def call(name: str, **arguments: Any) -> Any:
        return {"function": {"name": name, "arguments": arguments}}

    messages = [
        *HI,
        {"role": "assistant", "content": "", "tool_calls": [call("a", x=1), call("b"), call("a", x="ß")]},
        {"role": "tool", "content": "of b", "tool_name": "b"},
        {"role": "tool", "content": "of a"},
        {"role": "tool", "content": "of a again", "tool_name": "a"},
    ]
    stage.client.chat("scripted", messages)
    calls = (ToolCall("a", '{"x": 1}', "call_0"), ToolCall("b", "{}", "call_1"), ToolCall("a", '{"x": "ß"}', "call_2"))
    assert stage.asked.prompt == (
        Message("user", "Hi"),
        Message("assistant", "", calls),
        Message("tool", "of b", (), "call_1"),
        Message("tool", "of a", (), "call_0"),
        Message("tool", "of a again", (), "call_2"),
    )
    for wrong in (
        [*messages, {"role": "tool", "content": "more"}],
        [{"role": "tool", "content": "x", "tool_name": "q"}],
    ):
        assert "no call before it waits" in stage.post("chat", messages=wrong).json()["error"]


def test_an_answer_that_was_begun_goes_on(stage: Stage) -> None:
    stage.client.chat("scripted", [*HI, {"role": "assistant", "content": "Sure, "}])
    assert stage.asked.prompt == tuple(b"user: Hi\nSure, ")
    with pytest.raises(ollama.ResponseError, match="begun"):
        stage.client.chat("scripted", [*HI, {"role": "assistant", "content": "{"}], format="json")


def test_forms(stage: Stage) -> None:
    stage.client.chat("scripted", HI, format="json")
    assert stage.asked.grammar == Grammar("json_object")
    stage.client.generate("scripted", "Hi", format=SCHEMA)
    assert stage.asked.grammar == Grammar("json_schema", json.dumps(SCHEMA))
    assert stage.post("chat", messages=HI, format="yaml").status_code == 400


def test_log_probabilities(stage: Stage) -> None:
    told = TokenLogprob(72, -0.5, ((72, -0.5), (195, -math.inf)))
    stage.play(
        events_of(Event(text="H", token_ids=(72,), logprobs=(told,)), Event(finish="stop", usage=Usage(1, 0, 1)))
    )
    made = stage.client.generate("scripted", "Hi", logprobs=True, top_logprobs=2)
    assert stage.asked.sampling.logprobs == 2
    assert made.logprobs is not None
    assert (made.logprobs[0].token, made.logprobs[0].logprob) == ("H", -0.5)
    assert [(one.token, one.logprob) for one in made.logprobs[0].top_logprobs or ()] == [("H", -0.5), ("\ufffd", -9999)]
    assert stage.post("generate", prompt="a", top_logprobs=2).status_code == 400


def test_options_and_their_defaults(stage: Stage) -> None:
    def asked(**options: Any) -> Sampling:
        stage.client.generate("scripted", "Hi", options=options)
        return stage.asked.sampling

    default = Sampling(
        temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.1, penalty_range=64, max_tokens=None, seed=None
    )
    assert asked() == default
    assert asked(num_predict=-1, seed=-1, num_ctx=CARD.context_length, num_keep=4, mirostat=0, tfs_z=1.0) == default
    every = {
        "temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "seed": 7, "num_predict": 5,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "stop": ["a", "b"],
    }  # fmt: skip
    assert asked(**every, repeat_penalty=1.3, repeat_last_n=-1) == Sampling(
        temperature=0, top_k=3, top_p=0.5, min_p=0.1, typical_p=0.9, seed=7, max_tokens=5, presence_penalty=0.5,
        frequency_penalty=0.25, stop=("a", "b"), repetition_penalty=1.3, penalty_range=0,
    )  # fmt: skip
    assert asked(repeat_last_n=0, presence_penalty=1) == Sampling(temperature=0.8, top_k=40, top_p=0.9)
    assert asked(mirostat=2, mirostat_tau=4, stop="x", repeat_last_n=0) == Sampling(
        temperature=0.8, top_k=0, top_p=1, mirostat_tau=4, mirostat_eta=0.1, stop=("x",)
    )


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_ctx": CARD.context_length + 1}, "num_ctx"),
        ({"num_gpu": 1}, "num_gpu"),
        ({"num_thread": 4}, "num_thread"),
        ({"use_mmap": True}, "use_mmap"),
        ({"num_batch": 4}, "num_batch"),
        ({"mirostat": 1}, "mirostat"),
        ({"mirostat": 2, "top_k": 5}, "top_k"),
        ({"tfs_z": 0.5}, "tfs_z"),
        ({"penalize_newline": False}, "penalize_newline"),
        ({"num_predict": 0}, "num_predict"),
        ({"num_predict": -3}, "num_predict"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_options_that_are_refused_name_themselves(stage: Stage, options: Any, name: str) -> None:
    before = len(stage.backend.requests)
    with pytest.raises(ollama.ResponseError, match=name) as refused:
        stage.client.generate("scripted", "Hi", options=options)
    assert refused.value.status_code == 400
    assert len(stage.backend.requests) == before


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("generate", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("generate", {"prompt": "a", "template": "{{ .Prompt }}"}, "template"),
        ("generate", {"prompt": "a", "context": [1, 2]}, "context"),
        ("generate", {"prompt": "a", "images": [base64.b64encode(b"x").decode()]}, "images"),
        ("generate", {"prompt": "a", "think": True}, "think"),
        ("generate", {"prompt": "a", "width": 64}, "width"),
        ("generate", {"prompt": "a", "unheard_of": 1}, "unheard_of"),
        ("chat", {"messages": HI, "think": "high"}, "think"),
        ("chat", {"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "images"),
        ("chat", {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "a",
                  "arguments": {}}}]}]}, "tool_calls"),
        ("chat", {"messages": [{"role": "user", "content": "a", "tool_name": "x"}]}, "tool_name"),
        ("chat", {"messages": [{"role": "judge", "content": "a"}]}, "role"),
        ("chat", {"messages": HI, "keep_alive": "soon"}, "keep_alive"),
    ],
)  # fmt: skip
def test_fields_that_are_refused_name_themselves(stage: Stage, path: str, fields: Any, name: str) -> None:
    response = stage.post(path, **fields)
    assert response.status_code == 400
    assert name in response.json()["error"]


def test_what_asks_for_nothing_is_taken(stage: Stage) -> None:
    made = stage.post("generate", prompt="a", suffix="", template="", context=[], images=[], think=False, format="",
                      raw=False, keep_alive="5m", options={"num_gpu": None})  # fmt: skip
    assert made.status_code == 200, made.text


def test_durations_of_keep_alive() -> None:
    said = ("5m", "1h30m", "1.5h", "300ms", "-1s", "0", "+2s", 30, -1, 0.5, None)
    assert [seconds(each) for each in said] == [300, 5400, 5400, 0.3, -1, 0, 2, 30, -1, 0.5, None]
    for wrong in ("", "5", "5 m", "m", "1d", "--1s", "5m!", "1" * 30 + "s", math.nan, math.inf, 1e300):
        with pytest.raises(Exception, match="keep_alive"):
            seconds(wrong)


def test_loading_and_unloading(stage: Stage) -> None:
    before = len(stage.backend.requests)
    assert stage.client.generate("scripted", keep_alive="10m").done_reason == "load"
    assert stage.client.chat("scripted", []).done_reason == "load"
    assert stage.client.generate("scripted", "", keep_alive=0).done_reason == "unload"
    assert stage.client.chat("scripted", keep_alive=0).message.content == ""
    stage.door.caller = Caller(scopes=frozenset({"infer"}))
    for keep in (0, -1, "-1m"):
        refused = stage.post("generate", prompt="a", keep_alive=keep)
        assert refused.status_code == 403
        assert "manage" in refused.json()["error"]
    assert len(stage.backend.requests) == before
    assert stage.post("generate", prompt="a", keep_alive=60).status_code == 200


def test_lists_of_models(stage: Stage) -> None:
    stage.backend._card = replace(
        CARD, nbytes=1000, modified=1e9, digest="ab" * 32, parameters=1_235_814_400, quantization="Q4_K_M",
        format="gguf", family="llama3.2", template="{{ x }}",
    )  # fmt: skip
    (listed,) = stage.client.list().models
    assert (listed.model, listed.size, listed.digest) == ("scripted", 1000, "ab" * 32)
    assert listed.modified_at == datetime.fromtimestamp(1e9, UTC)
    assert listed.details is not None
    assert (listed.details.parameter_size, listed.details.quantization_level) == ("1.24B", "Q4_K_M")
    (running,) = stage.client.ps().models
    assert (running.model, running.size, running.size_vram, running.context_length) == ("scripted", 1000, 0, 4096)
    assert running.expires_at is not None
    assert running.expires_at.year == 9999
    shown = stage.client.show("scripted")
    assert shown.template == "{{ x }}"
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert shown.modelinfo[f"{shown.modelinfo['general.architecture']}.context_length"] == 4096
    assert stage.client.show("scripted:latest").template == "{{ x }}"
    with pytest.raises(ollama.ResponseError) as missing:
        stage.client.show("nothing")
    assert missing.value.status_code == 404
    assert httpx2.get(f"{stage.url}/api/version").json() == {"version": OLLAMA_VERSION}
    stage.door.caller = Caller(models=frozenset({"other"}))
    assert stage.client.list().models == []
    assert stage.client.ps().models == []
    assert stage.post("show").status_code in (400, 404)


def test_parameters_in_words() -> None:
    told = [counted(number) for number in (0, 999, 260_032, 8_030_261_248, 70_553_706_496)]
    assert told == ["0", "999", "260K", "8.03B", "70.6B"]


def test_embeddings(stage: Stage) -> None:
    made = stage.client.embed("scripted", ["abc", "ab"], truncate=True)
    assert len(made.embeddings) == 2
    assert [math.hypot(*vector) for vector in made.embeddings] == pytest.approx([1, 1])
    assert made.prompt_eval_count == 5
    assert list(made.embeddings[0])[:4] == pytest.approx([0, 3**-0.5, 3**-0.5, 3**-0.5])
    short = stage.client.embed("scripted", "abc", dimensions=3).embeddings[0]
    assert list(short) == pytest.approx([0, 2**-0.5, 2**-0.5])
    assert stage.client.embed("scripted", []).embeddings == []
    assert list(stage.client.embeddings("scripted", "aab").embedding) == [0, 2, 1, 0, 0, 0, 0, 0]
    for wrong in ({"dimensions": 9}, {"dimensions": 0}, {"options": {"temperature": 1}}, {"options": {"num_gpu": 1}}):
        body = {"model": "scripted", "input": "a", **wrong}
        assert httpx2.post(f"{stage.url}/api/embed", json=body).status_code == 400


def test_what_changes_models_is_refused_in_words(stage: Stage) -> None:
    tries: list[Any] = [
        lambda: stage.client.delete("scripted"),
        lambda: stage.client.copy("scripted", "b"),
        lambda: stage.client.create("b", from_="scripted"),
        lambda: stage.client.push("scripted"),
    ]
    for each in tries:
        with pytest.raises(ollama.ResponseError, match=r"not .*\. ") as refused:
            each()
        assert refused.value.status_code == 405
    stage.door.caller = Caller(scopes=frozenset({"infer"}))
    with pytest.raises(ollama.ResponseError, match="manage"):
        stage.client.delete("scripted")
    with pytest.raises(ollama.ResponseError, match="manage"):
        stage.client.pull("herd/tiny")


def test_errors_before_and_in_the_middle(stage: Stage) -> None:
    with pytest.raises(ollama.ResponseError) as missing:
        stage.client.chat("nothing", HI)
    assert missing.value.status_code == 404

    def failing(pieces: int, error: Exception | None) -> Script:
        async def script(request: Request) -> AsyncGenerator[Event]:
            for _ in range(pieces):
                yield Event(text="a")
            if error is not None:
                raise error

        return script

    stage.play(failing(0, StoppedError("Gone.")))
    with pytest.raises(ollama.ResponseError) as stopped:
        list(stage.client.chat("scripted", HI, stream=True))
    assert stopped.value.status_code == 503
    for error, said in ((StoppedError("Gone."), "Gone."), (ValueError("secret"), "failed"), (None, "ended before")):
        stage.play(failing(1, error))
        lines = stage.post("chat", messages=HI, stream=True).text.splitlines()
        assert said in json.loads(lines[-1])["error"]
        assert "secret" not in "".join(lines)
        with pytest.raises(ollama.ResponseError, match=said):
            list(stage.client.chat("scripted", HI, stream=True))


def test_every_cut_of_a_text_gives_the_same_answer(stage: Stage) -> None:
    text, arguments = "Héllo, wörld", '{"city": "Zürich"}'
    for size in range(1, len(arguments) + 1):
        events = [Event(text=text[i : i + size]) for i in range(0, len(text), size)]
        pieces = [ToolCallPiece(0, arguments=arguments[i : i + size]) for i in range(0, len(arguments), size)]
        events.append(Event(tool_calls=(ToolCallPiece(0, "a", "weather"), pieces[0])))
        events += [Event(tool_calls=(piece,)) for piece in pieces[1:]]
        events += [Event(tool_calls=(ToolCallPiece(1, "b", "clock"),)), Event(finish="stop", usage=Usage(1, 0, 1))]
        stage.play(events_of(*events))
        lines = [json.loads(each) for each in stage.post("chat", messages=HI, stream=True).text.splitlines()]
        assert "".join(one["message"]["content"] for one in lines) == text
        calls = [call for one in lines for call in one["message"].get("tool_calls", ())]
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
            ("weather", {"city": "Zürich"}),
            ("clock", {}),
        ]
        assert lines[-1]["done_reason"] == "stop"


def test_a_client_that_leaves_cancels(stage: Stage) -> None:
    began = threading.Event()

    async def endless(request: Request) -> AsyncGenerator[Event]:
        yield Event(text="a")
        began.set()
        await asyncio.Event().wait()

    stage.play(endless)
    with httpx2.stream("POST", f"{stage.url}/api/generate", json={"model": "scripted", "prompt": "a"}) as response:
        pieces = response.iter_raw()  # dropped, it would close the connection
        next(pieces)
        assert began.wait(30)
        assert stage.backend.running == 1
    until = time.monotonic() + 30
    while stage.backend.running:
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model, an empty cache and an empty PUNA_HOME; nothing leads to the real hub or a real token."""
    server = FakeHub()
    files = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": bytes(3_000_000)}
    server.repositories["herd/tiny"] = Repository(files)
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "home"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(fetch, "RETRY_SECONDS", 0.0)
    yield server
    server.close()


def test_pulling(stage: Stage, hub: FakeHub) -> None:
    lines = list(stage.client.pull("herd/tiny", stream=True))
    assert lines[0].status == "pulling manifest"
    assert lines[-1].status == "success"
    last = lines[-2]
    total = sum(len(each) for each in hub.repositories["herd/tiny"].files.values())
    assert (last.completed, last.total, last.digest) == (total, total, "herd/tiny")
    assert all("herd/tiny" in (each.status or "") for each in lines[1:-1])
    fetched = len(hub.contents("model.safetensors"))
    assert stage.client.pull("herd/tiny").status == "success"
    assert len(hub.contents("model.safetensors")) == fetched
    assert stage.client.pull("cria").status == "success"
    for wrong in ("herd/unheard", "../../etc/passwd", "no such", "llama9:900b"):
        for stream in (True, False):
            with pytest.raises(ollama.ResponseError) as refused:
                list(stage.client.pull(wrong, stream=stream))  # type: ignore[call-overload]
            assert refused.value.status_code == 400
    assert stage.post("pull", model="herd/tiny", insecure=True).status_code == 400


def test_a_pull_that_its_client_leaves_ends(stage: Stage, hub: FakeHub) -> None:
    hub.pace["model.safetensors"] = 0.1  # five seconds for all of it
    hub.repositories["herd/tiny"].files["model.safetensors"] = bytes(12_000_000)
    with httpx2.stream("POST", f"{stage.url}/api/pull", json={"model": "herd/tiny"}) as response:
        pieces = response.iter_raw()
        next(pieces)
    until = time.monotonic() + 30
    while any(thread.name.startswith("puna-pull") for thread in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)
    blobs = (Path(constants.HF_HUB_CACHE) / "models--herd--tiny/blobs").iterdir()
    assert max((blob.stat().st_size for blob in blobs), default=0) < 12_000_000


def test_a_hub_in_trouble_is_not_the_clients_fault(stage: Stage, hub: FakeHub) -> None:
    hub.statuses["api"] = [503] * 20
    assert stage.post("pull", model="herd/tiny").status_code == 502


def test_tool_is_what_the_backend_hears() -> None:
    from puna.server.ollama_bodies import ToolIn, tools

    assert tools([ToolIn.model_validate({"function": {"name": "a"}})]) == (Tool("a"),)
