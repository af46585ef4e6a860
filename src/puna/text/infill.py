"""Filling a gap in a text: the prompt that Code Llama's 7B and 13B were trained on.

What it is: a `types.Infill` to ids, in either order, after `infilling_prompt_tokens` of Meta's code
(https://github.com/meta-llama/codellama, llama/generation.py and llama/tokenizer.py):

    <s> <PRE> {prefix} <SUF>{suffix} <MID>          the order that is asked for where none is said
    <s> <PRE> <SUF>{suffix} <MID> {prefix}          suffix_first

The answer is what stands in the gap, and ends with `<EOT>`, which is one of the tokenizer's stop tokens.
What it is not: a format for every model: whether one infills is told by its tokenizer having the four tokens.
What is surprising: the prefix is a text of its own, with the space that sentencepiece puts before one; the suffix is
not, and the gap's own text keeps the spaces that it begins with. The names of the tokens have sentencepiece's space in
them (`▁<PRE>`). A prefix or suffix that spells one stays text.
"""

from __future__ import annotations

from collections.abc import Sequence

from puna.errors import TokenizerError, UsageError
from puna.text.token_table import encode_after
from puna.text.tokenizer import INFILL_NAMES, Tokenizer
from puna.types import Infill

MARK = "<FILL_ME>"
"""What stands for the gap in a text that is given whole, as in Meta's examples."""


def infills(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the tokens that a gap is told with."""
    return all(name in tokenizer.special for name in INFILL_NAMES)


def infill_ids(tokenizer: Tokenizer, gap: Infill) -> list[int]:
    """The ids that an answer which fills the gap follows.

    Raises UsageError where the tokenizer has no tokens for it, TokenizerError for a text that cannot be told apart from
    them or is no Unicode.
    """
    if not infills(tokenizer):
        raise UsageError(
            "This model was not trained to fill in the middle of a text.",
            remedy="Code Llama's 7B and 13B were, but for their Python variants. Others go on from the prefix alone.",
        )
    prefix, suffix = tokenizer.encode(gap.prefix), encode_after(tokenizer, gap.suffix)
    pre, suf, mid, _ = marks = [tokenizer.special[name] for name in INFILL_NAMES]
    if not set(marks).isdisjoint((*prefix, *suffix)):  # merges of a tokenizer.json may lead to them
        raise TokenizerError(
            f"The text spells one of {', '.join(name.lstrip('▁') for name in INFILL_NAMES)}, which this model's gaps "
            "are told with.",
            remedy="Remove it from the text.",
        )
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    if gap.suffix_first:
        return [*begin, pre, suf, *suffix, mid, *prefix]
    return [*begin, pre, *prefix, suf, *suffix, mid]


def gap_follows(tokenizer: Tokenizer) -> Sequence[int]:
    """Ids that the text of a gap is decoded behind: it is never the beginning of a text, even where the prompt has no
    other token than the marks, so it keeps its first space."""
    return tokenizer.encode("\n")


def split_at_mark(text: str) -> Infill:
    """A text with the mark in the place of the gap. Raises UsageError where the mark is not there exactly once."""
    if text.count(MARK) != 1:
        raise UsageError(
            f"The text has {text.count(MARK)} gaps, and one is filled at a time.",
            remedy=f"Write {MARK} once, where the gap is.",
        )
    prefix, suffix = text.split(MARK)
    return Infill(prefix, suffix)
