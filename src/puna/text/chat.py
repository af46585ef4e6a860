"""Chat formats: a conversation as the text, and the ids, that a model was trained on.

What it is: `ChatFormat`, made from the model's own `chat_template` or built in for checkpoints that bring none
(Meta's folders). Built-ins follow Meta's published code and prompt-format pages, linked at each.
What it is not: a parser of answers, or of tool calls; messages are text from system, user and assistant.
What is surprising: a message's text never becomes a special token, even where it spells one, while the template's own
text does. Both come out of one rendered string, so the message's characters must be known in it: the conversation is
rendered a second time with a mark, a character that occurs nowhere else, put into the messages where a special
token's name would otherwise be found. If taking the marks out gives the first rendering, they show what is whose.
An honest conversation's ids are exactly those of tokenizing the rendered string.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from puna.errors import ChatFormatError
from puna.text.tokenizer import Tokenizer, check_text
from puna.types import Message

if TYPE_CHECKING:
    from puna.text.template import ChatTemplate

Segments = Callable[[Sequence[Message], bool, datetime], list[str]]
"""Messages, whether the assistant's header follows, the date -> the text, in parts that are tokenized apart."""


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
    ) -> None:
        self.name = name
        self.template = template
        self.special = tuple(special)
        self._segments = segments
        self._now = now

    @classmethod
    def from_template(
        cls,
        source: str,
        *,
        origin: str,
        bos_token: str = "",
        eos_token: str = "",
        now: Callable[[], datetime] = datetime.now,
    ) -> ChatFormat:
        """The format of a Jinja template. origin names its file in errors; now is what strftime_now tells it.

        The template is compiled when it is first used, so a model whose template is broken can still continue text;
        then `render` and `encode` raise ChatFormatError.
        """

        @functools.cache
        def template() -> ChatTemplate:
            from puna.text.template import ChatTemplate

            return ChatTemplate(source, origin=origin)

        def segments(messages: Sequence[Message], add_generation_prompt: bool, date: datetime) -> list[str]:
            variables = {
                "messages": [{"role": m.role, "content": m.content} for m in messages],
                # transformers passes these two, so templates may test them without `is defined`
                "tools": None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "bos_token": bos_token,
                "eos_token": eos_token,
            }
            return [template().render(variables, input_chars=sum(len(m.content) for m in messages), now=date)]

        return cls(f"chat template of {origin}", segments, template=source, now=now)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, ending with the assistant's header where add_generation_prompt.

        Raises ChatFormatError for an empty conversation, one the format cannot express, or a failing template.
        """
        return "".join(self._render(messages, add_generation_prompt, self._now()))

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The conversation as ids, starting with exactly one begin-of-text id where the model expects one.

        Raises ChatFormatError as `render` does, and where the tokenizer lacks a special token of this format or the
        template so mixes messages into its own text that they cannot be told apart; TokenizerError as `encode` does.
        """
        missing = [name for name in self.special if name not in tokenizer.special]
        if missing:
            raise ChatFormatError(
                f"The {self.name} needs the special tokens {', '.join(missing)}, and {tokenizer.source} has none such.",
                remedy="Use the tokenizer that came with the model, or run it without a chat format (--raw).",
            )
        date = self._now()  # once: the renderings compared must not differ by a clock's tick
        plain = self._render(messages, add_generation_prompt, date)
        marked, mark = self._render_marked(messages, add_generation_prompt, date, plain, tokenizer)
        ids: list[int] = []
        for text, with_marks in zip(plain, marked, strict=True):
            parts = tokenizer.split_special(with_marks)
            if _specials(parts) == _specials(tokenizer.split_special(text)):
                ids.extend(tokenizer.encode(text, allow_special=True))
                continue
            # A message spells a special token: what lies between the template's own is tokenized as plain text, apart.
            # (A tokenizer.json that puts a space before the first part of a text only, puts one before each of these.)
            for part in parts:
                ids.extend([part] if isinstance(part, int) else tokenizer.encode(part.replace(mark, "")))
        if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, date: datetime) -> list[str]:
        if not messages:
            raise ChatFormatError("The conversation is empty.", remedy="Give at least one message.")
        for message in messages:
            check_text(message.content)
        return self._segments(messages, add_generation_prompt, date)

    def _render_marked(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        date: datetime,
        plain: list[str],
        tokenizer: Tokenizer,
    ) -> tuple[list[str], str]:
        """The rendering with a mark inside everything of the messages' that could read as a special token; the mark.

        First every character that begins a special token's name is marked, and both ends of each text. A template
        that looks into the text (R1's cuts it at `</think>`) may then render differently; so second, only whole names
        are marked, and accepted if the template's own special tokens come out as in the first rendering.
        """
        present = set("".join([*plain, *(m.content for m in messages)]))
        # Planes 15 and 16 are for private use. Nobody can have put the mark into a text: it is chosen for not being
        # there. (A text that holds all 131,068 of them gets U+10FFFD, and the check below refuses it.)
        mark = next((c for c in map(chr, range(0xF_0000, 0x10_FFFE)) if c not in present), "\U0010fffd")
        starts = "|".join({re.escape(name[0]) for name in tokenizer.special if name}) or r"(?!)"
        names = "|".join(re.escape(n) for n in sorted(tokenizer.special, key=len, reverse=True) if n) or r"(?!)"

        def every_start(text: str) -> str:
            text = re.sub(starts, lambda found: found[0] + mark, text)
            inner = text.strip()
            return text.replace(inner, mark + inner + mark, 1) if inner else text

        def whole_names(text: str) -> str:
            return re.sub(names, lambda found: found[0][:1] + mark + found[0][1:], text)

        own: list[int] | None = None
        for marking in (every_start, whole_names):
            marked_messages = [Message(m.role, marking(m.content)) for m in messages]
            marked = self._segments(marked_messages, add_generation_prompt, date)
            specials = [i for text in marked for i in _specials(tokenizer.split_special(text))]
            own = specials if own is None else own
            if [text.replace(mark, "") for text in marked] == plain and specials == own:
                return marked, mark
        raise ChatFormatError(
            f"The {self.name} mixes the messages into its own text so that special tokens spelled in a message cannot "
            "be told from its own.",
            remedy="Remove names of special tokens from the messages, or replace the template.",
        )


