"""What Anthropic's clients send, and the conversation that it means: https://docs.anthropic.com/en/api/messages.

What it is: the bodies of `/v1/messages` and `/v1/messages/count_tokens`, and the way from their blocks to
`types.Message`s and `types.Tool`s.
What it is not: routes or answers (`anthropic.py`).
What is surprising: a user's message with results of tools becomes several messages, as models know results as messages
of their own. Texts of one message's blocks are joined by a line's end, and so are texts of messages of one role that
follow each other, which the protocol counts as one turn. A result with `is_error` is told to the model with `Error: `
before it. `cache_control` is taken everywhere and changes nothing: every prompt is remembered here while there is room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from puna.server.bodies import Body
from puna.server.fields import asks_for_nothing, json_text, refuse, refused, told_refused
from puna.server.limits import MAX_MODEL_NAME, MAX_STOP_CHARS, MAX_STOPS, MAX_TOOLS
from puna.server.pictures import decoded, picture_at, together
from puna.server.problems import RequestError
from puna.types import Grammar, Message, Tool, ToolCall, ToolChoice


class CacheControl(Body):
    """Where a prompt should be remembered: it is, anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    citations: Any = None


class ImageSource(Body):
    """A picture itself, in base64."""

    type: Literal["base64"]
    media_type: Literal["image/png", "image/jpeg", "image/webp", "image/gif"]
    data: str


class UrlSource(Body):
    """Where a picture lies."""

    type: Literal["url"]
    url: str


class DirectCaller(Body):
    """The model itself made the call."""

    type: Literal["direct"]


class ToolUseBlock(Body):
    """A call that the model made before."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=128)
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None
    toolset_name: Any = None


class OtherBlock(BaseModel):
    """A block of the protocol that is refused, whatever is in it."""

    model_config = ConfigDict(extra="allow")

    type: str


class ImageBlock(Body):
    """A picture. One that lies elsewhere (`url`) is fetched where the operator allows its host; there are no files."""

    type: Literal["image"]
    source: Annotated[
        Annotated[ImageSource, Tag("base64")] | Annotated[UrlSource, Tag("url")] | Annotated[OtherBlock, Tag("other")],
        Discriminator(lambda value: kind if (kind := _type(value)) in ("base64", "url") else "other"),
    ]
    cache_control: CacheControl | None = None


def _type(value: Any) -> Any:
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


_OTHERS = {
    "image": "a picture stands in a user's message",
    "document": "give its text in a text block",
    "search_result": "give its text in a text block",
    "thinking": "no model here thinks in blocks of its own",
    "redacted_thinking": "no model here thinks in blocks of its own",
}
_SERVER = "what a service's own tools made is not known here"


def _kind(value: object) -> str:
    """The tag of a block, of a body that nobody has looked at yet or of one that was read."""
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return kind if kind in ("text", "tool_use", "tool_result", "image") else "other"


def _text_or_list(value: object) -> str:
    return "text" if isinstance(value, str) else "blocks"


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[OtherBlock, Tag("other")],
    Discriminator(lambda value: "text" if _kind(value) == "text" else "other"),
]


class ToolResultBlock(Body):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[list[ResultBlock], Tag("blocks")], Discriminator(_text_or_list)
        ]
        | None
    ) = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: Any = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_kind),
]
Content = Annotated[Annotated[str, Tag("text")] | Annotated[list[Block], Tag("blocks")], Discriminator(_text_or_list)]
System = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextBlock], Tag("blocks")], Discriminator(_text_or_list)
]


class MessageIn(Body):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Content


class CustomTool(Body):
    """A tool that the client runs."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: Any = None


class ServerTool(BaseModel):
    """A tool that Anthropic runs, whatever is in it."""

    model_config = ConfigDict(extra="allow")

    type: str


def _tool_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "server" if isinstance(kind, str) and kind != "custom" else "custom"


ToolIn = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[ServerTool, Tag("server")], Discriminator(_tool_kind)
]


class ToolChoiceIn(Body):
    """Whether a tool may, must or must not be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the answer should be."""

    effort: Any = None
    format: OutputFormat | None = None


