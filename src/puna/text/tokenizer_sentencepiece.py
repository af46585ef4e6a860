"""sentencepiece `tokenizer.model`: Llama 1, Llama 2, Code Llama.

What it is: sentencepiece's own processor behind the interface, and the spelling of its pieces, which `tokenizer.json`
files of these models share.
What it is not: a parser of the protobuf; the library checks it.
What is surprising: user-defined pieces that look like `<name>` are made control pieces before the library sees the
model, because it would find them in any text; and so are Code Llama's marks of a gap, which its file has as ordinary
pieces that merges lead to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.text.tokenizer import INFILL_NAMES, Tokenizer, looks_special
from puna.text.tokenizer_files import REMEDY_FETCH, Beside, Unsaid

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def piece_bytes(piece: str) -> bytes:
    """A sentencepiece-style piece as bytes: `▁` is a space, `<0xNN>` one byte."""
    match = BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()


class SentencePieceTokenizer(Tokenizer):
    """sentencepiece `tokenizer.model`: Llama 1, Llama 2, Code Llama."""

    def __init__(self, path: Path, data: bytes, beside: Beside) -> None:
        from sentencepiece import SentencePieceProcessor

        def load(proto: bytes) -> Any:
            try:
                processor = SentencePieceProcessor()
                processor.LoadFromSerializedProto(proto)
            except (RuntimeError, ValueError) as error:
                raise TokenizerError(
                    f"{path} is a damaged sentencepiece model ({error}).", remedy=REMEDY_FETCH
                ) from error
            return processor

        processor = load(data)
        size = processor.vocab_size()
        try:
            pieces: list[str] = processor.id_to_piece(list(range(size)))
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{path} is a damaged sentencepiece model: a piece is not UTF-8 ({error}).", remedy=REMEDY_FETCH
            ) from error
        patched = _with_marks_special(_without_user_defined(data, pieces), pieces)
        if patched != data:
            processor = load(patched)
        ids = list(range(size))
        kinds = zip(pieces, ids, processor.is_control(ids), processor.is_unknown(ids), strict=True)
        special = {piece: i for piece, i, control, unknown in kinds if control or unknown}
        byte_ids = [i for i, is_byte in enumerate(processor.is_byte(ids)) if is_byte]
        # The model knows its own begin and end, whatever they are called; a config may overrule it.
        bos, eos = processor.bos_id(), processor.eos_id()
        if isinstance(beside.bos_token, Unsaid):
            beside = replace(beside, bos_token=pieces[bos] if bos >= 0 else None)
        if isinstance(beside.eos_token, Unsaid):
            beside = replace(beside, eos_token=pieces[eos] if eos >= 0 else None)
        self._processor = processor
        self._pieces = pieces
        super().__init__(
            kind="sentencepiece",
            source=path,
            vocab_size=size,
            special=special,
            beside=beside,
            strips_space=processor.encode("a", out_type=str)[:1] in (["▁a"], ["▁"]),
            byte_ids=range(byte_ids[0], byte_ids[-1] + 1) if byte_ids else range(0),
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def _ordinary_bytes(self, token_id: int) -> bytes:
        return piece_bytes(self._pieces[token_id])

    def _lookup(self, name: str) -> int | None:
        found: int = self._processor.piece_to_id(name)
        return found if 0 <= found < len(self._pieces) and self._pieces[found] == name else None


def _without_user_defined(data: bytes, pieces: Sequence[str]) -> bytes:
    """The model with its user-defined pieces that look like `<name>` made control pieces.

    sentencepiece always finds user-defined pieces in a text; control pieces never. A piece is serialized as its text
    (tag 0A), score (tag 15, 4 bytes) and type (tag 18): 4 is user-defined, 3 control (sentencepiece_model.proto).
    """
    patched = bytearray(data)
    for piece in pieces:
        # The first condition is in the third; 128,000 calls would take long.
        if piece.endswith(">") and not BYTE_PIECE.fullmatch(piece) and looks_special(piece):
            raw = piece.encode()
            if len(raw) < 128:  # one length byte
                at = data.find(b"\n" + bytes([len(raw)]) + raw + b"\x15")
                kind = at + 2 + len(raw) + 5
                if at >= 0 and data[kind : kind + 2] == b"\x18\x04":
                    patched[kind + 1] = 3
    return bytes(patched)


def _with_marks_special(data: bytes, pieces: Sequence[str]) -> bytes:
    """The model with Code Llama's marks of a gap made control pieces, where they are ordinary ones.

    The type of an ordinary piece is usually left out, so its record (tag 0A, length, and what is said above) grows.
    """
    for name in set(INFILL_NAMES).intersection(pieces):
        raw = name.encode()
        text = b"\n" + bytes([len(raw)]) + raw + b"\x15"
        for kind in (b"", b"\x18\x01"):
            at = data.find(b"\n" + bytes([len(text) + 4 + len(kind)]) + text)
            end = at + 2 + len(text) + 4  # behind the score
            if at >= 0 and data[end : end + len(kind)] == kind:
                record = b"\n" + bytes([len(text) + 6]) + data[at + 2 : end] + b"\x18\x03"
                data = data[:at] + record + data[end + len(kind) :]
                break
    return data
