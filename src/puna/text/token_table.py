"""A tokenizer as a table of bytes, for what follows an answer byte by byte.

What it is: the bytes of every id, and how a text is cut that goes on after another.
What it is not: a tokenizer; nor what a text's first token gives (`Tokenizer.text_bytes` takes a space from it).
What is surprising: a special token has no bytes here. Its name is how people write it down, not what it says.
"""

from __future__ import annotations

from puna.errors import TokenizerError
from puna.text.tokenizer import Tokenizer


def token_table(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each id adds to a text that has begun, [vocab_size]; none for special tokens and unused ids."""
    special = set(tokenizer.special.values())
    table = []
    for i in range(tokenizer.vocab_size):
        try:
            table.append(b"" if i in special else tokenizer.token_bytes(i))
        except TokenizerError:  # a hole in a tokenizer.json's ids
            table.append(b"")
    return table


def encode_after(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on after another: no space is put before it. Special tokens' names are text.

    Empty where the tokenizer cannot cut a text without what comes before it.
    """
    data = text.encode()
    ids = tokenizer.encode(text)
    if b"".join(map(tokenizer.token_bytes, ids)) == data:
        return ids
    # sentencepiece puts a space before a text. It goes before a line end instead, which is merged with nothing.
    ids = tokenizer.encode("\n" + text)
    before = b""
    for n, i in enumerate(ids):
        before += tokenizer.token_bytes(i)
        if before.endswith(b"\n"):
            return ids[n + 1 :]
    return []