class Metadata(Body):
    """Labels; nothing is done with them."""

    user_id: str | None = Field(default=None, max_length=512)


_REFUSED = {
    "mcp_servers": "this server calls no other",
    "context_management": "a conversation is taken as it is, and nothing is taken out of it",
    "user_profile_id": "keys say who asks",
    "workspace_id": "keys say who asks",
}
_REFUSED_WHERE_ANSWERED = {
    "container": "no code is run here",
    "diagnostics": "the cache gives no reasons",
    "inference_geo": "the model runs where this server is",
}


class CountBody(Body):
    """The body of `/v1/messages/count_tokens`, and what both bodies have in common."""

    model_config = ConfigDict(json_schema_extra=told_refused(_REFUSED))

    model: str = Field(min_length=1, max_length=MAX_MODEL_NAME)
    messages: list[MessageIn] = Field(min_length=1, max_length=100_000)
    system: System | None = None
    tools: list[ToolIn] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoiceIn | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    thinking: Any = None
    speed: Literal["standard", "fast"] | None = None
    mcp_servers: Any = None
    context_management: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None


class MessagesBody(CountBody):
    """The body of `/v1/messages`."""

    model_config = ConfigDict(json_schema_extra=told_refused(_REFUSED, _REFUSED_WHERE_ANSWERED))

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None = Field(
        default=None, max_length=MAX_STOPS
    )
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None


def check(body: CountBody) -> None:
    """Raise RequestError for what the protocol knows and is not done here."""
    refuse(body, _REFUSED)
    if isinstance(body, MessagesBody):
        refuse(body, _REFUSED_WHERE_ANSWERED)
    if not asks_for_nothing(body.thinking) and body.thinking != {"type": "disabled"}:
        raise refused("thinking", 'no model here thinks in blocks of its own; {"type": "disabled"} is taken')
    if body.speed == "fast":
        raise refused("speed", "every answer is made as fast as the machine allows")
    if body.output_config is not None:
        refuse(body.output_config, {"effort": "no model here has levels of effort"}, "output_config.")


def conversation(body: CountBody) -> tuple[Message, ...]:
    """The messages, the system's first. Raises RequestError for a block that is refused, for one that its role may not
    say, and for the result of a call that nobody made."""
    made: list[Message] = []
    if body.system:
        made.append(Message("system", _texts(body.system, "system")))
    called: set[str] = set()
    for i, message in enumerate(body.messages):
        name = f"messages.{i}.content"
        if isinstance(message.content, str):
            turns = [Message(message.role, message.content)]
        elif message.role == "assistant":
            turns = [_assistant(message.content, name)]
        else:
            turns = _user(message.content, message.role, name, called)
        called.update(call.id for turn in turns for call in turn.tool_calls)
        for turn in turns:
            if made and turn.role in ("user", "assistant") and made[-1].role == turn.role:
                turn = _together(made.pop(), turn)
            made.append(turn)
    return tuple(made)


def _together(first: Message, second: Message) -> Message:
    content = "\n".join(text for text in (first.content, second.content) if text)
    return Message(first.role, content, first.tool_calls + second.tool_calls, pictures=together(first, second, "\n"))


def _assistant(blocks: list[Any], name: str) -> Message:
    calls = []
    texts = []
    for i, block in enumerate(blocks):
        where = f"{name}.{i}"
        if isinstance(block, ToolUseBlock):
            refuse(block, {"toolset_name": "there are no sets of tools here"}, f"{where}.")
            calls.append(ToolCall(block.name, json_text(block.input, f"{where}.input"), block.id))
        else:
            texts.append(_text(block, "assistant", where))
    return Message("assistant", "\n".join(texts), tuple(calls))


