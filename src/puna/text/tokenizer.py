"""Tokenizers: text to ids and back, one interface over the field's libraries.

What it is: the interface `Tokenizer`, and `load_tokenizer`, which tells the four tokenizer files the Llama family comes
with (sentencepiece `tokenizer.model`, Meta's tiktoken `tokenizer.model`, Hugging Face `tokenizer.json`, llama2.c
`tok*.bin`) apart by what is in them, not by their names. A module beside this one reads each kind. The ids come from
sentencepiece, tiktoken and tokenizers themselves; only llama2.c's pair merge is ours: no library reads that file.
What it is not: a trainer, a chat format (`puna.text.chat`), a stream decoder (`puna.text.detokenizer`).
What is surprising:
- Special tokens spelled out in a text are ordinary text unless `allow_special=True`. That holds for two kinds of token
  that the libraries would always find: sentencepiece's user-defined `<...>` pieces, and `<...>` tokens that a
  tokenizer.json adds without calling them special (R1's `<｜User｜>`). Both are made special on load.
- Decoding is our own (bytes of the tokens, joined, UTF-8 with errors="replace"), because the libraries disagree about
  invalid UTF-8 and a stream can only be decoded from bytes.
- A str with lone surrogates (what is left of invalid UTF-8 input) is refused, not patched.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from puna.errors import TokenizerError
from puna.text.tokenizer_files import REMEDY_FETCH, Beside, Unsaid, read_beside, read_limited

MAX_FILE_BYTES = 256 << 20
"""The largest tokenizer file that is read at all; the largest real one (Llama 4's tokenizer.json) has 28 MB."""

_BOS_NAMES = ("<|begin_of_text|>", "<s>")
_EOS_NAMES = ("<|end_of_text|>", "</s>")

INFILL_NAMES = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
"""Code Llama's tokens about a gap: what stands before it, after it, the gap itself, and its end."""

_STOP_NAMES = (
    "</s>",  # Llama 1, 2, Code Llama
    INFILL_NAMES[-1],  # Code Llama, end of an infilling
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
        adds_bos: whether the model expects a text to begin with bos: what its files say, else whether there is one.
        stop_ids: every id that ends an answer: eos, the generation's end-of-turn tokens, and generation_config.json's.
        chat_template: the Jinja source that came with the tokenizer, or None.
        template_place: the file or folder that source came from, for messages.
    """

    def __init__(
        self,
        *,
        kind: str,
        source: Path,
        vocab_size: int,
        special: Mapping[str, int],
        beside: Beside,
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
        self.adds_bos = self.bos_id is not None and beside.adds_bos is not False
        self.chat_template = beside.chat_template
        self.template_place = beside.template_place or source.parent
        stops = {special[name] for name in _STOP_NAMES if name in special}
        stops.update(() if self.eos_id is None else (self.eos_id,))
        for i in beside.eos_ids:
            if not 0 <= i < vocab_size:
                raise TokenizerError(
                    f"{source.parent / 'generation_config.json'}: eos_token_id {i} is outside the "
                    f"vocabulary of {vocab_size} tokens.",
                    remedy="The file belongs to another tokenizer, or is damaged. " + REMEDY_FETCH,
                )
            stops.add(i)
        self.stop_ids = frozenset(stops)

    def _named(self, name: str | Unsaid | None, usual: tuple[str, ...], key: str) -> int | None:
        """The id of the token a config names; where the config says nothing, of the first usual name there is."""
        if isinstance(name, Unsaid):
            return next((self.special[n] for n in usual if n in self.special), None)
        if name is None:
            return None
        found = self.special.get(name, self._lookup(name))
        if found is None:
            raise TokenizerError(
                f"{self.source}: the configuration beside it names {name!r} as its {key}, and the tokenizer has no "
                "such token.",
                remedy="The files belong to different models. " + REMEDY_FETCH,
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

    @property
    def bos_token(self) -> str:
        """The text of the token that begins a text, as templates know it; "" where there is none."""
        return "" if self.bos_id is None else self.token_bytes(self.bos_id).decode(errors="replace")

    @property
    def eos_token(self) -> str:
        """The text of the token that ends a text; "" where there is none."""
        return "" if self.eos_id is None else self.token_bytes(self.eos_id).decode(errors="replace")

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


def looks_special(name: str) -> bool:
    """Whether a token's name has the form `<...>`, with sentencepiece's space before it or not."""
    bare = name.lstrip("▁ ")
    return len(bare) > 2 and bare[0] == "<" and bare[-1] == ">"


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
    data = read_limited(path, MAX_FILE_BYTES)
    if data.lstrip()[:1] == b"{":
        from puna.text.tokenizer_json import read_tokenizer_json

        return read_tokenizer_json(path, data, read_beside(path.parent))
    if re.match(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\r?\n", data[:4096]):
        from puna.text.tokenizer_tiktoken import read_tiktoken

        return read_tiktoken(path, data, read_beside(path.parent), generation)
    # A serialized ModelProto starts with field 1 (a piece) holding field 1 (its text): 0A, length, 0A.
    if data[:1] == b"\n" and data[2:3] == b"\n":
        from puna.text.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(path, data, read_beside(path.parent))
    # llama2.c starts with the longest token's length as a little-endian int32: the upper bytes are zero.
    if len(data) >= 12 and data[2:4] == b"\0\0":
        from puna.text.tokenizer_llama2c import Llama2cTokenizer

        return Llama2cTokenizer(path, data)
    raise TokenizerError(
        f"{path} is none of the tokenizer files Puna reads: a sentencepiece model, a tiktoken file of base64 lines, "
        f"a tokenizer.json, a llama2.c tok*.bin (it starts with {data[:8]!r}).",
        remedy=REMEDY_FETCH,
    )