def _specials(parts: Sequence[str | int]) -> list[int]:
    return [part for part in parts if isinstance(part, int)]


def chat_format(
    tokenizer: Tokenizer, generation: str, *, instruct: bool, now: Callable[[], datetime] = datetime.now
) -> ChatFormat:
    """The model's own chat template where its tokenizer came with one, else the built-in of its generation.

    Raises ChatFormatError as `builtin_format` does.
    """
    if tokenizer.chat_template is None:
        return builtin_format(generation, instruct=instruct)

    def name(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.token_bytes(token_id).decode()

    return ChatFormat.from_template(
        tokenizer.chat_template,
        origin=str(tokenizer.template_place),
        bos_token=name(tokenizer.bos_id),
        eos_token=name(tokenizer.eos_id),
        now=now,
    )


def builtin_format(generation: str, *, instruct: bool) -> ChatFormat:
    """The format of an instruct model of this generation: llama2, codellama, codellama70b, llama3, llama3.1 to 3.3.

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
    segments, special = _BUILTIN[generation]
    return ChatFormat(
        f"built-in chat format of {generation}", segments, special=special, template=_TEMPLATES.get(generation)
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


def _llama2(messages: Sequence[Message], add_generation_prompt: bool, _: datetime) -> list[str]:
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


def _codellama70b(messages: Sequence[Message], add_generation_prompt: bool, _: datetime) -> list[str]:
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


def _llama3(messages: Sequence[Message], add_generation_prompt: bool, _: datetime) -> list[str]:
    """Llama 3 to 3.3 Instruct. Sources: meta-llama/llama3, llama/tokenizer.py, ChatFormat; the prompt-format pages of
    3.1, 3.2 and 3.3, whose plain conversations have the same form and no system message of their own."""
    text = "<|begin_of_text|>"
    for message in messages:
        text += f"<|start_header_id|>{message.role}<|end_header_id|>\n\n{message.content.strip()}<|eot_id|>"
    if add_generation_prompt:
        text += "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return [text]


_LLAMA3_NEEDS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_BUILTIN: dict[str, tuple[Segments, tuple[str, ...]]] = {
    "llama2": (_llama2, ("<s>", "</s>")),
    "codellama": (_llama2, ("<s>", "</s>")),
    "codellama70b": (_codellama70b, ("<s>", "<step>")),
    "llama3": (_llama3, _LLAMA3_NEEDS),
    "llama3.1": (_llama3, _LLAMA3_NEEDS),
    "llama3.2": (_llama3, _LLAMA3_NEEDS),
    "llama3.3": (_llama3, _LLAMA3_NEEDS),
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

_TEMPLATES = {
    "llama2": _LLAMA2_JINJA,
    "codellama": _LLAMA2_JINJA,
    **dict.fromkeys(("llama3", "llama3.1", "llama3.2", "llama3.3"), _LLAMA3_JINJA),
}
# Not Code Llama 70B's: it tokenizes the parts of a message apart, which a template cannot say.
