"""The tokenizer inside a GGUF file: its vocabulary as plain data, handed to the field's engines.

What it is: from `tokenizer.ggml.*` (read by `puna.weights`) to sentencepiece for the model called `llama`, and for the
one called `gpt2` to tiktoken or tokenizers.
What it is not: an encoder of its own, or a reader of files.
What is surprising: for Llama 3's own 128,000 tokens, known by their SHA-256, the file's 280,147 merges are not read.
Meta defines that tokenizer by tiktoken's ranks, the merges were derived from them, and tiktoken starts in a third of
the time. Any other vocabulary goes to tokenizers with the merges it brings. Which text is cut into words first is said
only by a name (`tokenizer.ggml.pre`); a name that is not known to be one of Llama's is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import TokenizerError
from puna.text.tokenizer import Tokenizer, looks_special
from puna.text.tokenizer_files import Beside, Unsaid
from puna.text.vocabulary import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED
from puna.text.words import Words

MOST_TOKENS = 1 << 20
"""The largest vocabulary that is read; Llama 4's, the largest of the family, has 202,048 tokens."""

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
"""The names of Llama 3's pre-tokenizer, which are one rule in llama.cpp: words as tiktoken cuts them, and a word that
is a token is one without merging."""

_ALIASES = {**dict.fromkeys(LLAMA3_NAMES, "llama-bpe"), "smaug-bpe": "llama-bpe"}
"""Names that cut text as another one does; smaug-bpe's words are always merged."""

_LLAMA3_TOKENS = 128_000
_LLAMA3_MERGES = 280_147
_LLAMA3_SHA256 = "e8ba6a668af34a7fc4525708be38df9da5c7f0ae02a2127ec4b576a226475c4d"
# Of the tokens' bytes in order, then of where each ends, in 32 bits: Meta's tokenizer.model of Llama 3, decoded.


@dataclass(frozen=True)
class StoredVocabulary:
    """What a GGUF says about its tokenizer, every value of the type it should have and none interpreted yet.

    `merges` is called only where they are needed; `merge_count` says how many there are. `bos_id` and `eos_id` are
    `Unsaid` where the file is silent, `stop_ids` are the further ids that end an answer (end of turn, end of message).
    `adds_space`: whether a space is put before a text.
    """

    source: Path
    model: str
    tokens: Words
    types: npt.NDArray[Any] | None
    scores: npt.NDArray[Any] | None = None
    merges: Callable[[], Words] | None = None
    merge_count: int = 0
    pre: str | None = None
    bos_id: int | Unsaid = field(default_factory=Unsaid)
    eos_id: int | Unsaid = field(default_factory=Unsaid)
    stop_ids: tuple[int, ...] = ()
    adds_bos: bool | None = None
    adds_space: bool = True
    chat_template: str | None = None


