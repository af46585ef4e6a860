"""Tokenizers: text to ids and back, one interface over the field's libraries.

What it is: readers for the four tokenizer files the Llama family comes with (sentencepiece `tokenizer.model`, Meta's
tiktoken `tokenizer.model`, Hugging Face `tokenizer.json`, llama2.c `tok*.bin`), told apart by what is in the file, not
by its name. The ids come from sentencepiece, tiktoken and tokenizers themselves; only llama2.c's pair merge is ours,
because no library reads that file.
What it is not: a trainer, a chat format (`puna.text.chat`), a stream decoder (`puna.text.detokenizer`).
What is surprising:
- Special tokens spelled out in a text are ordinary text unless `allow_special=True`. That holds for sentencepiece's
  user-defined `<...>` pieces too, which that library cannot leave alone: they are re-typed to control pieces on load.
- Decoding is our own (bytes of the tokens, joined, UTF-8 with errors="replace"), because the libraries disagree about
  invalid UTF-8 and a stream can only be decoded from bytes.
- tiktoken's regex engine overflows on a million whitespace characters in a row. Only such a run is cut, every 25,000
  characters, as Meta's own code cuts; any text that tiktoken can encode gets exactly tiktoken's ids.
- A str with lone surrogates (what is left of invalid UTF-8 input) is refused, not patched.
"""

from __future__ import annotations

import binascii
import heapq
import json
import math
import os
import re
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from puna.errors import TokenizerError

MAX_FILE_BYTES = 256 << 20
"""The largest tokenizer file that is read at all; the largest real one (Llama 4's tokenizer.json) has 28 MB."""

MAX_CONFIG_BYTES = 16 << 20
"""The largest JSON file beside a tokenizer that is read; the largest real one has 0.3 MB."""

_REMEDY_FETCH = "Fetch the file again from where the model came from; compare its size and sha256 with the source."

_BOS_NAMES = ("<|begin_of_text|>", "<s>")
_EOS_NAMES = ("<|end_of_text|>", "</s>")

_STOP_NAMES = (
    "</s>",  # Llama 1, 2, Code Llama
    "▁<EOT>",  # Code Llama, end of an infilling
    "<step>",  # Code Llama 70B Instruct, end of a message
    "<|end_of_text|>",  # Llama 3 and 4, base models
    "<|eot_id|>",  # Llama 3, end of turn
    "<|eom_id|>",  # Llama 3.1 and later, end of message (a tool is called)
    "<|eot|>",  # Llama 4
    "<|eom|>",  # Llama 4
)


