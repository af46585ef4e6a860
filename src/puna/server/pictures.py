"""Pictures in requests' bodies: base64 to what a message holds, within limits.

What it is: `picture_at` and `decoded` for the protocols' bodies, and `check_sight`, which names the field where the
model does not see.
What it is not: a reader of pictures (`puna.text.pictures`), or a client: one elsewhere on the net is `Elsewhere` until
`puna.server.elsewhere` has looked whether it may be fetched, once the model is there and the caller let in.
What is surprising: base64 is held to its alphabet. Python's decoder drops what it does not know, and a picture of which
something was dropped is another.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass

from puna.server.limits import MAX_PICTURES
from puna.server.problems import RequestError
from puna.types import Backend, Message, Picture, Prompt

KINDS = ("image/png", "image/jpeg", "image/webp", "image/gif")
"""The media types that are read; what a file is, its own bytes say."""


@dataclass(frozen=True)
class Elsewhere(Picture):
    """A picture that a request names by its URL; it has no bytes, so that what forgets to fetch it finds no picture."""

    url: str = ""
    param: str = ""

    def __post_init__(self) -> None:
        """It is checked where it is fetched."""


def picture_at(url: str, param: str) -> Picture:
    """The picture in a `data:` URL, or `Elsewhere` for one of https. Raises RequestError for another URL, media type or
    coding."""
    head, comma, data = url.partition(",")
    scheme, _, about = head.partition(":")
    if scheme.lower() == "https":
        return Elsewhere(b"", url, param)
    if scheme.lower() != "data":
        raise RequestError(
            f"{param} is not honoured: it is no URL of data, nor of https.",
            remedy="Send the picture itself: data:image/png;base64,...",
            code="unsupported_parameter",
            param=param,
        )
    kind, *rest = about.lower().split(";")
    if not comma or kind not in KINDS or rest != ["base64"]:
        raise RequestError(
            f"{param} must be a data URL of {', '.join(KINDS)} in base64.",
            remedy="It begins like data:image/png;base64,",
            code="invalid_value",
            param=param,
        )
    return decoded(data, param)


def decoded(data: str, param: str) -> Picture:
    """The picture in base64. Raises RequestError for what is none."""
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not found:
        raise RequestError(f"{param} is no base64 of a picture.", code="invalid_value", param=param)
    return Picture(found)


def together(first: Message, second: Message, between: str) -> tuple[tuple[int, Picture], ...]:
    """The pictures of two messages whose texts become one, with `between` where both have one."""
    shift = len(first.content) + (len(between) if first.content and second.content else 0)
    return first.pictures + tuple((shift + at, picture) for at, picture in second.pictures)


def check_sight(backend: Backend, prompt: Prompt, param: str = "messages") -> None:
    """Raise RequestError for pictures where the model does not see, and for more than one request may bring."""
    messages = prompt if isinstance(prompt, tuple) else ()
    count = 0
    for i, message in enumerate(messages):
        if not isinstance(message, Message) or not message.pictures:
            continue
        count += len(message.pictures)
        if not backend.card.sees:
            raise RequestError(
                f"{param} hold a picture (in the {message.role}'s message {i}), and {backend.card.name} does not see.",
                remedy="Leave pictures out, or use a model that sees, such as Llama 3.2 Vision or Llama 4.",
                code="unsupported_parameter",
                param=param,
            )
    if count > MAX_PICTURES:
        raise RequestError(
            f"{param} hold {count} pictures; at most {MAX_PICTURES} are taken.", code="invalid_value", param=param
        )
