"""Pictures on their way into a prompt: from files and messages to what the engine is shown.

What it is: reading a picture's file for a message (`picture`, `with_images`), making ready what a conversation shows
(`pixels_of`), and saying where in the ids each picture and its features stand (`shown`). `puna.LLM` is its caller.
What it is not: a decoder of pictures (`puna.text.pictures`), or what sees them (`puna.models`).
What is surprising: a picture that is sent again in the next turn is decoded again, for only its digest is kept: what
the model saw in it is not computed again, and that takes seconds where decoding takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from puna.engine.pictures import Run, Shown, attended
from puna.errors import UsageError
from puna.types import Message, Picture

if TYPE_CHECKING:
    from puna.kernels.layouts import Pixels
    from puna.text.pictures import Processor
    from puna.text.sight import Stand

MOST_PICTURES = 32
"""Pictures of a conversation at most: made ready, one takes up to 23 MB."""

Image = str | Path | bytes | Picture
"""A picture as a caller may give it: the path of its file, the file's bytes, or what a message holds."""


def picture(image: Image) -> Picture:
    """A picture of a file, or of its bytes. Raises UsageError naming a file that cannot be read, PictureError for one
    that is larger than is read, ChatFormatError for what cannot be one."""
    from puna.text.pictures import check_length

    if isinstance(image, Picture):
        return image
    if not isinstance(image, str | Path):
        return Picture(image)
    path = Path(image)
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file.", remedy="Name the file of a picture.")
        check_length(path.stat().st_size)
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).", remedy="Name another file.") from error
    if not data:
        raise UsageError(f"{path}: is empty.", remedy="Name the file of a picture.")
    return Picture(data)


def with_images(prompt: object, images: Iterable[Image]) -> list[Message]:
    """A prompt as messages, with pictures before the text of the last, which must be a user's. Raises UsageError."""
    if isinstance(prompt, str):
        prompt = [Message("user", prompt)]
    messages = list(prompt) if isinstance(prompt, Sequence) else []
    if not messages or not isinstance(messages[-1], Message) or messages[-1].role != "user":
        raise UsageError(
            "Images belong to a user's message, and this prompt ends with none.",
            remedy="Give a text, or messages of which the last is the user's.",
        )
    last = messages[-1]
    added = tuple((0, picture(image)) for image in images)
    return [*messages[:-1], replace(last, pictures=added + last.pictures)]


def pictures_of(prompt: object) -> list[Picture]:
    """Those of a conversation, in order; none of another prompt. Raises UsageError for more than `MOST_PICTURES`."""
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        return []
    found = [each for message in prompt if isinstance(message, Message) for _, each in message.pictures]
    if len(found) > MOST_PICTURES:
        raise UsageError(
            f"The conversation has {len(found)} pictures, and at most {MOST_PICTURES} are looked at.",
            remedy="Leave some out.",
        )
    return found


def pixels_of(pictures: Sequence[Picture], processor: Processor) -> list[Pixels]:
    """Pictures made ready, each decoded once. Raises PictureError."""
    ready: dict[bytes, Pixels] = {}
    for each in pictures:
        if each.digest not in ready:
            ready[each.digest] = processor.prepare(each.data)
    return [ready[each.digest] for each in pictures]


def shown(pictures: Sequence[Picture], pixels: Sequence[Pixels], stands: Sequence[Stand]) -> tuple[Shown, ...]:
    """Pictures for the engine, given where each stands in the prompt's ids."""
    found = tuple(
        Shown(where.at, where.length, picture.digest, each, tuple(Run(*run) for run in where.runs))
        for picture, each, where in zip(pictures, pixels, stands, strict=True)
    )
    return found if any(each.runs for each in found) else attended(found)
