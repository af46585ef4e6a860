"""Meta's tiktoken `tokenizer.model`: Llama 3 (128,000 ranks) and Llama 4 (200,000).

What it is: the file's ranks, and what the file does not hold: the split pattern and the special tokens by generation.
What it is not: a reader of other tiktoken files; a count of ranks that is neither is a file cut short.
What is surprising: tiktoken's regex engine overflows on a million whitespace characters in a row. Only such a run is
cut, every 25,000 characters, as Meta's own code cuts; any text that tiktoken can encode gets exactly tiktoken's ids.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from pathlib import Path

from puna.errors import TokenizerError
from puna.text.sight import PICTURE
from puna.text.tokenizer import Tokenizer
from puna.text.tokenizer_files import REMEDY_FETCH, Beside


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
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA4_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Ranks in the file -> the default generation, its pattern, and the special tokens of each generation that uses it.
_TIKTOKEN_FILES: dict[int, tuple[str, str, dict[str, list[str]]]] = {
    128_000: (
        "llama3.1",
        LLAMA3_PATTERN,
        {
            "llama3": _LLAMA3_SPECIAL,
            "llama3.1": _LLAMA31_SPECIAL,
            "llama3.2": _LLAMA31_SPECIAL,
            "llama3.3": _LLAMA31_SPECIAL,
        },
    ),
    200_000: ("llama4", LLAMA4_PATTERN, {"llama4": _LLAMA4_SPECIAL}),
}

# tiktoken's regex engine keeps a stack entry for each character of a whitespace run that no line end follows, and
# gives up at the 999,999th. \s is Unicode's White_Space to it; Python's \s holds four control characters more.
_BLANK = r"[\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_BLANK_RUN_LIMIT = 999_999
_ENDLESS_RUN = f"(?<!{_BLANK}){_BLANK}{{{_BLANK_RUN_LIMIT},}}+(?![\\r\\n])"
_BLANK_RUN_CUT = 25_000


def read_tiktoken(path: Path, data: bytes, beside: Beside, generation: str | None) -> TiktokenTokenizer:
    """The tokenizer of Meta's `tokenizer.model`: a line a token, base64 and rank; special tokens by generation."""
    tokens = _read_ranks(path, data)
    count = len(tokens)
    if count not in _TIKTOKEN_FILES:
        raise TokenizerError(
            f"{path} holds {count} ranks; Llama 3's file has 128000, Llama 4's 200000.",
            remedy="The file is cut short or belongs to another family. " + REMEDY_FETCH,
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
    return TiktokenTokenizer(path, tokens, pattern, special, count + len(names), beside)


class TiktokenTokenizer(Tokenizer):
    """tiktoken's encoding of a list of tokens in the order of their ranks, with the names of special ones behind."""

    def __init__(
        self, path: Path, tokens: list[bytes], pattern: str, special: dict[str, int], vocab_size: int, beside: Beside
    ) -> None:
        import tiktoken

        self._tokens = tokens
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens=special
        )
        super().__init__(
            kind="tiktoken",
            source=path,
            vocab_size=vocab_size,
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
        raise TokenizerError(f"{path} is a damaged tiktoken file ({str(error)[:200]}).", remedy=REMEDY_FETCH) from error
    if len(words) % 2 or ranks != list(range(len(ranks))):
        raise TokenizerError(
            f"{path} is a damaged tiktoken file: its ranks do not count up from 0, one a line.", remedy=REMEDY_FETCH
        )
    distinct = set(tokens)
    if len(distinct) != len(tokens) or b"" in distinct or any(bytes([b]) not in distinct for b in range(256)):
        raise TokenizerError(
            f"{path} is a damaged tiktoken file: a token is empty or repeated, or one of the 256 bytes has none.",
            remedy=REMEDY_FETCH,
        )
    return tokens


def _renamed(path: Path, special: Mapping[str, int], added: Mapping[int, str]) -> dict[str, int]:
    """Special tokens with the names that the tokenizer_config.json beside a tiktoken file gives their ids."""
    config = path.parent / "tokenizer_config.json"
    names = {i: name for name, i in special.items()}
    # The hub lists Llama 3.2 Vision's picture too, which is past the vocabulary; its id comes from the model's config.
    added = {i: name for i, name in added.items() if (i, name) != (max(names) + 1, PICTURE)}
    for i, name in added.items():
        if i not in names:
            raise TokenizerError(
                f"{config}: added_tokens_decoder names id {i}, and the special tokens of {path.name} run from "
                f"{min(names)} to {max(names)}.",
                remedy="The files belong to different models. " + REMEDY_FETCH,
            )
        names[i] = name
    renamed = {name: i for i, name in names.items() if i in added}
    if len(renamed) != len(added):
        raise TokenizerError(f"{config}: added_tokens_decoder gives two ids the same name.", remedy=REMEDY_FETCH)
    # Ids the config says nothing about keep Meta's name, unless the config has given that name to another id.
    return {name: i for i, name in names.items() if i not in added and name not in renamed} | renamed
