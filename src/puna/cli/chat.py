"""The chat at the terminal: a conversation with a model, or, for one without a chat format, texts that it continues.

What it is: the loop (`chat`), its slash commands, and saved sessions (`Session`).
What it is not: a keeper of context by cutting. When a conversation no longer fits, it says by how much.
What is surprising: every turn sends the whole conversation again; the engine finds that it begins with what it has in
its cache and computes only what is new. Ctrl-C stops an answer and keeps what there is of it; Ctrl-D leaves.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.cli import flags, terminal
from puna.cli.answers import figures, verdict, with_seed
from puna.errors import ChatFormatError, ContextError, PunaError, UsageError
from puna.settings import SAMPLING_FLAGS, RunSettings, puna_home, typed_path
from puna.types import Message, Picture, Sampling
from puna.weights.files import read_json

if TYPE_CHECKING:
    from puna.llm import LLM, Stream
    from puna.types import Answer

FORMAT, VERSION = "puna-chat", 1
HISTORY_LINES = 1000
COMMON = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "stop")
"""What /set shows; any other setting only where it is not at its default."""

PROMPT, MORE = ">>> ", "... "
BLOCK = '"""'

HELP = """\
/help               this text
/system [TEXT]      show or set the system message; /system none removes it
/set [NAME VALUE]   show or set sampling: temperature, top_p, top_k, min_p, seed, max_tokens, stop (none: off),
                    and what else `puna run --help` lists
/image FILE         show a picture with the next message; /image none takes those away again
/regenerate         answer the last message again
/clear              forget the conversation
/save FILE          save the conversation
/load FILE          go on with a saved conversation
/exit               leave (so does Ctrl-D)
A line that ends with a backslash goes on in the next; \"\"\" begins and ends a text of several lines.
A text that begins with a slash is typed with two. Ctrl-C stops an answer."""


@dataclass
class Session:
    """A conversation under way: `messages` are users' and assistants' in turn, `continues` says that they are texts and
    their continuations (a model without a chat format, or `--raw`)."""

    model: str
    continues: bool
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the session as JSON, whole or not at all, over an older session but over no other file.

        Raises UsageError when the file is another, or cannot be written.
        """
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "mode": "text" if self.continues else "chat",
            "system": self.system,
            "messages": [_as_json(message) for message in self.messages],
            "sampling": {name: getattr(self.sampling, name) for name in SAMPLING_FLAGS},
        }
        if path.is_file():
            try:
                load_session(path)
            except PunaError as error:
                raise UsageError(f"{path}: is there, and no saved chat.", remedy="Name another file.") from error
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(part, path)
        except (OSError, UnicodeEncodeError) as error:
            part.unlink(missing_ok=True)
            raise UsageError(f"{path}: cannot be written ({error}).", remedy="Name another file.") from error


def load_session(path: Path) -> Session:
    """A saved session, read as a stranger's file. Raises UsageError or CheckpointError naming the file and the key."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path}: is no file.", remedy="Name a file that /save wrote.")
    data = read_json(path)

    def need(fits: bool, key: str, what: str) -> None:
        if not fits:
            raise UsageError(f"{path}: {key} must be {what}.", remedy="Name a file that /save wrote.")

    need(data.get("format") == FORMAT, "format", repr(FORMAT))
    need(data.get("version") == VERSION, "version", f"{VERSION}, the one this Puna writes")
    for key in ("model", "mode"):
        need(isinstance(data.get(key), str), key, "a text")
    need(data["mode"] in ("chat", "text"), "mode", "'chat' or 'text'")
    need(isinstance(data.get("system"), str | None), "system", "a text or null")
    messages, sampling = data.get("messages"), data.get("sampling")
    need(isinstance(messages, list), "messages", "a list")
    need(isinstance(sampling, dict), "sampling", "an object")
    known = {"format", "version", "model", "mode", "system", "messages", "sampling"}
    need(data.keys() == known, "the keys", f"{', '.join(sorted(known))}, and no others")
    assert isinstance(messages, list)
    assert isinstance(sampling, dict)
    turns: list[Message] = []
    for number, each in enumerate(messages):
        role = ("user", "assistant")[number % 2]
        fits = isinstance(each, dict) and each.keys() - {"pictures"} == {"role", "content"}
        need(fits, f"messages[{number}]", "role and content, and pictures at most")
        need(each["role"] == role, f"messages[{number}].role", f"{role!r}: the two take turns")
        need(isinstance(each["content"], str), f"messages[{number}].content", "a text")
        shown = each.get("pictures", [])
        fits = isinstance(shown, list) and (not shown or role == "user") and all(_is_picture(one) for one in shown)
        need(fits, f"messages[{number}].pictures", "a user's, as [0, base64]")
        try:
            pictures = tuple((at, Picture(base64.b64decode(data, validate=True))) for at, data in shown)
            turns.append(Message(role, each["content"], pictures=pictures))
        except (ValueError, ChatFormatError) as error:
            raise UsageError(
                f"{path}: messages[{number}].pictures: {error}", remedy="Name a file that /save wrote."
            ) from error
    need(len(turns) % 2 == 0, "messages", "whole turns: the last is the assistant's")
    return Session(data["model"], data["mode"] == "text", _sampling(sampling, need), data["system"], turns)


