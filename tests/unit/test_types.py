"""Records that refuse what cannot be."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from puna.errors import ChatFormatError
from puna.text.chat import builtin_format
from puna.types import Message, Picture

PICTURE = Picture(b"\x89PNG")


def test_a_picture_is_told_by_its_bytes_which_no_error_text_shows() -> None:
    assert PICTURE.digest == hashlib.sha256(b"\x89PNG").digest()
    assert Picture(b"\x89PNG") == PICTURE
    assert "PNG" not in repr(Message("user", "x", pictures=((0, PICTURE),)))
    for data in (b"", "text", bytearray(b"x")):
        with pytest.raises(ChatFormatError, match="A picture is"):
            Picture(data)  # type: ignore[arg-type]


def test_pictures_stand_in_the_text_in_order() -> None:
    message = Message("user", "ab", pictures=((0, PICTURE), (2, PICTURE), (2, PICTURE)))
    assert [at for at, _ in message.pictures] == [0, 2, 2]
    wrong: list[Any] = [((3, PICTURE),), ((-1, PICTURE),), ((1, PICTURE), (0, PICTURE)), (PICTURE,), ((0, b"x"),), 7]
    for pictures in wrong:
        with pytest.raises(ChatFormatError, match="pictures of a message of 2 characters"):
            Message("user", "ab", pictures=pictures)


def test_a_chat_format_without_sight_refuses_pictures() -> None:
    messages = [Message("user", "What is this?", pictures=((0, PICTURE),))]
    with pytest.raises(ChatFormatError, match=r"llama3\.1 has no place for pictures"):
        builtin_format("llama3.1", instruct=True).render(messages)