class Tokenizer(ABC):
    """What every tokenizer offers, whichever library stands behind it. Instances may be shared by threads.

    Attributes:
        kind: "sentencepiece", "tiktoken", "tokenizer.json" or "llama2c".
        source: the file that was read.
        vocab_size: ids run from 0 to vocab_size - 1 (a model's embedding may have more rows: padding).
        special: the special tokens, name to id.
        bos_id, eos_id: None where the tokenizer has none.
        stop_ids: every id that ends an answer: eos, the generation's end-of-turn tokens, and generation_config.json's.
        chat_template: the Jinja source that came with the tokenizer, or None.
    """

    def __init__(
        self,
        *,
        kind: str,
        source: Path,
        vocab_size: int,
        special: Mapping[str, int],
        beside: _Beside,
        strips_space: bool,
        byte_ids: range = range(0),
    ) -> None:
        """strips_space: encoding puts a space before the text, so decoding takes one away (sentencepiece's rule).

        byte_ids: the tokens that stand for one byte each; a space spelled that way is never the one taken away.
        """
        self.kind = kind
        self.source = source
        self.vocab_size = vocab_size
        self.special: Mapping[str, int] = MappingProxyType(dict(special))
        self._special_names = {i: name for name, i in special.items()}
        self._strips_space = strips_space
        self._byte_ids = byte_ids
        self._splitter: re.Pattern[str] | None = None
        self.bos_id = self._named(beside.bos_token, _BOS_NAMES, "bos_token")
        self.eos_id = self._named(beside.eos_token, _EOS_NAMES, "eos_token")
        self.chat_template = beside.chat_template
        stops = {special[name] for name in _STOP_NAMES if name in special}
        stops.update(() if self.eos_id is None else (self.eos_id,))
        for i in beside.eos_ids:
            if not 0 <= i < vocab_size:
                raise TokenizerError(
                    f"{source.parent / 'generation_config.json'}: eos_token_id {i} is outside the "
                    f"vocabulary of {vocab_size} tokens.",
                    remedy="The file belongs to another tokenizer, or is damaged. " + _REMEDY_FETCH,
                )
            stops.add(i)
        self.stop_ids = frozenset(stops)

    def _named(self, name: str | _Unsaid | None, usual: tuple[str, ...], key: str) -> int | None:
        """The id of the token a config names; where the config says nothing, of the first usual name there is."""
        if isinstance(name, _Unsaid):
            return next((self.special[n] for n in usual if n in self.special), None)
        if name is None:
            return None
        found = self.special.get(name, self._lookup(name))
        if found is None:
            raise TokenizerError(
                f"{self.source}: the configuration beside it names {name!r} as its {key}, and the tokenizer has no "
                "such token.",
                remedy="The files belong to different models. " + _REMEDY_FETCH,
            )
        return found

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """The ids of a text.

        With bos, the begin-of-text id comes first, once: a text that starts with it (only possible with
        allow_special) gets no second one. With allow_special, names of special tokens in the text become those
        tokens; without, they are ordinary text.

        Raises TokenizerError where the text is not valid Unicode (lone surrogates), or bos is asked of a tokenizer
        that has none.
        """
        check_text(text)
        ids = self._encode_special(text) if allow_special else self._encode_ordinary(text)
        if bos:
            if self.bos_id is None:
                raise TokenizerError(
                    f"{self.source} defines no begin-of-text token, and one was asked for.",
                    remedy="Encode without it, or name bos_token in the tokenizer_config.json beside it.",
                )
            if ids[:1] != [self.bos_id]:
                ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD as `bytes.decode(errors="replace")` does it.

        The space that encoding put before the text is taken away from the first token that is not special. Special
        tokens give their name, or nothing with skip_special. Raises TokenizerError for an id outside the vocabulary.
        """
        return self.text_bytes(ids, skip_special=skip_special)[0].decode("utf-8", errors="replace")

    def text_bytes(
        self, ids: Iterable[int], *, started: bool = False, skip_special: bool = False
    ) -> tuple[bytes, bool]:
        """The bytes of ids in a text that has already `started` or not, and whether it has started after them."""
        parts = []
        for i in ids:
            if i in self._special_names:
                if not skip_special:
                    parts.append(self.token_bytes(i))
                continue
            piece = self.token_bytes(i)
            if not started:
                started = True
                if self._strips_space and i not in self._byte_ids:
                    piece = piece.removeprefix(b" ")
            parts.append(piece)
        return b"".join(parts), started

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes an id contributes to a text (its name for a special token), leading space included."""
        name = self._special_names.get(token_id)
        if name is not None:
            return name.encode()
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(
                f"Token id {token_id} is outside the vocabulary of {self.vocab_size} tokens of {self.source}.",
                remedy="The model and the tokenizer belong to different models, or the model's vocabulary is padded.",
            )
        return self._ordinary_bytes(token_id)

    def split_special(self, text: str) -> list[str | int]:
        """A text cut at the names of special tokens: each becomes its id, the (non-empty) text between stays text."""
        if self._splitter is None:
            names = sorted(self.special, key=len, reverse=True)
            # A pattern that never matches where there is no special token.
            self._splitter = re.compile("(" + ("|".join(map(re.escape, names)) if names else r"(?!)") + ")")
        parts = self._splitter.split(text)
        return [self.special[part] if n % 2 else part for n, part in enumerate(parts) if part]

    def _encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.split_special(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._encode_ordinary(part))
        return ids

    @abstractmethod
    def _encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which nothing is special."""

    @abstractmethod
    def _ordinary_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that is in the vocabulary and not special."""

    @abstractmethod
    def _lookup(self, name: str) -> int | None:
        """The id of a token by its name in the file, special or not."""


