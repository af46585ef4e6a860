"""Llama 2 (July 2023; 7B, 13B, 70B) and Code Llama (August 2023; 7B to 70B).

Touvron et al. 2023, "Llama 2"; Rozière et al. 2023, "Code Llama". New since Llama 1: 4,096 tokens of context, and in
the 70B eight key/value heads shared by groups of heads (GQA, Ainslie et al. 2023) with a feed-forward layer 1.3 times
as wide. Code Llama is the same decoder with rope's base raised to 10⁶ and trained on 16,384 tokens, except the 70B
Instruct and Python, which kept Llama 2's 10⁴ and 4,096 (its maintainers, meta-llama/codellama issue 188); its 7B, 13B
and 70B add 16 rows to the vocabulary, for infilling and for the 70B's chats.
What is surprising: Meta's files do not store the width of the feed-forward layer; it follows from the formula below.
"""

from __future__ import annotations

CONTEXT = 4096
WIDEST_UNGROUPED = 5120
"""`dim` of the 13B, the largest without grouped attention; Llama 1 has two wider ones without it."""

CODE_CONTEXT = 16384
CODE_ROPE_THETA = 1_000_000.0

CODE_70B_VOCAB_SIZE = 32016
CODE_70B_LAYERS = 80
"""Together these tell a Code Llama 70B, whatever its rope: Llama 2's 70B has a vocabulary of 32,000."""


def hidden_dim(dim: int, multiple_of: int, multiplier: float = 1.0) -> int:
    """Width of the feed-forward layer: 8/3 · dim · multiplier, rounded down twice as Meta's code does,
    then up to a multiple.

    `FeedForward.__init__` of Meta's llama/model.py.
    """
    width = int(multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * ((width + multiple_of - 1) // multiple_of)
