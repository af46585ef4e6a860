"""What Ollama's clients send, and what it means: https://docs.ollama.com/api.

What it is: the bodies of `/api/generate`, `/api/chat` and their `options`, and the way from them to `types.Sampling`,
messages and tools. Where an option is left out its default is Ollama's, not Puna's: temperature 0.8, top_k 40, top_p
0.9, repeat_penalty 1.1 over the last 64 tokens (https://docs.ollama.com/modelfile#parameter), an answer without limit.
What it is not: routes or answers (`ollama.py`).
What is surprising: options that say how a model is loaded are refused, since its owner said that when the server was
started. `num_ctx` may be anything up to the model's context: nothing is ever cut to fit a smaller one. `num_keep` is
taken, as it says what to keep where something is cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from puna.server.bodies import Body
from puna.server.fields import json_text, refuse, refused, told_refused
from puna.server.limits import MAX_LOGPROBS, MAX_MODEL_NAME, MAX_PICTURES, MAX_TOOLS
from puna.server.pictures import decoded
from puna.server.problems import RequestError
from puna.server.sampling import to_sampling
from puna.types import Grammar, Message, ModelCard, Picture, Sampling, Tool, ToolCall

ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_NAME)]
KeepAlive = int | float | str | None

_LOADING = dict.fromkeys(
    (
        "numa", "num_batch", "num_gpu", "main_gpu", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mmap",
        "use_mlock", "embedding_only", "num_thread",
    ),
    "how a model is loaded is said where the server is started",
)  # fmt: skip


class Options(Body):
    """`options`; null is the default of each."""

    model_config = ConfigDict(json_schema_extra=told_refused(_LOADING))

    num_predict: int | None = Field(default=None, ge=-2)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = Field(default=None, gt=0, le=100)
    repeat_last_n: int | None = Field(default=None, ge=-1, lt=1 << 31)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    num_ctx: int | None = Field(default=None, ge=1)
    num_keep: int | None = None
    penalize_newline: Literal[True] | None = None
    tfs_z: float | None = None
    numa: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    logits_all: Any = None
    vocab_only: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    embedding_only: Any = None
    num_thread: Any = None

    def check(self, card: ModelCard) -> None:
        """Raise RequestError for what says how a model is loaded, and for a larger context than it has."""
        refuse(self, _LOADING, "options.")
        if self.num_ctx is not None and 0 < card.context_length < self.num_ctx:
            raise refused("options.num_ctx", f"the context of {card.name} has {card.context_length} tokens")


_NOTHING_IS_DRAWN = (
    "num_predict", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n",
    "presence_penalty", "frequency_penalty", "mirostat", "mirostat_tau", "mirostat_eta", "seed", "stop",
)  # fmt: skip


def check_embedding(options: Options | None, card: ModelCard) -> None:
    """Raise RequestError for options that an embedding cannot honour."""
    if options is None:
        return
    options.check(card)
    for name in _NOTHING_IS_DRAWN:
        if getattr(options, name) is not None:
            raise refused(f"options.{name}", "an embedding draws no tokens")


def sampling(options: Options | None, card: ModelCard, logprobs: int | None) -> Sampling:
    """How tokens are chosen. Raises RequestError for an option that is not honoured, or out of range."""
    asked = options or Options()
    asked.check(card)
    if asked.num_predict == 0:
        raise RequestError(
            "options.num_predict is 0, an answer of nothing.", remedy="-1 is no limit.", param="options.num_predict"
        )
    if asked.tfs_z not in (None, 1):
        raise refused("options.tfs_z", "Ollama has given it up, and min_p has taken its place")
    last = 64 if asked.repeat_last_n is None else asked.repeat_last_n
    penalties: dict[str, Any] = {}
    if last != 0:  # over no tokens a penalty does nothing, whatever it is
        penalties = {
            "repetition_penalty": 1.1 if asked.repeat_penalty is None else asked.repeat_penalty,
            "presence_penalty": asked.presence_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "penalty_range": max(last, 0),
        }
    return to_sampling(
        temperature=0.8 if asked.temperature is None else asked.temperature,
        seed=None if asked.seed == -1 else asked.seed,
        max_tokens=None if (asked.num_predict or -1) < 0 else asked.num_predict,
        stop=asked.stop,
        logprobs=logprobs,
        **penalties,
        **_filters(asked),
    )


def _filters(asked: Options) -> dict[str, Any]:
    given = {"top_k": asked.top_k, "top_p": asked.top_p, "min_p": asked.min_p, "typical_p": asked.typical_p}
    if not asked.mirostat:  # its parameters ask for nothing then
        default = {"top_k": 40, "top_p": 0.9}
        return default | {name: value for name, value in given.items() if value is not None}
    if asked.mirostat != 2:
        raise refused("options.mirostat", "of mirostat's two versions there is the second, 2; 0 is off")
    off = {"top_k": 0, "top_p": 1.0}
    return {
        **off,
        **{name: value for name, value in given.items() if value is not None},
        "mirostat_tau": 5.0 if asked.mirostat_tau is None else asked.mirostat_tau,
        "mirostat_eta": 0.1 if asked.mirostat_eta is None else asked.mirostat_eta,
    }


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d{1,12}(?:\.\d{0,9})?|\.\d{1,9})(ns|us|µs|μs|ms|s|m|h)", re.ASCII)


def seconds(keep_alive: KeepAlive) -> float | None:
    """A `keep_alive` in seconds: a number of them, or what Go's time.ParseDuration takes ("5m", "1h30m", "-1s");
    None where none was given. Raises RequestError for anything else."""
    if keep_alive is None:
        return None
    if not isinstance(keep_alive, str):
        if abs(keep_alive) < 1e12:  # which no NaN is; `isfinite` would fail of a whole number of 400 digits
            return float(keep_alive)
        raise _no_duration(keep_alive)
    sign, rest = (-1.0, keep_alive[1:]) if keep_alive[:1] == "-" else (1.0, keep_alive.removeprefix("+"))
    if rest == "0":
        return 0.0
    parts = list(_PART.finditer(rest[:200]))
    if not rest or "".join(match.group() for match in parts) != rest:
        raise _no_duration(keep_alive)
    return sign * sum(float(match.group(1)) * _UNITS[match.group(2)] for match in parts)


def _no_duration(value: object) -> RequestError:
    return RequestError(
        f"keep_alive is {value!r:.60}, which is no duration.",
        remedy='It is a number of seconds, or a text such as "5m" or "1h30m".',
        code="invalid_value",
        param="keep_alive",
    )


_REFUSED = {
    "think": "no model here thinks apart from its answer; false is taken",
    "template": "a model's own chat format is used; with raw a prompt has any form",
    "context": "Ollama has given it up; send the conversation to /api/chat",
    "width": "no images are made here",
    "height": "no images are made here",
    "steps": "no images are made here",
}


class AnswerBody(Body):
    """What `/api/generate` and `/api/chat` have in common."""

    model_config = ConfigDict(json_schema_extra=told_refused(_REFUSED))

    model: ModelName
    stream: bool | None = None
    options: Options | None = None
    keep_alive: KeepAlive = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    think: Any = None
    images: list[str] | None = Field(default=None, max_length=MAX_PICTURES)
    template: Any = None
    context: Any = None
    width: Any = None
    height: Any = None
    steps: Any = None

    def check(self) -> None:
        """Raise RequestError for what the protocol knows and is not done here."""
        refuse(self, _REFUSED)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs.", remedy="Set logprobs to true.", param="top_logprobs")

    @property
    def told_logprobs(self) -> int | None:
        """`Sampling.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def grammar(self) -> Grammar | None:
        """The form that the answer must have."""
        if not self.format:
            return None
        if self.format == "json":
            return Grammar("json_object")
        return Grammar("json_schema", json_text(self.format, "format"))


class GenerateBody(AnswerBody):
    """The body of `/api/generate`."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None


class CalledFunction(Body):
    """What was called, and with what."""

    name: str = Field(min_length=1, max_length=128)
    arguments: dict[str, Any]
    index: int | None = None
    description: Any = None


class Called(Body):
    """A call that the assistant made."""

    function: CalledFunction
    id: str | None = Field(default=None, max_length=256)
    type: Literal["function"] | None = None


_NOT_IN_A_MESSAGE = {
    "thinking": "no model here thinks apart from its answer",
}


class ChatMessage(Body):
    """A message."""

    model_config = ConfigDict(json_schema_extra=told_refused(_NOT_IN_A_MESSAGE))

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[Called] | None = None
    tool_name: str | None = Field(default=None, max_length=128)
    tool_call_id: str | None = Field(default=None, max_length=256)
    name: str | None = Field(default=None, max_length=128)
    thinking: Any = None
    images: list[str] | None = Field(default=None, max_length=MAX_PICTURES)


class Function(Body):
    """What a tool is."""

    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(Body):
    """A tool that the client runs."""

    function: Function
    type: Literal["function"] | None = None


class ChatBody(AnswerBody):
    """The body of `/api/chat`."""

    messages: list[ChatMessage] | None = None
    tools: list[ToolIn] | None = Field(default=None, max_length=MAX_TOOLS)


def images(given: Sequence[str] | None, param: str) -> tuple[tuple[int, Picture], ...]:
    """Pictures in base64, which stand before a message's text."""
    return tuple((0, decoded(data, f"{param}.{i}")) for i, data in enumerate(given or ()))


def conversation(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The messages. A result says by `tool_call_id` which call it answers, or by `tool_name`: then the first call of
    that tool that has no result yet; with neither, the first call of all. Raises RequestError where there is none."""
    made: list[Message] = []
    waiting: list[ToolCall] = []
    count = 0
    for i, message in enumerate(messages):
        where = f"messages.{i}"
        refuse(message, _NOT_IN_A_MESSAGE, f"{where}.")
        calls = []
        for called in message.tool_calls or ():
            text = json_text(called.function.arguments, f"{where}.tool_calls")
            calls.append(ToolCall(called.function.name, text, called.id or f"call_{count}"))
            count += 1
        if calls and message.role != "assistant":
            raise RequestError(f"{where} has tool_calls, which only the assistant makes.", param=f"{where}.tool_calls")
        waiting += calls
        answers = ""
        if message.role == "tool":
            answers = _answered(message, waiting, where)
        elif message.tool_name or message.tool_call_id or message.name:
            raise RequestError(
                f"{where} has a tool_name or tool_call_id, and is not of the role tool.", param=f"{where}.tool_name"
            )
        shown = images(message.images, f"{where}.images")
        made.append(Message(message.role, message.content or "", tuple(calls), answers, shown))
    return tuple(made)


def _answered(message: ChatMessage, waiting: list[ToolCall], where: str) -> str:
    name = message.tool_name or message.name
    for call in waiting:
        if (message.tool_call_id or call.id) == call.id and (name or call.name) == call.name:
            waiting.remove(call)
            return call.id
    raise RequestError(
        f"{where} is a tool's result, and no call before it waits for one.",
        remedy="Send the assistant's message with its tool_calls too.",
        code="invalid_messages",
        param=where,
    )


def tools(given: Sequence[ToolIn] | None) -> tuple[Tool, ...]:
    """The tools of a chat. Raises RequestError for a schema that is too large."""
    made = []
    for i, tool in enumerate(given or ()):
        function = tool.function
        kept = {} if function.parameters is None else {
            "parameters": json_text(function.parameters, f"tools.{i}.function.parameters")
        }  # fmt: skip
        made.append(Tool(function.name, function.description or "", **kept, strict=bool(function.strict)))
    return tuple(made)