def check_text(text: str) -> None:
    """Raises TokenizerError, naming the place, where a str holds lone surrogates: no tokenizer has ids for them."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"The text is not valid Unicode: character {error.start} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}).",
            remedy="It was read from bytes that are no UTF-8. Convert the input to UTF-8, or decode it with "
            'errors="replace".',
        ) from error


def load_tokenizer(path: Path, *, generation: str | None = None) -> Tokenizer:
    """Read a tokenizer from a file, or from a folder (tokenizer.json if there is one, else tokenizer.model).

    The kind is decided by the file's content. tokenizer_config.json, special_tokens_map.json, generation_config.json,
    chat_template.jinja and chat_template.json beside it are honoured (not for llama2.c files, which stand alone).
    `generation` ("llama3", "llama3.1", "llama3.2", "llama3.3", "llama4") names the special tokens of a tiktoken file,
    which holds none; None means llama3.1's for 128,000 ranks and llama4's for 200,000.

    Raises TokenizerError for a file that is missing, damaged, oversized or of no known kind.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()), None)
        if file is None:
            raise TokenizerError(
                f"{path} holds neither tokenizer.json nor tokenizer.model.",
                remedy="Name the tokenizer file itself (--tokenizer FILE), or copy it into the folder.",
            )
        path = file
    data = _read(path, MAX_FILE_BYTES)
    if data.lstrip()[:1] == b"{":
        return _TokenizersTokenizer(path, data, _read_beside(path.parent))
    if re.match(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n", data[:4096]):
        return _TiktokenTokenizer(path, data, _read_beside(path.parent), generation)
    # A serialized ModelProto starts with field 1 (a piece) holding field 1 (its text): 0A, length, 0A.
    if data[:1] == b"\n" and data[2:3] == b"\n":
        return _SentencePieceTokenizer(path, data, _read_beside(path.parent))
    # llama2.c starts with the longest token's length as a little-endian int32: the upper bytes are zero.
    if len(data) >= 12 and data[2:4] == b"\0\0":
        return _Llama2cTokenizer(path, data)
    raise TokenizerError(
        f"{path} is none of the tokenizer files Puna reads: a sentencepiece model, a tiktoken file of base64 lines, "
        f"a tokenizer.json, a llama2.c tok*.bin (it starts with {data[:8]!r}).",
        remedy=_REMEDY_FETCH,
    )


# --- files beside a tokenizer ----------------------------------------------------------------------------------------


class _Unsaid:
    """The config says nothing about this token, which is not the same as saying null."""


@dataclass(frozen=True)
class _Beside:
    """What the small JSON files beside a tokenizer say about it."""

    bos_token: str | _Unsaid | None = field(default_factory=_Unsaid)
    eos_token: str | _Unsaid | None = field(default_factory=_Unsaid)
    chat_template: str | None = None
    eos_ids: tuple[int, ...] = ()
    added: Mapping[int, str] = field(default_factory=dict)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(limit + 1) if size <= limit else b""  # a pipe claims no size, hence the + 1
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read: {error.strerror or error}.", remedy="Check the path and its permissions."
        ) from error
    if max(size, len(data)) > limit:
        raise TokenizerError(
            f"{path} is larger than {limit >> 20} MiB, more than any such file is.", remedy=_REMEDY_FETCH
        )
    return data


def _read_text(path: Path) -> str:
    data = _read(path, MAX_CONFIG_BYTES)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text ({error}).", remedy=_REMEDY_FETCH) from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}).", remedy=_REMEDY_FETCH) from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} does not hold a JSON object.", remedy=_REMEDY_FETCH)
    return value


def _wrong(path: Path, key: str, expected: str, value: object) -> TokenizerError:
    return TokenizerError(f"{path}: {key} must be {expected}, not {str(value)[:80]!r}.", remedy=_REMEDY_FETCH)


