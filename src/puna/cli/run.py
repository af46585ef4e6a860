"""`puna run`: one answer, streamed; or, without a prompt at a terminal, the chat of `chat.py`.

What it is: from flags and stdin to a prompt, from the stream to stdout.
What it is not: generation, which is `puna.LLM`'s.
What is surprising: stdout gets exactly the answer where it is a pipe or a file. At a terminal a text that is continued
is shown from its beginning, and a line end follows the answer.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from puna.cli import terminal
from puna.cli.answers import figures, verdict, with_seed
from puna.errors import UsageError
from puna.settings import RunSettings, typed_path
from puna.types import Infill
from puna.weights.embedded import EMBEDDED
from puna.weights.find import find_model, looks_like_path

if TYPE_CHECKING:
    from puna.llm import LLM
    from puna.types import Picture

INTERRUPTED = 130


def main(settings: RunSettings) -> int:
    """Run the command."""
    from puna.images import picture

    settings = _sorted_out(settings)
    # A wrong name or value is said before stdin is read and a large model loaded.
    find_model(settings.model or EMBEDDED)
    settings.sampling()
    prompt = _prompt(settings)
    gap = _gap(settings, prompt)
    if prompt is None:
        _check_chat(settings)
    elif settings.session is not None:
        raise UsageError("--session keeps a chat, and a prompt asks for one answer.", remedy="Leave one of them out.")
    images = [picture(typed_path(name)) for name in settings.image]
    if images and settings.raw:
        raise UsageError("--image has no place beside --raw: raw text shows none.", remedy="Leave one of them out.")
    with terminal.Waiting(lambda: f"Loading {settings.model} ..."):
        llm = _load(settings)
    for text in llm.notes:
        terminal.note(f"note: {text}")
    if prompt is None:
        from puna.cli.chat import chat

        return chat(llm, settings, images=images)
    return _answer(llm, prompt if gap is None else gap, settings, images)


def _load(settings: RunSettings) -> LLM:
    from puna.llm import LLM

    return LLM(
        settings.model or EMBEDDED,
        dtype=settings.dtype,
        quant=settings.quant,
        device=settings.device,
        kernels=settings.kernels,
        invariant=settings.invariant,
        speculate=settings.speculate,
        draft=settings.draft,
        kv_type=settings.kv_type,
        kv_memory=settings.kv_memory,
        tokenizer=settings.tokenizer,
        adapter=settings.adapter,
    )


def _sorted_out(settings: RunSettings) -> RunSettings:
    """With the model settled, and a lone `-` or text in the model's place taken for the prompt."""
    model, prompt = settings.model, settings.prompt
    if model == "":
        raise UsageError('MODEL is empty: ""', remedy=f'Name a model: puna run {EMBEDDED} "{prompt or ""}"')
    if model == "-" and prompt is None:
        model, prompt = None, "-"
    elif model is not None and prompt is None and _is_text(model):
        terminal.note(f"note: no MODEL is named, so {EMBEDDED} gets this text")
        model, prompt = None, model
    return replace(settings, model=model or EMBEDDED, prompt=prompt)


def _is_text(word: str) -> bool:
    """Whether a lone argument is a text: it has spaces, is no path that exists, and does not look like one."""
    try:
        return any(map(str.isspace, word)) and not looks_like_path(word) and not Path(word).exists()
    except OSError:  # longer than any file name
        return True


def _prompt(settings: RunSettings) -> str | None:
    """The prompt from the command line or from stdin; None where a chat is to begin. Raises UsageError."""
    if settings.prompt is not None and settings.prompt != "-":
        return settings.prompt
    if settings.prompt is None and terminal.is_terminal(sys.stdin):
        return None
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The prompt on stdin is not UTF-8: byte {error.start} is {data[error.start]:#04x}.",
            remedy="Convert it first, for example with iconv -t UTF-8.",
        ) from error
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UsageError(
            "There is no prompt: none is given, and stdin is empty.",
            remedy=f'Give one: puna run {settings.model} "..."; --raw with "" starts from nothing.',
        )
    return text


def _gap(settings: RunSettings, prompt: str | None) -> Infill | None:
    """The gap that is to be filled, where one is. Raises UsageError for what goes with it and cannot."""
    if not settings.infill:
        if settings.suffix_first:
            raise UsageError("--suffix-first goes with --infill.", remedy="Leave it out, or add --infill.")
        return None
    from puna.text.infill import MARK, split_at_mark

    for name in ("system", "raw"):
        if getattr(settings, name):
            raise UsageError(f"--infill leaves no place for --{name}.", remedy="Leave one of them out.")
    if prompt is None:
        raise UsageError("--infill needs a text with a gap.", remedy=f"Write {MARK} where it is.")
    return replace(split_at_mark(prompt), suffix_first=settings.suffix_first)


def _check_chat(settings: RunSettings) -> None:
    """Refuse what a chat cannot honour."""
    why = ""
    if settings.json:
        why = "--json gives one answer, and a chat has many"
    elif not terminal.is_terminal(sys.stdout):
        why = "stdout is not a terminal, so there is no place for a chat"
    if why:
        raise UsageError(f"There is no prompt, and {why}.", remedy=f'Give one: puna run {settings.model} "..."')


def _answer(llm: LLM, prompt: str | Infill, settings: RunSettings, images: list[Picture]) -> int:
    sampling = with_seed(settings.sampling())
    stream = llm.stream(prompt, system=settings.system, raw=settings.raw, images=images, **vars(sampling))
    at_terminal = not settings.json and terminal.is_terminal(sys.stdout)
    # A text that is continued is shown from its beginning where a person reads it.
    continued = prompt if isinstance(prompt, str) and (settings.raw or llm.chat_format is None) else ""
    before = continued if at_terminal else ""
    interrupted = False
    with terminal.Waiting(lambda: f"Reading the prompt ({stream.prefilled} tokens so far) ...") as waiting:
        try:
            for piece in stream:
                waiting.done()
                if not settings.json:
                    terminal.say(before + piece)
                    before = ""
        except KeyboardInterrupt:
            interrupted = True
        finally:
            stream.close()
    answer = stream.answer
    if settings.json:
        terminal.document({**asdict(answer), "seed": sampling.seed})
    elif at_terminal:
        print(flush=True)
    if said := verdict(answer, settings.max_tokens, llm.config.context_length):
        terminal.note(said)
    if settings.verbose:
        terminal.note(figures(answer))
    return INTERRUPTED if interrupted else 0
