"""Chat formats: a conversation as the text, and the ids, that a model was trained on.

What it is: `ChatFormat`, made from the model's own `chat_template` or built in for checkpoints that bring none
(Meta's folders). Built-ins follow Meta's published code and prompt-format pages, linked at each.
What it is not: a parser of answers, or of the calls in them (`puna.text.tools`).
What is surprising:
- A message's text never becomes a special token, even where it spells one, while the template's own text does. Both
  come out of one rendered string, so the message's characters must be known in it: the conversation is rendered a
  second time with a mark, a character that occurs nowhere else, put into the messages where a special token's name
  would otherwise be found. If taking the marks out gives the first rendering, they show what is whose. What tools are
  described by, what they gave and what they were called with are marked as messages are.
  An honest conversation's ids are exactly those of tokenizing the rendered string.
- Whether a template can tell about tools, and in which form its model calls them, is found out by rendering a call.
- A picture's place in a rendering is `<|image|>`, the template's own; the same characters in a message are text. What
  ids stand there is the model's affair (`puna.text.sight`). Only messages with pictures are told in parts, as lists.
- A format that has room for one call a message gets several as if they had been made one after the other, each with
  what came of it behind it; one that drops the text beside a call gets it as a message of its own before the call.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from puna.errors import ChatFormatError
from puna.text.sight import PICTURE, Sight, Stand, stand
from puna.text.tokenizer import Tokenizer, check_text
from puna.text.tools import CallForm, CallKind, check_name, json_object, json_text, python_call
from puna.types import Message, Picture, Tool, ToolCall

if TYPE_CHECKING:
    from puna.kernels.layouts import Pixels
    from puna.text.template import ChatTemplate

Segments = Callable[[Sequence[Message], bool, datetime, Sequence[Tool]], list[str]]
"""Messages, whether the assistant's header follows, the date, tools -> the text, in parts that are tokenized apart."""