def _token_name(path: Path, key: str, value: object) -> str | None:
    """A token as the hub's files spell one: a string, an AddedToken object with "content", or null."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise _wrong(path, key, 'a string, an object with "content", or null', value)
    return value


def _read_beside(folder: Path) -> _Beside:
    config_path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, special_map = _read_json(config_path), _read_json(map_path)
    tokens: dict[str, str | _Unsaid | None] = {}
    for key in ("bos_token", "eos_token"):
        tokens[key] = _Unsaid()
        for path, values in ((config_path, config), (map_path, special_map)):
            if key in values:
                tokens[key] = _token_name(path, key, values[key])
                break
    added: dict[int, str] = {}
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise _wrong(config_path, "added_tokens_decoder", "an object", entries)
    for key, entry in entries.items():
        name = _token_name(config_path, f"added_tokens_decoder[{key[:20]}]", entry)
        if name is None or not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise _wrong(config_path, "added_tokens_decoder", "ids with their tokens", key)
        added[int(key)] = name
    return _Beside(
        bos_token=tokens["bos_token"],
        eos_token=tokens["eos_token"],
        chat_template=_read_chat_template(folder, config_path, config),
        eos_ids=_read_eos_ids(folder / "generation_config.json"),
        added=added,
    )


def _read_chat_template(folder: Path, config_path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else tokenizer_config.json's: transformers' own order."""
    if (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    path, value = folder / "chat_template.json", _read_json(folder / "chat_template.json").get("chat_template")
    if value is None:
        path, value = config_path, config.get("chat_template")
    if isinstance(value, list):  # several named ones: the one called default is the one for chat
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
        if value is None:
            raise _wrong(path, "chat_template", 'one template, or a list in which one is named "default"', list(named))
    if value is not None and not isinstance(value, str):
        raise _wrong(path, "chat_template", "a string", value)
    return value


def _read_eos_ids(path: Path) -> tuple[int, ...]:
    value = _read_json(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise _wrong(path, "eos_token_id", "an integer or a list of integers", value)
    return tuple(ids)


# --- sentencepiece ---------------------------------------------------------------------------------------------------

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _piece_bytes(piece: str) -> bytes:
    """A sentencepiece-style piece as bytes: `▁` is a space, `<0xNN>` one byte."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()


class _SentencePieceTokenizer(Tokenizer):
    """sentencepiece `tokenizer.model`: Llama 1, Llama 2, Code Llama."""

    def __init__(self, path: Path, data: bytes, beside: _Beside) -> None:
        from sentencepiece import SentencePieceProcessor

        def load(proto: bytes) -> Any:
            try:
                processor = SentencePieceProcessor()
                processor.LoadFromSerializedProto(proto)
            except (RuntimeError, ValueError) as error:
                raise TokenizerError(
                    f"{path} is a damaged sentencepiece model ({error}).", remedy=_REMEDY_FETCH
                ) from error
            return processor

        processor = load(data)
        size = processor.vocab_size()
        try:
            pieces: list[str] = processor.id_to_piece(list(range(size)))
        except UnicodeDecodeError as error:
            raise TokenizerError(
                f"{path} is a damaged sentencepiece model: a piece is not UTF-8 ({error}).", remedy=_REMEDY_FETCH
            ) from error
        patched = _without_user_defined(data, pieces)
        if patched != data:
            processor = load(patched)
        ids = list(range(size))
        kinds = zip(pieces, ids, processor.is_control(ids), processor.is_unknown(ids), strict=True)
        special = {piece: i for piece, i, control, unknown in kinds if control or unknown}
        byte_ids = [i for i, is_byte in enumerate(processor.is_byte(ids)) if is_byte]
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
        return _piece_bytes(self._pieces[token_id])

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
        bare = piece.lstrip("▁")
        if len(bare) > 2 and bare[0] == "<" and bare[-1] == ">" and not _BYTE_PIECE.fullmatch(piece):
            raw = piece.encode()
            if len(raw) < 128:  # one length byte
                at = data.find(b"\n" + bytes([len(raw)]) + raw + b"\x15")
                kind = at + 2 + len(raw) + 5
                if at >= 0 and data[kind : kind + 2] == b"\x18\x04":
                    patched[kind + 1] = 3
    return bytes(patched)


# --- tiktoken --------------------------------------------------------------------------------------------------------


def _reserved(name: str, start: int, count: int) -> list[str]:
    return [f"<|{name}reserved_special_token_{i}|>" for i in range(start, start + count)]


# Source: the hub's tokenizer_config.json of each generation (Meta's reading code calls some never-trained ids by other
# names; the ids of all that are used agree).
_LLAMA3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", *_reserved("", 0, 4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *_reserved("", 5, 246),
]
_LLAMA31_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", *_reserved("", 0, 2), "<|finetune_right_pad_id|>", *_reserved("", 2, 1)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *_reserved("", 3, 245),
]
# Source: meta-llama/llama-models, models/llama4/tokenizer.py (2,048 special tokens; post-train 6 and 7 do not exist).
_LLAMA4_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *_reserved("text_post_train_", 0, 6)),
    *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *_reserved("text_post_train_", 8, 61)),
    *("<|image_start|>", "<|image_end|>", *_reserved("vision_", 0, 2), "<|tile_x_separator|>", "<|tile_y_separator|>"),
    *(
        *_reserved("vision_", 2, 4),
        "<|image|>",
        *_reserved("vision_", 6, 1),
        "<|patch|>",
        *_reserved("vision_", 7, 1041),
    ),
    *(*_reserved("reasoning_", 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),
    *_reserved("", 0, 904),
]

# Source: meta-llama/llama3 and meta-llama/llama-models, tokenizer.py (pat_str, O200K_PATTERN).
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA4_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Ranks in the file -> the default generation, its pattern, and the special tokens of each generation that uses it.
_TIKTOKEN_FILES: dict[int, tuple[str, str, dict[str, list[str]]]] = {
    128_000: (
        "llama3.1",
        _LLAMA3_PATTERN,
        {
            "llama3": _LLAMA3_SPECIAL,
            "llama3.1": _LLAMA31_SPECIAL,
            "llama3.2": _LLAMA31_SPECIAL,
            "llama3.3": _LLAMA31_SPECIAL,
        },
    ),
    200_000: ("llama4", _LLAMA4_PATTERN, {"llama4": _LLAMA4_SPECIAL}),
}

# tiktoken's regex engine keeps a stack entry for each character of a whitespace run that no line end follows, and
# gives up at the 999,999th. \s is Unicode's White_Space to it; Python's \s holds four control characters more.
_BLANK = r"[\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_BLANK_RUN_LIMIT = 999_999
_ENDLESS_RUN = f"(?<!{_BLANK}){_BLANK}{{{_BLANK_RUN_LIMIT},}}+(?![\\r\\n])"
_BLANK_RUN_CUT = 25_000


class _TiktokenTokenizer(Tokenizer):
    """Meta's `tokenizer.model` of Llama 3 and 4: a line a token, base64 and rank; special tokens by generation."""

    def __init__(self, path: Path, data: bytes, beside: _Beside, generation: str | None) -> None:
        import tiktoken

        tokens = _read_ranks(path, data)
        count = len(tokens)
        if count not in _TIKTOKEN_FILES:
            raise TokenizerError(
                f"{path} holds {count} ranks; Llama 3's file has 128000, Llama 4's 200000.",
                remedy="The file is cut short or belongs to another family. " + _REMEDY_FETCH,
            )
        default, pattern, by_generation = _TIKTOKEN_FILES[count]
        names = by_generation.get(generation or default)
        if names is None:
            raise TokenizerError(
                f"{path} is the tokenizer of {', '.join(by_generation)} ({count} ranks), not of {generation}.",
                remedy="Use the tokenizer.model that came with this checkpoint.",
            )
        special = dict(zip(names, range(count, count + len(names)), strict=True))
        if beside.added:
            special = _renamed(path, special, beside.added)
        self._tokens = tokens
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens=special
        )
        super().__init__(
            kind="tiktoken",
            source=path,
            vocab_size=count + len(names),
            special=special,
            beside=beside,
            strips_space=False,
        )

    def _encode_ordinary(self, text: str) -> list[int]:
        if len(text) < _BLANK_RUN_LIMIT:
            return self._encoding.encode_ordinary(text)
        cuts = [0]
        for run in re.finditer(_ENDLESS_RUN, text):
            cuts.extend(range(run.start() + _BLANK_RUN_CUT, run.end(), _BLANK_RUN_CUT))
        ids: list[int] = []
        for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
            ids.extend(self._encoding.encode_ordinary(text[start:end]))
        return ids

    def _ordinary_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]

    def _lookup(self, name: str) -> int | None:
        return self.special.get(name)