def _as_json(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.pictures:
        said["pictures"] = [[at, base64.b64encode(picture.data).decode()] for at, picture in message.pictures]
    return said


def _is_picture(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] == 0 and isinstance(value[1], str)


def _sampling(data: Mapping[str, Any], need: Callable[[bool, str, str], None]) -> Sampling:
    """The sampling of a saved session, its types checked here and its ranges by Sampling."""
    kinds = _kinds()
    values: dict[str, Any] = {}
    for key, value in data.items():
        need(key in kinds, f"sampling.{key[:60]}", f"one of {', '.join(kinds)}")
        if kinds[key] is float:
            need(type(value) in (int, float), f"sampling.{key}", "a number")
            values[key] = value
        elif kinds[key] == tuple[str, ...]:
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
            need(fits, f"sampling.{key}", "a list of texts")
            values[key] = tuple(value)
        else:
            fits = type(value) is int or (value is None and kinds[key] == int | None)
            need(fits, f"sampling.{key}", "a whole number")
            values[key] = value
    return Sampling(**values)


def _kinds() -> dict[str, Any]:
    """The settings of sampling that a chat has, and their types."""
    kinds = typing.get_type_hints(Sampling)
    return {name: kinds[name] for name in SAMPLING_FLAGS}


def chat(llm: LLM, settings: RunSettings, *, ask: Callable[[str], str] = input, images: Sequence[Picture] = ()) -> int:
    """Talk until the person leaves; returns the exit code. `ask` shows a prompt and gives the line typed after it;
    `images` go with the first message."""
    talk = _Chat(llm, settings, ask)
    if images:
        talk.check_sight()
        talk.images = list(images)
    if settings.session is None:
        return talk.loop()
    talk.resume(settings.session)
    try:
        return talk.loop()
    finally:
        talk.keep(settings.session)


class _Chat:
    def __init__(self, llm: LLM, settings: RunSettings, ask: Callable[[str], str]) -> None:
        self.llm, self.settings, self.ask = llm, settings, ask
        self.computed: list[int] = []  # the tokens of the last turn, its answer too; none where it has pictures
        self.images: list[Picture] = []  # for the next message
        self.session = Session(
            llm.name, settings.raw or llm.chat_format is None, settings.sampling(), system=settings.system
        )
        if settings.system is not None:
            # Refused here, with the reason, if this model has no place for it.
            llm.encode("", system=settings.system, raw=settings.raw)
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: terminal.note(HELP),
            "/system": self.set_system,
            "/set": self.set_sampling,
            "/image": self.show_image,
            "/regenerate": self.regenerate,
            "/clear": self.clear,
            "/save": self.save,
            "/load": self.load,
        }

    def loop(self) -> int:
        self.banner()
        with _line_editing():
            while True:
                try:
                    entry = self.entry()
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    print()
                    terminal.note("(Ctrl-D or /exit leaves)")
                    continue
                if entry.strip() in ("/exit", "/quit", "/bye"):
                    return 0
                try:
                    self.take(entry)
                except PunaError as error:
                    terminal.note(str(error))
                except KeyboardInterrupt:
                    # Before the first token there is nothing to keep.
                    terminal.note("[stopped; the message is not kept]")

    def banner(self) -> None:
        from puna.models.registry import definition

        config = self.llm.config
        out = terminal.console(sys.stderr)
        out.print(self.llm.name, style="bold", end="")
        count = definition(config).parameter_count(config)
        out.print(
            f" · {terminal.quantity(count)} parameters · context {config.context_length} tokens · {self.llm.kernels}",
            soft_wrap=True,
        )
        if self.session.continues:
            why = "--raw" if self.settings.raw else "it has no chat format"
            out.print(
                f"It continues each text you type ({why}). /help lists the commands.", style="dim", soft_wrap=True
            )
        else:
            out.print("/help lists the commands.", style="dim")

    def entry(self) -> str:
        """One entry: a line, several joined by backslashes, or a block between triple quotes."""
        line = self.ask(PROMPT)
        if line.lstrip().startswith(BLOCK):
            lines = [line.lstrip().removeprefix(BLOCK)]
            while not lines[-1].rstrip().endswith(BLOCK):
                lines.append(self.ask(MORE))
            lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
            text = "\n".join(lines).strip("\n")
            return f"/{text}" if text.startswith("/") else text  # a block is never a command
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self.ask(MORE))
        return "\n".join(lines)

    def take(self, entry: str) -> None:
        """Do what an entry says."""
        if not entry.strip():
            return
        if entry.startswith("//"):
            entry = entry[1:]
        elif entry.startswith("/"):
            name, _, rest = entry.strip().partition(" ")
            if name not in self.commands:
                near = flags.suggestion(name, [*self.commands, "/exit"])
                raise UsageError(f"There is no command {name}.", remedy=near or "/help lists the commands.")
            self.commands[name](rest.strip())
            return
        self.turn(entry)

    def turn(self, text: str) -> None:
        """Send a message with all before it, and show and keep the answer."""
        message = Message("user", text, pictures=tuple((0, picture) for picture in self.images))
        sampling = with_seed(self.session.sampling)
        try:
            if self.session.continues:
                stream = self.llm.stream(text, raw=True, **vars(sampling))
            else:
                stream = self.llm.stream(
                    [*self.session.messages, message], system=self.session.system, **vars(sampling)
                )
        except ContextError as error:
            if self.session.messages and not self.session.continues:
                raise ContextError(
                    error.message,
                    remedy="Nothing was sent. /clear forgets the conversation (/save FILE keeps it first); "
                    "a lower /set max_tokens leaves it more room.",
                ) from error
            raise
        answer = self.show(stream, before=text if self.session.continues else "")
        # Ids do not say which pictures stand among them, so what was computed with some is not for a file.
        shows = any(each.pictures for each in (*self.session.messages, message))
        self.computed = [] if shows else [*stream.prompt_ids, *answer.token_ids]
        if not answer.token_ids and answer.finish_reason == "cancelled":
            terminal.note("[stopped; the message is not kept]")
            return
        self.images = []
        self.session.messages += [message, Message("assistant", answer.text)]
        if said := verdict(answer, sampling.max_tokens, self.llm.config.context_length):
            terminal.note(said)
        if self.settings.verbose:
            terminal.note(figures(answer))

    def show(self, stream: Stream, before: str) -> Answer:
        """Print an answer as it comes, after the text `before` it; Ctrl-C ends it."""
        with terminal.Waiting(lambda: f"Reading ({stream.prefilled} tokens so far) ...") as waiting:
            try:
                for piece in stream:
                    waiting.done()
                    terminal.say(before + piece)
                    before = ""
            except KeyboardInterrupt:
                pass  # the answer's finish reason says it
            finally:
                stream.close()
                waiting.done()
                print(flush=True)
        return stream.answer

    def resume(self, path: Path) -> None:
        """Go on with the conversation in a file, where there is one, and with what was computed for it."""
        if path.exists():
            self.load(str(path))
        cache = _cache(path)
        if cache.is_file():
            found = self.llm.load_session(cache)
            self.computed = list(found.token_ids)
            if found.note:
                terminal.note(f"note: {found.note}")

    def keep(self, path: Path) -> None:
        """Save the conversation in a file, and what was computed for it beside that."""
        self.session.save(path)
        if self.computed:
            self.llm.save_session(_cache(path), self.computed)

    def set_system(self, text: str) -> None:
        if not text:
            terminal.note(self.session.system or "(no system message)")
            return
        if self.session.continues:
            raise UsageError("There is no system message here: the model continues text.", remedy="/help")
        self.session.system = None if text == "none" else text
        terminal.note("(it holds from the next message on)")

    def set_sampling(self, words: str) -> None:
        name, _, word = words.partition(" ")
        if name:
            kinds = _kinds()
            name = name.replace("-", "_")
            if name not in kinds:
                near = flags.suggestion(name, list(kinds))
                raise UsageError(f"There is no setting {name}.", remedy=near or f"One of: {', '.join(kinds)}.")
            word, example = word.strip(), f"For example: /set {name} {_example(name)}"
            if not word:
                raise UsageError(f"/set {name} needs a value.", remedy=example)
            self.session.sampling = replace(
                self.session.sampling, **{name: flags.value(name, kinds[name], word, example)}
            )
        off = Sampling()
        shown = []
        for name in SAMPLING_FLAGS:
            value = getattr(self.session.sampling, name)
            if name in COMMON or value != getattr(off, name):
                shown.append(f"{name} {_plain(value)}")
        terminal.note("  ".join(shown))

    def check_sight(self) -> None:
        """Raises UsageError where the model has no place for pictures."""
        if self.session.continues or not self.llm.sees:
            why = "it continues text" if self.session.continues else "it does not see"
            raise UsageError(
                f"{self.llm.name} has no place for pictures: {why}.",
                remedy="Run a model that sees, such as Llama 3.2 Vision or Llama 4.",
            )

    def show_image(self, name: str) -> None:
        from puna.images import picture

        if name == "none":
            self.images = []
            terminal.note("(no pictures go with the next message)")
            return
        self.check_sight()
        self.images.append(picture(_file(name, "/image")))
        many = len(self.images)
        terminal.note(f"({many} picture{'s' if many > 1 else ''} go{'' if many > 1 else 'es'} with the next message)")

    def regenerate(self, _: str) -> None:
        if not self.session.messages:
            raise UsageError("There is nothing to answer again.", remedy="Type a message first.")
        if self.session.sampling.seed is not None or self.session.sampling.temperature == 0:
            terminal.note("(seed or temperature are fixed, so the same answer is to be expected; /set changes them)")
        kept = list(self.session.messages)
        question = self.session.messages[-2]
        del self.session.messages[-2:]
        waiting, self.images = self.images, [picture for _, picture in question.pictures]
        try:
            self.turn(question.content)
        finally:
            self.images = waiting
            if len(self.session.messages) < len(kept):
                self.session.messages = kept

    def clear(self, _: str) -> None:
        self.session.messages.clear()
        terminal.note("(forgotten)")

    def save(self, name: str) -> None:
        self.session.save(_file(name, "/save"))
        terminal.note(f"(saved: {len(self.session.messages) // 2} turns)")

    def load(self, name: str) -> None:
        found = load_session(_file(name, "/load"))
        if found.continues != self.session.continues:
            kind, here = ("texts", "a chat") if found.continues else ("a chat", "texts")
            raise UsageError(f"{name} holds {kind}, and this model's session is {here}.", remedy="Run another model.")
        if found.model != self.session.model:
            terminal.note(f"(it was saved with {found.model})")
        self.session = replace(found, model=self.session.model)
        terminal.note(f"(loaded: {len(found.messages) // 2} turns, with their system message and settings)")


