"""A tokenizer as a GGUF file holds it: tokens, their kinds, and scores or merges.

What it is: one record made from any tokenizer Puna reads, for a program that has neither sentencepiece nor tiktoken.
What it is not: a reader of GGUF. Nothing is trained or guessed: a tokenizer whose rules the format has no word for is
refused by name.
What is surprising: a tiktoken file holds ranks of tokens, and GGUF wants merges of pairs. Any two tokens that make up a
third may be merged, at that third token's rank; so every such split is a merge, in the order of the ranks. The other
way round, sentencepiece's rule in a tokenizer.json is spelled as merges and becomes scores again. The tokenizers keep
what is written here to themselves; this module, alone of all, looks into them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from puna.errors import TokenizerError
from puna.text.tokenizer import Tokenizer
from puna.text.tokenizer_json import JsonTokenizer, byte_level_alphabet
from puna.text.tokenizer_llama2c import Llama2cTokenizer
from puna.text.tokenizer_sentencepiece import BYTE_PIECE, SentencePieceTokenizer
from puna.text.tokenizer_tiktoken import LLAMA3_PATTERN, LLAMA4_PATTERN, TiktokenTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of token (llama.h, `llama_token_type`)."""

_NEVER = -1e9
"""The score of a token that no merge leads to, below every other."""

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _split(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTE_LEVEL]


PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "llama-bpe": _split(LLAMA3_PATTERN),
    "llama4": _split(LLAMA4_PATTERN),
    "qwen2": _split(LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")),
    "gpt-2": [_BYTE_LEVEL | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"use_regex": True}],
}
"""llama.cpp's name for a way to split text, and how a tokenizer.json spells it."""

_TIKTOKEN_NAMES = {128_000: "llama-bpe", 200_000: "llama4"}
"""The same by the number of ranks, which tells Meta's tiktoken files apart."""