def _read_ranks(path: Path, data: bytes) -> list[bytes]:
    """The tokens of a tiktoken file in the order of their ranks, which is the order of its lines."""
    words = data.split()
    try:
        ranks = list(map(int, words[1::2]))
        tokens = [binascii.a2b_base64(word, strict_mode=True) for word in words[::2]]
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(
            f"{path} is a damaged tiktoken file ({str(error)[:200]}).", remedy=_REMEDY_FETCH
        ) from error
    if len(words) % 2 or ranks != list(range(len(ranks))):
        raise TokenizerError(
            f"{path} is a damaged tiktoken file: its ranks do not count up from 0, one a line.", remedy=_REMEDY_FETCH
        )
    distinct = set(tokens)
    if len(distinct) != len(tokens) or b"" in distinct or any(bytes([b]) not in distinct for b in range(256)):
        raise TokenizerError(
            f"{path} is a damaged tiktoken file: a token is empty or repeated, or one of the 256 bytes has none.",
            remedy=_REMEDY_FETCH,
        )
    return tokens


def _renamed(path: Path, special: Mapping[str, int], added: Mapping[int, str]) -> dict[str, int]:
    """Special tokens with the names that the tokenizer_config.json beside a tiktoken file gives their ids."""
    config = path.parent / "tokenizer_config.json"
    names = {i: name for name, i in special.items()}
    for i, name in added.items():
        if i not in names:
            raise TokenizerError(
                f"{config}: added_tokens_decoder names id {i}, and the special tokens of {path.name} run from "
                f"{min(names)} to {max(names)}.",
                remedy="The files belong to different models. " + _REMEDY_FETCH,
            )
        names[i] = name
    renamed = {name: i for i, name in names.items() if i in added}
    if len(renamed) != len(added):
        raise TokenizerError(f"{config}: added_tokens_decoder gives two ids the same name.", remedy=_REMEDY_FETCH)
    # Ids the config says nothing about keep Meta's name, unless the config has given that name to another id.
    return {name: i for i, name in names.items() if i not in added and name not in renamed} | renamed


