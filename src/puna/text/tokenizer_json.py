"""Hugging Face `tokenizer.json`, by the tokenizers library.

What it is: the library behind the interface, and the bytes of its tokens for the two kinds of decoder that Llama's
files have (byte-level: Llama 3 and 4; sentencepiece's spelling: Llama 1, 2, Code Llama).
What it is not: a reader of every tokenizer.json; another decoder is refused by name.
What is surprising: truncation and padding that a file asks for are turned off, because nothing is cut in silence.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.text.tokenizer import Tokenizer, looks_special
from puna.text.tokenizer_files import REMEDY_FETCH, Beside
from puna.text.tokenizer_sentencepiece import piece_bytes


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 for itself, the others from U+0100 on, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


def read_tokenizer_json(path: Path, data: bytes, beside: Beside) -> JsonTokenizer:
    """The tokenizer in the bytes of a `tokenizer.json`. Raises TokenizerError for a damaged one."""
    engine = _load(path, data)
    tags = {t.content for t in engine.get_added_tokens_decoder().values() if not t.special}
    tags = {content for content in tags if looks_special(content)}
    if tags:
        file = json.loads(data)
        for entry in file["added_tokens"]:
            entry["special"] = entry["special"] or entry["content"] in tags
        engine = _load(path, json.dumps(file).encode())
    return JsonTokenizer(path, engine, beside)


class JsonTokenizer(Tokenizer):
    """An engine of the tokenizers library, as `tokenizer.json` describes one."""

    def __init__(self, path: Path, engine: Any, beside: Beside, kind: str = "tokenizer.json") -> None:
        engine.no_truncation()
        engine.no_padding()
        added = engine.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        size = engine.get_vocab_size(with_added_tokens=True)
        if size > 1 << 24 or any(i >= 1 << 24 for i in added):
            raise TokenizerError(f"{path} claims more than 16 million tokens.", remedy=REMEDY_FETCH)
        self._engine = engine
        self._lock = threading.Lock()
        self._to_bytes, strips_space, byte_level = _decoder_rule(path, engine)
        super().__init__(
            kind=kind,
            source=path,
            vocab_size=max([size, *(i + 1 for i in added)]),
            special=special,
            beside=beside,
            strips_space=strips_space,
        )
        if beside.adds_bos is None and self.bos_id is not None:
            # The file's own post-processor decides, as in transformers: not every Llama-shaped model begins with BOS.
            self.adds_bos = engine.encode("").ids[:1] == [self.bos_id]
        self._missing_bytes: frozenset[int] = frozenset()
        if byte_level:
            alphabet = byte_level_alphabet().items()
            self._missing_bytes = frozenset(b for c, b in alphabet if engine.token_to_id(c) is None)
        first = engine.token_to_id("<0x00>")
        if strips_space and first is not None:
            self._byte_ids = range(first, first + 256)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        # Whether special tokens are found in a text is a state of the engine, hence the lock.
        with faults_of(f"{self.source} cannot encode this text"), self._lock:
            self._engine.encode_special_tokens = not special
            # The library lets other threads run only while it encodes several texts; one may take seconds.
            ids: list[int] = self._engine.encode_batch([text], add_special_tokens=False)[0].ids
        if self._missing_bytes and (lost := self._missing_bytes.intersection(text.encode())):
            # The library would leave them out without a word.
            raise TokenizerError(
                f"{self.source} has no token for the bytes {bytes(sorted(lost))!r} of this text.",
                remedy="Remove those characters, or use a tokenizer trained with all 256 bytes in its alphabet.",
            )
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        return self._encode(text, special=False)

    def _encode_special(self, text: str) -> list[int]:
        # Not by split_special: only the library knows that a first piece gets a leading space and later ones do not.
        return self._encode(text, special=True)

    def _ordinary_bytes(self, token_id: int) -> bytes:
        piece = self._engine.id_to_token(token_id)
        if piece is None:
            raise TokenizerError(
                f"{self.source} has no token with id {token_id}.", remedy="The model and the tokenizer do not match."
            )
        return self._to_bytes(piece)

    def _lookup(self, name: str) -> int | None:
        found: int | None = self._engine.token_to_id(name)
        return found


def _load(path: Path, data: bytes) -> Any:
    from tokenizers import Tokenizer as Engine

    with faults_of(f"{path} is a damaged tokenizer.json"):
        return Engine.from_buffer(data)


@contextmanager
def faults_of(what: str) -> Iterator[None]:
    """What the library raises, as a TokenizerError that says `what`."""
    try:
        yield
    except BaseException as error:  # Rust panics reach Python as a BaseException of no importable type
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise TokenizerError(f"{what} ({str(error)[:200]}).", remedy=REMEDY_FETCH) from error


def _decoder_rule(path: Path, engine: Any) -> tuple[Callable[[str], bytes], bool, bool]:
    """From tokenizer.json's decoder: how a piece becomes bytes, whether decoding takes the first space away, and
    whether pieces are byte-level."""
    decoder = engine.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = byte_level_alphabet()

        def from_alphabet(piece: str) -> bytes:
            try:
                return bytes([alphabet[c] for c in piece])
            except KeyError:  # an added token, which is spelled in plain text
                return piece.encode()

        return from_alphabet, False, True
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (
        "Metaspace" in kinds or {"pattern": {"String": "▁"}, "content": " ", "type": "Replace"} in steps
    ):
        strips = any(
            (step["type"] == "Strip" and step["start"] == 1 and step["content"] == " " and step["stop"] == 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
        return piece_bytes, strips, False
    raise TokenizerError(
        f"{path}: decoder {kinds} is not one that Puna implements (ByteLevel; Replace, ByteFallback, Fuse, Strip; "
        "Metaspace).",
        remedy="Llama's tokenizers use these only; is it the tokenizer of another family?",
    )