def read_vocabulary(vocabulary: StoredVocabulary) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Raises TokenizerError naming file and key for one that is damaged, of an unknown model, or cut into words by a rule
    Puna does not have.
    """
    v = vocabulary
    if not 0 < len(v.tokens) <= MOST_TOKENS:
        raise _wrong(v, "tokens", f"has {len(v.tokens)} of them; from 1 to {MOST_TOKENS} are read")
    for key, values in (("token_type", v.types), ("scores", v.scores)):
        if values is not None and len(values) != len(v.tokens):
            raise _wrong(v, key, f"has {len(values)} numbers, and there are {len(v.tokens)} tokens")
    if v.types is None:
        raise _wrong(v, "token_type", "is missing: it says which tokens are special")
    if not np.issubdtype(v.types.dtype, np.integer) or np.any((v.types < NORMAL) | (v.types > BYTE)):
        raise _wrong(v, "token_type", f"must hold whole numbers from {NORMAL} to {BYTE}")
    for key, ids in (("bos_token_id", [v.bos_id]), ("eos_token_id", [v.eos_id]), ("eot_token_id", v.stop_ids)):
        for i in ids:
            if not isinstance(i, Unsaid) and not 0 <= i < len(v.tokens):
                raise _wrong(v, key, f"is {i}, and the vocabulary has {len(v.tokens)} tokens")
    if v.model == "llama":
        return _sentencepiece(v)
    if v.model == "gpt2":
        return _byte_pairs(v)
    raise _wrong(v, "model", f"is {v.model!r:.80}; Llamas have 'llama' (sentencepiece) or 'gpt2' (byte-level pairs)")


def _wrong(v: StoredVocabulary, key: str, what: str) -> TokenizerError:
    return TokenizerError(
        f"{v.source}: 'tokenizer.ggml.{key}' {what}.",
        remedy="Name another tokenizer with --tokenizer, or fetch the model from another source.",
    )


def _beside(v: StoredVocabulary, *, adds_bos: bool) -> Beside:
    """The vocabulary's settings in the form that the engines' modules take them."""

    def name(i: int | Unsaid, key: str) -> str | Unsaid:
        return i if isinstance(i, Unsaid) else _text(v, i, key)

    return Beside(
        bos_token=name(v.bos_id, "bos_token_id"),
        eos_token=name(v.eos_id, "eos_token_id"),
        adds_bos=adds_bos if v.adds_bos is None else v.adds_bos,
        chat_template=v.chat_template,
        template_place=v.source,
        eos_ids=v.stop_ids,
    )


def _text(v: StoredVocabulary, i: int, key: str) -> str:
    try:
        return v.tokens[i].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(v, key, f"names token {i}, which is not UTF-8") from error


def _special(v: StoredVocabulary) -> dict[str, int]:
    """The names of the tokens that are no text, and their ids."""
    assert v.types is not None
    special: dict[str, int] = {}
    for i in np.flatnonzero((v.types == CONTROL) | (v.types == USER_DEFINED) | (v.types == UNKNOWN)).tolist():
        name = _text(v, i, "token_type")
        if v.types[i] == USER_DEFINED and not looks_special(name):
            continue
        if not name or special.setdefault(name, i) != i:
            raise _wrong(v, "tokens", f"has the special token {name!r:.80} twice, or one without a name")
    return special


def _byte_pairs(v: StoredVocabulary) -> Tokenizer:
    special = _special(v)
    meta = _llama3_tokens(v)
    pre = v.pre
    if pre in (None, "default") and meta is not None:
        pre = LLAMA3_NAMES[0]
    rule = _ALIASES.get(pre or "", pre)
    if rule not in PRE_TOKENIZERS:
        said = "is missing" if pre is None else f"is {pre!r:.80}"
        known = sorted({*PRE_TOKENIZERS, *_ALIASES})
        raise _wrong(v, "pre", f"{said}, and says how text is cut into words; Puna knows {', '.join(known)}")
    beside = _beside(v, adds_bos=pre in LLAMA3_NAMES)
    ranked = v.merge_count == _LLAMA3_MERGES and len(special) == len(v.tokens) - _LLAMA3_TOKENS
    if meta is not None and ranked and pre in LLAMA3_NAMES:
        from puna.text.tokenizer_tiktoken import LLAMA3_PATTERN, TiktokenTokenizer

        return TiktokenTokenizer(v.source, meta.to_list(), LLAMA3_PATTERN, special, len(v.tokens), beside)
    return _merging(v, special, beside, PRE_TOKENIZERS[rule], whole_words=pre in LLAMA3_NAMES)


def _llama3_tokens(v: StoredVocabulary) -> Words | None:
    """The bytes of Meta's 128,000 tokens of Llama 3, where the first so many are those, all of them ordinary."""
    assert v.types is not None
    if len(v.tokens) < _LLAMA3_TOKENS or np.any(v.types[:_LLAMA3_TOKENS] != NORMAL):
        return None
    try:
        words = _from_alphabet(v.tokens, _LLAMA3_TOKENS)
    except ValueError:
        return None
    digest = hashlib.sha256(words.blob + words.ends.astype("<u4").tobytes()).hexdigest()
    return words if digest == _LLAMA3_SHA256 else None


def _from_alphabet(words: Words, count: int) -> Words:
    """The bytes that the first words stand for in GPT-2's alphabet. Raises ValueError for what it does not have.

    The alphabet ends at U+0143, so each of its letters takes one or two bytes of UTF-8. No word may be empty.
    """
    from puna.text.tokenizer_json import byte_level_alphabet

    ends = words.ends[:count]
    text = np.frombuffer(words.blob, np.uint8, int(ends[-1])).astype(np.int16)
    begins = (text & 0xC0) != 0x80
    of_two = begins & (text >= 0xC2) & (text < 0xC6)
    whole = np.array_equal(np.flatnonzero(of_two) + 1, np.flatnonzero(~begins))
    if not whole or np.any(text[begins & ~of_two] >= 0x80) or not np.all(begins[ends[:-1]]):
        raise ValueError("not of the alphabet")
    letters = text.copy()
    letters[:-1][of_two[:-1]] = ((text[:-1] & 0x1F) << 6 | text[1:] & 0x3F)[of_two[:-1]]
    table = np.full(0x180, -1, np.int16)
    for letter, byte in byte_level_alphabet().items():
        table[ord(letter)] = byte
    found = table[letters[begins]]
    if np.any(found < 0):
        raise ValueError("not of the alphabet")
    return Words(found.astype(np.uint8).tobytes(), np.cumsum(begins)[ends - 1])