def _user(blocks: list[Any], role: str, name: str, called: set[str]) -> list[Message]:
    turns: list[Message] = []
    for i, block in enumerate(blocks):
        where = f"{name}.{i}"
        if not isinstance(block, ToolResultBlock) or role == "system":
            turn = _shown(block, where) if isinstance(block, ImageBlock) and role == "user" else Message(
                role, _text(block, role, where)
            )  # fmt: skip
            turns.append(_together(turns.pop(), turn) if turns and turns[-1].role == role else turn)
            continue
        refuse(block, {"toolset_name": "there are no sets of tools here"}, f"{where}.")
        if block.tool_use_id not in called:
            raise RequestError(
                f"{where} is the result of {block.tool_use_id!r:.100}, a call that no message before it makes.",
                remedy="Send the assistant's message with its tool_use block too.",
                code="invalid_messages",
                param=where,
            )
        result = _texts(block.content or "", f"{where}.content")
        turns.append(Message("tool", f"Error: {result}" if block.is_error else result, (), block.tool_use_id))
    return turns or [Message(role, "")]


def _shown(block: ImageBlock, where: str) -> Message:
    source = block.source
    if isinstance(source, OtherBlock):
        raise refused(f"{where}.source ({source.type[:40]})", "send the picture itself, in base64")
    if isinstance(source, UrlSource):
        picture = picture_at(source.url, f"{where}.source.url")
    else:
        picture = decoded(source.data, f"{where}.source.data")
    return Message("user", "", pictures=((0, picture),))


def _texts(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, "", f"{name}.{i}") for i, block in enumerate(content))


def _text(block: Any, role: str, where: str) -> str:
    if isinstance(block, TextBlock):
        refuse(block, {"citations": "texts are not cited here"}, f"{where}.")
        return block.text
    if isinstance(block, OtherBlock):
        raise refused(f"{where} ({block.type[:40]})", _OTHERS.get(block.type, _SERVER))
    raise RequestError(
        f"{where} is a {block.type} block, which a message of the role {role} cannot hold.",
        code="invalid_messages",
        param=where,
    )


def tools(body: CountBody) -> tuple[Tool, ...]:
    """The tools. Raises RequestError for those that a service would have to run, and what else is not done."""
    made = []
    for i, tool in enumerate(body.tools or ()):
        where = f"tools.{i}"
        if isinstance(tool, ServerTool):
            raise refused(f"{where}.type ({tool.type[:40]})", "only tools that the client runs are known here")
        refuse(
            tool,
            {"defer_loading": "all tools are told to the model", "input_examples": "put them into the description"},
            f"{where}.",
        )
        if tool.allowed_callers not in (None, [], ["direct"]):
            raise refused(f"{where}.allowed_callers", "no code is run here that could call")
        if tool.eager_input_streaming is False:
            raise refused(f"{where}.eager_input_streaming", "arguments are always sent as they come")
        schema = json_text(tool.input_schema, f"{where}.input_schema")
        made.append(Tool(tool.name, tool.description or "", schema, bool(tool.strict)))
    return tuple(made)


def choice(body: CountBody) -> tuple[ToolChoice, tuple[str, ...], bool]:
    """Whether tools may be called, which alone may be (none: any), and whether several at once."""
    chosen = body.tool_choice
    if chosen is None:
        return "auto", (), True
    if (chosen.name is not None) != (chosen.type == "tool"):
        raise RequestError(
            f"tool_choice of the type {chosen.type} {'needs' if chosen.type == 'tool' else 'takes no'} name.",
            code="invalid_value",
            param="tool_choice.name",
        )
    if chosen.name is not None and chosen.name not in {getattr(tool, "name", "") for tool in body.tools or ()}:
        raise RequestError(
            f"tool_choice names {chosen.name!r:.100}, which is none of the tools.",
            code="invalid_value",
            param="tool_choice.name",
        )
    several = not chosen.disable_parallel_tool_use
    how: dict[str, ToolChoice] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
    return how[chosen.type], (chosen.name,) if chosen.name else (), several


def grammar(body: CountBody) -> Grammar | None:
    """The form that the answer must have."""
    wanted = body.output_config.format if body.output_config is not None else None
    if wanted is None:
        return None
    return Grammar("json_schema", json_text(wanted.schema_, "output_config.format.schema"))