# --- tokenizer.json --------------------------------------------------------------------------------------------------


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 for itself, the others from U+0100 on, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(0x100 + n): b for n, b in enumerate(hidden)}


class _TokenizersTokenizer(Tokenizer):
    """Hugging Face `tokenizer.json`, by the tokenizers library."""

    def __init__(self, path: Path, data: bytes, beside: _Beside) -> None:
        from tokenizers import Tokenizer as Engine

        try:
            engine = Engine.from_buffer(data)
        except BaseException as error:  # Rust panics reach Python as a BaseException of no importable type
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            raise TokenizerError(
                f"{path} is a damaged tokenizer.json ({str(error)[:200]}).", remedy=_REMEDY_FETCH
            ) from error
        engine.no_truncation()
        engine.no_padding()
        added = engine.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        size = engine.get_vocab_size(with_added_tokens=True)
        if size > 1 << 24 or any(i >= 1 << 24 for i in added):
            raise TokenizerError(f"{path} claims more than 16 million tokens.", remedy=_REMEDY_FETCH)
        self._engine = engine
        self._lock = threading.Lock()
        self._to_bytes, strips_space = _decoder_rule(path, engine)
        super().__init__(
            kind="tokenizer.json",
            source=path,
            vocab_size=max([size, *(i + 1 for i in added)]),
            special=special,
            beside=beside,
            strips_space=strips_space,
        )
        first = engine.token_to_id("<0x00>")
        if strips_space and first is not None:
            self._byte_ids = range(first, first + 256)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        # Whether special tokens are found in a text is a state of the engine, hence the lock.
        with self._lock:
            self._engine.encode_special_tokens = not special
            ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
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