def _cache(path: Path) -> Path:
    """Where what was computed for a conversation lies."""
    return path.with_name(path.name + ".cache")


def _file(name: str, command: str) -> Path:
    if not name:
        raise UsageError(f"{command} needs a file's name.", remedy=f"For example: {command} chat.json")
    return typed_path(name)


def _plain(value: Any) -> str:
    """A setting's value as a person reads it; stop texts in quotes, so that their spaces and line ends are seen."""
    if value in (None, ()):
        return "none"
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def _example(name: str) -> str:
    return _plain(getattr(Sampling(), name))


class _line_editing:  # noqa: N801 - used as a function is
    """A context with the arrow keys, and entries remembered in `PUNA_HOME/history`, where Python has readline."""

    def __enter__(self) -> None:
        self.path = puna_home() / "history"
        self.readline: Any = None
        try:
            import readline
        except ImportError:
            return  # Windows: the console edits lines by itself
        self.readline = readline
        try:
            if self.path.is_file():
                readline.read_history_file(self.path)
        except OSError as error:
            terminal.note(f"note: {self.path} cannot be read ({error.strerror})")
        readline.set_history_length(HISTORY_LINES)

    def __exit__(self, *_: object) -> None:
        if self.readline is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.readline.write_history_file(self.path)
        except OSError as error:
            terminal.note(f"note: {self.path} cannot be written ({error.strerror})")