class ChatFormat:
    """How a model wants its conversations.

    `name` says where the format came from; `special` are the special tokens it cannot do without; `template` is its
    Jinja source, for files that bring it to other programs, or None where Jinja cannot say it.
    """

    def __init__(
        self,
        name: str,
        segments: Segments,
        *,
        special: Sequence[str] = (),
        template: str | None = None,
        now: Callable[[], datetime] = datetime.now,
        call_form: CallForm | Callable[[], CallForm | None] | None = None,
        sight: Sight | None = None,
    ) -> None:
        """`call_form`: how its model calls tools, or what finds that out; None where it knows of no tools. `sight`: how
        a picture stands in its prompts; None where its model does not see."""
        self.name = name
        self.template = template
        self.special = tuple(special)
        self._segments = segments
        self._now = now
        self._call_form = call_form
        self._sight = sight

    @classmethod
    def from_template(
        cls,
        source: str,
        *,
        origin: str,
        bos_token: str = "",
        eos_token: str = "",
        now: Callable[[], datetime] = datetime.now,
        sight: Sight | None = None,
    ) -> ChatFormat:
        """The format of a Jinja template. origin names its file in errors; now is what strftime_now tells it; sight as
        in `ChatFormat`.

        The template is compiled when it is first used, so a model whose template is broken can still continue text;
        then `render` and `encode` raise ChatFormatError.
        """

        @functools.cache
        def template() -> ChatTemplate:
            from puna.text.template import ChatTemplate

            return ChatTemplate(source, origin=origin)

        def rendered(
            messages: Sequence[Message], add_generation_prompt: bool, date: datetime, tools: Sequence[Tool], long: int
        ) -> list[str]:
            """What user and assistant say in `long` characters and more is told in parts."""

            def in_parts(message: Message) -> bool:
                return len(message.content) >= long and message.role in ("user", "assistant") and not message.tool_calls

            variables = {
                "messages": [_as_mapping(message, in_parts=in_parts(message)) for message in messages],
                # transformers passes these two, so templates may test them without `is defined`
                "tools": [_as_schema(tool) for tool in tools] or None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos_token,
                "eos_token": eos_token,
            }
            return [template().render(variables, input_chars=sum(map(len, _texts(messages, tools))), now=date)]

        @functools.cache
        def same_in_parts() -> bool:
            talk = [Message("user", " a \n"), Message("assistant", "\n b "), Message("user", "c")]
            try:
                return rendered(talk, True, datetime.min, (), 0) == rendered(talk, True, datetime.min, (), sys.maxsize)
            except ChatFormatError:
                return False

        def segments(
            messages: Sequence[Message], add_generation_prompt: bool, date: datetime, tools: Sequence[Tool]
        ) -> list[str]:
            # Llama 3.2 Vision's looks for pictures in a text letter by letter, as if it were a list of parts: a long
            # one would take more steps than a template has. In a list of one part it is one step.
            long = sys.maxsize
            if sight is not None and not tools and any(len(m.content) >= _LONG for m in messages) and same_in_parts():
                long = _LONG
            return rendered(messages, add_generation_prompt, date, tools, long)

        find = functools.partial(_probed, source, segments)
        return cls(f"chat template of {origin}", segments, template=source, now=now, call_form=find, sight=sight)

    @functools.cached_property
    def call_form(self) -> CallForm | None:
        """How its model calls tools; None where it cannot be told about tools, or calls them in no form known here."""
        return self._call_form() if callable(self._call_form) else self._call_form

    @property
    def tells_tools(self) -> bool:
        """Whether it can tell a model about tools."""
        return self.call_form is not None

    @property
    def sees(self) -> bool:
        """Whether messages may hold pictures."""
        return self._sight is not None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: Sequence[Tool] = ()
    ) -> str:
        """The conversation as text, ending with the assistant's header where add_generation_prompt.

        Raises ChatFormatError for an empty conversation, one the format cannot express, tools where it knows of none,
        or a failing template.
        """
        messages, tools = self._checked(messages, tools)
        return "".join(self._segments(self._fitted(messages), add_generation_prompt, self._now(), tools))

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """The conversation as ids, starting with exactly one begin-of-text id where the model expects one.

        Raises ChatFormatError as `render` does, and where the tokenizer lacks a special token of this format or the
        template so mixes messages into its own text that they cannot be told apart; TokenizerError as `encode` does.
        Pictures are refused here: what ids they take depends on their size, and `encode_pictures` is told that.
        """
        ids, _ = self.encode_pictures(messages, tokenizer, (), add_generation_prompt=add_generation_prompt, tools=tools)
        return ids

    def encode_pictures(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        pixels: Sequence[Pixels],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] = (),
    ) -> tuple[list[int], tuple[Stand, ...]]:
        """The conversation as ids, and where its pictures stand among them.

        `pixels` are all messages' pictures in their order, as the model's `text.pictures.Processor` made them ready.
        Raises what `encode` does, and ChatFormatError where the format has no place for a picture, or not there.
        """
        shown = sum(len(message.pictures) for message in messages)
        if shown != len(pixels):
            raise ChatFormatError(
                f"The messages hold {shown} pictures, and {len(pixels)} were made ready.",
                remedy="Make each ready with the model's processor first.",
            )
        ids = self._encode(messages, tokenizer, add_generation_prompt, tools)
        if self._sight is None:
            return [each for each in ids if each is not None], ()
        return stand(ids, self._sight, pixels, tokenizer.special)

    def _encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool, tools: Sequence[Tool]
    ) -> list[int | None]:
        """The ids, None in the place of a picture."""
        needed = (*self.special, *(self._sight.needs if self._sight is not None else ()))
        missing = [name for name in needed if name not in tokenizer.special]
        if missing:
            raise ChatFormatError(
                f"The {self.name} needs the special tokens {', '.join(missing)}, and {tokenizer.source} has none such.",
                remedy="Use the tokenizer that came with the model, or run it without a chat format (--raw).",
            )
        date = self._now()  # once: the renderings compared must not differ by a clock's tick
        messages, tools = self._checked(messages, tools)
        messages = self._fitted(messages)
        plain = self._segments(messages, add_generation_prompt, date, tools)
        marked, mark = self._render_marked(messages, tools, add_generation_prompt, date, plain, tokenizer)
        ids: list[int | None] = []
        for text, with_marks in zip(plain, marked, strict=True):
            parts, own = self._split(with_marks, tokenizer), self._split(text, tokenizer)
            # Where a message spells a special token, what lies between the template's own is tokenized as plain text,
            # apart. (A tokenizer.json that puts a space before the first part of a text only, puts one before each.)
            if _specials(parts) == _specials(own):
                if None not in own:
                    ids.extend(tokenizer.encode(text, allow_special=True))
                    continue
                parts = own
            for part in parts:
                ids.extend(tokenizer.encode(part.replace(mark, "")) if isinstance(part, str) else [part])
        if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def _split(self, text: str, tokenizer: Tokenizer) -> list[str | int | None]:
        """A text cut at the names of special tokens, which become ids, and at the places of pictures: None."""
        if self._sight is None:
            return [*tokenizer.split_special(text)]
        parts: list[str | int | None] = []
        for n, part in enumerate(text.split(PICTURE)):
            parts += [None] if n else []
            parts += tokenizer.split_special(part)
        return parts

    def _checked(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[Sequence[Message], Sequence[Tool]]:
        """The conversation with all JSON written in one way. Raises ChatFormatError, TokenizerError."""
        if not messages:
            raise ChatFormatError("The conversation is empty.", remedy="Give at least one message.")
        if not self.sees and any(message.pictures for message in messages):
            raise ChatFormatError(
                f"The {self.name} has no place for pictures.",
                remedy="Leave the pictures out, or use a model that sees, such as Llama 3.2 Vision or Llama 4.",
            )
        if misplaced := next((m for m in messages if m.pictures and m.role != "user"), None):
            raise ChatFormatError(
                f"A message of the role {misplaced.role!r} holds a picture.", remedy="Pictures stand in the user's."
            )
        if (tools or any(m.tool_calls or m.role == "tool" for m in messages)) and not self.tells_tools:
            raise ChatFormatError(
                f"The {self.name} has no place for tools, or its model calls them in a form that is not known here.",
                remedy="Leave tools, calls and what came of them out, or use a model that was trained to call tools.",
            )
        tools = [replace(tool, parameters=json_text(tool.parameters, f"{tool.name}: the schema")) for tool in tools]
        checked = []
        for message in messages:
            if message.tool_calls and message.role != "assistant":
                raise ChatFormatError(
                    f"A message of the role {message.role!r} holds a call of a tool.", remedy="The assistant calls."
                )
            calls = [
                replace(call, arguments=json_text(call.arguments, f"{call.name}: what it was called with"))
                for call in message.tool_calls
            ]
            checked.append(replace(message, tool_calls=tuple(calls)))
        for name in [tool.name for tool in tools] + [call.name for m in checked for call in m.tool_calls]:
            check_name(name)
        for text in _texts(checked, tools):
            check_text(text)
        return checked, tools

    def _fitted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages, with calls in messages of their own where the format has no other place for them."""
        form = self.call_form if any(message.tool_calls for message in messages) else None
        if form is None or all(
            not m.tool_calls or ((form.many or len(m.tool_calls) == 1) and (form.beside or not m.content.strip()))
            for m in messages
        ):
            return messages
        return list(_one_at_a_time(messages))

    def _render_marked(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        add_generation_prompt: bool,
        date: datetime,
        plain: list[str],
        tokenizer: Tokenizer,
    ) -> tuple[list[str], str]:
        """The rendering with a mark inside everything of the messages' that could read as a special token; the mark.

        First every character that begins a special token's name is marked, and both ends of each text. A template
        that looks into a tool's schema may then render differently, or fail; so second, words in JSON are left as they
        are. One that looks into the text (R1's cuts it at `</think>`) may still; so third, only whole names are
        marked. What comes later is accepted if the template's own special tokens come out as in the first rendering.
        """
        present = set("".join([*plain, *_texts(messages, tools)]))
        # Nobody can have put the mark into a text: it is chosen for not being there. (A text that holds all gets
        # the last, and the check below refuses it.) A letter, so that it survives where a template prints a list.
        mark = next((c for c in _MARKS if c not in present), _MARKS[-1])
        special = {name for name in tokenizer.special if name} | ({PICTURE} if self.sees else set())
        starts = "|".join({re.escape(name[0]) for name in special}) or r"(?!)"
        names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True)) or r"(?!)"

        def every_start(text: str) -> str:
            text = re.sub(starts, lambda found: found[0] + mark, text)
            inner = text.strip()
            return text.replace(inner, mark + inner + mark, 1) if inner else text

        def but_words(text: str) -> str:
            return text if _WORD.fullmatch(text) else every_start(text)

        def whole_names(text: str) -> str:
            return re.sub(names, lambda found: found[0][:1] + mark + found[0][1:], text)

        own: list[int | None] | None = None
        for marking, inside in ((every_start, every_start), (every_start, but_words), (whole_names, whole_names)):
            try:
                marked = self._segments(
                    [_marked_message(m, marking, inside) for m in messages],
                    add_generation_prompt,
                    date,
                    [_marked_tool(tool, marking, inside) for tool in tools],
                )
            except ChatFormatError:
                if inside is whole_names:
                    raise
                continue  # the template looks for words that are not as it knows them
            specials = [i for text in marked for i in _specials(self._split(text, tokenizer))]
            own = specials if own is None else own
            if [text.replace(mark, "") for text in marked] == plain and specials == own:
                return marked, mark
        raise ChatFormatError(
            f"The {self.name} mixes the messages into its own text so that special tokens spelled in a message cannot "
            "be told from its own.",
            remedy="Remove names of special tokens from the messages, or replace the template.",
        )


_LONG = 4096
"""Characters from which on a text is told in parts where its template allows it."""

_MARKS = "".join(map(chr, range(0x2_0000, 0x2_A6D7)))
"""42,711 rare letters, the CJK Unified Ideographs Extension B of Unicode 3.1."""

_WORD = re.compile(r"[\w$-]+", re.ASCII)


def _as_mapping(message: Message, *, in_parts: bool) -> dict[str, Any]:
    """A message as transformers hands it to a template: its content as a text, or as a list of its parts."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.pictures or in_parts:
        found["content"] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in _parts(message)
        ]
    if message.tool_calls:
        found["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json_object(call.arguments)}}
            | ({"id": call.id} if call.id else {})
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found


def _as_schema(tool: Tool) -> dict[str, Any]:
    """A tool as transformers hands it to a template."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": json_object(tool.parameters),
        },
    }


def _texts(messages: Sequence[Message], tools: Sequence[Tool]) -> list[str]:
    """Everything that strangers wrote."""
    texts = [text for tool in tools for text in (tool.name, tool.description, tool.parameters)]
    for message in messages:
        texts += [message.content, message.tool_call_id]
        texts += [text for call in message.tool_calls for text in (call.name, call.arguments, call.id)]
    return texts


def _parts(message: Message) -> Iterator[str | Picture]:
    """The content of a message: its text and its pictures, in order, no text being empty."""
    start = 0
    for at, picture in message.pictures:
        if start < at:
            yield message.content[start:at]
        yield picture
        start = at
    if start < len(message.content):
        yield message.content[start:]


def _spelled(message: Message) -> str:
    """The content of a message, with `<|image|>` where a picture goes."""
    return "".join(part if isinstance(part, str) else PICTURE for part in _parts(message))


def _marked_message(message: Message, marking: Callable[[str], str], inside: Callable[[str], str]) -> Message:
    calls = [replace(call, arguments=_marked_json(call.arguments, inside)) for call in message.tool_calls]
    content, pictures = "", []
    for part in _parts(message):  # each by itself: a template may trim them
        if isinstance(part, str):
            content += marking(part)
        else:
            pictures.append((len(content), part))
    return replace(message, content=content, tool_calls=tuple(calls), pictures=tuple(pictures))


def _marked_tool(tool: Tool, marking: Callable[[str], str], inside: Callable[[str], str]) -> Tool:
    return replace(tool, description=marking(tool.description), parameters=_marked_json(tool.parameters, inside))


def _marked_json(text: str, marking: Callable[[str], str]) -> str:
    def marked(value: Any) -> Any:  # as deep as JSON was read, which is limited
        if isinstance(value, dict):
            return {marking(key): marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [marked(item) for item in value]
        return marking(value) if isinstance(value, str) else value

    return json.dumps(marked(json_object(text)), ensure_ascii=False)


def _one_at_a_time(messages: Sequence[Message]) -> Iterator[Message]:
    """The conversation with one call a message, without text, each followed by what came of it.

    Raises ChatFormatError where it is not said of which call something came.
    """
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if not message.tool_calls:
            yield message
            continue
        if message.content.strip():
            yield replace(message, tool_calls=())
        results: list[Message] = []
        while rest and rest[0].role == "tool":
            results.append(rest.pop(0))
        calls = message.tool_calls
        if len(calls) > 1 and results:
            asked, came = [call.id for call in calls], [result.tool_call_id for result in results]
            if "" in asked or len(set(asked)) < len(asked) or sorted(asked) != sorted(came):
                raise ChatFormatError(
                    "This model's chat format has room for one call a message, and of a message with several it is not "
                    "said what came of each.",
                    remedy="Give each call an id, and as many tool messages with those ids right behind.",
                )
        for n, call in enumerate(calls):
            yield replace(message, content="", tool_calls=(call,))
            if len(calls) == 1:
                yield from results
            elif results:
                yield next(result for result in results if result.tool_call_id == calls[n].id)


_PROBE = "puna_probe"
_PROBE_TELLS, _PROBE_SAYS = "Tells of a probe.", "Says it beside."
_PROBE_FORMS: tuple[tuple[CallKind, re.Pattern[str]], ...] = (
    (
        "json",
        re.compile(
            rf'\{{\s*(?P<typed>"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"{_PROBE}"\s*,\s*'
            r'"(?P<key>parameters|arguments)"\s*:\s*\{'
        ),
    ),
    ("pythonic", re.compile(rf"\[\s*{_PROBE}\(\s*k\s*=")),
)


def _probed(source: str, segments: Segments) -> CallForm | None:
    """How the model of a template calls tools, as the template renders a call."""
    if not re.search(r"\btools\b", source):
        return None  # most templates: no need to compile them
    tools = [Tool(_PROBE, _PROBE_TELLS)]
    call = ToolCall(_PROBE, '{"k": "v"}', "probe0001")

    def rendered(answer: Message) -> str | None:
        try:
            return "".join(segments([Message("user", "x"), answer], False, datetime.min, tools))
        except ChatFormatError:
            return None

    said, called = rendered(Message("assistant", _PROBE)), rendered(Message("assistant", "", (call,)))
    if said is None or called is None or _PROBE_TELLS not in said:
        return None
    header = said[: said.rindex(_PROBE)]
    if not called.startswith(header):
        return None
    text = called[len(header) :].lstrip()
    tag = next((tag for tag in CallForm.TAGS if text.startswith(tag)), "")
    both = rendered(Message("assistant", "", (call, replace(call, arguments='{"k": "w"}', id="probe0002")))) or ""
    beside = rendered(Message("assistant", _PROBE_SAYS, (call,))) or ""
    for kind, pattern in _PROBE_FORMS:
        found = pattern.match(text.removeprefix(tag).lstrip())
        if found is not None:
            named = found.groupdict()
            return CallForm(
                kind,
                key=named.get("key") or "parameters",
                typed=bool(named.get("typed")),
                tag=tag,
                many='"v"' in both and '"w"' in both,
                beside=_PROBE_SAYS in beside,
            )
    return None


def _specials(parts: Sequence[str | int | None]) -> list[int | None]:
    return [part for part in parts if not isinstance(part, str)]


def chat_format(
    tokenizer: Tokenizer,
    generation: str,
    *,
    instruct: bool,
    now: Callable[[], datetime] = datetime.now,
    sight: Sight | None = None,
) -> ChatFormat:
    """The model's own chat template where its tokenizer came with one, else the built-in of its generation.

    `sight` is how a picture stands in its prompts (`sight_for`). Raises ChatFormatError as `builtin_format` does.
    """
    if tokenizer.chat_template is None:
        return builtin_format(generation, instruct=instruct, sight=sight)

    return ChatFormat.from_template(
        tokenizer.chat_template,
        origin=str(tokenizer.template_place),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        now=now,
        sight=sight,
    )


def builtin_format(generation: str, *, instruct: bool, sight: Sight | None = None) -> ChatFormat:
    """The format of an instruct model of this generation: llama2, codellama, codellama70b, llama3, llama3.1 to 3.3,
    llama4; `sight` as in `ChatFormat`.

    Raises ChatFormatError for Llama 1 and for base models, which were trained on no conversation.
    """
    if generation == "llama1" or not instruct:
        raise ChatFormatError(
            "This is a base model: it continues text and was trained on no chat format.",
            remedy="Give it a text to continue (--raw), or use the instruct model of the family.",
        )
    if generation not in _BUILTIN:
        raise ChatFormatError(
            f"There is no built-in chat format for {generation!r}.",
            remedy=f"Built in: {', '.join(_BUILTIN)}. Other models need the chat_template they came with.",
        )
    segments, special, call_form = _BUILTIN[generation]
    return ChatFormat(
        f"built-in chat format of {generation}",
        segments,
        special=special,
        template=_TEMPLATES.get(generation),
        call_form=call_form,
        sight=sight,
    )


def _check_turns(messages: Sequence[Message], add_generation_prompt: bool, tags: Sequence[str]) -> None:
    """What Llama 2 and Code Llama demand: a system message at most at the start, then user and assistant in turn."""
    for message in messages:
        for tag in tags:
            if tag in message.content:
                raise ChatFormatError(
                    f"A message holds {tag!r}, which this model's chat format is made of.",
                    remedy="Remove it from the message: the model would read it as the end of the message.",
                )
    turns = messages[1:] if messages[0].role == "system" else messages
    if not turns or any(m.role != ("user", "assistant")[n % 2] for n, m in enumerate(turns)):
        raise ChatFormatError(
            f"This chat format has no place for the roles {', '.join(m.role for m in messages)}.",
            remedy="After an optional system message, user and assistant alternate, and the user begins.",
        )
    if add_generation_prompt and turns[-1].role != "user":
        raise ChatFormatError(
            "The last message is the assistant's, so there is nothing to answer.", remedy="Add a user message."
        )


_LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def _llama2(messages: Sequence[Message], add_generation_prompt: bool, *_: Any) -> list[str]:
    """Llama 2 Chat, Code Llama Instruct 7B to 34B. Source: meta-llama/llama, llama/generation.py, chat_completion.

    Every turn has its own BOS and a finished one its EOS; the assistant has no header, so add_generation_prompt adds
    nothing. A system message is folded into the first user message.
    """
    _check_turns(messages, add_generation_prompt, _LLAMA2_TAGS)
    system = ""
    if messages[0].role == "system":
        system, messages = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n", messages[1:]
    text = ""
    for message in messages:
        if message.role == "user":
            text += f"<s>[INST] {(system + message.content).strip()} [/INST]"
            system = ""
        else:
            text += f" {message.content.strip()} </s>"
    return [text]


def _codellama70b(messages: Sequence[Message], add_generation_prompt: bool, *_: Any) -> list[str]:
    """Code Llama 70B Instruct. Source: meta-llama/codellama, llama/generation.py, dialog_prompt_tokens.

    Header and body are tokenized apart there, each with sentencepiece's leading space, and so they are here.
    """
    _check_turns(messages, add_generation_prompt, (*_LLAMA2_TAGS, "<step>"))
    if messages[0].role != "system":
        messages = [Message("system", ""), *messages]
    segments = ["<s>"]
    for message in messages:
        segments.append(f" Source: {message.role}")
        if message.content:
            segments.append(f"\n\n {message.content.strip()}")
        segments.append("<step>")
    if add_generation_prompt:
        segments += [" Source: assistant\nDestination: user", "\n\n "]
    return segments


def _llama3_message(role: str, content: str, end: str = "<|eot_id|>") -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content.strip()}{end}"


def _llama3(messages: Sequence[Message], add_generation_prompt: bool, *_: Any) -> list[str]:
    """Llama 3 to 3.3 Instruct. Sources: meta-llama/llama3, llama/tokenizer.py, ChatFormat; the prompt-format pages of
    3.1, 3.2 and 3.3, whose plain conversations have the same form and no system message of their own."""
    text = "<|begin_of_text|>"
    for message in messages:
        text += _llama3_message(message.role, message.content)
    if add_generation_prompt:
        text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return [text]


def _llama31(messages: Sequence[Message], add_generation_prompt: bool, _: datetime, tools: Sequence[Tool]) -> list[str]:
    """Llama 3.1 Instruct. Source: its prompt-format page, "JSON based tool calling": the tools stand in a user message
    before the conversation, calls are JSON after <|python_tag|>, and what came of one has the role ipython."""
    system, turns = _system_of(messages)
    text = ["<|begin_of_text|>"]
    if tools:
        text.append(_llama3_message("system", "\n\n".join(["Environment: ipython", *system])))
        listed = "\n\n".join(json.dumps(_as_schema(tool), indent=4, ensure_ascii=False) for tool in tools)
        text.append(_llama3_message("user", _LLAMA31_TOOLS.replace("{}", listed, 1)))
    else:
        text += [_llama3_message("system", content) for content in system]
    for message in turns:
        if message.tool_calls:
            [call] = message.tool_calls
            said = {"type": "function", "name": call.name, "parameters": json_object(call.arguments)}
            called = "<|python_tag|>" + json.dumps(said, ensure_ascii=False)
            text.append(_llama3_message("assistant", called, "<|eom_id|>"))
        else:
            text.append(_llama3_message("ipython" if message.role == "tool" else message.role, message.content))
    return ["".join([*text, *_llama3_header(add_generation_prompt)])]


def _llama32(messages: Sequence[Message], add_generation_prompt: bool, _: datetime, tools: Sequence[Tool]) -> list[str]:
    """Llama 3.2 and 3.3 Instruct. Source: their prompt-format pages, "Zero shot function calling": the tools stand in
    the system message, calls are a list in Python's notation, and what came of one has the role ipython."""
    if any(message.pictures for message in messages) and (tools or messages[0].role == "system"):
        raise ChatFormatError(
            "Llama 3.2 Vision was trained on pictures without a system message and without tools.",
            remedy="Leave them out, or the pictures.",
        )
    system, turns = _system_of(messages)
    text = ["<|begin_of_text|>"]
    if tools:
        listed = json.dumps([_as_schema(tool)["function"] for tool in tools], indent=4, ensure_ascii=False)
        system = [_LLAMA32_TOOLS.replace("{}", listed, 1), *system]
    if system:
        text.append(_llama3_message("system", "\n\n".join(system)))
    for message in turns:
        text.append(_llama3_message("ipython" if message.role == "tool" else message.role, _with_calls(message)))
    return ["".join([*text, *_llama3_header(add_generation_prompt)])]


def _with_calls(message: Message) -> str:
    """What a message says: its text and pictures, then its calls as a list in Python's notation."""
    calls = ", ".join(python_call(call.name, json_object(call.arguments)) for call in message.tool_calls)
    return _spelled(message) + (f"[{calls}]" if calls else "")


def _llama4(messages: Sequence[Message], add_generation_prompt: bool, _: datetime, tools: Sequence[Tool]) -> list[str]:
    """Llama 4 Instruct. Source: its prompt-format page, "Zero shot function calling - system message": the tools stand
    in the system message, calls are a list in Python's notation, and what came of one has the role ipython, as in the
    template on the hub. Nothing is stripped but the system message, as there."""

    def said(role: str, content: str) -> str:
        return f"<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>"

    system, turns = _system_of(messages)
    text = ["<|begin_of_text|>"]
    if tools:
        listed = json.dumps([_as_schema(tool)["function"] for tool in tools], indent=4, ensure_ascii=False)
        system = [_LLAMA4_TOOLS + listed, *system]
    if system and (content := "\n\n".join(system)):
        text.append(said("system", content))
    for message in turns:
        text.append(said("ipython" if message.role == "tool" else message.role, _with_calls(message)))
    if add_generation_prompt:
        text.append("<|header_start|>assistant<|header_end|>\n\n")
    return ["".join(text)]


def _system_of(messages: Sequence[Message]) -> tuple[list[str], Sequence[Message]]:
    """The text of the system message, if the conversation begins with one, and the other messages."""
    if messages[0].role == "system":
        return [messages[0].content.strip()], messages[1:]
    return [], messages


def _llama3_header(add_generation_prompt: bool) -> list[str]:
    return ["<|start_header_id|>assistant<|end_header_id|>\n\n"] if add_generation_prompt else []


_LLAMA31_TOOLS = """\
Answer the user's question by making use of the following functions if needed.
If none of the function can be used, please say so.
Here is a list of functions in JSON format:
{}

Return function calls in JSON format."""

_LLAMA32_TOOLS = """\
You are an expert in composing functions. You are given a question and a set of possible functions.
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the function can be used, point it out. If the given question lacks the parameters required by the function,
also point it out. You should only return the function call in tools call sections.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]
You SHOULD NOT include any other text in the response.

Here is a list of functions in JSON format that you can invoke.

{}"""

_LLAMA4_TOOLS = """\
You are a helpful assistant and an expert in function composition. You can answer general questions using \
your internal knowledge OR invoke functions when necessary. Follow these strict guidelines:

1. FUNCTION CALLS:
- ONLY use functions that are EXPLICITLY listed in the function list below
- If NO functions are listed (empty function list []), respond ONLY with internal knowledge or "I don't have \
access to [Unavailable service] information"
- If a function is not in the list, respond ONLY with internal knowledge or "I don't have access to \
[Unavailable service] information"
- If ALL required parameters are present AND the query EXACTLY matches a listed function's purpose: output \
ONLY the function call(s)
- Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]
Examples:
CORRECT: [get_weather(location="Vancouver"), calculate_route(start="Boston", end="New York")] <- Only if \
get_weather and calculate_route are in function list
INCORRECT: get_weather(location="New York")
INCORRECT: Let me check the weather: [get_weather(location="New York")]
INCORRECT: [get_events(location="Singapore")] <- If function not in list

2. RESPONSE RULES:
- For pure function requests matching a listed function: ONLY output the function call(s)
- For knowledge questions: ONLY output text
- For missing parameters: ONLY request the specific missing parameters
- For unavailable services (not in function list): output ONLY with internal knowledge or "I don't have \
access to [Unavailable service] information". Do NOT execute a function call.
- If the query asks for information beyond what a listed function provides: output ONLY with internal \
knowledge about your limitations
- NEVER combine text and function calls in the same response
- NEVER suggest alternative functions when the requested service is unavailable
- NEVER create or invent new functions not listed below

3. STRICT BOUNDARIES:
- ONLY use functions from the list below - no exceptions
- NEVER use a function as an alternative to unavailable information
- NEVER call functions not present in the function list
- NEVER add explanatory text to function calls
- NEVER respond with empty brackets
- Use proper Python/JSON syntax for function calls
- Check the function list carefully before responding

4. TOOL RESPONSE HANDLING:
- When receiving tool responses: provide concise, natural language responses
- Don't repeat tool response verbatim
- Don't add supplementary information

Here is a list of functions in JSON format that you can invoke:
"""

_LLAMA3_NEEDS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PYTHONIC = CallForm("pythonic", many=True, beside=True)
_BUILTIN: dict[str, tuple[Segments, tuple[str, ...], CallForm | None]] = {
    "llama2": (_llama2, ("<s>", "</s>"), None),
    "codellama": (_llama2, ("<s>", "</s>"), None),
    "codellama70b": (_codellama70b, ("<s>", "<step>"), None),
    "llama3": (_llama3, _LLAMA3_NEEDS, None),
    "llama3.1": (
        _llama31,
        (*_LLAMA3_NEEDS, "<|python_tag|>", "<|eom_id|>"),
        CallForm("json", typed=True, tag="<|python_tag|>"),
    ),
    "llama3.2": (_llama32, _LLAMA3_NEEDS, _PYTHONIC),
    "llama3.3": (_llama32, _LLAMA3_NEEDS, _PYTHONIC),
    "llama4": (_llama4, ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"), _PYTHONIC),
}

_LLAMA2_JINJA = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ '<s>[INST] ' + ((system if loop.first else '') + message['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)

_LLAMA3_JINJA = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

_LLAMA4_JINJA = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}{% if loop.index0 > 0 or message['role'] != 'system' or "
    "message['content'] | trim %}{{ '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "{% if message['content'] is not string %}{% for part in message['content'] %}"
    "{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% elif loop.first and message['role'] == 'system' %}{{ message['content'] | trim }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"
)

_TEMPLATES = {
    "llama2": _LLAMA2_JINJA,
    "codellama": _LLAMA2_JINJA,
    **dict.fromkeys(("llama3", "llama3.1", "llama3.2", "llama3.3"), _LLAMA3_JINJA),
    "llama4": _LLAMA4_JINJA,
}
# Not Code Llama 70B's: it tokenizes the parts of a message apart, which a template cannot say.
