"""Generated strings for the tokenizers, and small tokenizer files that need no reference folder."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SPECIAL_LOOKALIKES = [
    *("<s>", "</s>", "<unk>", "<0x41>", "<pad>", "[INST]", "[/INST]", "<<SYS>>\n", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|end_of_text|>", "<|start_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|reserved_special_token_7|>"),
    *("<|eot|>", "<|header_start|>", "<|image|>", "<|patch|>", "<|eot_id", "|>", "<|", "<", "▁<PRE>"),
]
WHITESPACE = [
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\t",
    "\n\n",
    " \n ",
    "\v",
    "\f",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\x1c",
    "\x85",
]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇦", "❤️", "1️⃣", "🦙", "\u200d", "\ufe0f"]
WORDS = [
    "the",
    "llama",
    "Once",
    "upon",
    "a",
    "time",
    "HELLO",
    "don't",
    "I'LL",
    "naïve",
    "größe",
    "日本語",
    "привет",
    "مرحبا",
    "हिन्दी",
    "ไทย",
]
COMBINING = [
    "e\u0301",
    "\u0300\u0301\u0302",
    "ﷺ",
    "Ǆ",
    "ß",
    "İ",
    "\u202e",
    "\ufeff",
    "\u0000",
    "\x7f",
    "\ufffd",
    "\U0010ffff",
]


def _part(random_: random.Random) -> str:
    kind = random_.randrange(11)
    if kind == 0:
        return random_.choice(SPECIAL_LOOKALIKES)
    if kind == 1:
        return random_.choice(WHITESPACE) * random_.choice([1, 1, 2, 5, 17])
    if kind == 2:
        return str(random_.randrange(10 ** random_.randrange(1, 15)))
    if kind == 3:
        return random_.choice(EMOJI) * random_.choice([1, 1, 3])
    if kind == 4:  # any plane; surrogates are no characters, U+2581 is sentencepiece's own space
        plane = random_.choice([0, 0, 0, 1, 2, 3, 14, 15, 16])
        codes = [plane << 16 | random_.randrange(0x10000) for _ in range(random_.randrange(1, 5))]
        return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000 and c != 0x2581)
    if kind == 5:  # invalid UTF-8, as it arrives after errors="replace"
        return bytes(random_.choices([0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xF0, 0x9F, 0xFF], k=6)).decode(
            errors="replace"
        )
    if kind == 6:
        return random_.choice(COMBINING)
    if kind == 7:
        return "".join(random_.choices("+-*/=(){}[];:,.!?'\"#@$%^&|\\~`_/\n\n\r", k=random_.randrange(1, 9)))
    if kind == 8:
        return random_.choice("aA0 \n=é汉") * random_.randrange(1, 60)
    return random_.choice(["", " "]) + random_.choice(WORDS)


def generated_strings(count: int, seed: int = 0) -> Iterator[str]:
    random_ = random.Random(seed)
    yield from ["", " ", "\n", "a", " a", "a ", "\u0000"]
    for _ in range(count - 7):
        yield "".join(_part(random_) for _ in range(random_.randrange(1, 9)))


@pytest.fixture(scope="session")
def strings() -> Callable[[int], list[str]]:
    """The first so many of one fixed sequence of generated strings."""
    return lambda count: list(generated_strings(count))


def llama2c_bytes() -> bytes:
    """A llama2.c tokenizer of 259 + a few tokens, with merges that compete."""
    pieces: list[tuple[bytes, float]] = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(b"<0x%02X>" % b, 0.0) for b in range(256)]
    for n, piece in enumerate([b" a", b"ab", b"bc", b"abc", b" ", b"a", b"b", b"c"]):
        pieces.append((piece, -float(n)))
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
    return struct.pack("<i", max(len(piece) for piece, _ in pieces)) + body


@pytest.fixture
def llama2c_file(tmp_path: Path) -> Path:
    path = tmp_path / "tok.bin"
    path.write_bytes(llama2c_bytes())
    return path


def byte_level_json() -> str:
    """A tokenizer.json of the Llama 3 kind: byte-level, 256 bytes, two merges, two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "he", "Ġhe"])}
    engine = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "he")]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<|begin_of_text|>", "<|eot_id|>")]
    )
    return str(engine.to_str())


@pytest.fixture
def byte_level_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(byte_level_json())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}})
    )
    return folder
