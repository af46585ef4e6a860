"""Tools through the local backend: a random model with the real Llama 3 vocabulary and Meta's chat formats."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file

from puna import LLM
from puna.engine.engine import Progress
from puna.engine.sampler import Draw
from puna.errors import ChatFormatError, GrammarError, UsageError
from puna.gateway import post
from puna.gateway.local import LocalBackend
from puna.models import decoder
from puna.models.config import read_hub
from puna.text.chat import ChatFormat, builtin_format
from puna.types import Event, Grammar, Message, Request, Sampling, Tool
from puna.weights import names

WEATHER = Tool(
    "get_weather",
    "Tells the weather.",
    json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "unit": {"enum": ["celsius", "kelvin"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "alert": {"type": "boolean"},
                "where": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
            },
            "required": ["city", "days"],
            "$defs": {
                "place": {
                    "type": "object",
                    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 3}, "new": {"type": "boolean"}},
                    "required": ["x", "new"],
                    "additionalProperties": False,
                }
            },
        }
    ),
)
CLOCK = Tool("clock", "Tells the time.", '{"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}}')
TOOLS = (WEATHER, CLOCK)
ASK = (Message("system", "S"), Message("user", "What weather?"))


@pytest.fixture(scope="module")
def llm(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("tools") / "tiny"
    folder.mkdir()
    sizes = {
        "vocab_size": 128_256, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    shapes = decoder.shapes(read_hub(config, "config").config)
    weights = {
        names.foreign(name, "hub"): random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    shutil.copy(reference / "tokenizers/llama3/tokenizer.model", folder)
    shutil.copy(reference / "tokenizers/llama3.1/tokenizer_config.json", folder)
    template = reference / "prompt_formats/chat_templates/meta-llama-Llama-3.1-8B-Instruct.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    return LLM(folder)


@pytest.fixture(scope="module")
def backend(llm: LLM) -> Iterator[LocalBackend]:
    backend = LocalBackend(llm)
    yield backend
    asyncio.run(backend.close())


@pytest.fixture
def formats(llm: LLM) -> Iterator[dict[str, ChatFormat]]:
    own = llm.chat_format
    assert own is not None
    yield {
        "template": own,
        "llama3.1": builtin_format("llama3.1", instruct=True),
        "llama3.2": builtin_format("llama3.2", instruct=True),
    }
    llm.chat_format = own


def answers(backend: LocalBackend, request: Request) -> list[list[Event]]:
    """The events of each choice."""

    async def run() -> list[list[Event]]:
        choices: list[list[Event]] = [[] for _ in range(request.sampling.n)]
        async for event in backend.generate(request):
            choices[event.choice].append(event)
        return choices

    return asyncio.run(asyncio.wait_for(run(), 120))


def calls_of(events: list[Event]) -> list[tuple[str, str, str]]:
    calls: dict[int, list[str]] = {}
    for piece in (piece for event in events for piece in event.tool_calls):
        call = calls.setdefault(piece.index, ["", "", ""])
        for n, part in enumerate((piece.id, piece.name, piece.arguments)):
            call[n] += part
    return [(identity, name, arguments) for identity, name, arguments in calls.values()]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events)


def test_the_card_says_that_it_can_be_told_about_tools(backend: LocalBackend) -> None:
    assert (backend.card.name, backend.card.chat, backend.card.tools) == ("tiny", True, True)


@pytest.mark.parametrize("name", ["template", "llama3.1", "llama3.2"])
def test_a_required_call_is_a_valid_one(
    backend: LocalBackend, llm: LLM, formats: dict[str, ChatFormat], name: str
) -> None:
    llm.chat_format = formats[name]
    request = Request(ASK, Sampling(seed=1, temperature=1.5, n=4, max_tokens=400), tools=TOOLS, tool_choice="required")
    found: list[list[Event]] = []
    for allowed in ((), ("get_weather",), ("clock",)):
        for events in answers(backend, replace(request, callable_tools=allowed)):
            assert events[-1].finish == "stop"
            assert text_of(events) == ""
            calls = calls_of(events)
            assert len(calls) == 1 or name == "llama3.2"
            for identity, called, arguments in calls:
                assert identity.startswith("call_")
                assert len(identity) > 9
                assert called in allowed or not allowed
                [tool] = [tool for tool in TOOLS if tool.name == called]
                jsonschema.validate(json.loads(arguments), json.loads(tool.parameters))
            found.append(events)
    ids = [identity for events in found for identity, _, _ in calls_of(events)]
    assert len(set(ids)) == len(ids) >= 12
    prompt = found[0][0].prefilled or found[0][-1].prefilled
    assert prompt == len(llm.encode(ASK, tools=TOOLS)) + (name == "llama3.1")  # the tag that its calls stand behind


def test_a_named_tool_is_the_one_that_is_called(
    backend: LocalBackend, llm: LLM, formats: dict[str, ChatFormat]
) -> None:
    for name, many in (("template", True), ("llama3.2", False)):
        llm.chat_format = formats[name]
        request = Request(
            ASK, Sampling(seed=2, n=4, max_tokens=60), tools=TOOLS, tool_choice="required", callable_tools=("clock",),
            parallel_tool_calls=many,
        )  # fmt: skip
        for events in answers(backend, request):
            [(_, called, arguments)] = calls_of(events)
            assert called == "clock"
            assert json.loads(arguments).get("zone") in ("UTC", "CET", None)
            assert events[-1].finish == "stop"


def test_a_schema_that_cannot_be_honoured_is_refused_with_the_tools_name(
    backend: LocalBackend, llm: LLM, formats: dict[str, ChatFormat]
) -> None:
    def required(schema: dict[str, Any]) -> Request:
        return Request(ASK, tools=(CLOCK, Tool("bad", "", json.dumps(schema))), tool_choice="required")

    for name, schema, reason in (
        ("template", {"type": "object", "properties": {"a": {"not": {}}}}, r"bad/properties/a/not"),
        ("template", {"type": "array"}, "tool 'bad' .* arguments are an object"),
        ("llama3.2", {"type": "object", "properties": {"a": {"not": {}}}}, r"bad/properties/a/not"),
        ("llama3.2", {"type": "object", "properties": {"a-b": {}}}, "tool 'bad' .* 'a-b' is no name"),
        ("llama3.2", {"type": "object", "properties": {"if": {}}}, "tool 'bad' .* 'if' is no name"),
        ("llama3.2", {"anyOf": [{"type": "object"}]}, "tool 'bad' .* anyOf cannot stand beside properties"),
        ("llama3.2", {"properties": {}, "required": ["x"]}, "tool 'bad' .* 'x' is required"),
    ):
        llm.chat_format = formats[name]
        with pytest.raises(GrammarError, match=reason):
            answers(backend, required(schema))


def test_what_contradicts_itself_is_refused(backend: LocalBackend) -> None:
    with pytest.raises(UsageError, match="a given form too"):
        answers(backend, Request(ASK, grammar=Grammar("json_object"), tools=TOOLS))
    with pytest.raises(UsageError, match="token ids"):
        answers(backend, Request((1, 2, 3), tools=TOOLS))
    with pytest.raises(UsageError, match="raw text"):
        answers(backend, Request("x", raw=True, tools=TOOLS))
    with pytest.raises(ChatFormatError, match="cannot be the name"):
        answers(backend, Request(ASK, tools=(Tool("no name"),)))
    given = Request(ASK, Sampling(max_tokens=20), grammar=Grammar("choice", '["yes"]'), tools=TOOLS, tool_choice="none")
    assert text_of(answers(backend, given)[0]) == "yes"


class Saying:
    """Makes the model say what it is told, in pieces of so many tokens; what is asked for later it says by itself."""

    def __init__(self, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self._backend, self._patch = backend, monkeypatch
        self.cancelled: list[int | None] = []
        self.later: list[dict[str, Any]] = []

    def choices(self, texts: list[str], request: Request, step: int = 1, finish: str = "stop") -> list[list[Event]]:
        tokenizer, thread = self._backend._llm.tokenizer, self._backend._thread
        submit = thread.submit
        self.cancelled, self.later, begun = [], [], []

        def scripted(listener: Any, prompt: list[int], sampling: Sampling, **options: Any) -> Future[int]:
            if begun:
                self.later.append({"prompt": prompt, "sampling": sampling, **options})
                return submit(listener, prompt, sampling, **options)
            begun.append(True)
            number: Future[int] = Future()
            number.set_result(-1)  # no number of the engine's
            for choice, text in enumerate(texts):
                tokens = tokenizer.encode(text, allow_special=True)
                for begin in range(0, len(tokens), step):
                    made = tuple(tokens[begin : begin + step])
                    told = None if sampling.logprobs is None else tuple(Draw(token, -0.5) for token in made)
                    listener(Progress(-1, choice, made, told, prefilled=len(prompt), reused=3))
                listener(Progress(-1, choice, (), finish=finish, prefilled=len(prompt)))  # type: ignore[arg-type]
            return number

        with self._patch.context() as patch:
            patch.setattr(thread, "submit", scripted)
            patch.setattr(post, "joined", lambda first, then: None)  # as for a reader who is never behind
            cancel = thread.cancel
            patch.setattr(thread, "cancel", lambda n, c=None: (self.cancelled.append(c), cancel(n, c))[1])
            return answers(self._backend, request)

    def __call__(self, text: str, request: Request, step: int = 1, finish: str = "stop") -> list[Event]:
        return self.choices([text], request, step, finish)[0]


@pytest.fixture
def say(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> Saying:
    return Saying(backend, monkeypatch)


AUTO = Request(ASK, tools=TOOLS)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_calls_that_the_model_chooses_are_told_apart_from_text(say: Saying, step: int) -> None:
    events = say('{"name": "clock", "parameters": {"zone": "UTC"}}', AUTO, step)
    assert text_of(events) == ""
    assert [call[1:] for call in calls_of(events)] == [("clock", '{"zone": "UTC"}')]
    assert events[-1].finish == "stop"
    events = say('Look:<|python_tag|>[clock(zone="UTC"), get_weather(city="é", days=2)]', AUTO, step)
    assert text_of(events) == "Look:"
    assert [call[1:] for call in calls_of(events)] == [
        ("clock", '{"zone": "UTC"}'),
        ("get_weather", '{"city": "é", "days": 2}'),
    ]
    for text in ('{"name": "Bob", "parameters": {}}', "It is [fine](x)."):
        events = say(text, AUTO, step)
        assert (text_of(events), calls_of(events)) == (text, [])


def test_without_tools_or_a_choice_an_answer_is_text(say: Saying) -> None:
    text = '{"name": "clock", "parameters": {}}'
    for request in (Request(ASK), replace(AUTO, tool_choice="none"), replace(AUTO, callable_tools=("get_weather",))):
        events = say(text, request)
        assert (text_of(events), calls_of(events)) == (text, [])


def test_one_call_at_most_ends_the_answer(say: Saying) -> None:
    events = say("[clock(), clock()] and so on", replace(AUTO, parallel_tool_calls=False))
    assert [call[1:] for call in calls_of(events)] == [("clock", "{}")]
    assert (text_of(events), events[-1].finish) == ("", "stop")
    assert say.cancelled[0] == 0
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == sum(len(event.token_ids) for event in events) < 8


def test_the_stop_string_that_ended_it_is_told(say: Saying, backend: LocalBackend) -> None:
    events = say("one two three", Request(ASK, Sampling(stop=("zwei", " two"))))
    assert (text_of(events), events[-1].finish, events[-1].stopped_by) == ("one", "stop", " two")
    assert {event.stopped_by for event in events[:-1]} == {""}
    events = say("one", Request(ASK, Sampling(stop=("zwei",))))
    assert (events[-1].finish, events[-1].stopped_by) == ("stop", "")
    events = say('{"name": "clock", "parameters": {"zone": "UTC"}}', replace(AUTO, sampling=Sampling(stop=("UTC",))))
    assert [call[1:] for call in calls_of(events)] == [("clock", '{"zone": "')]
    assert events[-1].stopped_by == "UTC"


def test_an_answer_that_is_cut_off_tells_what_there_is(say: Saying) -> None:
    events = say('{"name": "clock", "parameters": {"zo', AUTO, finish="length")
    assert [call[1:] for call in calls_of(events)] == [("clock", '{"zo')]
    assert events[-1].finish == "length"
    events = say('{"name": "clo', AUTO, finish="length")
    assert (text_of(events), calls_of(events)) == ('{"name": "clo', [])


def test_logprobs_and_several_answers_beside_calls(backend: LocalBackend) -> None:
    request = Request(
        ASK, Sampling(seed=4, n=2, best_of=3, logprobs=1, max_tokens=300), tools=TOOLS, tool_choice="required"
    )
    for events in answers(backend, request):
        assert calls_of(events)
        told = [token.token for event in events for token in event.logprobs]
        assert told == [token for event in events for token in event.token_ids] != []


STRICT = tuple(replace(tool, strict=True) for tool in TOOLS)


@pytest.mark.parametrize("step", [1, 4, 100])
def test_a_strict_tool_that_the_model_chooses_is_called_by_its_schema(
    say: Saying, backend: LocalBackend, llm: LLM, formats: dict[str, ChatFormat], step: int
) -> None:
    """What the model says is no valid call; the call is made once more, by the grammar."""
    for name, said in (
        ("template", '{"name": "get_weather", "parameters": {"town": "x"}}'),
        ("llama3.1", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"town": "x"}}'),
        ("llama3.2", '[get_weather(town="x")]'),
    ):
        llm.chat_format = formats[name]
        request = Request(ASK, Sampling(seed=5, max_tokens=400), tools=STRICT)
        events = say(said, request, step)
        assert (text_of(events), events[-1].finish) == ("", "stop")
        calls = calls_of(events)
        assert len(calls) == 1 or name == "llama3.2"
        assert name == "llama3.2" or calls[0][1] == "get_weather"
        for _, called, arguments in calls:
            [tool] = [tool for tool in TOOLS if tool.name == called]
            jsonschema.validate(json.loads(arguments), json.loads(tool.parameters))
        [later] = say.later
        tag = [llm.tokenizer.special["<|python_tag|>"]] if name == "llama3.1" else []
        assert later["prompt"] == [*llm.encode(ASK, tools=STRICT), *tag]
        assert later["sampling"].max_tokens == 400 - len(tag)
        made = [token for event in events for token in event.token_ids]
        usage = events[-1].usage
        assert usage is not None
        assert (usage.completion_tokens, usage.reused_tokens) == (len(made), 3)
        assert llm.tokenizer.decode(made).startswith(said[:12])


def test_a_strict_tool_leaves_text_and_other_calls_alone(say: Saying) -> None:
    request = Request(ASK, Sampling(seed=5, max_tokens=400, logprobs=0), tools=(WEATHER, STRICT[1]))
    for text in ("It rains.", '{"name": "Bob"}', '{"name": "clock"}', "[clock](x)", "\n\n{"):
        events = say(text, request)
        assert (text_of(events), calls_of(events), say.later) == (text, [], [])
        tokens = [token for event in events for token in event.token_ids]
        assert tokens == say._backend._llm.tokenizer.encode(text)
        assert [each.token for event in events for each in event.logprobs] == tokens
    events = say('{"name": "get_weather", "parameters": {"x": 1}}', request)
    assert ([call[1:] for call in calls_of(events)], say.later) == ([("get_weather", '{"x": 1}')], [])
    events = say('{"name": "get_weather", "parameters": {"x": 1}}; {"name": "clock", "parameters": {"y": 2}}', request)
    (_, first, given), (_, second, zone) = calls_of(events)
    assert (first, given, second) == ("get_weather", '{"x": 1}', "clock")
    assert json.loads(zone) in ({}, {"zone": "UTC"}, {"zone": "CET"})
    tokens = [token for event in events for token in event.token_ids]
    assert [each.token for event in events for each in event.logprobs] == tokens
    assert say._backend._llm.tokenizer.decode(tokens).startswith('{"name": "get_weather", "parameters": {"x": 1}};')


def test_each_answer_makes_its_own_strict_call(say: Saying) -> None:
    request = Request(ASK, Sampling(seed=5, n=3, max_tokens=300), tools=STRICT)
    call = '{"name": "get_weather", "parameters": {"town": "x"}}'
    first, second, third = say.choices([call, "No.", call], request)
    assert (text_of(second), calls_of(second)) == ("No.", [])
    for events in (first, third):
        [(_, called, arguments)] = calls_of(events)
        assert called == "get_weather"
        jsonschema.validate(json.loads(arguments), json.loads(WEATHER.parameters))
        assert events[-1].finish == "stop"
    assert len({later["sampling"].seed for later in say.later}) == 2
    assert [event.usage for event in [*first, *second, *third] if event.usage] != []
    again = say.choices([call, "No.", call], request)
    assert [[call[1:] for call in calls_of(events)] for events in again] == [
        [call[1:] for call in calls_of(events)] for events in (first, second, third)
    ]


def test_a_strict_schema_is_checked_before_the_answer(backend: LocalBackend) -> None:
    bad = Tool("bad", "", '{"type": "object", "properties": {"a": {"not": {}}}}', strict=True)
    with pytest.raises(GrammarError, match="bad/properties/a/not"):
        answers(backend, Request(ASK, tools=(bad,)))
    assert answers(backend, Request(ASK, Sampling(max_tokens=3), tools=(replace(bad, strict=False),)))