def _merging(
    v: StoredVocabulary, special: dict[str, int], beside: Beside, cutting: list[dict[str, Any]], *, whole_words: bool
) -> Tokenizer:
    """tokenizers' engine with the merges of the file; `cutting` is a tokenizer.json's way to cut text into words."""
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Engine

    from puna.text.tokenizer_json import JsonTokenizer, faults_of

    assert v.types is not None
    if v.merges is None:
        raise _wrong(v, "merges", "is missing")
    try:
        vocabulary = {token: i for i, token in enumerate(v.tokens.texts())}
        pairs = _pairs(v.merges())
    except UnicodeDecodeError as error:
        raise _wrong(v, "tokens", f"or its merges are not UTF-8 ({error})") from error
    if pairs is None:
        raise _wrong(v, "merges", "must be pairs of tokens with a space between")
    if len(vocabulary) != len(v.tokens):
        raise _wrong(v, "tokens", f"has {len(v.tokens) - len(vocabulary)} of them twice")
    steps = [step | {"trim_offsets": False} for step in cutting]
    shell: dict[str, Any] = {
        "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    }  # fmt: skip
    engine = Engine.from_str(json.dumps(shell))
    with faults_of(f"{v.source}: its merges do not fit its tokens"):
        engine.model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=whole_words)
    engine.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    plain = [_text(v, i, "tokens") for i in np.flatnonzero(v.types == USER_DEFINED).tolist()]
    engine.add_tokens([AddedToken(name, normalized=False) for name in plain if name not in special])
    return JsonTokenizer(v.source, engine, beside, kind="merges")


def _pairs(merges: Words) -> list[tuple[str, str]] | None:
    """The halves of each merge; None where one is not two texts with one space between.

    Raises UnicodeDecodeError for one that is not UTF-8.
    """
    blob, ends = np.frombuffer(merges.blob, np.uint8), merges.ends
    spaces = np.flatnonzero(blob == ord(" "))
    begins = np.concatenate([[0], ends[:-1]])[: len(ends)]
    if spaces.size != len(ends) or not np.all((begins < spaces) & (spaces < ends - 1)):
        return None
    halves = merges.between(" ").split(" ") if len(ends) else []
    return list(zip(halves[::2], halves[1::2], strict=True))


def _sentencepiece(v: StoredVocabulary) -> Tokenizer:
    """sentencepiece's engine, given the vocabulary as the model file it would read (sentencepiece_model.proto)."""
    from puna.text.tokenizer_sentencepiece import SentencePieceTokenizer

    assert v.types is not None
    if v.scores is None:
        raise _wrong(v, "scores", "is missing: it says which pieces are joined first")
    if v.scores.dtype != np.float32 or not np.all(np.isfinite(v.scores)):
        raise _wrong(v, "scores", "must hold finite numbers")
    pieces = _pieces(v.tokens, v.scores.astype("<f4"), v.types)
    # trainer_spec: model_type (3) BPE, vocab_size is unread, byte_fallback (35); normalizer_spec: no charsmap,
    # add_dummy_prefix (3), remove_extra_whitespaces (4) false, escape_whitespaces (5).
    trainer = b"\x18\x02\x98\x02%c" % bool(np.any(v.types == BYTE))
    normalizer = b"\n\x08identity\x18%c\x20\x00\x28\x01" % v.adds_space
    model = b"%b\x12%c%b\x1a%c%b" % (pieces, len(trainer), trainer, len(normalizer), normalizer)
    return SentencePieceTokenizer(v.source, model, _beside(v, adds_bos=True))


def _pieces(tokens: Words, scores: npt.NDArray[np.float32], types: npt.NDArray[Any]) -> bytes:
    """The pieces of a ModelProto (field 1), each a text (1), a score (2, little-endian) and a type (3)."""
    lengths = np.diff(tokens.ends, prepend=0)
    if len(lengths) and lengths.max() > 0x7F - 9:  # one byte does not hold every length
        parts = []
        for piece, score, kind in zip(tokens.to_list(), scores, types.tolist(), strict=True):
            body = b"\n%b%b\x15%b\x18%c" % (_length(len(piece)), piece, score.tobytes(), kind)
            parts.append(b"\n%b%b" % (_length(len(body)), body))
        return b"".join(parts)
    # All at once: four bytes, the text, seven bytes.
    ends = tokens.ends + 11 * np.arange(1, len(lengths) + 1)
    begins = ends - lengths - 11
    out = np.empty(len(tokens.blob) + 11 * len(lengths), np.uint8)
    is_text = np.ones(out.size, np.bool_)
    for at in (*(begins + i for i in range(4)), *(ends - i for i in range(1, 8))):
        is_text[at] = False
    out[is_text] = np.frombuffer(tokens.blob, np.uint8)
    out[begins], out[begins + 1], out[begins + 2], out[begins + 3] = 0x0A, lengths + 9, 0x0A, lengths
    out[ends - 7], out[ends - 2], out[ends - 1] = 0x15, 0x18, types
    for i, byte in enumerate(scores.view(np.uint8).reshape(-1, 4).T):
        out[ends - 6 + i] = byte
    return out.tobytes()


def _length(value: int) -> bytes:
    """A length as protobuf writes it: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
