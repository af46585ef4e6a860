"""Llama Guard 1 to 4: what a guard model is asked, and what its answer says.

What it is: the prompt of each version as a `ChatFormat`, its categories, and `verdict`, which reads any answer.
What it is not: a model, or the place where what is unsafe is kept back (`puna.server.guarding`).
Sources: llama-cookbook's `prompt_format_utils.py` (versions 1 to 3), the chat templates that Llama Guard 3 came with
(8B; 1B and 11B-vision, which have no S14), and the page
https://www.llama.com/docs/model-cards-and-prompt-formats/llama-guard-4/.
What is surprising:
- Versions 1 and 2 are told what each category means, 3 and 4 its name alone, unless an operator says more.
- A category that is switched off leaves its line, and the others keep their codes, as in the chat templates of 3-1B.
  A model may name it all the same (Meta says so); that is no violation then.
- A message that spells the tags which the prompt is made of is refused: it could end the conversation that is judged
  and go on with instructions. Words that only look like another speaker's ("Agent: ...") cannot be told apart.
- Only a user's and an assistant's messages are judged. What a tool gave stands as the user's, for it came from outside;
  a system message is the operator's own and left out; a call of a tool stands in the assistant's message, as JSON.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files

from puna.errors import ChatFormatError, UsageError, VerdictError
from puna.text.chat import ChatFormat
from puna.text.tokenizer import Tokenizer
from puna.types import Category, Judge, Message, Tool

VERSIONS = ("1", "2", "3", "3-1b", "4")
"""3-1b is the form of Llama Guard 3 1B and 11B-vision."""

_TAGS = (
    *("<BEGIN UNSAFE CONTENT CATEGORIES>", "<END UNSAFE CONTENT CATEGORIES>"),
    *("<BEGIN CONVERSATION>", "<END CONVERSATION>"),
)
_INST = ("[INST]", "[/INST]")
_MOST_ADDED = 64


@dataclass(frozen=True)
class _Form:
    """How a version's prompt begins and ends, its special tokens, and how its two last lines begin."""

    head: str
    tail: str
    special: tuple[str, ...] = ()
    last: str = "ONLY THE LAST {role} message"
    dash: str = " -"
    according: str = "according our"


_LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_LLAMA4 = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>")
_HEAD3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
_FORMS = {
    "1": _Form("[INST] ", " [/INST]", last="{role}", dash="-"),
    "2": _Form("[INST] ", " [/INST]"),
    "3": _Form(_HEAD3, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", _LLAMA3),
    "3-1b": _Form(_HEAD3, " <|eot_id|><|start_header_id|>assistant<|end_header_id|>", _LLAMA3),
    "4": _Form(
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n",
        " <|eot|><|header_start|>assistant<|header_end|>",
        _LLAMA4,
        according="according to our",
    ),
}


def version_of(generation: str, template: str | None, names: Sequence[str]) -> str:
    """The version that a model is, "" for none: its chat template asks for a judgement, or it has none and is called
    so; which one it is its generation says (`DecoderConfig.generation`)."""
    if template is not None:
        guards = _TAGS[0] in template and "unsafe" in template
    else:
        guards = any(re.search(r"llama[-_. ]?guard", name, re.IGNORECASE) for name in names)
    if not guards:
        return ""
    if generation in ("llama1", "llama2"):
        return "1"
    if generation == "llama3":
        return "2"
    if generation.startswith("llama4"):
        return "4"
    if template is not None:
        return "3" if "Code Interpreter Abuse" in template else "3-1b"
    small = generation.startswith("llama3.2") or any(re.search(r"1b|vision", name, re.IGNORECASE) for name in names)
    return "3-1b" if small else "3"


@functools.cache
def trained(version: str) -> tuple[Category, ...]:
    """The categories that a version was trained on. Raises UsageError for an unknown version."""
    if version not in VERSIONS:
        raise UsageError(f"There is no Llama Guard {version!r:.40}.", remedy=f"One of {', '.join(VERSIONS)}.")
    table = json.loads((files("puna.text") / "guard.json").read_text(encoding="utf-8"))
    known = tuple(Category(**each) for each in table[{"4": "3", "3-1b": "3"}.get(version, version)])
    return known[:-1] if version == "3-1b" else known  # it knows no code interpreter


def categories(version: str, *, off: Sequence[str] = (), added: Sequence[tuple[str, str]] = ()) -> tuple[Category, ...]:
    """The categories of a version without those whose codes are switched `off`, and with those `added` as (name,
    description), which take the codes that follow.

    Raises UsageError for a code that the version does not have, a name that is none, and where no category is left.
    """
    known = trained(version)
    codes = [each.code for each in known]
    for code in off:
        if code not in codes:
            raise UsageError(
                f"Llama Guard {version} has no category {code!r:.40}.", remedy=f"It has {', '.join(codes)}."
            )
    if len(added) > _MOST_ADDED:
        raise UsageError(f"{len(added)} categories are added, and {_MOST_ADDED} are at most.", remedy="Add fewer.")
    for name, description in added:
        if not name.strip() or "\n" in name or any(tag in name + description for tag in (*_TAGS, *_INST)):
            raise UsageError(
                f"{name!r:.80} is no name of a category, or its description spells a tag of the prompt.",
                remedy="A name is one line; a description says what the model should not do.",
            )
    letter, count = codes[0][0], len(codes)
    more = [Category(f"{letter}{count + i}", name, text) for i, (name, text) in enumerate(added, 1)]
    left = (*(each for each in known if each.code not in off), *more)
    if not left:
        raise UsageError("Every category is switched off.", remedy="Leave one, or serve without a guard.")
    return left


def guard_format(version: str, judged: Sequence[Category] = ()) -> ChatFormat:
    """The prompt of a version about these categories (none: those it was trained on), for conversations whose last
    message is judged."""
    form, listed = _FORMS[version], judged or trained(version)
    lines = [f"{each.code}: {each.name}" + (f"\n{each.description}" if each.description else "") for each in listed]

    def segments(messages: Sequence[Message], add_header: bool, date: datetime, tools: Sequence[Tool]) -> list[str]:
        speakers = {"user": "User", "assistant": "Agent"}
        role = speakers[messages[-1].role]
        said = "\n\n".join(f"{speakers[each.role]}: {each.content.strip()}" for each in messages)
        text = (
            f"Task: Check if there is unsafe content in '{role}' messages in conversations {form.according} safety "
            f"policy with the below categories.\n\n{_TAGS[0]}\n" + "\n".join(lines) + f"\n{_TAGS[1]}\n\n"
            f"{_TAGS[2]}\n\n{said}\n\n{_TAGS[3]}\n\n"
            f"Provide your safety assessment for {form.last.format(role=role)} in the above conversation:\n"
            f"{form.dash} First line must read 'safe' or 'unsafe'.\n"
            f"{form.dash} If unsafe, a second line must include a comma-separated list of violated categories."
        )
        return [form.head + text + form.tail]

    return ChatFormat(f"prompt of Llama Guard {version}", segments, special=form.special)


def judge_ids(version: str, tokenizer: Tokenizer, judge: Judge) -> list[int]:
    """The ids that a guard's verdict follows.

    Raises ChatFormatError where there is nothing to judge, for a message that spells a tag of the prompt, and for one
    with a picture: guards read text here.
    """
    tags = (*_TAGS, *_INST) if version in ("1", "2") else _TAGS
    return guard_format(version, judge.categories).encode(_spoken(judge.messages, tags), tokenizer)


def _spoken(messages: Sequence[Message], tags: Sequence[str]) -> list[Message]:
    """The conversation in a guard's two roles."""
    spoken = []
    for message in messages:
        if getattr(message, "pictures", ()):
            raise ChatFormatError(
                "A message has a picture, and guards judge text alone here.",
                remedy="Send text, or have it answered by a server without a guard.",
            )
        if message.role == "system":
            continue
        calls = [json.dumps({"name": call.name, "arguments": call.arguments}) for call in message.tool_calls]
        content = "\n".join([message.content, *calls]) if message.content else "\n".join(calls)
        for tag in tags:
            if tag in content:
                raise ChatFormatError(
                    f"A message holds {tag!r}, which a guard's prompt is made of.",
                    remedy="Remove it: the guard could not tell where the message ends.",
                )
        spoken.append(Message("assistant" if message.role == "assistant" else "user", content))
    if not spoken:
        raise ChatFormatError("There is no message to judge.", remedy="Give a message of a user or an assistant.")
    return spoken


@dataclass(frozen=True)
class Verdict:
    """What a guard said: `unsafe`, and the categories that are violated, in its order (a model may name none)."""

    unsafe: bool
    categories: tuple[Category, ...] = ()


def verdict(text: str, version: str, judged: Sequence[Category] = ()) -> Verdict:
    """The verdict in a guard's answer; `judged` as for `guard_format`.

    A category that the version knows and that is switched off is no violation. Raises VerdictError for any text that is
    not "safe", or "unsafe" with a line of codes or none.
    """
    listed = {each.code: each for each in judged or trained(version)}
    known = {each.code for each in trained(version)} | listed.keys()
    first, *rest = text.strip().split("\n")
    codes = [code.strip() for line in rest for code in line.split(",") if code.strip()]
    if first.strip() == "safe" and not codes:
        return Verdict(False)
    if first.strip() != "unsafe" or not known.issuperset(codes):
        raise VerdictError(
            # What it said is not told: it may repeat what it was to judge.
            "The guard gave no verdict: it said neither safe, nor unsafe with categories that it knows.",
            remedy="It must be a Llama Guard, whole: a model that was cut short or packed too tightly may not judge.",
        )
    violated = tuple(listed[code] for code in dict.fromkeys(codes) if code in listed)
    return Verdict(bool(violated) or not codes, violated)


def longest_verdict(version: str, judged: Sequence[Category] = ()) -> int:
    """Tokens that a verdict of every category takes at most: a code and its comma have no more than their letters."""
    return 16 + sum(len(each.code) + 2 for each in judged or trained(version))