def _decoder_rule(path: Path, engine: Any) -> tuple[Callable[[str], bytes], bool]:
    """How a piece becomes bytes, and whether decoding takes the first space away, from tokenizer.json's decoder."""
    decoder = engine.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = _byte_level_alphabet()

        def byte_level(piece: str) -> bytes:
            try:
                return bytes([alphabet[c] for c in piece])
            except KeyError:  # an added token, which is spelled in plain text
                return piece.encode()

        return byte_level, False
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (
        "Metaspace" in kinds or {"pattern": {"String": "▁"}, "content": " ", "type": "Replace"} in steps
    ):
        strips = any(
            (step["type"] == "Strip" and step["start"] == 1 and step["content"] == " " and step["stop"] == 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
        return _piece_bytes, strips
    raise TokenizerError(
        f"{path}: decoder {kinds} is not one that Puna implements (ByteLevel; Replace, ByteFallback, Fuse, Strip; "
        "Metaspace).",
        remedy="Llama's tokenizers use these only; is it the tokenizer of another family?",
    )


# --- llama2.c --------------------------------------------------------------------------------------------------------

_LLAMA2C_FIRST_BYTE = 3  # <unk>, <s>, </s>, then one token for each of the 256 bytes


class _Llama2cTokenizer(Tokenizer):
    """llama2.c `tok*.bin`: int32 longest length, then for each token float32 score, int32 length, its bytes.

    Encoding is run.c's: a space before the text, a token for each character (or, failing that, for each of its bytes),
    then the adjacent pair whose union has the best score is merged, leftmost first, until none is left.
    """

    def __init__(self, path: Path, data: bytes) -> None:
        self._scores: list[float] = []
        self._pieces: list[bytes] = []
        longest = struct.unpack_from("<i", data)[0]
        at = 4
        while at < len(data):
            if at + 8 > len(data):
                raise self._damaged(path, f"token {len(self._pieces)} is cut short")
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not 0 < length <= longest or at + length > len(data) or not math.isfinite(score):
                raise self._damaged(path, f"token {len(self._pieces)} has length {length} and score {score}")
            self._scores.append(score)
            self._pieces.append(data[at : at + length])
            at += length
        first = _LLAMA2C_FIRST_BYTE
        if self._pieces[first : first + 256] != [b"<0x%02X>" % b for b in range(256)]:
            raise self._damaged(path, "tokens 3 to 258 are not <0x00> to <0xFF>")
        special = {self._pieces[i].decode("utf-8", "replace").strip("\n"): i for i in range(first)}
        if len(special) != first:
            raise self._damaged(path, "tokens 0 to 2 are not three different special tokens")
        self._ids: dict[bytes, int] = {}
        for i in range(first + 256, len(self._pieces)):
            self._ids.setdefault(self._pieces[i], i)
        super().__init__(
            kind="llama2c",
            source=path,
            vocab_size=len(self._pieces),
            special=special,
            beside=_Beside(),
            strips_space=True,
            byte_ids=range(first, first + 256),
        )
        if (self.bos_id, self.eos_id) != (1, 2):
            raise self._damaged(path, "tokens 1 and 2 are not <s> and </s>")

    @staticmethod
    def _damaged(path: Path, what: str) -> TokenizerError:
        return TokenizerError(f"{path} is a damaged llama2.c tokenizer: {what}.", remedy=_REMEDY_FETCH)

    def _encode_ordinary(self, text: str) -> list[int]:
        if not text:
            return []
        symbols: list[int] = []
        for character in " " + text:
            raw = character.encode()
            known = self._ids.get(raw)
            symbols.extend([known] if known is not None else [_LLAMA2C_FIRST_BYTE + b for b in raw])
        return self._merge(symbols)

    def _merge(self, symbols: list[int]) -> list[int]:
        """Merge best pairs first, leftmost on a tie. A heap of candidate pairs over a linked list: O(n log n).

        An entry is stale, and skipped, when either of its two symbols has changed since it was pushed.
        """
        count = len(symbols)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        heap: list[tuple[float, int, int, int, int]] = []

        def push(left: int, right: int) -> None:
            if left < 0 or right >= count:
                return
            a, b = symbols[left], symbols[right]
            merged = self._ids.get(self._pieces[a] + self._pieces[b])
            if merged is not None:
                heapq.heappush(heap, (-self._scores[merged], left, a, b, merged))

        for left in range(count - 1):
            push(left, left + 1)
        while heap:
            _, left, a, b, merged = heapq.heappop(heap)
            right = after[left]
            if right >= count or symbols[left] != a or symbols[right] != b:
                continue
            symbols[left], symbols[right] = merged, -1
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            push(before[left], left)
            push(left, after[left])
        return [s for s in symbols if s >= 0]

    def _ordinary_bytes(self, token_id: int) -> bytes:
        if token_id in self._byte_ids:
            return bytes([token_id - _LLAMA2C_FIRST_BYTE])
        return self._pieces[token_id]

    def _lookup(self, name: str) -> int | None:
        return self._ids.get(name.encode())