@dataclass(frozen=True)
class Vocabulary:
    """`model` is "llama" (sentencepiece: scores) or "gpt2" (byte-level: merges), `pre` how text is split before.

    `tokens` are spelled as the model spells them (`▁the`, `Ġthe`); `kinds` has one of the numbers above for each.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: npt.NDArray[np.float32] | None = None
    merges: list[str] | None = None
    unknown_id: int | None = None
    adds_space: bool | None = None


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The record of a tokenizer. Raises TokenizerError for one that a GGUF file cannot express."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_sentencepiece(tokenizer)
    if isinstance(tokenizer, Llama2cTokenizer):
        return _of_llama2c(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _of_tiktoken(tokenizer)
    if isinstance(tokenizer, JsonTokenizer):
        return _of_json(tokenizer)
    raise _cannot(tokenizer, f"its kind is {tokenizer.kind!r}")


def _cannot(tokenizer: Tokenizer, why: str) -> TokenizerError:
    return TokenizerError(
        f"{tokenizer.source}: a GGUF file cannot hold this tokenizer: {why}.",
        remedy="Name another form of the same tokenizer with --tokenizer (Llama 1 and 2: tokenizer.model), or convert "
        "to safetensors.",
    )


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    processor = tokenizer._processor
    ids = list(range(tokenizer.vocab_size))
    pieces: list[str] = processor.id_to_piece(ids)
    scores = np.array(processor.get_score(ids), np.float32)
    kinds = [NORMAL] * len(ids)
    for kind, flags in (
        (UNUSED, processor.is_unused(ids)),
        (BYTE, processor.is_byte(ids)),
        (CONTROL, processor.is_control(ids)),
        (UNKNOWN, processor.is_unknown(ids)),
    ):
        for i, flag in enumerate(flags):
            kinds[i] = kind if flag else kinds[i]
    if any(score != round(score) for score, kind in zip(scores.tolist(), kinds, strict=True) if kind == NORMAL):
        raise _cannot(tokenizer, "it is a unigram model of sentencepiece, and Llama's are pair merges")
    if processor.normalize("ﬁ  x") not in ("ﬁ▁▁x", "▁ﬁ▁▁x"):
        raise _cannot(tokenizer, "it rewrites text before it splits it")
    unknown = processor.unk_id()
    return Vocabulary(
        "llama", "default", pieces, kinds, scores,
        unknown_id=unknown if unknown >= 0 else None, adds_space=tokenizer._strips_space,
    )  # fmt: skip


def _of_llama2c(tokenizer: Llama2cTokenizer) -> Vocabulary:
    """llama2.c writes spaces as spaces, and line ends around the names of its special tokens."""
    tokens, kinds = [], []
    names = {i: name for name, i in tokenizer.special.items()}
    for i, piece in enumerate(tokenizer._pieces):
        try:
            token = piece.decode()
        except UnicodeDecodeError as error:
            raise _cannot(tokenizer, f"token {i} is not UTF-8") from error
        if "▁" in token:
            raise _cannot(tokenizer, f"token {i} holds ▁, which stands for a space there")
        tokens.append(names.get(i, token.replace(" ", "▁")))
        is_byte = i in tokenizer._byte_ids
        kinds.append(BYTE if is_byte else NORMAL if i not in names else UNKNOWN if i == 0 else CONTROL)
    scores = np.array(tokenizer._scores, np.float32)
    return Vocabulary("llama", "default", tokens, kinds, scores, unknown_id=0, adds_space=True)


def _of_tiktoken(tokenizer: TiktokenTokenizer) -> Vocabulary:
    spelled = {byte: character for character, byte in byte_level_alphabet().items()}
    ranked = tokenizer._tokens
    tokens = ["".join(spelled[byte] for byte in token) for token in ranked]
    ranks = {token: i for i, token in enumerate(tokens)}
    merges: list[str] = []
    for token in tokens:
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(ranks[a], ranks[b], f"{a} {b}") for a, b in splits if a in ranks and b in ranks]
        merges.extend(merge for *_, merge in sorted(known))
    kinds = [NORMAL] * len(tokens) + [CONTROL] * len(tokenizer.special)
    tokens += sorted(tokenizer.special, key=lambda name: tokenizer.special[name])
    return Vocabulary("gpt2", _TIKTOKEN_NAMES[len(ranked)], tokens, kinds, merges=merges)


def _of_json(tokenizer: JsonTokenizer) -> Vocabulary:
    state: dict[str, Any] = json.loads(tokenizer._engine.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise _cannot(tokenizer, f"its model is {model.get('type')}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _cannot(tokenizer, f"its model has {key} {model[key]!r:.40}")
    added = {entry["id"]: entry["content"] for entry in state["added_tokens"]}
    names: dict[int, str] = {i: token for token, i in model["vocab"].items()} | added
    tokens = [names.get(i, f"[UNUSED{i}]") for i in range(tokenizer.vocab_size)]
    special = set(tokenizer.special.values())
    kinds = [
        CONTROL if i in special else USER_DEFINED if i in added else NORMAL if i in names else UNUSED
        for i in range(tokenizer.vocab_size)
    ]
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if state["decoder"]["type"] == "ByteLevel":
        if _steps(state["normalizer"], "normalizers"):
            raise _cannot(tokenizer, "it rewrites text before it splits it")
        return Vocabulary(
            "gpt2", _pre(tokenizer, state["pre_tokenizer"]), tokens, kinds, merges=[*map(" ".join, pairs)]
        )
    if not model.get("byte_fallback") or not _spells_spaces(state["normalizer"], state["pre_tokenizer"]):
        raise _cannot(tokenizer, "it does not split text as sentencepiece does")
    unknown = model["vocab"].get(model.get("unk_token"))
    kinds = [
        UNKNOWN if i == unknown else BYTE if kind == NORMAL and BYTE_PIECE.fullmatch(tokens[i]) else kind
        for i, kind in enumerate(kinds)
    ]
    scores = _scores(tokens, kinds, pairs)
    return Vocabulary(
        "llama", "default", tokens, kinds, scores, unknown_id=unknown, adds_space=tokenizer._strips_space
    )  # fmt: skip


def _scores(tokens: Sequence[str], kinds: Sequence[int], pairs: Sequence[tuple[str, ...]]) -> npt.NDArray[np.float32]:
    """Minus the place of the first merge that makes a token; single characters need none."""
    first: dict[str, int] = {}
    for place, (a, b) in enumerate(pairs):
        first.setdefault(a + b, place)
    scores = [
        float(-first[token]) if token in first else 0.0 if kind != NORMAL or len(token) == 1 else _NEVER
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    return np.array(scores, np.float32)


def _holds(found: Any, wanted: dict[str, Any]) -> bool:
    return isinstance(found, dict) and all(found.get(key) == value for key, value in wanted.items())


def _steps(found: Any, inside: str) -> list[Any]:
    if found is None:
        return []
    return list(found[inside]) if found["type"] == "Sequence" else [found]


def _pre(tokenizer: JsonTokenizer, pre_tokenizer: Any) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    for name, wanted in PRE_TOKENIZERS.items():
        if len(steps) == len(wanted) and all(map(_holds, steps, wanted)):
            return name
    raise _cannot(tokenizer, f"it splits text in a way that has no name there ({json.dumps(pre_tokenizer):.200})")


def _spells_spaces(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether nothing happens to a text but that spaces become ▁, one more perhaps put before it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    before, after = _steps(normalizer, "normalizers"), _steps(pre_tokenizer, "pretokenizers")
    if not after:
        return any(_holds(step, replace) for step in before) and all(
            _holds(step, replace) or _holds(step, prepend) for step in before
        )
    return (
        not before and len(after) == 1 and _holds(after[0], {"type": "Metaspace", "replacement": "▁", "split": False})
    )
